"""A sleeper that can be woken."""

from __future__ import annotations

import asyncio
import math

# Streams that wake up in the same slice of time share one turn of the event loop, and so one burst
# of system calls. A frame period is a multiple of it, so it shifts a phase and adds no jitter.
_GRID_MS = 4.0


class Alarm:
    """One task waits, anybody on the loop rings. A ring before the wait is kept, and only once."""

    def __init__(self) -> None:
        self._rung = False
        self._waiter: asyncio.Future[None] | None = None

    def ring(self) -> None:
        self._rung = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self, delay_ms: float | None = None) -> None:
        """Until rung, or until the first grid point after `delay_ms`; None: only until rung."""
        if not self._rung and (delay_ms is None or delay_ms > 0.0):
            await self._sleep(delay_ms)
        self._rung = False

    async def _sleep(self, delay_ms: float | None) -> None:
        loop = asyncio.get_running_loop()
        waiter = self._waiter = loop.create_future()
        timer = None
        if delay_ms is not None:
            timer = loop.call_at(_on_grid(loop.time() * 1000.0 + delay_ms), self.ring)
        try:
            await waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()


def _on_grid(at_ms: float) -> float:
    return math.ceil(at_ms / _GRID_MS) * _GRID_MS / 1000.0
