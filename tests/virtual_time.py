"""An event loop whose time is virtual: it jumps to the next timer instead of waiting for it.

Thirty seconds of conversation run in milliseconds, and every run is the same.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Deadlock(AssertionError):
    """Everybody waits, and nothing is scheduled that could wake them."""


class _JumpingSelector(selectors.SelectSelector):
    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None:
            raise Deadlock("every task waits for something that nothing will bring")
        self.now_s += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s


class LoopClock:
    """`Clock` of the running loop."""

    def now_ms(self) -> float:
        return asyncio.get_running_loop().time() * 1000.0


def run_virtual(scenario: Coroutine[Any, Any, T], *, limit_s: float = 600.0) -> T:
    """Run to the end in virtual time. Fails when tasks are left behind, or after `limit_s`."""
    loop = VirtualTimeLoop()
    try:
        result = loop.run_until_complete(asyncio.wait_for(scenario, limit_s))
        left = [task.get_name() for task in asyncio.all_tasks(loop)]
        assert not left, f"tasks left behind: {left}"
        return result
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
