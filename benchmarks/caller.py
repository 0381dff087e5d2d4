"""The benchmarks' user: a real-time microphone and a client that notes when every frame came.

All times are `machine.now_ms()`: one clock for every process on the machine.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np

from benchmarks.machine import now_ms
from src.audio.pcm import Int16
from src.client.player import Player
from src.client.session import VoiceClient, connect
from src.common.clock import MonotonicClock
from src.common.tasks import TaskGroup, timeout
from src.rpc.ws_events import Flush, ServerEvent, SessionStart, SessionStarted

MIC_RATE = 16_000
NOISE_DBFS = -60.0
LOUD = int(32768 * 10 ** (-40 / 20))
"""Speech begins and ends with the first and last sample over -40 dBFS."""
PATIENCE_S = 12.0
EventT = TypeVar("EventT")


class DidNotHappen(RuntimeError):
    """What a benchmark waited for never came."""


class Arrival(NamedTuple):
    """One audio frame at the client's socket. `peak`: its loudest sample, 0 to 32767."""

    at_ms: float
    utterance_id: str
    peak: int


class Ear(Player):
    """A jitter buffer that remembers when its frames came."""

    def __init__(self) -> None:
        super().__init__()
        self.arrivals: list[Arrival] = []
        self._utterance_id = ""

    def begin(self, utterance_id: str, seq: int) -> None:
        super().begin(utterance_id, seq)
        self._utterance_id = utterance_id

    def push(self, samples: Int16) -> None:
        at_ms = now_ms()
        super().push(samples)
        peak = max(int(samples.max()), -int(samples.min()))
        self.arrivals.append(Arrival(at_ms, self._utterance_id, peak))

    def first(self, since_ms: float, peak: int) -> Arrival | None:
        """The first frame since then with a sample of at least `peak`."""
        found = None
        for arrival in reversed(self.arrivals):
            if arrival.at_ms < since_ms:
                break
            if arrival.peak >= peak:
                found = arrival
        return found


@dataclass
class Spoken:
    """A clip and when its first and last loud sample were handed over (0: not yet)."""

    clip: Int16
    onset: int
    end: int
    taken: int = 0
    onset_ms: float = 0.0
    end_ms: float = 0.0
    onset_audio_ms: float = 0.0
    done: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    def of(cls, clip: Int16) -> Spoken:
        loud = np.flatnonzero(np.abs(clip.astype(np.int32)) > LOUD)
        if not loud.size:
            return cls(clip, -1, -1)
        return cls(clip, int(loud[0]), int(loud[-1]))

    def next_samples(self, count: int, at_ms: float, audio_ms: float) -> Int16:
        """`audio_ms`: microphone time at the start of these samples."""
        begin, self.taken = self.taken, self.taken + count
        if begin <= self.onset < self.taken:
            self.onset_ms = at_ms
            self.onset_audio_ms = audio_ms + (self.onset - begin) * 1000 / MIC_RATE
        if begin <= self.end < self.taken:
            self.end_ms = at_ms
        if self.taken >= self.clip.size:
            self.done.set()
        return self.clip[begin : self.taken]


class Microphone:
    """A frame every `frame_ms`, handed over when its last sample is due; room noise underneath."""

    def __init__(self, frame_ms: int, seed: int) -> None:
        self.frame_ms = frame_ms
        self.handed: list[float] = []
        """When each frame was handed over."""
        self._size = MIC_RATE * frame_ms // 1000
        level = 32768 * 10 ** (NOISE_DBFS / 20)
        random = np.random.default_rng(seed)
        self._noise = np.rint(random.standard_normal((199, self._size)) * level).astype(np.int16)
        self._saying: Spoken | None = None
        self._began_ms = 0.0

    async def run(self, client: VoiceClient) -> None:
        began_ms = self._began_ms = now_ms()
        while not client.closed.is_set():
            due_ms = began_ms + (len(self.handed) + 1) * self.frame_ms
            await asyncio.sleep(max(0.0, due_ms - now_ms()) / 1000)
            frame = self._next_frame(now_ms())
            await client.send_mic(frame.tobytes())

    def _next_frame(self, at_ms: float) -> Int16:
        noise: Int16 = self._noise[len(self.handed) % len(self._noise)]
        audio_ms = len(self.handed) * self.frame_ms
        self.handed.append(at_ms)
        if self._saying is None:
            return noise
        speech = self._saying.next_samples(self._size, at_ms, audio_ms)
        if self._saying.done.is_set():
            self._saying = None
        frame = noise.astype(np.int32)
        frame[: speech.size] += speech
        return np.clip(frame, -32768, 32767).astype(np.int16)

    async def say(self, clip: Int16) -> Spoken:
        """Speak, and return when the last sample was handed over."""
        spoken = self._saying = Spoken.of(clip)
        await spoken.done.wait()
        return spoken

    def late_ms(self, since_ms: float, until_ms: float) -> list[float]:
        """How late its frames were: what this machine's load did to the caller itself."""
        return [
            at_ms - self._began_ms - (index + 1) * self.frame_ms
            for index, at_ms in enumerate(self.handed)
            if since_ms <= at_ms < until_ms
        ]

    def handed_ms(self, audio_ms: float) -> float:
        """When the sample at this audio time (the end of a detector's step) was handed over."""
        frame = int(np.ceil(audio_ms / self.frame_ms)) - 1
        return self.handed[min(max(frame, 0), len(self.handed) - 1)]


class Caller:
    """One session with its microphone open."""

    def __init__(self, frame_ms: int, seed: int) -> None:
        self.ear = Ear()
        self.microphone = Microphone(frame_ms, seed)
        self.events: list[tuple[float, ServerEvent]] = []
        self.flushed_ms: list[float] = []
        """When each `flush` was received, as in `client.flushes`."""
        self._news = asyncio.Event()
        self.client: VoiceClient

    def on_event(self, _: float, event: ServerEvent) -> None:
        self.events.append((now_ms(), event))
        if isinstance(event, Flush):
            self.flushed_ms.append(now_ms())
        self._news.set()

    async def until(
        self,
        kind: type[EventT],
        what: str,
        since_ms: float = 0.0,
        accept: Callable[[EventT], bool] = lambda _: True,
    ) -> EventT:
        """The first such event since then. Raises DidNotHappen."""
        try:
            async with timeout(PATIENCE_S):
                seen = bisect_left(self.events, since_ms, key=lambda event: event[0])
                while True:
                    self._news.clear()
                    for _, event in self.events[seen:]:
                        if isinstance(event, kind) and accept(event):
                            return event
                    seen = len(self.events)
                    await self._news.wait()
        except asyncio.TimeoutError:
            raise DidNotHappen(f"waited {PATIENCE_S:.0f} s for {what}") from None

    async def until_sound(self, since_ms: float) -> Arrival:
        """The first frame since then that is not digital silence. Raises DidNotHappen."""
        give_up_ms = now_ms() + PATIENCE_S * 1000
        while now_ms() < give_up_ms:
            arrival = self.ear.first(since_ms, peak=1)
            if arrival is not None:
                return arrival
            await asyncio.sleep(0.01)
        raise DidNotHappen(f"waited {PATIENCE_S:.0f} s for the agent's voice")

    def silent_ms(self, index: int) -> float | None:
        """When the client's audio clock took the fade-out of the flush: nothing follows it."""
        flushed = self.client.flushes[index]
        if flushed.silent_ms is None:
            return None
        return self.flushed_ms[index] + flushed.silent_ms - flushed.received_ms


@asynccontextmanager
async def on_call(
    url: str, start: SessionStart | None = None, *, frame_ms: int = 20, seed: int = 1
) -> AsyncIterator[Caller]:
    """A caller whose session has started. The microphone opens after that: audio that comes before
    is not counted by the server, and its `at_ms` would not be ours."""
    caller = Caller(frame_ms, seed)
    async with (
        connect(
            url, start or SessionStart(), on_event=caller.on_event, clock=MonotonicClock()
        ) as client,
        TaskGroup() as tasks,
    ):
        client.player = caller.ear
        caller.client = client
        await caller.until(SessionStarted, "the session to start")
        microphone = tasks.create_task(caller.microphone.run(client), name="microphone")
        try:
            yield caller
        finally:
            await client.end()
            microphone.cancel()
