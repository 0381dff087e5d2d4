"""LiveKit rooms: tokens for users, visits by us, one way in of two."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from aiohttp import web

from src.common.clock import Clock
from src.common.tasks import TaskGroup
from src.orchestrator.auth import SessionSlots
from src.orchestrator.http_api import Check
from src.orchestrator.metrics import Metrics
from src.orchestrator.rooms import token_request
from src.orchestrator.rooms.agent_server import Registered
from src.orchestrator.rooms.direct import Direct
from src.orchestrator.rooms.server_probe import ServerProbe
from src.orchestrator.rooms.settings import LiveKitSettings
from src.orchestrator.rooms.token_request import TokenRequest
from src.orchestrator.rooms.tokens import TokenMint, install_redaction, warn_of_short_secret
from src.orchestrator.rooms.visit import RoomAccess, RoomSessionFactory, RoomVisit
from src.orchestrator.rooms.visits import CLOSE_S, MakeVisit, Visit, Visits, going_down

log = logging.getLogger(__name__)


class Entry(Protocol):
    """How we come to be in a room: `Direct` or `Registered`."""

    async def run(self) -> None: ...

    async def admit(self, asked: TokenRequest, who: str) -> None:
        """See to it that an agent will be there. Raises Exhausted, Unavailable."""
        ...

    async def drain(self, limit_s: float) -> None:
        """Let nobody send us anywhere any more."""
        ...

    def check(self) -> Check: ...


class Rooms:
    """All rooms of this process, on its event loop. `run` first, `drain` before it is cancelled."""

    def __init__(
        self,
        settings: LiveKitSettings,
        make_session: RoomSessionFactory,
        slots: SessionSlots,
        metrics: Metrics,
        clock: Clock,
        *,
        make_visit: MakeVisit | None = None,
        can_begin: Callable[[], object] = lambda: None,
    ) -> None:
        """`can_begin` raises DuplexError while no session could begin.

        Raises IncompatibleAgents (`entry: agentserver`, which also takes seconds to import).
        """
        install_redaction()
        warn_of_short_secret(settings)

        def visit(access: RoomAccess) -> Visit:
            return RoomVisit(access, make_session, settings, metrics, clock)

        self._settings = settings
        self._can_begin = can_begin
        self._mint = TokenMint(settings)
        self._probe = ServerProbe(settings)
        self._visits = Visits(
            make_visit or visit,
            slots,
            metrics,
            clock,
            heir_ms=settings.join_timeout_ms,
            on_failed_join=self._probe.doubt,
        )
        metrics.count_rooms(lambda: self._visits.live)
        kind = Direct if settings.entry == "direct" else Registered
        self._entry: Entry = kind(settings, self._mint, self._visits, slots, self._probe)
        self._draining = False

    @property
    def live(self) -> int:
        return self._visits.live

    def check(self) -> Check:
        return self._entry.check()

    async def run(self) -> None:
        """Until cancelled. A LiveKit server that is not there is waited for."""
        async with TaskGroup() as tasks:
            tasks.create_task(self._probe.run(), name="livekit")
            tasks.create_task(self._visits.run(), name="visits")
            tasks.create_task(self._entry.run(), name=f"entry {self._settings.entry}")

    async def drain(self, drain_ms: int) -> None:
        """No tokens, no jobs; everybody is told, then left. At most `drain_ms` and CLOSE_S."""
        self._draining = True
        async with TaskGroup() as tasks:
            tasks.create_task(self._visits.drain(drain_ms), name="visits drain")
            tasks.create_task(self._entry.drain(drain_ms / 1000 + CLOSE_S), name="entry drains")

    async def token(self, request: web.Request, who: str) -> web.Response:
        """GET and POST /v1/livekit/token. `who` comes from `ApiKeys.check`.

        Raises InvalidArgument, UnknownName, Exhausted, Unavailable, and Internal when the LiveKit
        server refuses our key.
        """
        asked = await self._asked(request)
        if self._draining:
            raise going_down()
        self._can_begin()
        await self._probe.ensure()
        await self._entry.admit(asked, who)
        log.info("token", extra={"room": asked.room})
        body = {
            "server_url": self._settings.client_url,
            "participant_token": self._user_token(asked),
            "room_name": asked.room,
            "participant_identity": asked.identity,
            "expires_in_s": self._settings.token_ttl_ms // 1000,
        }
        return web.json_response(body, headers={"Cache-Control": "no-store"})

    async def _asked(self, request: web.Request) -> TokenRequest:
        if request.method != "POST":
            return token_request.from_query(request.query.items())
        return token_request.from_json(await request.read(), self._settings.agent_name)

    def _user_token(self, asked: TokenRequest) -> str:
        return self._mint.user(
            asked.room, asked.identity, asked.name, asked.attributes, asked.metadata
        )
