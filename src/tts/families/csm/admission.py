"""Slots by order of arrival: bounded many wait, a bounded time, each on a condition of its own."""

from __future__ import annotations

import copy
import threading
from collections import deque
from dataclasses import dataclass

from src.rpc.errors import DuplexError, Exhausted
from src.tts.tts_base import CancelToken


@dataclass(eq=False, slots=True)
class _Waiter:
    changed: threading.Condition
    slot: int | None = None


class Admission:
    """`lock` is the engine's, reentrant."""

    def __init__(
        self, slots: int, lock: threading.RLock, *, max_waiting: int, max_wait_ms: int
    ) -> None:
        self._slots = slots
        self._lock = lock
        self._max_waiting = max_waiting
        self._max_wait_ms = max_wait_ms
        # The slot that was left longest ago first.
        self._free = deque(range(slots))
        self._waiting: deque[_Waiter] = deque()
        self._refusal: DuplexError | None = None

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def enter(self, cancel: CancelToken) -> int | None:
        """A slot; None: cancelled while waiting. Raises Exhausted, and what `refuse` was told."""
        waiter = _Waiter(threading.Condition(self._lock))

        def wake() -> None:
            with self._lock:
                waiter.changed.notify()

        with cancel.calling(wake), self._lock:
            return self._enter(waiter, cancel)

    def leave(self, slot: int) -> None:
        with self._lock:
            self._free.append(slot)
            self._seat()

    def refuse(self, error: DuplexError) -> None:
        """Nobody enters any more; who waits is told so."""
        with self._lock:
            self._refusal = error
            for waiter in self._waiting:
                waiter.changed.notify()

    def _enter(self, waiter: _Waiter, cancel: CancelToken) -> int | None:
        if len(self._waiting) >= self._max_waiting and not self._free:
            raise self._full(len(self._waiting) + 1)
        self._waiting.append(waiter)
        self._seat()
        waiter.changed.wait_for(
            lambda: waiter.slot is not None or cancel.cancelled or self._refusal is not None,
            timeout=self._max_wait_ms / 1000.0,
        )
        return self._come_back(waiter, cancel)

    def _come_back(self, waiter: _Waiter, cancel: CancelToken) -> int | None:
        wanted = not cancel.cancelled and self._refusal is None
        if waiter.slot is not None:
            if wanted:
                return waiter.slot
            self.leave(waiter.slot)
        place = 1
        if waiter in self._waiting:
            place += self._waiting.index(waiter)
            self._waiting.remove(waiter)
        if cancel.cancelled:
            return None
        raise copy.copy(self._refusal) or self._full(place)

    def _seat(self) -> None:
        while self._free and self._waiting and self._refusal is None:
            waiter = self._waiting.popleft()
            waiter.slot = self._free.popleft()
            waiter.changed.notify()

    def _full(self, place: int) -> Exhausted:
        return Exhausted(
            f"this model speaks at most {self._slots} utterances at once and others wait; "
            "try again later or on another worker",
            retry_after_ms=self._max_wait_ms,
            queue_position=place,
        )
