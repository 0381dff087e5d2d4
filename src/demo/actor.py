"""The scripted user: a microphone that never stops, ears that write everything down."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import numpy as np

from src.audio.pcm import Int16
from src.client.session import VoiceClient, connect
from src.common.tasks import TaskGroup, timeout
from src.demo.recording import MIC_RATE, Recording, Said, Timed
from src.rpc.ws_events import AudioBegin, Heard, ServerEvent, SessionStart

MIC_FRAME_MS = 20
MIC_FRAME = MIC_RATE * MIC_FRAME_MS // 1000
ROOM_NOISE_DBFS = -62.0
PATIENCE_S = 30.0
EventT = TypeVar("EventT")


class DidNotHappen(RuntimeError):
    """What the script waited for never came."""


class Actor:
    """Speaks into the session and waits for what the server says. Times as in `VoiceClient`."""

    def __init__(self, on_event: Callable[[float, ServerEvent], None]) -> None:
        self._show = on_event
        self._rng = np.random.default_rng(7)
        self._to_say: Int16 = np.empty(0, dtype=np.int16)
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._mic: list[Int16] = []
        self._agent: list[Int16] = []
        self.client: VoiceClient | None = None
        self.events: list[Timed] = []
        self.said: list[Said] = []

    # --- ears ---

    def on_event(self, at_ms: float, event: ServerEvent) -> None:
        self.events.append(Timed(at_ms, event))
        self._show(at_ms, event)

    def on_audio(self, samples: Int16) -> None:
        self._agent.append(samples)

    @property
    def stage(self) -> VoiceClient:
        """The session. Raises RuntimeError before the microphone is open."""
        if self.client is None:
            raise RuntimeError("the actor is not on stage")
        return self.client

    @property
    def now_ms(self) -> float:
        return self.client.now_ms() if self.client else 0.0

    # --- mouth ---

    async def microphone(self, client: VoiceClient) -> None:
        """A frame every 20 ms while the session lives: words when there are any, else the room."""
        self.client = client
        sent = 0
        while not client.closed.is_set():
            # A microphone has a frame when its last sample is there, not before.
            sent += 1
            await asyncio.sleep(max(0.0, sent * MIC_FRAME_MS - client.now_ms()) / 1000)
            frame = self._next_frame()
            self._mic.append(frame)
            await client.send_mic(frame.tobytes())

    def _next_frame(self) -> Int16:
        noise = self._rng.standard_normal(MIC_FRAME) * 32768 * 10 ** (ROOM_NOISE_DBFS / 20)
        speech = self._to_say[:MIC_FRAME]
        self._to_say = self._to_say[MIC_FRAME:]
        if not self._to_say.size:
            self._quiet.set()
        noise[: speech.size] += speech
        frame: Int16 = np.rint(np.clip(noise, -32768, 32767)).astype(np.int16)
        return frame

    async def say(self, clip: Int16, text: str = "") -> Said:
        """Speak one clip and return when its last sample has been sent."""
        start = len(self._mic) * MIC_FRAME_MS
        said = Said(float(start), start + clip.size * 1000 / MIC_RATE, text)
        self.said.append(said)
        self._quiet.clear()
        self._to_say = clip
        await self._quiet.wait()
        return said

    # --- patience ---

    async def until(
        self, kind: type[EventT], accept: Callable[[EventT], bool], since_ms: float, what: str
    ) -> EventT:
        """The first event of this kind since `since_ms` that is accepted. Raises DidNotHappen."""
        try:
            async with timeout(PATIENCE_S):
                while True:
                    for timed in self.events:
                        event = timed.event
                        if timed.at_ms >= since_ms and isinstance(event, kind) and accept(event):
                            return event
                    await asyncio.sleep(0.02)
        except asyncio.TimeoutError:
            raise DidNotHappen(f"waited {PATIENCE_S:.0f} s for {what}") from None

    async def reply_begins(self, since_ms: float) -> AudioBegin:
        return await self.until(AudioBegin, lambda _: True, since_ms, "the agent's voice")

    async def reply_was_heard(self, utterance_id: str) -> Heard:
        return await self.until(
            Heard, lambda event: event.utterance_id == utterance_id, 0.0, "the end of the reply"
        )

    def recording(self) -> Recording:
        return Recording(
            mic=_joined(self._mic),
            agent=_joined(self._agent),
            events=self.events,
            said=self.said,
            flushes=self.client.flushes if self.client else [],
        )


def _joined(parts: list[Int16]) -> Int16:
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int16)


@asynccontextmanager
async def on_stage(
    host: str, start: SessionStart, show: Callable[[float, ServerEvent], None]
) -> AsyncIterator[Actor]:
    """A connected actor whose microphone is open."""
    actor = Actor(show)
    async with (
        connect(host, start, on_event=actor.on_event, on_audio=actor.on_audio) as client,
        TaskGroup() as tasks,
    ):
        microphone = tasks.create_task(actor.microphone(client), name="microphone")
        yield actor
        await client.end()
        microphone.cancel()
