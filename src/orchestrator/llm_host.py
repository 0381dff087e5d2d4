"""In from a language-model host: it connects by WebSocket or gRPC and streams replies.

`HostHub` holds the connected hosts and deals sessions out to them, `HostSession` is one
conversation; below them the shells that move messages between a socket and a `HostLink`.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import grpc
from aiohttp import WSMsgType, web

from src.common.tasks import cancel_and_wait, timeout
from src.orchestrator.llm_context import Gate, Gates
from src.orchestrator.llm_host_link import HostLink, HostReply, Wake
from src.orchestrator.llm_host_wire import (
    BridgeMessage,
    Hello,
    HostMessage,
    Welcome,
    bridge_to_proto,
    host_from_proto,
    parse_host,
)
from src.rpc.errors import (
    DuplexError,
    Exhausted,
    InvalidArgument,
    Unauthenticated,
    Unavailable,
    abort,
)
from src.rpc.generated import llm_bridge_pb2 as pb
from src.rpc.generated import llm_bridge_pb2_grpc as pb_grpc

log = logging.getLogger(__name__)

KeyCheck = Callable[[str], bool]
_Context: TypeAlias = "grpc.aio.ServicerContext[pb.HostMessage, pb.BridgeMessage]"

MAX_HOSTS = 64
HELLO_TIMEOUT_S = 5.0
MAX_MESSAGE_BYTES = 256 * 1024


class HostHub:
    """All connected hosts. Sessions are dealt out in turn."""

    def __init__(self) -> None:
        self._links: list[HostLink] = []
        self._dealt = 0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(link.name for link in self._links)

    def session(
        self, session_id: str, *, first_token_timeout_ms: int, idle_timeout_ms: int
    ) -> HostSession:
        return HostSession(self.pick, session_id, first_token_timeout_ms, idle_timeout_ms)

    def pick(self) -> HostLink:
        """The next host in turn. Raises Unavailable when there is none."""
        if not self._links:
            raise Unavailable("no language model host is connected")
        self._dealt += 1
        return self._links[self._dealt % len(self._links)]

    def join(self, link: HostLink) -> None:
        """Raises Exhausted."""
        if len(self._links) >= MAX_HOSTS:
            raise Exhausted(f"{MAX_HOSTS} language model hosts are connected already")
        self._links.append(link)
        log.info("language model host connected", extra={"host": link.name})

    def leave(self, link: HostLink) -> None:
        if link in self._links:
            self._links.remove(link)
            log.info("language model host gone", extra={"host": link.name})
        link.lose()

    def ws_handler(
        self, check_key: KeyCheck
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """For `router.add_get("/v1/llm", …)`. `check_key` gets the presented key, "" if none."""

        async def handle(request: web.Request) -> web.StreamResponse:
            presented = _bearer(request.headers.get("Authorization", ""))
            if presented and not check_key(presented):
                body = {"error": {"code": Unauthenticated.code, "message": "wrong API key"}}
                return web.json_response(body, status=Unauthenticated.http)
            socket = web.WebSocketResponse(heartbeat=20, max_msg_size=MAX_MESSAGE_BYTES)
            await socket.prepare(request)
            try:
                await serve(self, _WsChannel(socket), check_key, presented)
            except DuplexError as error:
                await socket.close(code=error.close, message=error.message.encode()[:120])
            return socket

        return handle

    def add_to_grpc(self, server: grpc.aio.Server, check_key: KeyCheck) -> None:
        """Serve LLMHost.Connect on a gRPC server."""
        register = pb_grpc.add_LLMHostServicer_to_server
        register(_Servicer(self, check_key), server)  # type: ignore[no-untyped-call]

    async def aclose(self) -> None:
        for link in tuple(self._links):
            self.leave(link)


@dataclass(slots=True)
class _HostTurn:
    wire_id: str
    link: HostLink
    reply: HostReply
    streaming: bool = True


class HostSession:
    """One conversation with a connected host, which keeps the context itself.

    A host is told of each turn's end exactly once: `Cut` with what was heard when the session
    commits it, or with nothing when it was thrown away (a speculation that came to nothing).
    """

    def __init__(
        self,
        pick: Callable[[], HostLink],
        session_id: str,
        first_token_timeout_ms: int,
        idle_timeout_ms: int,
    ) -> None:
        self._pick = pick
        self._session_id = session_id
        self._first_token_timeout_ms = first_token_timeout_ms
        self._idle_timeout_ms = idle_timeout_ms
        self._link: HostLink | None = None
        self._gates = Gates()
        self._turns: dict[str, _HostTurn] = {}
        self._attempts = 0

    @property
    def name(self) -> str:
        return f"host:{self._link.name}" if self._link else "host"

    def respond(
        self, turn_id: str, text: str, *, speculative: bool = False
    ) -> AsyncGenerator[str, None]:
        return self._stream(turn_id, text, speculative, self._gates.open(turn_id))

    async def _stream(
        self, turn_id: str, text: str, speculative: bool, gate: Gate
    ) -> AsyncGenerator[str, None]:
        changed = asyncio.Event()
        turn = self._begin(turn_id, text, speculative, changed.set)
        limit_ms, doing = self._first_token_timeout_ms, "begin to answer"
        try:
            while True:
                await gate.passed()
                finished = turn.reply.finished
                if piece := turn.reply.take():
                    yield piece
                    limit_ms, doing = self._idle_timeout_ms, "go on"
                elif finished:
                    return
                else:
                    await self._wait(turn, changed, gate, limit_ms, doing)
        finally:
            turn.streaming = False
            if not turn.reply.finished:
                turn.link.hold(self._session_id, turn.wire_id)

    async def _wait(
        self, turn: _HostTurn, changed: asyncio.Event, gate: Gate, limit_ms: int, doing: str
    ) -> None:
        changed.clear()
        try:
            async with timeout(limit_ms / 1000):
                await changed.wait()
        except asyncio.TimeoutError:
            # A host that was told to hold is silent because it obeys.
            if not gate.held:
                raise Unavailable(
                    f"the language model host {turn.link.name!r} did not {doing} "
                    f"within {limit_ms} ms"
                ) from None

    def _begin(self, turn_id: str, text: str, speculative: bool, wake: Wake) -> _HostTurn:
        self._forget_abandoned()
        if self._link is None or self._link.lost:
            self._link = self._pick()
        # Two attempts at one turn are two turns to the host: late text of the first stays out.
        self._attempts += 1
        wire_id = f"{turn_id}.{self._attempts}"
        reply = self._link.begin(
            self._session_id, wire_id, text, speculative=speculative, wake=wake
        )
        turn = self._turns[turn_id] = _HostTurn(wire_id, self._link, reply)
        return turn

    def _forget_abandoned(self) -> None:
        for turn_id, turn in tuple(self._turns.items()):
            if not turn.streaming and not turn.reply.finished:
                self._end(turn_id, "", completed=False)

    def _end(self, turn_id: str, heard_text: str, *, completed: bool) -> None:
        if turn := self._turns.pop(turn_id, None):
            turn.link.cut(self._session_id, turn.wire_id, heard_text, completed=completed)

    def hold(self, turn_id: str) -> None:
        self._gates.hold(turn_id)
        if turn := self._turns.get(turn_id):
            turn.link.hold(self._session_id, turn.wire_id)

    def go(self, turn_id: str) -> None:
        self._gates.go(turn_id)
        if turn := self._turns.get(turn_id):
            turn.link.go(self._session_id, turn.wire_id)

    def commit(self, turn_id: str, user_text: str, heard_text: str, *, completed: bool) -> None:
        self._gates.drop(turn_id)
        self._end(turn_id, heard_text, completed=completed)

    async def aclose(self) -> None:
        self._turns.clear()
        if self._link is not None:
            self._link.close_session(self._session_id)


class _Channel(Protocol):
    async def receive(self) -> HostMessage | None:
        """None when the host has left. Raises InvalidArgument."""
        ...

    async def send(self, message: BridgeMessage) -> None: ...


class _WsChannel:
    def __init__(self, socket: web.WebSocketResponse) -> None:
        self._socket = socket

    async def receive(self) -> HostMessage | None:
        message = await self._socket.receive()
        if message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
            return parse_host(message.data)
        return None

    async def send(self, message: BridgeMessage) -> None:
        try:
            await self._socket.send_str(message.model_dump_json())
        except ConnectionError:
            # The reader sees the end of the socket too, and that is what ends the link.
            log.debug("language model host closed its socket while we wrote")


class _GrpcChannel:
    def __init__(self, context: _Context) -> None:
        self._context = context

    async def receive(self) -> HostMessage | None:
        message = await self._context.read()
        return host_from_proto(message) if isinstance(message, pb.HostMessage) else None

    async def send(self, message: BridgeMessage) -> None:
        await self._context.write(bridge_to_proto(message))


class _Servicer(pb_grpc.LLMHostServicer):
    def __init__(self, hub: HostHub, check_key: KeyCheck) -> None:
        self._hub = hub
        self._check_key = check_key

    async def Connect(self, request_iterator: object, context: _Context) -> None:
        metadata = dict(context.invocation_metadata() or ())
        presented = _bearer(str(metadata.get("authorization", "")))
        try:
            await serve(self._hub, _GrpcChannel(context), self._check_key, presented)
        except DuplexError as error:
            await abort(context, error)


def _bearer(header: str) -> str:
    scheme, _, key = header.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


async def serve(hub: HostHub, channel: _Channel, check_key: KeyCheck, presented: str) -> None:
    """From the first message to the last. Raises DuplexError when we end it."""
    hello = await _hello(channel)
    if not check_key(presented or hello.api_key):
        raise Unauthenticated("wrong or missing API key: send it as `api_key` in hello")
    changed, lost = asyncio.Event(), asyncio.Event()

    def wake() -> None:
        changed.set()
        if link.lost:
            lost.set()

    link = HostLink(hello.name or "unnamed", wake)
    hub.join(link)
    try:
        await channel.send(Welcome(bridge_id=uuid.uuid4().hex))
        # `lost` on its own: a write to a host that does not read would never come back to look.
        await _first_of(_read(channel, link), _write(channel, link, changed), lost.wait())
    finally:
        hub.leave(link)


async def _hello(channel: _Channel) -> Hello:
    try:
        async with timeout(HELLO_TIMEOUT_S):
            message = await channel.receive()
    except asyncio.TimeoutError:
        raise InvalidArgument("a host must begin with hello") from None
    if not isinstance(message, Hello):
        raise InvalidArgument("a host must begin with hello")
    return message


async def _read(channel: _Channel, link: HostLink) -> None:
    while (message := await channel.receive()) is not None:
        if isinstance(message, Hello):
            raise InvalidArgument("hello comes once")
        link.receive(message)


async def _write(channel: _Channel, link: HostLink, changed: asyncio.Event) -> None:
    while True:
        await changed.wait()
        changed.clear()
        for message in link.take():
            await channel.send(message)


async def _first_of(*jobs: Coroutine[Any, Any, object]) -> None:
    """Run all until one ends, then stop the others. Raises what the first one raised."""
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            if not task.done():
                await cancel_and_wait(task)
