"""Who reads how much text before the next tick, and who draws a frame in it. Pure.

Text is read in bounded shares, so that those who speak are not held up by those who begin. A frame
is drawn for whoever has room for one, but only when somebody is close to running dry: a slot with a
frame in hand joins the next tick instead of causing its own, so that ticks are few and full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SMALL_READ = 32
"""A reading of fewer positions takes as long as one of so many: what counts is to have begun."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A slot that must read `left` more positions before it can draw."""

    slot: int
    left: int


@dataclass(frozen=True, slots=True)
class Drawing:
    """A slot that could draw a frame now."""

    slot: int
    undelivered: int
    """Frames that its consumer has not taken."""
    drew_at: int
    """When it drew last, in frames drawn by all; lower waits longer."""


def low_water(credit: int) -> int:
    """With so few undelivered frames or fewer a slot is worth a tick."""
    return credit // 2


def share_reads(reading: Sequence[Reading], budget: int) -> list[tuple[int, int]]:
    """(slot, positions) to read now, at most `budget` in all; `reading` is in order of arrival.

    Half belongs to the slot that came first, so that every text is read in the end; what remains
    goes to the shortest, whose first audio is nearest. A slot with nothing left has a share of 0.
    """
    if not reading:
        return []
    first, *others = reading
    shares = {first.slot: min(first.left, (budget + 1) // 2 if others else budget)}
    rest = budget - _cost(shares[first.slot])
    for one in sorted(others, key=lambda one: one.left):
        shares[one.slot] = min(one.left, max(0, rest))
        rest -= _cost(shares[one.slot])
    shares[first.slot] += min(first.left - shares[first.slot], max(0, rest))
    return [(one.slot, shares[one.slot]) for one in reading if shares[one.slot] or not one.left]


def _cost(positions: int) -> int:
    return max(positions, SMALL_READ) if positions else 0


def choose_rows(drawing: Sequence[Drawing], credit: int, most: int) -> list[int]:
    """The slots of the next tick, the neediest first, at most `most`; none if nobody is in need.

    `credit` is how many undelivered frames a slot may have: at the credit it draws no more.
    """
    if all(one.undelivered > low_water(credit) for one in drawing):
        return []
    room = [one for one in drawing if one.undelivered < credit]
    room.sort(key=lambda one: (one.undelivered > low_water(credit), one.drew_at))
    return [one.slot for one in room[:most]]
