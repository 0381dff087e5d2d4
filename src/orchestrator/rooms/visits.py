"""The rooms we are in: one visit and one session slot each."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from src.common.clock import Clock
from src.common.logging import log_context
from src.common.tasks import TaskGroup, timeout
from src.orchestrator.auth import SessionSlots
from src.orchestrator.metrics import Metrics
from src.orchestrator.rooms.visit import RoomAccess
from src.rpc.errors import DuplexError, Unavailable

log = logging.getLogger(__name__)

CLOSE_S = 3.0


class Visit(Protocol):
    """`RoomVisit` in production."""

    @property
    def linked(self) -> str:
        """The identity of the user whom the visit is for; "" until one has come."""
        ...

    async def run(self) -> str:
        """Join, talk, leave. Returns why it ended; raises DuplexError when it could not begin."""
        ...

    def warn(self, error: DuplexError) -> None:
        """Tell the user; the visit goes on."""
        ...

    def close(self, reason: str) -> None:
        """End it soon. Idempotent."""
        ...


MakeVisit = Callable[[RoomAccess], Visit]


@dataclass(slots=True)
class _Stay:
    """Our presence in one room. A reload of the page may follow one visit with another."""

    visit: Visit
    first: asyncio.Future[None]
    heir: RoomAccess | None = None
    heir_until_ms: float = 0.0


class Visits:
    """`run` owns the tasks. A slot goes in with every `begin` and comes back exactly once."""

    def __init__(
        self,
        make_visit: MakeVisit,
        slots: SessionSlots,
        metrics: Metrics,
        clock: Clock,
        *,
        heir_ms: int,
        on_failed_join: Callable[[], None] = lambda: None,
    ) -> None:
        """`heir_ms`: how long somebody with a token may still be on their way."""
        self._make_visit = make_visit
        self._slots = slots
        self._metrics = metrics
        self._clock = clock
        self._heir_ms = heir_ms
        self._on_failed_join = on_failed_join
        self._stays: dict[str, _Stay] = {}
        self._tasks: TaskGroup | None = None
        self._draining = False
        self._empty = asyncio.Event()

    @property
    def live(self) -> int:
        return len(self._stays)

    def holds(self, room: str) -> bool:
        return room in self._stays

    async def run(self) -> None:
        """Until cancelled; every visit ends with it."""
        async with TaskGroup() as tasks:
            self._tasks = tasks
            try:
                await asyncio.Event().wait()
            finally:
                self._tasks = None

    def begin(self, access: RoomAccess, who: str) -> asyncio.Future[None]:
        """A visit in a room that we are not in, for a slot of `who` that was taken for it.

        The answer is done when this visit has ended; that of an heir may follow it. Raises
        Unavailable, and whatever makes a visit raises: the slot is then still the caller's.
        """
        if self._tasks is None or self._draining:
            raise going_down()
        stay = _Stay(self._make_visit(access), asyncio.get_running_loop().create_future())
        task = self._tasks.create_task(self._stay(access, stay), name=f"room {access.room}")
        self._stays[access.room] = stay
        # Not in the coroutine: one that is cancelled before its first step runs no `finally`.
        task.add_done_callback(lambda _: self._left(access.room, who))
        return stay.first

    def expect(self, access: RoomAccess) -> None:
        """Somebody else has a token for a room that we are in: most often the page was reloaded.

        A visit to which nobody has come takes whoever comes first. Another goes on with whom it
        has; if it ends before the newcomer can have given up, the next visit is theirs.
        """
        stay = self._stays[access.room]
        if not stay.visit.linked:
            return
        stay.heir = access
        stay.heir_until_ms = self._clock.now_ms() + self._heir_ms

    def close(self, room: str, reason: str) -> None:
        if stay := self._stays.get(room):
            stay.visit.close(reason)

    async def drain(self, drain_ms: int) -> None:
        """Begin nothing new, tell everybody, wait, close what is left; cancel what will not end."""
        self._draining = True
        for stay in self._stays.values():
            stay.visit.warn(going_down())
        await self._until_empty(drain_ms / 1000)
        for room in list(self._stays):
            self.close(room, "draining")
        await self._until_empty(CLOSE_S)

    async def _until_empty(self, limit_s: float) -> None:
        self._check_empty()
        with suppress(asyncio.TimeoutError):
            async with timeout(limit_s):
                await self._empty.wait()

    def _check_empty(self) -> None:
        if not self._stays:
            self._empty.set()

    def _left(self, room: str, who: str) -> None:
        _settle(self._stays.pop(room).first)
        self._slots.give_back(who)
        if self._draining:
            self._check_empty()

    async def _stay(self, access: RoomAccess, stay: _Stay) -> None:
        with log_context(room=access.room):
            while await self._visit(stay):
                _settle(stay.first)
                heir, stay.heir = stay.heir, None
                if heir is None or self._draining or self._clock.now_ms() > stay.heir_until_ms:
                    return
                log.info("another has come for this room")
                stay.visit = self._make_visit(heir)

    async def _visit(self, stay: _Stay) -> bool:
        """False: it failed, and another would fail too."""
        self._metrics.rooms_joined.inc()
        try:
            reason = await stay.visit.run()
        except DuplexError as error:
            log.warning("visit ends", extra={"reason": error.code, "error": error.message})
            self._metrics.refused.labels(error.code).inc()
            self._on_failed_join()
            return False
        except Exception:  # an edge: whatever went wrong ends this room only
            log.exception("visit failed")
            self._on_failed_join()
            return False
        log.info("visit ends", extra={"reason": reason})
        return True


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def going_down() -> Unavailable:
    return Unavailable("the server is going down; reconnect in a moment", retry_after_ms=2_000)
