"""The pause gate and the pacer, on a clock turned by hand."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.audio.pcm import FRAME_MS
from src.tts.playout import Frame, Overflow, Playout, PlayoutPolicy
from src.tts.tts_base import WordMark

POLICY = PlayoutPolicy(queue_ms=200, burst_ms=60, lead_ms=80)
DROPPING = PlayoutPolicy(queue_ms=200, burst_ms=60, lead_ms=80, overflow=Overflow.DROP)


def frame(seq: int, *words: str) -> Frame:
    marks = (WordMark(word, seq * FRAME_MS, seq * FRAME_MS + 10, 0, 1, False) for word in words)
    return Frame(seq, b"", tuple(marks))


def filled(count: int, policy: PlayoutPolicy = POLICY) -> Playout:
    playout = Playout(policy)
    for seq in range(count):
        playout.push(frame(seq))
    return playout


def pull_all(playout: Playout, now_ms: float) -> list[int]:
    out = []
    while (pulled := playout.pull(now_ms)) is not None:
        out.append(pulled.seq)
    return out


def test_burst_then_one_frame_per_frame_time() -> None:
    playout = filled(10)
    assert pull_all(playout, 1000.0) == [0, 1, 2]
    assert playout.next_due(1000.0) == 1020.0
    assert pull_all(playout, 1019.9) == []
    assert pull_all(playout, 1020.0) == [3]
    assert pull_all(playout, 1060.0) == [4, 5]


def test_late_wake_up_catches_up_to_the_schedule_but_not_beyond() -> None:
    playout = filled(10)
    pull_all(playout, 0.0)
    assert pull_all(playout, 50.0) == [3, 4]
    assert playout.next_due(50.0) == 60.0


def test_a_listener_that_ran_dry_gets_the_lead_and_no_more() -> None:
    playout = filled(3)
    pull_all(playout, 0.0)
    for seq in range(3, 13):
        playout.push(frame(seq))
    assert pull_all(playout, 5000.0) == [3, 4, 5, 6]
    assert playout.next_due(5000.0) == 5020.0


def test_nothing_leaves_while_paused_and_nothing_races_afterwards() -> None:
    playout = filled(10)
    pull_all(playout, 0.0)
    playout.pause(10.0)
    assert pull_all(playout, 9_000.0) == []
    assert playout.next_due(9_000.0) is None
    playout.resume(10_000.0)
    assert pull_all(playout, 10_000.0) == []
    assert playout.next_due(10_000.0) == 10_010.0
    assert pull_all(playout, 10_010.0) == [3]


def test_pause_before_the_first_frame_holds_it() -> None:
    playout = filled(4)
    playout.pause(0.0)
    assert pull_all(playout, 500.0) == []
    playout.resume(500.0)
    assert pull_all(playout, 500.0) == [0, 1, 2]


def test_pause_at_time_zero_counts_as_a_pause() -> None:
    playout = filled(10)
    pull_all(playout, 0.0)
    playout.pause(0.0)
    playout.resume(1_000.0)
    assert pull_all(playout, 1_000.0) == []


def test_controls_are_idempotent() -> None:
    playout = filled(10)
    playout.resume(0.0)
    pull_all(playout, 0.0)
    playout.pause(5.0)
    playout.pause(400.0)
    playout.resume(505.0)
    playout.resume(900.0)
    assert pull_all(playout, 520.0) == [3]
    playout.stop()
    playout.stop()
    playout.pause(600.0)
    playout.resume(600.0)
    assert playout.stopped
    assert not playout.paused
    assert pull_all(playout, 5_000.0) == []


def test_stop_ends_it_at_once_even_while_paused() -> None:
    playout = filled(10)
    playout.pause(0.0)
    playout.stop()
    playout.push(frame(10))
    assert playout.done
    assert len(playout) == 0


def test_the_end_waits_for_the_resume() -> None:
    playout = filled(2)
    pull_all(playout, 0.0)
    playout.pause(1.0)
    playout.finish()
    assert not playout.done
    playout.resume(2.0)
    assert playout.done
    playout.pause(3.0)
    assert not playout.paused


def test_a_full_queue_stalls_the_producer() -> None:
    playout = filled(10)
    assert playout.room(0.0) == 0
    assert playout.room(60_000.0) == 0
    playout.pull(0.0)
    assert playout.room(0.0) == 1


def test_drop_waits_while_the_reader_keeps_up_or_pauses() -> None:
    playout = filled(10, DROPPING)
    pull_all(playout, 0.0)
    for seq in range(10, 13):
        playout.push(frame(seq))
    assert playout.room(20.0) == 0
    playout.pause(20.0)
    assert playout.room(60_000.0) == 0
    assert playout.dropped == 0


def test_drop_loses_the_oldest_when_the_reader_lags_and_keeps_its_words() -> None:
    playout = Playout(DROPPING)
    playout.push(frame(0))
    pull_all(playout, 0.0)
    playout.push(frame(1, "one"))
    playout.push(frame(2, "two"))
    for seq in range(3, 11):
        playout.push(frame(seq))
    assert playout.room(219.0) == 0
    assert playout.room(220.0) == 1
    playout.push(frame(11))
    pulled = playout.pull(220.0)
    assert pulled is not None
    assert pulled.seq == 2
    assert [word.text for word in pulled.words] == ["one", "two"]
    assert playout.dropped == 1


def test_words_without_a_frame_are_left_for_the_end_marker() -> None:
    playout = filled(1)
    late = WordMark("late", 400, 500, 0, 4, True)
    playout.finish((late,))
    pull_all(playout, 0.0)
    assert playout.done
    assert playout.words_left == (late,)


@dataclass
class Rig:
    """A producer that pushes whenever there is room, and a log of what left when."""

    policy: PlayoutPolicy
    total: int
    now_ms: float = 0.0
    listening_ms: float = 0.0
    pushed: int = 0
    left: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.playout = Playout(self.policy)

    def produce(self, at_most: int) -> None:
        for _ in range(at_most):
            if self.pushed == self.total or not self.playout.room(self.now_ms):
                break
            self.playout.push(frame(self.pushed))
            self.pushed += 1
        if self.pushed == self.total:
            self.playout.finish()

    def wait(self, ms: float) -> None:
        self.now_ms += ms
        if not self.playout.paused:
            self.listening_ms += ms

    def pull(self) -> None:
        for seq in pull_all(self.playout, self.now_ms):
            self.left.append((self.listening_ms, seq))

    def run_out(self) -> None:
        self.playout.resume(self.now_ms)
        for _ in range(10 * self.total + 10):
            if self.playout.done:
                return
            self.produce(self.total)
            self.pull()
            due = self.playout.next_due(self.now_ms)
            self.wait(max(0.0, (due or self.now_ms) - self.now_ms))
        pytest.fail("it never ended")


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.integers(0, 300)),
        st.tuples(st.just("produce"), st.integers(1, 20)),
        st.tuples(st.sampled_from(["pull", "pause", "resume"]), st.just(0)),
    ),
    max_size=60,
)
POLICIES = st.builds(
    PlayoutPolicy,
    queue_ms=st.integers(20, 400),
    burst_ms=st.integers(20, 120),
    lead_ms=st.integers(20, 200),
)


def play(rig: Rig, steps: list[tuple[str, int]]) -> None:
    for step, amount in steps:
        if step == "wait":
            rig.wait(amount)
        elif step == "produce":
            rig.produce(amount)
        elif step == "pull":
            before, paused = len(rig.left), rig.playout.paused
            rig.pull()
            assert not paused or len(rig.left) == before, "a frame left while paused"
        elif step == "pause":
            rig.playout.pause(rig.now_ms)
        else:
            rig.playout.resume(rig.now_ms)


@given(POLICIES, STEPS, st.integers(0, 60))
def test_every_frame_leaves_once_in_order_whatever_the_schedule(
    policy: PlayoutPolicy, steps: list[tuple[str, int]], total: int
) -> None:
    rig = Rig(policy, total)
    play(rig, steps)
    rig.run_out()
    assert [seq for _, seq in rig.left] == list(range(total))
    assert rig.playout.emitted == total
    assert rig.playout.dropped == 0


@given(POLICIES, STEPS)
def test_never_more_than_real_time_plus_the_lead(
    policy: PlayoutPolicy, steps: list[tuple[str, int]]
) -> None:
    rig = Rig(policy, total=200)
    play(rig, steps)
    rig.run_out()
    ahead_ms = max(policy.burst_ms, policy.lead_ms)
    for place, (start_ms, _) in enumerate(rig.left):
        for later, (end_ms, _) in enumerate(rig.left[place:], start=1):
            assert later * FRAME_MS <= end_ms - start_ms + ahead_ms


@given(STEPS)
def test_drop_keeps_order_and_accounts_for_every_frame(steps: list[tuple[str, int]]) -> None:
    policy = PlayoutPolicy(queue_ms=100, overflow=Overflow.DROP)
    rig = Rig(policy, total=60)
    play(rig, steps)
    rig.run_out()
    seqs = [seq for _, seq in rig.left]
    assert seqs == sorted(set(seqs))
    assert len(seqs) + rig.playout.dropped == rig.pushed == 60
