"""Which worker to ask next: each in turn, and those that failed lately only after the others."""

from __future__ import annotations

from collections.abc import Sequence


class Rota:
    def __init__(self, targets: Sequence[str]) -> None:
        self._targets = tuple(targets)
        self._turn = 0
        self._resting_until: dict[str, float] = {}

    def order(self, now_ms: float) -> list[str]:
        """Every target once, in the order in which to try them; the next call starts one later."""
        start = self._turn
        self._turn = (start + 1) % len(self._targets)
        turned = self._targets[start:] + self._targets[:start]
        return sorted(turned, key=lambda target: self._rests(target, now_ms))

    def rest(self, target: str, now_ms: float, for_ms: float) -> None:
        """It failed, or said when to come back."""
        self._resting_until[target] = now_ms + for_ms

    def worked(self, target: str) -> None:
        self._resting_until.pop(target, None)

    def _rests(self, target: str, now_ms: float) -> bool:
        return self._resting_until.get(target, now_ms) > now_ms
