from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from src.audio.pcm import FRAME_SAMPLES, Int16
from src.client.player import FADE_SAMPLES, Player, Position

TICK = 480


def frame(seq: int) -> Int16:
    """A frame whose samples say which one it is."""
    return np.full(FRAME_SAMPLES, 1000 + seq, dtype=np.int16)


def pull_ms(player: Player, ms: int) -> Int16:
    return np.concatenate([player.pull(TICK) for _ in range(ms // 10)])


def fed(frames: int) -> Player:
    player = Player()
    player.begin("u", 0)
    for seq in range(frames):
        player.push(frame(seq))
    return player


def test_plays_after_forty_milliseconds_of_audio() -> None:
    player = fed(1)
    assert not pull_ms(player, 10).any()
    player.push(frame(1))
    assert pull_ms(player, 40).all()
    assert player.position == Position("u", 1)


def test_a_lone_frame_waits_sixty_milliseconds_and_not_for_ever() -> None:
    player = fed(1)
    heard = pull_ms(player, 100)
    assert not heard[: 6 * TICK].any()
    assert np.count_nonzero(heard) == FRAME_SAMPLES


def test_a_short_utterance_that_ended_does_not_wait() -> None:
    player = fed(1)
    player.end()
    assert pull_ms(player, 20).all()
    assert player.underruns == 0


def test_flush_is_silent_after_five_milliseconds_and_drops_stale_frames() -> None:
    player = fed(10)
    pull_ms(player, 50)
    assert player.flush() == Position("u", 1)
    player.push(frame(10))
    after = pull_ms(player, 100)
    assert after[: FADE_SAMPLES // 2].all()
    assert not after[FADE_SAMPLES:].any()
    assert player.dropped == 1


def test_resume_goes_on_at_the_sample_where_the_fade_began() -> None:
    player = fed(10)
    pull_ms(player, 50)
    heard = player.flush()
    pull_ms(player, 20)
    player.begin("u", heard.seq + 1)
    for seq in range(heard.seq + 1, 10):
        player.push(frame(seq))
    player.end()
    rest = pull_ms(player, 200)
    played = np.count_nonzero(rest)
    # 50 of 200 ms were heard before; the first few of the fade-in round to zero.
    assert 150 * 48 - 8 <= played <= 150 * 48
    assert player.position == Position("u", 9)


def test_an_underrun_is_counted_and_rebuffers() -> None:
    player = fed(2)
    pull_ms(player, 60)
    assert player.underruns == 1
    player.push(frame(2))
    assert not pull_ms(player, 10).any()
    player.push(frame(3))
    assert pull_ms(player, 20).all()


def runs_of_fifty(samples: Int16) -> list[int]:
    """The values that stand still for fifty samples, which a fade never does."""
    edges = np.flatnonzero(np.diff(samples)) + 1
    runs = np.split(samples, edges)
    return [int(run[0]) for run in runs if run.size >= 50 and run[0] >= 1000]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("push"), st.integers(1, 6)),
            st.tuples(st.just("pull"), st.integers(1, 30)),
            st.tuples(st.just("flush"), st.just(0)),
        ),
        max_size=60,
    )
)
def test_whatever_the_network_does_every_frame_is_heard_once_and_in_order(
    script: list[tuple[str, int]],
) -> None:
    """The sender resumes after each flush from the first un-heard frame, as our server does."""
    player = Player()
    player.begin("u", 0)
    sent = 0
    heard: list[Int16] = []
    for action, amount in script:
        if action == "push":
            for _ in range(amount):
                player.push(frame(sent))
                sent += 1
        elif action == "pull":
            heard.append(pull_ms(player, amount * 10))
        else:
            resume = player.flush().seq + 1
            heard.append(pull_ms(player, 20))
            player.begin("u", resume)
            for seq in range(resume, sent):
                player.push(frame(seq))
    player.end()
    heard.append(pull_ms(player, sent * 20 + 200))

    plateaus = runs_of_fifty(np.concatenate(heard))
    assert plateaus == sorted(plateaus)
    assert set(plateaus) >= {1000 + seq for seq in range(sent)}
    assert player.position.seq == sent - 1


def test_a_sender_that_resumes_too_early_is_not_heard_twice() -> None:
    player = fed(4)
    pull_ms(player, 50)
    assert player.flush().seq == 1
    pull_ms(player, 20)
    player.begin("u", 0)
    for seq in range(4):
        player.push(frame(seq))
    player.end()
    assert set(runs_of_fifty(pull_ms(player, 100))) == {1002, 1003}
    assert player.dropped == 2


def test_the_next_utterance_follows_without_a_gap() -> None:
    player = fed(4)
    player.end()
    player.begin("v", 0)
    for seq in range(4, 8):
        player.push(frame(seq))
    player.end()
    assert pull_ms(player, 160).all()
    assert player.position == Position("v", 3)


@given(
    st.lists(
        st.sampled_from(["push", "push", "push", "pull", "pull", "flush", "begin", "again", "end"]),
        max_size=80,
    )
)
def test_positions_never_go_back_and_nothing_sounds_between_flush_and_begin(
    script: list[str],
) -> None:
    """A server that misbehaves in any order: frames without a begin, begins that overlap."""
    player = Player()
    utterance, sent, muted = 0, 0, True
    before = player.position
    for action in script:
        if action == "begin":
            utterance, sent, muted = utterance + 1, 0, False
            player.begin(f"u{utterance}", 0)
        elif action == "again" and utterance:
            sent = max(0, sent - 3)
            muted = False
            player.begin(f"u{utterance}", sent)
        elif action == "push":
            player.push(frame(sent))
            sent += 1
        elif action == "pull":
            sound = pull_ms(player, 30)
            assert not (muted and sound[FADE_SAMPLES:].any())
        elif action == "flush":
            player.flush()
            pull_ms(player, 10)
            muted = True
        elif action == "end":
            player.end()
        now = player.position
        if now.utterance_id == before.utterance_id:
            assert now.seq >= before.seq
        else:
            assert int(now.utterance_id[1:]) > int(before.utterance_id[1:] or 0)
        before = now
