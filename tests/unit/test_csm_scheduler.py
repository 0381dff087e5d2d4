"""Who reads and who draws: bounded, in order, and nobody is forgotten."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from src.tts.families.csm.scheduler import (
    SMALL_READ,
    Drawing,
    Reading,
    choose_rows,
    low_water,
    share_reads,
)

_lefts = st.lists(st.integers(0, 400), max_size=12)
_budgets = st.integers(1, 300)


def readings(lefts: list[int]) -> list[Reading]:
    return [Reading(slot, left) for slot, left in enumerate(lefts)]


# --- text ---


def test_a_short_text_does_not_wait_behind_a_long_one() -> None:
    assert share_reads(readings([1500, 40]), 256) == [(0, 216), (1, 40)]


def test_half_of_the_reading_is_for_who_came_first() -> None:
    assert share_reads(readings([1500, 200, 100]), 256) == [(0, 128), (1, 28), (2, 100)]


def test_who_is_alone_has_it_all() -> None:
    assert share_reads(readings([1500]), 256) == [(0, 256)]


def test_who_needs_no_reading_is_not_kept_waiting() -> None:
    assert share_reads(readings([1500, 0]), 1) == [(0, 1), (1, 0)]


def test_many_short_texts_are_read_a_few_at_a_time() -> None:
    """Sixty readings would keep those who speak waiting, however short they are."""
    assert share_reads(readings([5] * 60), 256) == [(slot, 5) for slot in range(256 // SMALL_READ)]


@settings(deadline=None)
@given(_lefts, _budgets)
def test_reading_is_bounded_and_no_share_is_wasted(lefts: list[int], budget: int) -> None:
    shares = dict(share_reads(readings(lefts), budget))
    assert all(shares.get(slot, 0) <= left for slot, left in enumerate(lefts))
    assert all(positions or not lefts[slot] for slot, positions in shares.items())
    assert sum(shares.values()) <= budget
    begun = [positions for positions in shares.values() if positions]
    assert len(begun) <= budget // SMALL_READ + 2
    if sum(shares.values()) < sum(lefts) and budget >= 2 * SMALL_READ:
        assert sum(max(SMALL_READ, positions) for positions in begun) >= budget


@settings(deadline=None)
@given(st.integers(1, 2000), _budgets, st.lists(_lefts, max_size=60))
def test_no_text_starves_behind_shorter_ones(
    left: int, budget: int, newcomers: list[list[int]]
) -> None:
    """However many short texts come after it, it is read at half speed or better."""
    waited = 0
    while left:
        others = newcomers[waited % len(newcomers)] if newcomers else []
        waiting = [Reading(0, left), *(Reading(i + 1, n) for i, n in enumerate(others))]
        left -= dict(share_reads(waiting, budget)).get(0, 0)
        waited += 1
        assert waited <= 2 * 2000 // budget + 2


# --- frames ---

_drawing = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 100)), max_size=12)


def drawings(states: list[tuple[int, int]]) -> list[Drawing]:
    return [Drawing(slot, *state) for slot, state in enumerate(states)]


def test_a_slot_at_its_credit_draws_nothing() -> None:
    assert choose_rows(drawings([(3, 0), (0, 0)]), 3, 8) == [1]


def test_a_slot_with_frames_in_hand_joins_a_tick_but_causes_none() -> None:
    assert choose_rows(drawings([(2, 0), (2, 0)]), 3, 8) == []
    assert choose_rows(drawings([(2, 0), (1, 5)]), 3, 8) == [1, 0]


def test_the_needy_come_before_those_who_only_join() -> None:
    assert choose_rows(drawings([(2, 0), (0, 7), (1, 5)]), 3, 2) == [2, 1]


@settings(deadline=None)
@given(_drawing, st.integers(1, 9), st.integers(1, 12))
def test_credit_and_size_of_a_tick_hold(
    states: list[tuple[int, int]], credit: int, most: int
) -> None:
    rows = choose_rows(drawings(states), credit, most)
    needy = {slot for slot, state in enumerate(states) if state[0] <= low_water(credit)}
    assert len(set(rows)) == len(rows) <= most
    assert all(states[slot][0] < credit for slot in rows)
    assert bool(rows) == bool(needy)
    assert needy <= set(rows) or set(rows) <= needy


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 5))
def test_no_slot_starves_when_ticks_are_small(slots: int, most: int, credit: int) -> None:
    """All are always in need: everybody draws equally often, within one."""
    last, drawn = [0] * slots, [0] * slots
    for _ in range(60):
        for slot in choose_rows([Drawing(i, 0, last[i]) for i in range(slots)], credit, most):
            drawn[slot] += 1
            last[slot] = sum(drawn)
        assert max(drawn) - min(drawn) <= 1
