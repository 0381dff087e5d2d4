"""Is the user there? Named paths by table, every path by property."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.orchestrator.rooms.presence import (
    Came,
    Decision,
    Dropped,
    Event,
    Left,
    Mic,
    Packets,
    Presence,
    PresenceLimits,
    Reconnected,
    Reconnecting,
    Subscribed,
    Unheard,
    decide,
    entered,
    observe,
)

LIMITS = PresenceLimits(join_ms=30_000, gone_ms=3_000, grace_ms=20_000, subscribe_ms=5_000)
Timed = tuple[float, Event]
HERE: tuple[Timed, ...] = ((100, Came()), (200, Subscribed()))
TALKING: tuple[Timed, ...] = (*HERE, (300, Mic(live=True)))


def after(*events: Timed) -> Presence:
    presence = entered(0)
    for at_ms, event in events:
        presence = observe(presence, event, at_ms)
    return presence


def at(now_ms: float, *events: Timed) -> Decision:
    return decide(after(*events), now_ms, LIMITS)


@pytest.mark.parametrize(
    ("now_ms", "events", "here", "end"),
    [
        pytest.param(29_999, (), False, "", id="nobody yet"),
        pytest.param(30_000, (), False, "nobody_came", id="nobody at all"),
        pytest.param(150, HERE[:1], False, "", id="in the room, but deaf to us"),
        pytest.param(200, HERE, True, "", id="there and subscribed"),
        pytest.param(5_100, HERE[:1], True, "", id="one who only reads"),
        pytest.param(10**9, HERE, True, "", id="no microphone at all"),
        pytest.param(500, (*HERE, (400, Left("user_left"))), False, "user_left", id="hung up"),
        pytest.param(500, (*HERE, (400, Left())), False, "", id="lost"),
        pytest.param(20_400, (*HERE, (400, Left())), False, "user_gone", id="lost for good"),
        pytest.param(20_400, (*HERE, (400, Left()), (9_000, Came())), True, "", id="back"),
        pytest.param(500, (*HERE, (400, Dropped("room_deleted"))), False, "room_deleted", id="end"),
        pytest.param(3_299, TALKING, True, "", id="silent, but not for long"),
        pytest.param(3_300, TALKING, False, "", id="no packet for three seconds"),
        pytest.param(23_300, TALKING, False, "user_gone", id="none for twenty more"),
        pytest.param(3_300, (*TALKING, (2_000, Packets(500))), True, "", id="a packet in silence"),
        pytest.param(4_500, (*TALKING, (2_000, Packets(500))), False, "", id="the last of them"),
        pytest.param(10**9, (*TALKING, (900, Mic(live=False))), True, "", id="muted"),
        pytest.param(10**9, (*TALKING, (900, Mic(live=False)), (999, Packets())), True, "",
                     id="a packet of the track that is muted now"),
        pytest.param(9_000, (*TALKING, (8_000, Packets())), True, "", id="vanished and back"),
    ],
)  # fmt: skip
def test_paths(now_ms: float, events: tuple[Timed, ...], here: bool, end: str) -> None:
    decision = at(now_ms, *events)
    assert (decision.here, decision.end) == (here, end)


def test_everybody_is_reported_gone_while_we_reconnect_and_nobody_is() -> None:
    # As a killed livekit-server makes it look: 10 ms, 70 ms, and 15 s until it is back.
    lost = (*TALKING, (1_000, Reconnecting()), (1_060, Left()))
    assert at(600_000, *lost) == Decision(False)
    back = (*lost, (16_000, Came()), (16_100, Unheard()), (16_100, Reconnected()))
    assert at(16_150, *back) == Decision(False, at_ms=21_100)
    assert at(16_160, *back, (16_160, Subscribed())) == Decision(True)


def test_even_a_goodbye_is_not_believed_while_we_reconnect() -> None:
    lost = (*HERE, (1_000, Reconnecting()), (1_060, Left("user_left")))
    assert at(2_000, *lost, (1_500, Reconnected())).end == ""


def test_the_grace_counts_from_our_own_return() -> None:
    lost = (*HERE, (1_000, Reconnecting()), (1_060, Left()), (60_000, Reconnected()))
    assert at(60_000, *lost) == Decision(False, at_ms=80_000)
    assert at(80_000, *lost).end == "user_gone"


def test_a_server_that_says_late_that_somebody_vanished_prolongs_nothing() -> None:
    # CONNECTION_TIMEOUT comes about 21 s after the last packet.
    assert at(20_300, *TALKING, (20_200, Left())).end == "user_gone"


def test_our_own_quick_reconnect_needs_no_new_subscription() -> None:
    assert at(1_500, *HERE, (1_000, Reconnecting()), (1_500, Reconnected())) == Decision(True)


EVENTS = st.one_of(
    st.sampled_from([Came(), Reconnecting(), Reconnected(), Unheard(), Subscribed(), Left()]),
    st.builds(Left, st.sampled_from(["user_left", "room_deleted"])),
    st.builds(Mic, st.booleans()),
    st.builds(Packets, st.floats(0, 30_000)),
)
STORIES = st.lists(st.tuples(st.integers(0, 12_000), EVENTS), max_size=30)


@given(STORIES)
def test_it_always_knows_when_to_look_again(story: list[tuple[int, Event]]) -> None:
    """The decision changes only with an event or at the time it named itself."""
    presence, now_ms = entered(0), 0.0
    for gap_ms, event in story:
        decision = decide(presence, now_ms, LIMITS)
        assert not (decision.here and decision.end)
        quiet_until = now_ms + gap_ms if decision.at_ms is None else decision.at_ms
        if decision.end or quiet_until > now_ms + 1:
            later = decide(presence, min(now_ms + gap_ms, quiet_until - 1), LIMITS)
            assert (later.here, later.end) == (decision.here, decision.end)
        if decision.at_ms is not None:
            assert decision.at_ms > now_ms
            due = decide(presence, decision.at_ms, LIMITS)
            assert (due.here, due.end) != (decision.here, decision.end) or due.at_ms
        now_ms += gap_ms
        presence = observe(presence, event, now_ms)


@given(STORIES)
def test_nobody_is_left_alone_for_ever(story: list[tuple[int, Event]]) -> None:
    """Once connected, somebody who is not there ends the visit in bounded time."""
    presence, now_ms = entered(0), 0.0
    for gap_ms, event in story:
        now_ms += gap_ms
        presence = observe(presence, event, now_ms)
    if not presence.end and not presence.connected:
        presence = observe(presence, Reconnected(), now_ms)
    latest_ms = now_ms + LIMITS.join_ms + LIMITS.subscribe_ms + LIMITS.grace_ms + LIMITS.gone_ms
    decision = decide(presence, latest_ms, LIMITS)
    assert decision.here or decision.end


@given(STORIES, st.sampled_from(["room_deleted", "duplicate_identity"]))
def test_an_end_is_an_end(story: list[tuple[int, Event]], why: str) -> None:
    ended = replace(entered(0), end=why)
    for gap_ms, event in story:
        ended = observe(ended, event, gap_ms)
    assert decide(ended, 10**9, LIMITS) == Decision(False, why)
