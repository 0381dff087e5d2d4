"""How many steps of engines go on at once, and which goes next."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from src.tts.tts_base import CancelToken


class Deadline:
    """When a stream's next audio is due: at once for the first, then when the last has played."""

    def __init__(self) -> None:
        self.started = False
        self.due_s = time.monotonic()

    def played(self, seconds: float) -> None:
        self.started = True
        self.due_s = max(self.due_s, time.monotonic()) + seconds


class RunGate:
    """At most `slots` steps, earliest deadline first; one slot is kept for first pieces.

    A step cannot be paused: without the kept slot, somebody's first word would wait until another
    session's long sentence is done.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._running = 0
        self._condition = threading.Condition()
        self._order = itertools.count()
        self.waiting: list[tuple[float, int, bool]] = []
        """(when its audio is due, order of arrival, not its first piece) of those in the queue."""

    @contextmanager
    def turn(self, deadline: Deadline, cancel: CancelToken) -> Iterator[bool]:
        """Waits for a slot. False inside: cancelled, nothing may run."""
        with cancel.calling(self._wake):
            admitted = self._enter(deadline, cancel)
        try:
            yield admitted
        finally:
            if admitted:
                self._leave()

    def _enter(self, deadline: Deadline, cancel: CancelToken) -> bool:
        ticket = (deadline.due_s, next(self._order), deadline.started)
        with self._condition:
            self.waiting.append(ticket)
            self._condition.wait_for(lambda: cancel.cancelled or self._may_run(ticket))
            self.waiting.remove(ticket)
            if not cancel.cancelled:
                self._running += 1
            self._condition.notify_all()
            return not cancel.cancelled

    def _may_run(self, ticket: tuple[float, int, bool]) -> bool:
        later = ticket[2]
        kept = 1 if self._slots > 1 else 0
        if self._running >= self._slots - (kept if later else 0):
            return False
        # A later piece that is due earlier does not hold up a first one: the kept slot is not its.
        rivals = (t for t in self.waiting if later or not kept or not t[2])
        return all(ticket <= rival for rival in rivals)

    def _leave(self) -> None:
        with self._condition:
            self._running -= 1
            self._condition.notify_all()

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify_all()
