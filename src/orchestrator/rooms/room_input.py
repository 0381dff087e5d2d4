"""What the user sends in a room, except by voice: chat, control events, an early recording.

Topic `lk.chat` (text stream): a typed turn. Topic `duplex.control` (data packet): one client event
of src/rpc/ws_events.py as JSON; `text`, `model.switch` and `session.end` mean something in a room.
Topic `lk.agent.pre-connect-audio-buffer` (byte stream): see recording.py. Everything else, and
everything of other participants, is left alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

import numpy as np
from livekit import rtc

from src.audio.pcm import Int16
from src.common.clock import Clock, MonotonicClock
from src.common.tasks import TaskGroup, timeout
from src.orchestrator.rooms.recording import MAX_RECORDING_BYTES, decode_recording
from src.orchestrator.ws_inbound import Allowance, InboundLimits, parse_event
from src.rpc.errors import DuplexError, Exhausted, FailedPrecondition, InvalidArgument
from src.rpc.ws_events import ClientEvent, ModelSwitch, SessionEnd, TextInput

log = logging.getLogger(__name__)

CHAT_TOPIC = "lk.chat"
CONTROL_TOPIC = "duplex.control"
RECORDING_TOPIC = "lk.agent.pre-connect-audio-buffer"
MAX_STREAM_BYTES = MAX_RECORDING_BYTES
"""For `rtc.DataStreamOptions.max_payload_byte_length`: nothing that is read here is longer."""
MAX_CHAT_CHARS = 20_000

_MAX_WAITING = 16
# Of a sender who lost their connection in mid-message and is back, nothing says that it is over.
_CHAT_S = 3.0
_RECORDING_S = 10.0


class Hearer(Protocol):
    """What the input calls: a session, and the visit around it."""

    def on_text(self, text: str, *, speak: bool) -> None: ...

    def on_model_switch(self, model: str, voice: str) -> None: ...

    def on_preconnect(self, samples: Int16) -> None:
        """16 kHz mono, at most ten seconds, from before the microphone's first sample here. Empty
        for a recording that could not be read: do not wait for it."""
        ...

    def on_end(self, reason: str) -> None:
        """`client_ended`, or `refused` for a client that floods or talks nonsense."""
        ...


class RoomInput:
    """One user's. Made before the room is connected, so that it misses nothing; `identity` is empty
    until they are known, and `run` is called then.

    `report` is told of everything that is refused. `started`: the session takes texts; before that
    they would be lost. `on_chat` is told of a typed turn before the session is.
    """

    def __init__(
        self,
        room: rtc.Room,
        identity: Callable[[], str],
        sink: Hearer,
        report: Callable[[DuplexError], None],
        *,
        started: Callable[[], bool] = lambda: True,
        on_chat: Callable[[str], None] = lambda text: None,
        clock: Clock | None = None,
        limits: InboundLimits | None = None,
    ) -> None:
        self._room = room
        self._identity = identity
        self._sink = sink
        self._report = report
        self._started = started
        self._on_chat = on_chat
        self._clock = clock or MonotonicClock()
        self._limits = limits or InboundLimits()
        per_s = self._limits.events_per_s
        self._allowance = Allowance(2 * per_s, per_s / 1000.0, self._clock.now_ms())
        self._bad = 0
        # Overflow: the stream that comes too much is refused.
        self._chats: asyncio.Queue[tuple[rtc.TextStreamReader, str]] = asyncio.Queue(_MAX_WAITING)
        self._recordings: asyncio.Queue[tuple[rtc.ByteStreamReader, str]] = asyncio.Queue(
            _MAX_WAITING
        )
        self._closed = asyncio.Event()
        room.register_text_stream_handler(CHAT_TOPIC, self._on_chat_stream)
        room.register_byte_stream_handler(RECORDING_TOPIC, self._on_recording_stream)
        room.on("data_received", self._on_packet)

    async def run(self) -> None:
        """Read what comes in streams, until `close`."""
        async with TaskGroup() as group:
            tasks = (
                group.create_task(self._read_chats(), name="room chat"),
                group.create_task(self._read_recordings(), name="room recording"),
            )
            await self._closed.wait()
            for task in tasks:
                task.cancel()

    def close(self) -> None:
        """Idempotent."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._room.unregister_text_stream_handler(CHAT_TOPIC)
        self._room.unregister_byte_stream_handler(RECORDING_TOPIC)
        self._room.off("data_received", self._on_packet)
        for queue in (self._chats, self._recordings):
            while not queue.empty():
                queue.get_nowait()[0].close()

    # --- what arrives; every call is one of the room's, and must not raise ---

    def _on_chat_stream(self, reader: rtc.TextStreamReader, sender: str) -> None:
        if self._is_stranger(sender):
            reader.close()
            return
        try:
            self._chats.put_nowait((reader, sender))
        except asyncio.QueueFull:
            reader.close()
            self._refuse(Exhausted("too many messages at once; send one after the other"))

    def _on_recording_stream(self, reader: rtc.ByteStreamReader, sender: str) -> None:
        if self._is_stranger(sender):
            reader.close()
            return
        try:
            self._recordings.put_nowait((reader, sender))
        except asyncio.QueueFull:
            reader.close()

    def _on_packet(self, packet: rtc.DataPacket) -> None:
        sender = packet.participant.identity if packet.participant is not None else ""
        if packet.topic != CONTROL_TOPIC or not sender or sender != self._identity():
            return
        try:
            self._spend()
            self._obey(self._parsed(packet.data))
        except DuplexError as error:
            self._refuse(error)

    def _is_stranger(self, sender: str) -> bool:
        return self._identity() not in ("", sender)

    # --- streams ---

    async def _read_chats(self) -> None:
        """One after the other: they are turns of one conversation."""
        while True:
            reader, sender = await self._chats.get()
            try:
                if sender == self._identity():
                    self._take_chat(await _read_text(reader))
            except DuplexError as error:
                self._refuse(error)
            except (rtc.StreamError, asyncio.TimeoutError) as error:
                log.info("a chat message broke off", extra={"error": type(error).__name__})
            finally:
                reader.close()

    async def _read_recordings(self) -> None:
        while True:
            reader, sender = await self._recordings.get()
            try:
                if sender == self._identity():
                    self._sink.on_preconnect(await _read_recording(reader))
            finally:
                reader.close()

    # --- what it means ---

    def _take_chat(self, text: str) -> None:
        self._spend()
        text = text.strip()
        if not text:
            raise InvalidArgument("an empty message")
        self._must_be_started("text")
        self._on_chat(text)
        self._sink.on_text(text, speak=False)

    def _spend(self) -> None:
        if not self._allowance.spend(1, self._clock.now_ms()):
            raise Exhausted("too many events; slow down", retry_after_ms=1_000)

    def _must_be_started(self, what: str) -> None:
        if not self._started():
            raise FailedPrecondition(f"{what} before session.started; send it again then")

    def _parsed(self, data: bytes) -> ClientEvent:
        try:
            return parse_event(data.decode(), self._limits.max_text_bytes)
        except UnicodeDecodeError as error:
            raise InvalidArgument("an event is JSON in UTF-8") from error

    def _obey(self, event: ClientEvent) -> None:
        if isinstance(event, TextInput | ModelSwitch):
            self._must_be_started(event.type)
        match event:
            case TextInput():
                self._sink.on_text(event.text, speak=event.speak)
            case ModelSwitch():
                self._sink.on_model_switch(event.model, event.voice)
            case SessionEnd():
                self._sink.on_end("client_ended")
            case _:
                raise InvalidArgument(f"{event.type} means nothing in a room")

    def _refuse(self, error: DuplexError) -> None:
        """Of a client that sends nothing but nonsense we take leave, as on the WebSocket."""
        self._bad += 1
        if self._bad <= self._limits.max_bad_messages:
            self._report(error)
        if self._bad == self._limits.max_bad_messages:
            log.warning("too many refused messages", extra={"code": error.code})
            self._sink.on_end("refused")


async def _read_text(reader: rtc.TextStreamReader) -> str:
    """Raises InvalidArgument, StreamError, TimeoutError."""
    text = ""
    async with timeout(_CHAT_S):
        async for piece in reader:
            text += piece
            if len(text) > MAX_CHAT_CHARS:
                raise InvalidArgument(f"a message of more than {MAX_CHAT_CHARS} characters")
    return text


async def _read_recording(reader: rtc.ByteStreamReader) -> Int16:
    """Empty if it cannot be read; the user will not miss what they do not know of."""
    data = bytearray()
    try:
        async with timeout(_RECORDING_S):
            async for piece in reader:
                data += piece
                if len(data) > MAX_RECORDING_BYTES:
                    raise InvalidArgument(f"recording of more than {MAX_RECORDING_BYTES} bytes")
        attributes = reader.info.attributes or {}
        return await asyncio.to_thread(decode_recording, bytes(data), attributes)
    except (InvalidArgument, rtc.StreamError, asyncio.TimeoutError) as error:
        log.info("no use of a recording", extra={"error": type(error).__name__})
        return np.empty(0, dtype=np.int16)
