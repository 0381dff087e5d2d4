"""The LiveKit server as we know it: whether it answers, whether it takes our key, who is where."""

from __future__ import annotations

import asyncio
import logging
from enum import Enum
from urllib.parse import urlsplit

import aiohttp
from livekit import api

from src.common.timers import Alarm
from src.orchestrator.http_api import Check
from src.orchestrator.rooms.settings import LiveKitSettings
from src.rpc.errors import DuplexError, Internal, Unavailable

log = logging.getLogger(__name__)

WELL_MS = 10_000
ILL_MS = 2_000
_ANSWER_S = 3.0
_REFUSED = (401, 403)


class Place(Enum):
    """What a room is on the LiveKit server."""

    ABSENT = "absent"
    WITHOUT_AGENT = "without agent"
    WITH_AGENT = "with agent"


class ServerProbe:
    """Asks the server's own API, because an agent's connection cannot tell a wrong secret from a
    server that is down. `run` keeps asking, so that readiness is true and is logged once."""

    def __init__(self, settings: LiveKitSettings) -> None:
        self._settings = settings
        parts = urlsplit(settings.url)
        self.where = parts.netloc.rpartition("@")[2] or settings.url
        self._trouble: DuplexError | None = Unavailable(
            f"the LiveKit server at {self.where} has not been asked yet", retry_after_ms=1_000
        )
        self._answers = 0
        self._asking = asyncio.Lock()
        self._doubtful = False
        self._doubted = Alarm()
        self._api: api.LiveKitAPI | None = None

    @property
    def trouble(self) -> DuplexError | None:
        """None: it answers, and takes our key."""
        return self._trouble

    def check(self) -> Check:
        trouble = self._trouble
        return Check(trouble is None, trouble.message if trouble else self.where)

    async def run(self) -> None:
        """Ask for ever. Every change is logged once."""
        try:
            while True:
                await self.ask()
                await self._doubted.wait(WELL_MS if self._trouble is None else ILL_MS)
        finally:
            if self._api is not None:
                await self._api.aclose()

    async def ensure(self) -> None:
        """Raises Unavailable (it does not answer) or Internal (it refuses our key).

        A server that was well a moment ago is taken at its word; of another one it is asked now,
        so that nobody is turned away by old news.
        """
        if self._trouble is not None or self._doubtful:
            await self.ask()
        if self._trouble is not None:
            raise self._trouble

    def doubt(self) -> None:
        """A join failed: ask again now, and before the next token."""
        self._doubtful = True
        self._doubted.ring()

    async def ask(self) -> None:
        """One question at a time; whoever comes meanwhile gets its answer too."""
        answers = self._answers
        async with self._asking:
            if answers == self._answers:
                await self._ask()

    async def place(self, room: str) -> Place:
        """Raises Unavailable."""
        try:
            rooms = await self._server.room.list_rooms(api.ListRoomsRequest(names=[room]))
            if not rooms.rooms:
                return Place.ABSENT
            request = api.ListParticipantsRequest(room=room)
            people = (await self._server.room.list_participants(request)).participants
        except api.ServerError as error:
            if error.code == "not_found":  # it closed between the two questions
                return Place.ABSENT
            self.doubt()
            raise _silent(self.where) from None
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError):
            self.doubt()
            raise _silent(self.where) from None
        kinds = {person.kind for person in people}
        agent = api.ParticipantInfo.Kind.AGENT
        return Place.WITH_AGENT if agent in kinds else Place.WITHOUT_AGENT

    async def _ask(self) -> None:
        self._doubtful = False
        before, self._trouble = self._trouble, await self._diagnose()
        first, self._answers = self._answers == 0, self._answers + 1
        if self._trouble is None:
            if before is not None:
                log.info("the LiveKit server answers", extra={"at": self.where})
        elif first or before is None or before.code != self._trouble.code:
            log.warning("no rooms: %s", self._trouble.message)

    async def _diagnose(self) -> DuplexError | None:
        """The server's own words are left out: they repeat the token."""
        try:
            await self._server.room.list_rooms(api.ListRoomsRequest(names=["-"]))
        except api.ServerError as error:
            return _refusal(self.where, error.status)
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError):
            return _silent(self.where)
        return None

    @property
    def _server(self) -> api.LiveKitAPI:
        if self._api is None:
            settings = self._settings
            self._api = api.LiveKitAPI(
                settings.url,
                settings.api_key,
                settings.api_secret.get_secret_value(),
                timeout=aiohttp.ClientTimeout(total=_ANSWER_S),
            )
        return self._api


def _silent(where: str) -> Unavailable:
    return Unavailable(
        f"the LiveKit server at {where} does not answer; is it running, and is LIVEKIT_URL right?",
        retry_after_ms=ILL_MS,
    )


def _refusal(where: str, status: int) -> DuplexError:
    if status in _REFUSED:
        return Internal(
            f"the LiveKit server at {where} refuses our key or secret; LIVEKIT_API_KEY and "
            "LIVEKIT_API_SECRET must be one of its pairs, and both clocks must agree"
        )
    return Unavailable(
        f"{where} answers, but not as a LiveKit server does (HTTP {status}); is LIVEKIT_URL right?",
        retry_after_ms=ILL_MS,
    )
