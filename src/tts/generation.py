"""A call that hands out results while it runs, turned into an iterator.

Some families only speak through such a call (`generate` with a streamer). Here it runs on a thread
of its own: what it raises reaches whoever iterates, closing the iterator ends it at its next step,
and it never runs further ahead than a few results.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator
from typing import Protocol, TypeVar

T = TypeVar("T")

AHEAD = 4
"""Results that wait to be taken; then the call waits in `put`."""
_T_contra = TypeVar("_T_contra", contravariant=True)


class Stopped(BaseException):
    """Raised out of `put` when nobody wants more. No Exception: a family's code must not eat it."""


class Put(Protocol[_T_contra]):
    """What the call hands its results to."""

    def __call__(self, result: _T_contra) -> None:
        """Waits while `AHEAD` results wait. Raises Stopped."""
        ...

    @property
    def stopped(self) -> bool:
        """For a call that looks at each of its own steps, whether it has results or not."""
        ...


def generated(run: Callable[[Put[T]], None], name: str) -> Generator[T, None, None]:
    """The results of `run(put)`, then its end or what it raised.

    The thread starts with the first `next`. `close` waits until the thread has ended, so that
    nothing of it is left; it ends at its next `put` or look at `stopped`.
    """
    hand = _Hand[T]()
    thread = threading.Thread(target=hand.run, args=(run,), name=name, daemon=True)
    thread.start()
    try:
        yield from hand.results()
    finally:
        hand.stop()
        thread.join()


class _Hand(Put[T]):
    """From one thread to another."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[T] = deque()
        self._stopped = self._ended = False
        self._error: BaseException | None = None

    @property
    def stopped(self) -> bool:
        return self._stopped

    def __call__(self, result: T) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or len(self._waiting) < AHEAD)
            if self._stopped:
                raise Stopped
            self._waiting.append(result)
            self._changed.notify_all()

    def run(self, call: Callable[[Put[T]], None]) -> None:
        error: BaseException | None = None
        try:
            call(self)
        except Stopped:
            pass
        except BaseException as raised:
            error = raised
        with self._changed:
            self._error, self._ended = error, True
            self._changed.notify_all()

    def results(self) -> Generator[T, None, None]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or bool(self._waiting))
                if not self._waiting:
                    break
                result = self._waiting.popleft()
                self._changed.notify_all()
            yield result
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
