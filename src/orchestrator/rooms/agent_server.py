"""The registered way in: an agent like any other to the LiveKit server, which sends us to rooms."""

from __future__ import annotations

import asyncio
import logging
import math
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from src.common.tasks import TaskGroup, timeout
from src.orchestrator.auth import ANONYMOUS, SessionSlots
from src.orchestrator.http_api import Check
from src.orchestrator.rooms.server_probe import Place, ServerProbe
from src.orchestrator.rooms.settings import LiveKitSettings
from src.orchestrator.rooms.token_request import TokenRequest
from src.orchestrator.rooms.tokens import TokenMint
from src.orchestrator.rooms.visit import RoomAccess
from src.orchestrator.rooms.visits import Visits
from src.rpc.errors import Exhausted, Unavailable

# Its import would start a process's worth of local models (130 MB) that rooms of ours never use.
os.environ.setdefault("LIVEKIT_AGENTS_PRELOAD_LOCAL_INFERENCE", "0")

if TYPE_CHECKING:
    from src.orchestrator.rooms.inloop_pool import AgentServer, JobRequest, RunningJobInfo

log = logging.getLogger(__name__)

_FOR_EVER = 1 << 30
# From `agents.target_load` on, 0.7 by default, a LiveKit server sends nothing to a worker. Who is
# full is for us to say; to it the load only tells the fuller of two.
_FULL_LOAD = 0.6
_LOOK_S = 0.25
_CLOSE_S = 5.0


class IncompatibleAgents(Exception):
    """livekit-agents is not as we know it; the message says what to do."""


@dataclass(slots=True)
class _Seat:
    """A session slot that waits for the job that it is for."""

    who: str
    lapses: asyncio.TimerHandle | None = None


class Registered:
    """Jobs become visits on our own loop.

    A token of ours keeps a slot for its room until the LiveKit server sends us there, so that
    nobody gets a token for a room in which no agent would ever appear.
    """

    def __init__(
        self,
        settings: LiveKitSettings,
        mint: TokenMint,
        visits: Visits,
        slots: SessionSlots,
        probe: ServerProbe,
    ) -> None:
        """Imports livekit-agents (seconds). Raises IncompatibleAgents."""
        from src.orchestrator.rooms import inloop_pool

        inloop_pool.check_agents()
        self._pool = inloop_pool
        self._settings = settings
        self._mint = mint
        self._visits = visits
        self._slots = slots
        self._probe = probe
        self._server: AgentServer | None = None
        self._waiting: dict[str, _Seat] = {}
        self._accepted: dict[str, tuple[str, _Seat]] = {}
        self._load = 0.0
        self._started = asyncio.Event()
        self._fault: IncompatibleAgents | None = None
        # Every attempt of its own would be a line; `ServerProbe` and we say it once.
        logging.getLogger("livekit.agents").setLevel(logging.ERROR)

    @property
    def registered(self) -> bool:
        return self._server is not None and self._pool.connected(self._server)

    def check(self) -> Check:
        reachable = self._probe.check()
        if not reachable.ok or self.registered:
            return reachable
        if self._fault is not None:
            return Check(False, str(self._fault))
        return Check(False, f"not registered at {self._probe.where} yet; trying again")

    # --- tokens ---

    async def admit(self, asked: TokenRequest, who: str) -> None:
        """Keep a slot for them until the LiveKit server sends us there.

        A room that exists is not dispatched to again, so there we go by ourselves, unless it has
        an agent. Raises Exhausted, Unavailable.
        """
        if not self.registered:
            raise Unavailable(
                "not registered at the LiveKit server yet; try again", retry_after_ms=2_000
            )
        place = await self._probe.place(asked.room) if asked.named else Place.ABSENT
        if self._visits.holds(asked.room):
            self._visits.expect(self._own_access(asked))
        elif asked.room in self._waiting or self._accepts(asked.room) or place is Place.WITH_AGENT:
            return
        else:
            self._slots.take(who)
            if place is Place.ABSENT:
                self._wait_for_job(asked, who)
            else:
                self._go(asked, who)

    def _own_access(self, asked: TokenRequest) -> RoomAccess:
        token = self._mint.agent(asked.room)
        return RoomAccess(self._settings.url, token, asked.room, asked.identity)

    def _go(self, asked: TokenRequest, who: str) -> None:
        try:
            self._visits.begin(self._own_access(asked), who)
        except BaseException:
            self._slots.give_back(who)
            raise

    def _wait_for_job(self, asked: TokenRequest, who: str) -> None:
        seat = self._waiting[asked.room] = _Seat(who)
        loop = asyncio.get_running_loop()
        delay_s = self._settings.join_timeout_ms / 1000
        seat.lapses = loop.call_later(delay_s, self._lapse, asked.room)

    def _lapse(self, room: str) -> None:
        seat = self._waiting.pop(room)
        self._slots.give_back(seat.who)
        log.info("nobody came for a token", extra={"room": room})

    # --- jobs ---

    async def _on_request(self, request: JobRequest) -> None:
        """The LiveKit server asks whether we would take a room."""
        room = request.room.name
        if self._visits.holds(room) or self._accepts(room):
            log.info("refused to be a second agent in a room", extra={"room": room})
            await request.reject(terminate=True)
            return
        try:
            seat = self._seat(room)
        except Exhausted as error:
            log.warning("a job was refused", extra={"room": room, "reason": error.message})
            await request.reject(terminate=False)  # another orchestrator may have room
            return
        self._accepted[request.id] = (room, seat)
        try:
            await request.accept(name=self._settings.agent_name)
        except Exception as error:  # an edge: theirs or ours, this job is not to be
            log.warning("a job was not begun", extra={"room": room, "error": str(error)})
        finally:
            if self._accepted.pop(request.id, None) is not None:
                self._slots.give_back(seat.who)

    def _accepts(self, room: str) -> bool:
        return any(room == other for other, _ in self._accepted.values())

    def _seat(self, room: str) -> _Seat:
        """The one kept for a token of ours, or a new one for a token of somebody else's."""
        seat = self._waiting.pop(room, None)
        if seat is None:
            self._slots.take(ANONYMOUS)
            return _Seat(ANONYMOUS)
        if seat.lapses is not None:
            seat.lapses.cancel()
        return seat

    def begin_job(self, info: RunningJobInfo) -> asyncio.Future[None]:
        """From inside `accept`, which knows what to do when it fails."""
        access = RoomAccess(info.url, info.token, info.job.room.name)
        _, seat = self._accepted[info.job.id]
        visit = self._visits.begin(access, seat.who)
        del self._accepted[info.job.id]
        return visit

    def close_job(self, info: RunningJobInfo) -> None:
        self._visits.close(info.job.room.name, "room_closed")

    # --- the server ---

    async def run(self) -> None:
        """Registered until cancelled: attempts have no end."""
        server = self._make_server()
        async with TaskGroup() as tasks:
            try:
                with self._pool.InLoop(self) as pool:
                    tasks.create_task(server.run(), name="agent server")
                    await self._started.wait()
                pool.check()
                self._server = server
                await self._look()
            except IncompatibleAgents as error:
                self._fault = error
                log.error("no rooms: %s", error)
                await asyncio.Event().wait()
            finally:
                self._server = None
                with suppress(asyncio.TimeoutError):
                    async with timeout(_CLOSE_S):
                        await server.aclose()

    def _make_server(self) -> AgentServer:
        settings = self._settings
        server = self._pool.AgentServer(
            ws_url=settings.url,
            api_key=settings.api_key,
            api_secret=settings.api_secret.get_secret_value(),
            host="127.0.0.1",
            port=0,
            load_fnc=lambda: self._load,
            # Never full: every job is asked about, and `_on_request` knows. A status is up to 2.5 s
            # old, and a job that is not sent to us because of an old one is lost for ever.
            load_threshold=math.inf,
            max_retry=_FOR_EVER,
            num_idle_processes=0,
            multiprocessing_context="spawn",
        )
        name = settings.agent_name if settings.dispatch == "explicit" else ""
        server.rtc_session(_never, agent_name=name, on_request=self._on_request)
        server.on("worker_started", self._started.set)
        return server

    async def _look(self) -> None:
        """Keep the load, which is read in a thread, and say when the registration changes."""
        was = False
        while True:
            # A slot that waits is free for the job that it waits for.
            taken = self._slots.held - len(self._waiting)
            self._load = _FULL_LOAD * taken / self._slots.max_sessions
            if (now := self.registered) is not was:
                was = now
                self._say_registered(now)
            await asyncio.sleep(_LOOK_S)

    def _say_registered(self, registered: bool) -> None:
        extra = {"at": self._probe.where, "agent_name": self._settings.agent_name}
        if registered:
            log.info("registered at the LiveKit server", extra=extra)
        else:
            log.warning("the registration is lost; trying again", extra=extra)
            self._probe.doubt()

    async def drain(self, limit_s: float) -> None:
        """No more jobs; returns when those that run have ended, or after `limit_s`."""
        if self._server is None:
            return
        with suppress(asyncio.TimeoutError):
            async with timeout(limit_s):
                await self._server.drain(timeout=None)


async def _never(context: object) -> None:
    """livekit-agents wants an entrypoint; our pool does without."""
