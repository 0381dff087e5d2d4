"""What passes between a slot's consumer and the engine: texts one way, frames the other.

Both sides hold the engine's one lock, and only for as long as it takes to move a reference. Every
consumer sleeps on a condition of its own, so that a frame wakes the one that it is for. The lock is
reentrant: an iterator that was dropped is closed by the garbage collector, wherever that runs.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Iterable

from src.audio.pcm import Float32
from src.rpc.errors import DuplexError, FailedPrecondition


class Outlet:
    """Bounded by the credit: the engine draws no frame that has no room here.

    A `turn` is one text asked for; what comes for an earlier one is dropped by its number.
    """

    def __init__(self, lock: threading.RLock, wake: Callable[[], None], low_water: int) -> None:
        self.turn = 0
        self.closed = False
        self.error: DuplexError | None = None
        self._lock = lock
        self._changed = threading.Condition(lock)
        self._wake = wake
        self._low_water = low_water
        self._texts: list[str] = []
        self._frames: deque[Float32] = deque()
        self._asked = False

    # --- the consumer; takes the lock ---

    def ask(self, texts: Iterable[str]) -> int:
        """The number of the turn. Raises FailedPrecondition while another is being spoken."""
        with self._lock:
            if self._asked or self._frames:
                raise FailedPrecondition("this slot still speaks: one text at a time")
            self.turn += 1
            self._asked = True
            self._texts.extend(texts)
            self._wake()
            return self.turn

    def take(self) -> Float32 | None:
        """The next frame; None: the turn is over, or the slot closed. Raises what `fail` got, after
        the frames that were drawn before it."""
        with self._lock:
            self._changed.wait_for(self._something)
            if self._frames:
                frame = self._frames.popleft()
                if len(self._frames) <= self._low_water:
                    self._wake()
                return frame
            if self.error is not None and not self.closed:
                # A copy: the error is shared, and would gather the traceback of everybody.
                raise copy.copy(self.error)
            return None

    def drop(self, turn: int) -> None:
        """Nobody wants the rest of this turn."""
        with self._lock:
            if self.turn == turn:
                self.turn += 1
                self._forget()
                self._wake()

    def close(self) -> None:
        """Nothing more is taken. Idempotent."""
        with self._lock:
            self.closed = True
            self._forget()
            self._changed.notify()
            self._wake()

    @property
    def ready(self) -> bool:
        """Nothing of what was asked for is to come."""
        return not self._asked

    # --- the engine; holds the lock ---

    @property
    def undelivered(self) -> int:
        return len(self._frames)

    def collect(self) -> list[str]:
        """The pieces of the turn's text; once."""
        texts, self._texts = self._texts, []
        return texts

    def put(self, turn: int, frame: Float32) -> None:
        if self._speaks(turn):
            self._frames.append(frame)
            self._changed.notify()

    def finish(self, turn: int) -> None:
        if self._speaks(turn):
            self._asked = False
            self._changed.notify()

    def fail(self, error: DuplexError) -> None:
        """Whatever is asked of this slot from now on raises `error`; the first one stays."""
        self.error = self.error or error
        self._changed.notify()

    def _speaks(self, turn: int) -> bool:
        return self._asked and turn == self.turn and not self.closed

    def _forget(self) -> None:
        self._asked = False
        self._frames.clear()
        self._texts.clear()

    def _something(self) -> bool:
        return bool(self._frames) or not self._asked or self.closed or self.error is not None
