"""One room, from connect to leave: the same session as over a WebSocket, for the user in it."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from livekit import rtc

from src.common.clock import Clock
from src.common.logging import log_context
from src.common.tasks import TaskGroup
from src.orchestrator.metrics import Metrics
from src.orchestrator.rooms.intake import Intake
from src.orchestrator.rooms.joining import Voice, join, leave, speak_up
from src.orchestrator.rooms.link import Link
from src.orchestrator.rooms.presence import PresenceLimits
from src.orchestrator.rooms.room_events import RoomEvents
from src.orchestrator.rooms.room_input import RoomInput
from src.orchestrator.rooms.settings import LiveKitSettings
from src.orchestrator.rooms.speaker import RtcSink
from src.orchestrator.rooms.transport import RoomTransport
from src.orchestrator.rooms.watch import Watch
from src.orchestrator.ws_endpoint import Session
from src.rpc.errors import DuplexError, Internal
from src.rpc.ws_events import SessionStart

log = logging.getLogger(__name__)

_CLOSE_S = 3.0
_LINGER_S = 2.0
# For the SDK a packet is sent when it lies in its own buffer, and what lies there as we leave is
# lost: without this, the last event of one session in twenty (measured, on loopback).
_FAREWELL_S = 0.3

RoomSessionFactory = Callable[[str, SessionStart, RoomTransport], Session]
"""May raise DuplexError: the user is told, and the room is left."""


@dataclass(frozen=True, slots=True)
class RoomAccess:
    """`token` is ours, for `room`. `identity`: whom to listen to; empty: whoever comes first."""

    url: str
    token: str = field(repr=False)
    room: str
    identity: str = ""


@dataclass(frozen=True, slots=True)
class _Place:
    """A room that we are in."""

    room: rtc.Room
    voice: Voice
    link: Link
    intake: Intake

    def events(self, *, packets: bool) -> RoomEvents:
        return RoomEvents(
            self.room,
            self.link.identity,
            events=packets,
            mic_track_sid=lambda: self.link.mic_track_sid,
            agent_track_sid=lambda: self.voice.publication.sid,
        )


class RoomVisit:
    """Runs once. However it ends, the room is left and no task remains."""

    def __init__(
        self,
        access: RoomAccess,
        make_session: RoomSessionFactory,
        settings: LiveKitSettings,
        metrics: Metrics,
        clock: Clock,
    ) -> None:
        self._access = access
        self._make_session = make_session
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._reason = ""
        self._over = asyncio.Event()
        self._begin = asyncio.Event()
        self._user_here = False
        self._session: Session | None = None
        self._transport: RoomTransport | None = None
        self._link: Link | None = None

    @property
    def linked(self) -> str:
        """The identity of the user whom the visit is for; "" until one has come."""
        return self._link.identity if self._link is not None else ""

    def warn(self, error: DuplexError) -> None:
        """Tell the user; the visit goes on."""
        if self._transport is not None:
            self._transport.send_error(error, fatal=False)

    def close(self, reason: str) -> None:
        """Idempotent: the first reason is the one. `run` returns when the room is left."""
        self._reason = self._reason or reason or "closed"
        self._over.set()
        self._begin.set()

    async def run(self) -> str:
        """Why it ended. Raises Unauthenticated and Unavailable when the room cannot be entered."""
        if self._over.is_set():
            return self._reason
        room, intake = rtc.Room(), Intake(self.close)
        watch = Watch(self._limits(), self._clock, on_here=self._on_here, on_end=self.close)
        link = self._link = Link(
            room,
            wanted=self._access.identity,
            agent_name=self._settings.agent_name,
            intake=intake,
            tell=watch.tell,
        )
        voice: Voice | None = None
        try:
            inputs = self._inputs(room, link, intake)
            await join(room, self._access.url, self._access.token)
            link.look_around()
            voice = await speak_up(room, self._settings)
            await self._stay(_Place(room, voice, link, intake), watch, inputs)
        finally:
            watch.close()
            link.close()
            await leave(room)
            if voice is not None:
                await voice.source.aclose()
        return self._reason

    # --- in the room ---

    async def _stay(self, place: _Place, watch: Watch, inputs: RoomInput) -> None:
        async with TaskGroup() as tasks:
            presence = tasks.create_task(watch.run(place.link.packet_age_ms), name="presence")
            await self._begin.wait()
            if not self._over.is_set():
                tasks.create_task(inputs.run(), name="input")
                await self._attend(place)
            inputs.close()
            presence.cancel()

    async def _attend(self, place: _Place) -> None:
        """The session, and what it needs around it."""
        attributes = place.link.attributes
        events = place.events(packets=attributes.get("duplex.events") == "1")
        events.failed.add_done_callback(lambda why: self.close(why.result()))
        sink = RtcSink(place.voice.source)
        transport = RoomTransport(sink, events, self._clock, lead_ms=self._settings.lead_ms)
        self._transport = transport
        async with TaskGroup() as tasks:
            speaker = tasks.create_task(transport.speaker.run(), name="speaker")
            writer = tasks.create_task(events.run(), name="writer")
            await self._converse(transport, place.intake, attributes)
            events.finish()
            if place.link.user is not None:
                await asyncio.wait([writer], timeout=_LINGER_S)
                await asyncio.sleep(_FAREWELL_S)
            speaker.cancel()
            writer.cancel()
        self._transport = None

    async def _converse(
        self, transport: RoomTransport, intake: Intake, attributes: Mapping[str, str]
    ) -> None:
        session_id = f"s-{secrets.token_hex(6)}"
        with log_context(session_id=session_id):
            try:
                session = self._make_session(session_id, _start(attributes), transport)
            except DuplexError as error:
                self._fail(error)
                return
            log.info("session begins", extra={"room": self._access.room})
            await self._until_over(session, transport, intake)
            log.info("session ends", extra={"reason": self._reason})

    async def _until_over(self, session: Session, transport: RoomTransport, intake: Intake) -> None:
        transport.attach(session)
        session.on_presence(here=self._user_here)
        self._session = session
        async with TaskGroup() as tasks:
            talk = tasks.create_task(self._talk(session), name="session")
            feed = tasks.create_task(_feed(intake, session, transport), name="microphone")
            await self._over.wait()
            session.close(self._reason)
            await asyncio.wait([talk], timeout=_CLOSE_S)
            talk.cancel()
            feed.cancel()
        self._session = None

    async def _talk(self, session: Session) -> None:
        try:
            await session.run()
        except DuplexError as error:
            self._fail(error)
        except Exception:  # an edge: whatever went wrong ends this session only
            log.exception("session failed")
            self._fail(Internal("the session failed; the reason is in the server's log"))
        else:
            self.close("ended")

    # --- what happens meanwhile ---

    def _on_here(self, here: bool) -> None:
        self._user_here = here
        if here:
            self._begin.set()
        if self._session is not None:
            self._session.on_presence(here=here)

    def _report(self, error: DuplexError) -> None:
        """Something was refused; the session goes on."""
        self._metrics.refused.labels(error.code).inc()
        self.warn(error)

    def _fail(self, error: DuplexError) -> None:
        log.warning("the session cannot go on", extra={"code": error.code, "error": error.message})
        self._metrics.refused.labels(error.code).inc()
        if self._transport is not None:
            self._transport.send_error(error, fatal=True)
        self.close(error.code)

    # --- parts ---

    def _inputs(self, room: rtc.Room, link: Link, intake: Intake) -> RoomInput:
        """Before we are in the room: what the user sends may be there first."""
        return RoomInput(
            room,
            lambda: link.identity,
            intake,
            self._report,
            started=lambda: self._transport is not None and self._transport.started,
            on_chat=self._on_chat,
            clock=self._clock,
        )

    def _on_chat(self, text: str) -> None:
        if self._transport is not None:
            self._transport.on_chat(text)

    def _limits(self) -> PresenceLimits:
        settings = self._settings
        return PresenceLimits(
            join_ms=settings.join_timeout_ms,
            gone_ms=settings.user_gone_ms,
            grace_ms=settings.reconnect_grace_ms,
        )


async def _feed(intake: Intake, session: Session, transport: RoomTransport) -> None:
    await transport.opened.wait()
    await intake.open(session)


def _start(attributes: Mapping[str, str]) -> SessionStart:
    """What a WebSocket's first message says, from a participant's attributes."""
    return SessionStart(
        mode=attributes.get("duplex.mode") or "default",
        model=attributes.get("duplex.model", ""),
        voice=attributes.get("duplex.voice", ""),
        language=attributes.get("duplex.language", ""),
    )
