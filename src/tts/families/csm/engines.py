"""One set of weights, one engine, however many models of the catalog speak through it.

A base and its LoRA voices are models of their own to the worker, each loaded and unloaded by
itself. The first to come makes the engine, the last to go closes it.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Hashable
from typing import Any, Generic, Protocol, TypeVar, cast


class Closable(Protocol):
    def close(self) -> None: ...


T = TypeVar("T", bound=Closable)


class OtherTerms(Exception):
    """There is an engine for the key, but it was made on other terms than those asked for."""

    def __init__(self, terms: object) -> None:
        super().__init__(f"the engine was made with {terms}")
        self.terms = terms
        """Those of the engine that is there."""


class Lease(Generic[T]):
    """A share in an engine. Keep no other reference to it: the last `release` frees its memory."""

    def __init__(self, engine: T, leave: Callable[[], None]) -> None:
        self._engine: T | None = engine
        self._leave = leave
        self._lock = threading.Lock()

    @property
    def engine(self) -> T:
        """Raises RuntimeError after `release`."""
        engine = self._engine
        if engine is None:
            raise RuntimeError("the lease on this engine was given back")
        return engine

    def release(self) -> None:
        """Give the share back; closes the engine if it was the last. A second call does nothing.

        Raises what the engine's `close` raises; the engine is forgotten all the same.
        """
        with self._lock:
            held, self._engine = self._engine is not None, None
        if held:
            self._leave()


class _Place:
    """Where one key's engine is, is being made, or is being closed."""

    def __init__(self) -> None:
        self.busy = threading.Lock()
        """Held while the engine is made or closed: an heir waits until the memory is free."""
        self.users = 0
        """Leases, and callers that wait for one; guarded by the pool's lock."""
        self.engine: Closable | None = None
        self.terms: object = None


class SharedEngines:
    """Engines by key, made once (ten callers, one load) and closed by the last who leaves."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._places: dict[Hashable, _Place] = {}

    def lease(
        self,
        key: Hashable,
        make: Callable[[], T],
        terms: Any = None,
        serves: Callable[[Any, Any], bool] = operator.eq,
    ) -> Lease[T]:
        """A share in the key's engine, made by `make` on these `terms` if there is none. Blocks
        while another makes or closes it.

        Raises OtherTerms if the terms of the one that is there do not serve: `serves(its, terms)`;
        and what `make` raises, after which the next caller tries anew.
        """
        with self._lock:
            place = self._places.setdefault(key, _Place())
            place.users += 1
        try:
            with place.busy:
                if place.engine is None:
                    place.engine, place.terms = make(), terms
                elif not serves(place.terms, terms):
                    raise OtherTerms(place.terms)
                engine = cast(T, place.engine)
        except BaseException:
            self._leave(key, place)
            raise
        return Lease(engine, lambda: self._leave(key, place))

    def __len__(self) -> int:
        """How many engines there are, or are on their way in or out."""
        with self._lock:
            return len(self._places)

    def _leave(self, key: Hashable, place: _Place) -> None:
        try:
            with place.busy:
                with self._lock:
                    place.users -= 1
                    last = place.users == 0
                if last and place.engine is not None:
                    engine, place.engine = place.engine, None
                    engine.close()
        finally:
            with self._lock:
                if place.users == 0 and self._places.get(key) is place:
                    del self._places[key]


_PROCESS = SharedEngines()


def engine_for(
    key: Hashable,
    make: Callable[[], T],
    terms: Any = None,
    serves: Callable[[Any, Any], bool] = operator.eq,
) -> Lease[T]:
    """This process's engine for `key`, which says what may be in memory once: these weights on that
    device. See `SharedEngines.lease`.
    """
    return _PROCESS.lease(key, make, terms, serves)
