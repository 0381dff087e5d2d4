"""The ring of frames that were not heard, and the grid they leave on."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from src.orchestrator.outbox import Grid, Outbox, Spacing
from src.orchestrator.ports import SpeechFrame


def frame(seq: int, utterance_id: str = "u1") -> SpeechFrame:
    return SpeechFrame(utterance_id, seq, seq * 20, b"")


def filled(count: int, capacity: int = 100) -> Outbox:
    outbox = Outbox("u1", capacity)
    for seq in range(count):
        outbox.push(frame(seq))
    return outbox


def send(outbox: Outbox, count: int) -> list[int]:
    return [outbox.sent().seq for _ in range(count)]


def test_a_rewind_goes_back_to_the_first_unheard_frame() -> None:
    outbox = filled(10)
    send(outbox, 8)
    outbox.heard(4)
    assert outbox.rewind() == 3
    assert send(outbox, outbox.unsent) == [5, 6, 7, 8, 9]


def test_an_acknowledgement_that_comes_after_the_rewind_counts() -> None:
    outbox = filled(10)
    send(outbox, 8)
    outbox.heard(4)
    outbox.rewind()
    outbox.heard(6)
    assert send(outbox, outbox.unsent) == [7, 8, 9]


def test_what_was_not_sent_was_not_heard() -> None:
    outbox = filled(10)
    send(outbox, 3)
    outbox.heard(99)
    assert (outbox.heard_seq, outbox.heard_ms, outbox.kept) == (2, 60, 7)


def test_late_frames_of_others_and_old_ones_are_dropped() -> None:
    outbox = filled(3)
    assert not outbox.push(frame(3, "u0"))
    assert not outbox.push(frame(2))
    assert outbox.push(frame(5))
    assert (outbox.kept, outbox.produced) == (4, 4)


def test_a_full_ring_refuses_until_something_is_heard() -> None:
    outbox = filled(5, capacity=5)
    with pytest.raises(OverflowError):
        outbox.push(frame(5))
    send(outbox, 1)
    outbox.heard(0)
    assert outbox.push(frame(5))


def test_the_grid_moves_when_the_listener_ran_dry() -> None:
    grid = Grid(seq=10, now_ms=1000)
    assert grid.due_ms(12) == 1040
    assert grid.leave(12, 1030) == 0
    assert grid.leave(12, 1050) == 10
    assert grid.due_ms(13) == 1060
    assert grid.leave(13, 1360) == 300
    assert grid.due_ms(14) == 1380


def test_spacing_counts_once_the_opening_burst_is_over() -> None:
    spacing = Spacing()
    assert {spacing.leave(ms) for ms in range(0, 25)} == {None}
    assert spacing.leave(24 + 20) == 0
    assert spacing.leave(44 + 27) == 7
    assert spacing.leave(71 + 5) == 15


def test_what_the_clock_says_was_played() -> None:
    grid = Grid(seq=10, now_ms=1000)
    assert [grid.played_seq(ms) for ms in (0, 1000, 1019, 1020, 1100)] == [9, 9, 9, 10, 14]


class Delivery(RuleBasedStateMachine):
    """A worker, a sender and a listener at their own pace, with flushes in between."""

    def __init__(self) -> None:
        super().__init__()
        self.outbox = Outbox("u1", 12)
        self.pushed = 0
        self.on_the_way: list[int] = []
        self.ears: list[int] = []

    @precondition(lambda self: not self.outbox.full)
    @rule()
    def produce(self) -> None:
        assert self.outbox.push(frame(self.pushed))
        self.pushed += 1

    @precondition(lambda self: self.outbox.peek() is not None)
    @rule()
    def send(self) -> None:
        self.on_the_way.append(self.outbox.sent().seq)

    @precondition(lambda self: self.on_the_way)
    @rule(count=st.integers(1, 5))
    def hear(self, count: int) -> None:
        for seq in self.on_the_way[:count]:
            self.ears.append(seq)
            self.outbox.heard(seq)
        del self.on_the_way[:count]

    @rule()
    def flush(self) -> None:
        assert self.outbox.rewind() == len(self.on_the_way)
        self.on_the_way.clear()

    @invariant()
    def nothing_is_lost_or_repeated(self) -> None:
        assert self.ears == list(range(len(self.ears)))
        assert self.outbox.heard_frames + self.outbox.kept == self.outbox.produced == self.pushed
        following = self.outbox.peek()
        assert following is None or following.seq == len(self.ears) + len(self.on_the_way)
        assert self.outbox.kept <= 12


TestDelivery = Delivery.TestCase
