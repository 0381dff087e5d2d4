"""Time as a port: the shell runs on the loop's clock, the tests on one that they turn by hand."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def now_ms(self) -> float:
        """Monotonic milliseconds from an arbitrary origin."""
        ...


class MonotonicClock:
    def now_ms(self) -> float:
        return time.monotonic() * 1000.0


class ManualClock:
    """Stands still until told otherwise."""

    def __init__(self, now_ms: float = 0.0) -> None:
        self._now_ms = now_ms

    def now_ms(self) -> float:
        return self._now_ms

    def advance(self, ms: float) -> float:
        self._now_ms += ms
        return self._now_ms
