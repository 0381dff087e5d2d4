"""A person in a LiveKit room, for tests and benchmarks: talks, listens, reads, writes it all down.

Nothing but a stock `livekit.rtc` client and what docs/livekit.md tells a front end: a microphone
track, the agent's track, `lk.transcription`, `lk.agent.state`, `lk.chat`, and for those who want
more the topics `duplex.events` and `duplex.control`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
import numpy as np
from livekit import rtc
from pydantic import BaseModel, ValidationError

from src.audio.pcm import SAMPLE_RATE, Float32, Int16
from src.common.clock import Clock, MonotonicClock
from src.common.tasks import TaskGroup, cancel_and_wait, timeout
from src.demo.actor import DidNotHappen
from src.demo.recording import Timed
from src.demo.room_audio import STEP_MS, Ear, Mouth, Sound, Spoken
from src.demo.room_captions import Caption, Chunk
from src.orchestrator.rooms.sdk_audio import MicStream, push
from src.rpc.ws_events import ServerEvent, parse_server

EVENTS_TOPIC = "duplex.events"
CONTROL_TOPIC = "duplex.control"
CHAT_TOPIC = "lk.chat"
CAPTIONS_TOPIC = "lk.transcription"
AGENT_STATE = "lk.agent.state"
TOKEN_PATH = "/v1/livekit/token"  # noqa: S105

PATIENCE_S = 30.0
QUIET_MS = 300
EventT = TypeVar("EventT", bound=BaseModel)


class TokenRefused(RuntimeError):
    """The token endpoint said no. `retry_after_s` is its header, if there is one."""

    def __init__(self, status: int, body: Any, retry_after_s: int | None) -> None:
        super().__init__(f"no token: {status} {body}")
        self.status = status
        self.body = body
        self.retry_after_s = retry_after_s


async def fetch_token(base_url: str, api_key: str = "", **params: str) -> dict[str, Any]:
    """What `GET /v1/livekit/token` answers. Raises TokenRefused."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    async with (
        aiohttp.ClientSession(headers=headers) as http,
        http.get(base_url.rstrip("/") + TOKEN_PATH, params=params) as answer,
    ):
        if answer.status == 200:
            granted: dict[str, Any] = await answer.json()
            return granted
        json = answer.content_type == "application/json"
        body = await answer.json() if json else await answer.text()
        retry = answer.headers.get("Retry-After")
        raise TokenRefused(answer.status, body, int(retry) if retry else None)


@dataclass(frozen=True)
class Noted:
    """A state or a connection event, and when."""

    at_ms: float
    what: str


class RoomUser:
    """Made by `room_user`. Times are `clock.now_ms()`; see `Mouth` and `Ear` for the audio's."""

    def __init__(self, room: rtc.Room, clock: Clock, keep_ms: int) -> None:
        self.room = room
        self.clock = clock
        self.ear = Ear(keep_ms)
        self.events: list[Timed] = []
        self.captions: list[Caption] = []
        self.states: list[Noted] = []
        """The agent's `lk.agent.state`, every change."""
        self.connection: list[Noted] = []
        """`reconnecting`, `reconnected`, `disconnected`."""
        self.agent_track: rtc.RemoteAudioTrack | None = None
        self.late_ms = 0.0
        """How late the microphone's clock was at worst: over 20, this machine is too busy."""
        self._news = asyncio.Event()
        self._unreadable: ValidationError | None = None
        self._running: asyncio.Task[None] | None = None
        self._tasks: TaskGroup | None = None
        self._mouth: Mouth | None = None
        self._mic: rtc.LocalAudioTrack | None = None
        self._stream: MicStream | None = None
        self._listen_to(room)

    # --- speak and write ---

    def talk(self, speech: Float32) -> Spoken:
        """16 kHz speech into the microphone. Returns at once: the times are known beforehand."""
        if self._mouth is None:
            raise RuntimeError("this user has no microphone")
        return self._mouth.talk(speech)

    async def said(self, speech: Float32) -> Spoken:
        """Like `talk`; returns when the last sample has been sent."""
        spoken = self.talk(speech)
        await asyncio.sleep(max(0.0, spoken.end_ms + STEP_MS - self.clock.now_ms()) / 1000)
        return spoken

    def mute(self) -> None:
        if self._mic is not None:
            self._mic.mute()

    def unmute(self) -> None:
        if self._mic is not None:
            self._mic.unmute()

    async def chat(self, text: str) -> None:
        await self.room.local_participant.send_text(text, topic=CHAT_TOPIC)

    async def send_control(self, event: BaseModel | str) -> None:
        """A client event of docs/protocol.md, or any text in its place."""
        text = event if isinstance(event, str) else event.model_dump_json()
        await self.room.local_participant.publish_data(text, topic=CONTROL_TOPIC)

    # --- what came ---

    @property
    def identity(self) -> str:
        return self.room.local_participant.identity

    @property
    def heard(self) -> list[Sound]:
        """48 kHz of the agent's voice by arrival; `ear` measures in it."""
        return list(self.ear.heard)

    @property
    def agents(self) -> list[rtc.RemoteParticipant]:
        here = self.room.remote_participants.values()
        return [one for one in here if one.kind == rtc.ParticipantKind.PARTICIPANT_KIND_AGENT]

    @property
    def agent(self) -> rtc.RemoteParticipant | None:
        return next(iter(self.agents), None)

    @property
    def agent_attributes(self) -> dict[str, str]:
        return dict(self.agent.attributes) if self.agent else {}

    @property
    def agent_state(self) -> str:
        return self.agent_attributes.get(AGENT_STATE, "")

    def got(self, kind: type[EventT], since_ms: float = 0.0, **fields: Any) -> list[EventT]:
        """The events of this kind whose fields have these values."""
        return [
            timed.event
            for timed in self.events
            if isinstance(timed.event, kind)
            and timed.at_ms >= since_ms
            and all(getattr(timed.event, name) == value for name, value in fields.items())
        ]

    def captions_of(self, identity: str) -> list[Caption]:
        return [caption for caption in self.captions if caption.identity == identity]

    # --- wait ---

    async def until(
        self, true: Callable[[], Any], what: str = "", patience_s: float = PATIENCE_S
    ) -> None:
        """Looks whenever something arrives, a piece of sound too.

        Raises DidNotHappen, and pydantic.ValidationError for an event that is none.
        """
        try:
            async with timeout(patience_s):
                while not true():
                    self._raise_fault()
                    self._news.clear()
                    await self._news.wait()
        except asyncio.TimeoutError:
            last = [timed.event.type for timed in self.events[-20:]]
            states = [noted.what for noted in self.states[-5:] + self.connection[-3:]]
            raise DidNotHappen(
                f"waited {patience_s:.0f} s for {what or 'it'}; agent: {states}, last: {last}"
            ) from None

    async def until_event(self, kind: type[EventT], since_ms: float = 0.0, **fields: Any) -> EventT:
        await self.until(lambda: self.got(kind, since_ms, **fields), f"{kind.__name__} {fields}")
        return self.got(kind, since_ms, **fields)[-1]

    async def first_sound_ms(self, since_ms: float) -> float:
        """When the agent was first heard since then."""
        await self.until(lambda: self.ear.first_loud_ms(since_ms) is not None, "the agent's voice")
        found = self.ear.first_loud_ms(since_ms)
        assert found is not None  # noqa: S101
        return found

    async def silence_ms(self, since_ms: float, quiet_ms: int = QUIET_MS) -> float | None:
        """When the agent's last sound ended, known once `quiet_ms` of silence have followed.

        None: it was silent already at `since_ms`.
        """
        await self.until(
            lambda: self.clock.now_ms() >= since_ms + quiet_ms and self.ear.quiet_ms() >= quiet_ms,
            "the agent's silence",
        )
        return self.ear.last_loud_ms(since_ms)

    # --- inside ---

    def _listen_to(self, room: rtc.Room) -> None:
        room.on("track_subscribed", self._on_track)
        room.on("data_received", self._on_data)
        room.on("participant_connected", lambda _: self._note_state())
        room.on("participant_attributes_changed", lambda *_: self._note_state())
        room.on("reconnecting", lambda: self._note_connection("reconnecting"))
        room.on("reconnected", lambda: self._note_connection("reconnected"))
        room.on("disconnected", lambda _: self._note_connection("disconnected"))
        room.register_text_stream_handler(CAPTIONS_TOPIC, self._on_caption)

    async def join(self, url: str, token: str, options: rtc.RoomOptions) -> None:
        """Raises rtc.ConnectError."""
        # First of all, since the agent's track may be there before `connect` has returned.
        self._running = asyncio.create_task(self._run(), name="room user")
        self._running.add_done_callback(lambda _: self._news.set())
        await asyncio.sleep(0)
        try:
            await self.room.connect(url, token, options)
        except rtc.ConnectError as error:
            # The server's answer quotes the token.
            raise rtc.ConnectError(error.message.replace(token, "(token)")) from None
        self._note_state()

    async def _run(self) -> None:
        async with TaskGroup() as self._tasks:
            await asyncio.Event().wait()

    async def close(self) -> None:
        try:
            if self._running is not None:
                await cancel_and_wait(self._running)
        finally:
            self._stop_listening()
            await self.room.disconnect()

    def _raise_fault(self) -> None:
        if self._unreadable is not None:
            raise self._unreadable
        if self._running is not None and self._running.done():
            self._running.result()

    def _spawn(self, work: Any) -> None:
        if self._running is None or self._running.done() or self._tasks is None:
            work.close()
            return
        self._tasks.create_task(work)

    async def open_microphone(self, rate: int, channels: int) -> None:
        """A published track that records from now on."""
        # No queue: a sound card hands its frames over when they exist, and so does this one.
        source = rtc.AudioSource(rate, channels, queue_size_ms=0)
        self._mic = rtc.LocalAudioTrack.create_audio_track("microphone", source)
        self._mouth = Mouth(self.clock.now_ms(), rate)
        self._spawn(self._record(source, self._mouth, rate, channels))
        options = rtc.TrackPublishOptions(source=rtc.TrackSource.SOURCE_MICROPHONE)
        await self.room.local_participant.publish_track(self._mic, options)

    async def _record(
        self, source: rtc.AudioSource, mouth: Mouth, rate: int, channels: int
    ) -> None:
        while True:
            await asyncio.sleep(max(0.0, mouth.due_ms - self.clock.now_ms()) / 1000)
            self.late_ms = max(self.late_ms, self.clock.now_ms() - mouth.due_ms)
            step = mouth.next_step()
            if (rate, channels) == (SAMPLE_RATE, 1):
                push(source, step.tobytes())
            else:
                pcm = np.repeat(step, channels).tobytes()
                await source.capture_frame(rtc.AudioFrame(pcm, rate, channels, step.size))

    def _on_track(self, track: rtc.Track, _: object, participant: rtc.RemoteParticipant) -> None:
        agent = participant.kind == rtc.ParticipantKind.PARTICIPANT_KIND_AGENT
        if agent and isinstance(track, rtc.RemoteAudioTrack):
            self.agent_track = track
            self._stop_listening()
            self._stream = MicStream(track, self._hear, sample_rate=SAMPLE_RATE)
            self._news.set()

    def _hear(self, samples: Int16) -> None:
        self.ear.hear(self.clock.now_ms(), samples)
        self._news.set()

    def _stop_listening(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def _on_data(self, packet: rtc.DataPacket) -> None:
        if packet.topic != EVENTS_TOPIC:
            return
        try:
            event: ServerEvent = parse_server(packet.data)
        except ValidationError as error:
            self._unreadable = error
        else:
            self.events.append(Timed(self.clock.now_ms(), event))
        self._news.set()

    def _on_caption(self, reader: rtc.TextStreamReader, identity: str) -> None:
        self._spawn(self._read(reader, identity))

    async def _read(self, reader: rtc.TextStreamReader, identity: str) -> None:
        attributes = reader.info.attributes or {}
        caption = self._caption(attributes.get("lk.segment_id", ""), identity)
        caption.track_sid = attributes.get("lk.transcribed_track_id", "")
        caption.stream_id, caption.closed = reader.info.stream_id, False
        try:
            async for text in reader:
                now_ms = self.clock.now_ms()
                caption.chunks.append(Chunk(now_ms, reader.info.stream_id, text))
                self._news.set()
        except rtc.StreamError:
            return  # the writer or the room is gone: the caption stays open
        finally:
            reader.close()
        # The trailer's attributes lie over the header's by now.
        attributes = reader.info.attributes or {}
        if caption.stream_id == reader.info.stream_id:
            caption.final = attributes.get("lk.transcription_final") == "true"
            caption.closed = True
        self._news.set()

    def _caption(self, segment_id: str, identity: str) -> Caption:
        for caption in self.captions:
            if (caption.segment_id, caption.identity) == (segment_id, identity):
                return caption
        self.captions.append(Caption(segment_id, identity))
        return self.captions[-1]

    def _note_state(self) -> None:
        if self.agent_state and (not self.states or self.states[-1].what != self.agent_state):
            self.states.append(Noted(self.clock.now_ms(), self.agent_state))
        self._news.set()

    def _note_connection(self, what: str) -> None:
        self.connection.append(Noted(self.clock.now_ms(), what))
        self._news.set()


@asynccontextmanager
async def room_user(
    server_url: str,
    token: str,
    *,
    microphone: int | None = SAMPLE_RATE,
    channels: int = 1,
    keep_ms: int = 120_000,
    clock: Clock | None = None,
    options: rtc.RoomOptions | None = None,
) -> AsyncIterator[RoomUser]:
    """A connected user whose microphone is open and hears a quiet room.

    `microphone` is its sample rate in Hz, None: no track at all. Raises rtc.ConnectError.
    """
    room = rtc.Room()
    user = RoomUser(room, clock or MonotonicClock(), keep_ms)
    try:
        await user.join(server_url, token, options or rtc.RoomOptions())
        if microphone is not None:
            await user.open_microphone(microphone, channels)
        yield user
    finally:
        await user.close()
