"""A spoken session over the WebSocket: what the CLI, the demo and the benchmarks are built on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import aiohttp
from pydantic import ValidationError

from src.audio.pcm import SAMPLE_RATE, Int16, from_bytes
from src.client.player import Player, Position
from src.common.clock import Clock, MonotonicClock
from src.common.tasks import TaskGroup
from src.rpc.errors import (
    DuplexError,
    Exhausted,
    InvalidArgument,
    Unauthenticated,
    Unavailable,
)
from src.rpc.ws_events import (
    AudioBegin,
    AudioEnd,
    Error,
    Flush,
    ModelSwitch,
    Playback,
    ServerEvent,
    SessionEnd,
    SessionEnded,
    SessionStart,
    SessionStarted,
    TextInput,
    parse_server,
)

PATH = "/v1/session"
TICK_MS = 10
TICK_SAMPLES = SAMPLE_RATE * TICK_MS // 1000
ACK_EVERY_MS = 60

Socket: TypeAlias = "aiohttp.ClientWebSocketResponse[Any]"
OnEvent = Callable[[float, ServerEvent], None]
OnAudio = Callable[[Int16], None]


class SessionFailed(DuplexError):
    """The server ended the session with an error."""

    def __init__(self, error: Error) -> None:
        super().__init__(error.message, retry_after_ms=error.retry_after_ms)
        self.error = error


@dataclass(slots=True)
class Flushed:
    """One obeyed `flush`: `edge_ms` is the server's audio time, the others are the client's own."""

    utterance_id: str
    edge_ms: int
    received_ms: float
    heard_seq: int
    silent_ms: float | None = None


class VoiceClient:
    """One connected session.

    `on_event(at_ms, event)` sees every server event; `on_audio(samples)` gets 10 ms of 48 kHz sound
    at a time, silence included, on the client's audio clock: what a speaker would play. Times are
    milliseconds since the session began, on the same origin as the sound.
    """

    def __init__(
        self,
        socket: Socket,
        on_event: OnEvent,
        on_audio: OnAudio,
        clock: Clock,
    ) -> None:
        self._socket = socket
        self._on_event = on_event
        self._on_audio = on_audio
        self._clock = clock
        self._origin_ms = clock.now_ms()
        self.player = Player()
        self.started = asyncio.Event()
        """The server is ready: text sent before is refused, sound is kept."""
        self.ended: SessionEnded | None = None
        self.close_code: int | None = None
        self.closed = asyncio.Event()
        self.flushes: list[Flushed] = []
        self._acked = self.player.position

    def now_ms(self) -> float:
        return self._clock.now_ms() - self._origin_ms

    # --- to the server ---

    async def send_mic(self, pcm: bytes) -> None:
        await self._socket.send_bytes(pcm)

    async def send_text(self, text: str, *, speak: bool = False) -> None:
        await self._send(TextInput(text=text, speak=speak))

    async def switch_model(self, model: str, voice: str = "") -> None:
        await self._send(ModelSwitch(model=model, voice=voice))

    async def end(self) -> None:
        await self._send(SessionEnd())

    async def _send(self, event: TextInput | ModelSwitch | SessionEnd | Playback) -> None:
        if not self._socket.closed:
            # A socket that is closing refuses; its reader is about to say why.
            with suppress(ConnectionError):
                await self._socket.send_str(event.model_dump_json())

    # --- from the server ---

    async def receive(self) -> None:
        """Until the socket closes. Raises SessionFailed after a fatal error event, Unavailable when
        the server speaks another protocol.
        """
        fatal: Error | None = None
        async for message in self._socket:
            if message.type is aiohttp.WSMsgType.BINARY:
                self._push(message.data)
            elif message.type is aiohttp.WSMsgType.TEXT:
                event = _parsed(message.data)
                self._on_event(self.now_ms(), event)
                await self._obey(event)
                if isinstance(event, Error) and event.fatal:
                    fatal = event
        self.close_code = self._socket.close_code
        self.closed.set()
        if fatal is not None:
            raise SessionFailed(fatal)

    def _push(self, pcm: bytes) -> None:
        if len(pcm) % 2:
            raise Unavailable(f"the server sent {len(pcm)} bytes of audio: half a sample too many")
        self.player.push(from_bytes(pcm))

    async def _obey(self, event: ServerEvent) -> None:
        if isinstance(event, SessionStarted):
            self.started.set()
        elif isinstance(event, AudioBegin):
            self.player.begin(event.utterance_id, event.seq)
        elif isinstance(event, AudioEnd):
            self.player.end()
        elif isinstance(event, Flush):
            await self._flush(event)
        elif isinstance(event, SessionEnded):
            self.ended = event

    async def _flush(self, event: Flush) -> None:
        position = self.player.flush()
        seq = position.seq if position.utterance_id == event.utterance_id else -1
        self.flushes.append(Flushed(event.utterance_id, event.at_ms, self.now_ms(), seq))
        await self._send(Playback(utterance_id=event.utterance_id, seq=seq, flushed=True))
        self._acked = position

    # --- the audio clock ---

    async def play(self) -> None:
        """10 ms of sound every 10 ms, without drift; late ticks are caught up."""
        ticks = 0
        before = self.player.position
        while True:
            ticks += 1
            await asyncio.sleep(max(0.0, ticks * TICK_MS - self.now_ms()) / 1000)
            self._on_audio(self.player.pull(TICK_SAMPLES))
            self._note_silence()
            if before.utterance_id != self.player.position.utterance_id:
                # The next utterance began between two acknowledgements: the last word of this one
                # was heard all the same.
                await self._acknowledge(before)
            before = self.player.position
            if ticks % (ACK_EVERY_MS // TICK_MS) == 0 or not self.player.playing:
                await self._acknowledge(before)

    def _note_silence(self) -> None:
        if self.flushes and self.flushes[-1].silent_ms is None:
            self.flushes[-1].silent_ms = self.now_ms()

    async def _acknowledge(self, position: Position) -> None:
        if position != self._acked and position.utterance_id:
            self._acked = position
            await self._send(Playback(utterance_id=position.utterance_id, seq=position.seq))


def _discard(*_: Any) -> None:
    return None


@asynccontextmanager
async def connect(
    host: str,
    start: SessionStart,
    *,
    api_key: str = "",
    on_event: OnEvent = _discard,
    on_audio: OnAudio = _discard,
    clock: Clock | None = None,
) -> AsyncIterator[VoiceClient]:
    """A running session: received, played and acknowledged inside the `async with`.

    `host` is `ws://…` or `wss://…`, with or without the path. Raises Unavailable when nobody
    answers, Unauthenticated for a refused key, Exhausted when it is full, InvalidArgument for an
    address that is none, and in an exception group SessionFailed when the server ends it.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    async with aiohttp.ClientSession(headers=headers) as http:
        socket = await _dial(http, host)
        client = VoiceClient(socket, on_event, on_audio, clock or MonotonicClock())
        try:
            await socket.send_str(start.model_dump_json())
            async with TaskGroup() as tasks:
                playing = tasks.create_task(client.play(), name="play")
                receiving = tasks.create_task(client.receive(), name="receive")
                receiving.add_done_callback(lambda _: playing.cancel())
                yield client
                receiving.cancel()
        finally:
            await socket.close()


def session_url(host: str) -> str:
    """`localhost:8080`, `http://…`, `wss://…/v1/session`: whatever was typed. InvalidArgument."""
    scheme, found, rest = host.partition("://")
    if not found:
        scheme, rest = "ws", scheme
    scheme = {"http": "ws", "https": "wss"}.get(scheme, scheme)
    rest = rest.rstrip("/")
    if scheme not in ("ws", "wss") or not rest:
        raise InvalidArgument(f"not an address of a server: {host!r}; use ws://HOST:PORT")
    return f"{scheme}://{rest.removesuffix(PATH)}{PATH}"


def _parsed(text: str) -> ServerEvent:
    try:
        return parse_server(text)
    except ValidationError as error:
        fault = error.errors(include_input=False)[0]["msg"]
        raise Unavailable(f"the server speaks another protocol: {fault}") from None


async def _dial(http: aiohttp.ClientSession, host: str) -> Socket:
    url = session_url(host)
    try:
        return await http.ws_connect(url, heartbeat=20, max_msg_size=1 << 20, compress=0)
    except aiohttp.WSServerHandshakeError as error:
        if error.status == 401:
            raise Unauthenticated("the server refused the API key") from error
        message = await _refusal(http, url)
        if error.status == 429:
            raise Exhausted(message or "the server is full; try again in a moment") from error
        if not message:
            raise InvalidArgument(
                f"{url} answers, but not as this project's server ({error.status}): check --host"
            ) from error
        raise Unavailable(f"the server refused the connection: {error.status} {message}") from error
    except (aiohttp.ClientError, OSError) as error:
        raise Unavailable(f"no server at {url}; is it running? ({error})") from error


async def _refusal(http: aiohttp.ClientSession, url: str) -> str:
    """The JSON error behind a refused handshake, which the WebSocket client throws away."""
    plain = url.replace("ws", "http", 1)
    try:
        async with http.get(plain) as answer:
            return str(json.loads(await answer.text())["error"]["message"])
    except (aiohttp.ClientError, OSError, ValueError, KeyError):
        return ""
