"""The agent's voice in a room: frames as they come in, 20 ms at a time out, silence on demand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from livekit import rtc

from src.audio.pcm import SAMPLE_RATE
from src.common.clock import Clock
from src.orchestrator.ports import SpeechFrame
from src.orchestrator.rooms.playhead import Playhead
from src.orchestrator.rooms.sdk_audio import clear, push

# Above the longest lead and a frame. Not 0: then nothing is sent between utterances, the listener's
# jitter buffer takes the pause for delay, and the next word comes up to a second late.
SOURCE_QUEUE_MS = 200


class SampleSink(Protocol):
    """Plays 48 kHz mono in real time: what it was given, silence when it has nothing."""

    def push(self, pcm: bytes) -> None:
        """Queue s16le. Never blocks."""
        ...

    def clear(self) -> None:
        """Forget all that was not played yet."""
        ...


class RtcSink:
    """A LiveKit audio source made by `speech_source`."""

    def __init__(self, source: rtc.AudioSource) -> None:
        self._source = source

    def push(self, pcm: bytes) -> None:
        push(self._source, pcm)

    def clear(self) -> None:
        clear(self._source)


def speech_source() -> rtc.AudioSource:
    """What a `RoomSpeaker` speaks into; publish a track of it. Close it after the room."""
    return rtc.AudioSource(SAMPLE_RATE, 1, queue_size_ms=SOURCE_QUEUE_MS)


class RoomSpeaker:
    """Paces speech into a sink, `lead_ms` ahead of real time, and knows what was heard.

    Between utterances it does nothing at all: the source sends silence of its own without a gap
    (no concealment at the listener, livekit 1.1.21), and a first frame has nothing to wait behind.
    Silence of ours would cost half as much again as an idle session does (0.040 against 0.027 core
    with five of them), and 36 ms until the first word.

    Everything but `run` returns at once and is to be called on the event loop.
    `on_played(utterance_id, seq)` is called by `run` every 40 ms of speech and after an utterance's
    last frame, with the last frame heard.
    """

    def __init__(
        self,
        sink: SampleSink,
        clock: Clock,
        *,
        lead_ms: int,
        on_played: Callable[[str, int], None],
    ) -> None:
        self._sink = sink
        self._clock = clock
        self._on_played = on_played
        self._playhead = Playhead(lead_ms)
        self._wake = asyncio.Event()

    def begin(self, utterance_id: str, seq: int) -> None:
        """Frames of this utterance from `seq` on are played, after what is being played."""
        self._playhead.begin(utterance_id, seq)

    def send(self, frame: SpeechFrame) -> None:
        """Dropped unless its utterance was begun and not flushed since; the first one leaves in the
        call. Raises InvalidArgument for anything but 20 ms of 48 kHz s16le."""
        planned_ms = self._playhead.next_ms()
        if self._playhead.put(frame):
            self._pump()
            next_ms = self._playhead.next_ms()
            if planned_ms is None or (next_ms is not None and next_ms < planned_ms):
                self._wake.set()

    def end(self, utterance_id: str) -> None:
        """No frame of it follows."""
        self._playhead.end(utterance_id)

    def flush(self, utterance_id: str) -> int:
        """Silence, now, with a fade of 5 ms; returns the last frame heard, -1 for none. Idempotent.

        Frames of the utterance are dropped until it is begun again.
        """
        cut = self._playhead.flush(utterance_id, self._clock.now_ms())
        if cut.clear:
            self._sink.clear()
        if cut.fade:
            self._sink.push(cut.fade)
        self._wake.set()
        return cut.seq

    def heard_seq(self, utterance_id: str) -> int:
        """Never goes back; -1 for an utterance that is not among the last 16."""
        return self._playhead.heard_seq(utterance_id, self._clock.now_ms())

    @property
    def dropped(self) -> int:
        """Frames that found 2 s of speech before them."""
        return self._playhead.dropped

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            self._pump()
            for utterance_id, seq in self._playhead.reports(self._clock.now_ms()):
                self._on_played(utterance_id, seq)
            await self._sleep_until(self._playhead.next_ms())

    def _pump(self) -> None:
        now_ms = self._clock.now_ms()
        while (pcm := self._playhead.pop(now_ms)) is not None:
            self._sink.push(pcm)

    async def _sleep_until(self, at_ms: float | None) -> None:
        """Or until something began or was cut."""
        timer = None
        if at_ms is not None:
            delay_s = max(0.0, at_ms - self._clock.now_ms()) / 1000
            timer = asyncio.get_running_loop().call_later(delay_s, self._wake.set)
        try:
            await self._wake.wait()
            self._wake.clear()
        finally:
            if timer is not None:
                timer.cancel()
