"""/v1/session: one WebSocket, one session. Who is let in, what runs, and how it ends."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket as sockets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from aiohttp import ClientConnectionResetError, WSCloseCode, WSMessage, WSMsgType, web

from src.common.clock import Clock
from src.common.logging import log_context
from src.common.tasks import TaskGroup, timeout
from src.orchestrator.auth import SUBPROTOCOL, SessionSlots
from src.orchestrator.metrics import Metrics
from src.orchestrator.ports import MicSink
from src.orchestrator.ws_inbound import Inbound, InboundLimits, Refused
from src.orchestrator.ws_transport import OutboundLimits, WsTransport, error_event
from src.rpc.errors import (
    DuplexError,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    Unavailable,
)
from src.rpc.ws_events import ClientEvent, ModelSwitch, Playback, SessionStart, TextInput

log = logging.getLogger(__name__)

_WRITE_BUFFER_BYTES = 16 * 1024
_LINGER_S = 2.0


class Session(MicSink, Protocol):
    """What a connection runs. `DuplexSession` in production."""

    async def run(self) -> None:
        """Until `close`, or until it cannot go on (raises DuplexError)."""
        ...

    def close(self, reason: str) -> None: ...


SessionFactory = Callable[[str, SessionStart, WsTransport], Session]
"""May raise DuplexError: the client is told, and closed."""


@dataclass(frozen=True, slots=True)
class EndpointLimits:
    inbound: InboundLimits = field(default_factory=InboundLimits)
    outbound: OutboundLimits = field(default_factory=OutboundLimits)
    max_message_bytes: int = 256 * 1024
    start_timeout_ms: int = 10_000
    heartbeat_ms: int = 20_000
    close_timeout_ms: int = 3_000
    """How long a session may take to end once it was told to."""


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a connection ends. `error` is told to the client and gives the close code."""

    reason: str
    error: DuplexError | None = None
    reachable: bool = True

    @property
    def code(self) -> int:
        return self.error.close if self.error else int(WSCloseCode.OK)

    @property
    def message(self) -> bytes:
        # A close frame holds 123 bytes of reason.
        return (self.error.message if self.error else self.reason).encode()[:120]


class _Socket(web.WebSocketResponse):
    """Says why before it closes on a message that is too long to be read."""

    refusal: DuplexError | None = None

    async def close(
        self, *, code: int = WSCloseCode.OK, message: bytes = b"", drain: bool = True
    ) -> bool:
        if code == WSCloseCode.MESSAGE_TOO_BIG and not self.closed:
            self.refusal = InvalidArgument("message too long; send audio in pieces of 20 ms")
            await self.send_str(error_event(self.refusal, fatal=True).model_dump_json())
            code, message = self.refusal.close, self.refusal.message.encode()
        return await super().close(code=code, message=message, drain=drain)


class WsEndpoint:
    """All connections of this process."""

    def __init__(
        self,
        make_session: SessionFactory,
        slots: SessionSlots,
        limits: EndpointLimits,
        metrics: Metrics,
        clock: Clock,
    ) -> None:
        self._make_session = make_session
        self._slots = slots
        self._limits = limits
        self._metrics = metrics
        self._clock = clock
        self._live: set[Connection] = set()
        self._draining = False
        self._empty = asyncio.Event()

    @property
    def live(self) -> int:
        return len(self._live)

    async def handle(self, request: web.Request, who: str) -> web.StreamResponse:
        """`who` comes from `ApiKeys.check`."""
        socket = self._socket()
        await socket.prepare(request)
        if request.transport is not None:
            _tune(request.transport)
        connection = Connection(socket, self._limits, self._metrics, self._clock)
        self._live.add(connection)
        try:
            await self._serve(connection, who)
        finally:
            self._live.discard(connection)
            self._check_empty()
            if request.transport is not None:
                request.transport.abort()
        return socket

    async def drain(self, drain_ms: int) -> None:
        """Take nobody new, tell everybody, wait for them to finish, then close what is left."""
        self._draining = True
        for connection in self._live:
            connection.warn(_going_down())
        self._check_empty()
        with suppress(asyncio.TimeoutError):
            async with timeout(drain_ms / 1000):
                await self._empty.wait()
        for connection in self._live:
            connection.end(Ending("draining", _going_down()))
        with suppress(asyncio.TimeoutError):
            async with timeout(2 * _LINGER_S + self._limits.close_timeout_ms / 1000):
                await self._empty.wait()

    def _check_empty(self) -> None:
        if self._draining and not self._live:
            self._empty.set()

    async def _serve(self, connection: Connection, who: str) -> None:
        try:
            if self._draining:
                raise _going_down()
            self._slots.take(who)
        except DuplexError as error:
            await connection.turn_away(error)
            return
        try:
            await connection.run(self._make_session)
        finally:
            self._slots.give_back(who)

    def _socket(self) -> _Socket:
        limits = self._limits
        return _Socket(
            heartbeat=limits.heartbeat_ms / 1000,
            max_msg_size=limits.max_message_bytes,
            compress=False,
            protocols=(SUBPROTOCOL,),
            # Wait for the socket after every message, so that what waits can still be flushed.
            writer_limit=0,
            timeout=_LINGER_S,
        )


class Connection:
    """One client, from its first message to its close code."""

    def __init__(
        self, socket: _Socket, limits: EndpointLimits, metrics: Metrics, clock: Clock
    ) -> None:
        self._socket = socket
        self._limits = limits
        self._metrics = metrics
        self._clock = clock
        self._transport = WsTransport(clock, limits.outbound)
        self._inbound = Inbound(limits.inbound, clock.now_ms())
        self._told: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()

    def warn(self, error: DuplexError) -> None:
        self._transport.send_error(error, fatal=False)

    def end(self, ending: Ending) -> None:
        if not self._told.done():
            self._told.set_result(ending)

    async def turn_away(self, error: DuplexError) -> None:
        """For a connection without a writer: say why, and close."""
        self._refused(error)
        self._transport.send_error(error, fatal=True)
        self._transport.finish()
        with suppress(asyncio.TimeoutError):
            async with timeout(_LINGER_S):
                await self._write()
        await self._hang_up(Ending(error.code, error))

    async def run(self, make_session: SessionFactory) -> None:
        try:
            start = await self._await_start()
            if start is None:
                return
            session_id = f"s-{secrets.token_hex(6)}"
            session = make_session(session_id, start, self._transport)
        except Refused as refused:
            await self.turn_away(refused.error)
        except DuplexError as error:
            await self.turn_away(error)
        else:
            with log_context(session_id=session_id):
                await self._converse(session)

    async def _await_start(self) -> SessionStart | None:
        """The first message; None when the client left instead. Raises Refused."""
        message = await self._first_message()
        now_ms = self._clock.now_ms()
        if message.type is WSMsgType.TEXT:
            event = self._inbound.text(message.data, now_ms)
            assert isinstance(event, SessionStart), "Inbound takes nothing else first"  # noqa: S101
            return event
        if message.type is WSMsgType.BINARY:
            self._inbound.binary(message.data, now_ms)
        return None

    async def _first_message(self) -> WSMessage:
        """Raises Refused when it does not come in time, or the server goes down first."""
        limit_ms = self._limits.start_timeout_ms
        receive = asyncio.ensure_future(self._socket.receive())
        parts: list[asyncio.Future[Any]] = [receive, self._told]
        try:
            await asyncio.wait(parts, timeout=limit_ms / 1000, return_when=asyncio.FIRST_COMPLETED)
            if receive.done():
                return receive.result()
        finally:
            receive.cancel()
        late = InvalidArgument(f"no session.start within {limit_ms} ms of connecting")
        told = self._told.result().error if self._told.done() else None
        raise Refused(told or late, fatal=True)

    async def _converse(self, session: Session) -> None:
        log.info("session begins")
        try:
            ending = await self._until_something_ends(session)
        except Exception:  # an edge: whatever went wrong ends this client only
            log.exception("session failed")
            await self.turn_away(Internal("the session failed; the reason is in the server's log"))
            return
        log.info("session ends", extra={"reason": ending.reason, "code": ending.code})
        if ending.error is not None:
            self._refused(ending.error)

    async def _until_something_ends(self, session: Session) -> Ending:
        async with TaskGroup() as tasks:
            talk = tasks.create_task(self._talk(session), name="session")
            write = tasks.create_task(self._write(), name="writer")
            listen = tasks.create_task(self._listen(session), name="reader")
            watch = tasks.create_task(self._watch(), name="watchdog")
            parts: list[asyncio.Future[Ending]] = [talk, watch, listen, write, self._told]
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            ending = next(part.result() for part in parts if part.done())
            session.close(ending.reason)
            await asyncio.wait([talk], timeout=self._limits.close_timeout_ms / 1000)
            await self._say_goodbye(ending, write)
            # Before the writer is cancelled: aiohttp's drain cannot be waited for again after that.
            await self._hang_up(ending)
            for task in (talk, write, listen, watch):
                task.cancel()
        return ending

    async def _say_goodbye(self, ending: Ending, write: asyncio.Future[Ending]) -> None:
        """Give what is queued, and the reason, a moment to reach the client."""
        if ending.error is not None:
            self._transport.send_error(ending.error, fatal=True)
        self._transport.finish()
        if ending.reachable:
            await asyncio.wait([write], timeout=_LINGER_S)

    # --- the four parts of a running connection ---

    async def _talk(self, session: Session) -> Ending:
        try:
            await session.run()
        except DuplexError as error:
            return Ending(error.code, error)
        return Ending("ended")

    async def _write(self) -> Ending:
        try:
            await self._transport.write_to(self._socket)
        except (ClientConnectionResetError, ConnectionError):
            return Ending("client_gone", reachable=False)
        return Ending("ended")

    async def _watch(self) -> Ending:
        try:
            await self._transport.watch()
        except DuplexError as error:
            return Ending("client_stalled", error, reachable=False)

    async def _listen(self, session: Session) -> Ending:
        async for message in self._socket:
            try:
                if message.type is WSMsgType.BINARY:
                    session.on_mic(self._inbound.binary(message.data, self._clock.now_ms()))
                elif message.type is WSMsgType.TEXT:
                    event = self._inbound.text(message.data, self._clock.now_ms())
                    if not self._dispatch(session, event):
                        return Ending("client_ended")
            except Refused as refused:
                if refused.fatal:
                    return Ending("refused", refused.error)
                self._refused(refused.error)
                self._transport.send_error(refused.error, fatal=False)
        return Ending("client_gone", self._socket.refusal, reachable=False)

    def _dispatch(self, session: Session, event: ClientEvent) -> bool:
        """False: the client wants to end."""
        if isinstance(event, TextInput | ModelSwitch) and not self._transport.started:
            # Audio that comes too early is only silence; words would be lost.
            early = FailedPrecondition(f"{event.type} before session.started; send it again then")
            raise Refused(early, fatal=False)
        if isinstance(event, Playback):
            heard = self._transport.acknowledge(event.utterance_id, event.seq)
            session.on_playback(event.utterance_id, heard, flushed=event.flushed)
        elif isinstance(event, TextInput):
            session.on_text(event.text, speak=event.speak)
        elif isinstance(event, ModelSwitch):
            session.on_model_switch(event.model, event.voice)
        else:
            return False
        return True

    # --- the end ---

    async def _hang_up(self, ending: Ending) -> None:
        """Close with a code; a client that does not read is not waited for."""
        try:
            async with timeout(_LINGER_S):
                await self._socket.close(code=ending.code, message=ending.message)
        except (asyncio.TimeoutError, ClientConnectionResetError, ConnectionError):
            log.debug("the client did not take the close frame")

    def _refused(self, error: DuplexError) -> None:
        self._metrics.refused.labels(error.code).inc()


def _going_down() -> Unavailable:
    return Unavailable("the server is going down; reconnect in a moment", retry_after_ms=2_000)


def _tune(transport: asyncio.Transport) -> None:
    """Keep unsent audio in our own queue, where a flush can take it back."""
    transport.set_write_buffer_limits(high=_WRITE_BUFFER_BYTES)
    raw = transport.get_extra_info("socket")
    if raw is None or raw.family not in (sockets.AF_INET, sockets.AF_INET6):
        return
    raw.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_NODELAY, 1)
    if hasattr(sockets, "TCP_NOTSENT_LOWAT"):
        raw.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_NOTSENT_LOWAT, _WRITE_BUFFER_BYTES)
