"""One fake per port of a session, and a user with a microphone. All run on virtual time.

The user's words travel *in* the audio: every word is a tone level of its own, and the fake
recogniser reads words back from the samples it is given. So a transcript is right only if exactly
the right audio reached the recogniser. The fake worker's frames are numbered the same way.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import numpy as np

from src.audio.pcm import FRAME_MS, FRAME_SAMPLES, Float32, Int16
from src.common.clock import Clock
from src.orchestrator.ports import (
    MIC_STEP_MS,
    MIC_STEP_SAMPLES,
    BridgeSession,
    ControlAction,
    MicSink,
    SpeechFrame,
    SpeechSession,
    Transcript,
    Utterance,
    VoiceInfo,
    VoiceRequest,
    Word,
)
from src.orchestrator.vad import VadSettings, VoiceActivityDetector
from src.rpc.errors import DuplexError
from src.rpc.ws_events import Latency, ServerEvent

_FIRST_LEVEL = 4000
_NOISE_LEVEL = 20_000
_FRAMES_PER_WORD = 10
WORD_MS = _FRAMES_PER_WORD * FRAME_MS


# --- the user ---


class User:
    """Speaks into the session's microphone, 20 ms at a time, in real (virtual) time."""

    def __init__(self) -> None:
        self.vocabulary: list[str] = []
        self.muted = False
        self.chunk_samples = 2 * MIC_STEP_SAMPLES
        self._steps: deque[Int16] = deque()
        self._idle = asyncio.Event()
        self._idle.set()

    def say(self, text: str, *, word_ms: int = 200) -> None:
        for word in text.split():
            self.vocabulary.append(word)
            level = _FIRST_LEVEL + len(self.vocabulary) - 1
            self._steps.extend(_tone(level) for _ in range(word_ms // MIC_STEP_MS))
        self._idle.clear()

    def cough(self, ms: int = 120) -> None:
        self._steps.extend(_tone(_NOISE_LEVEL) for _ in range(ms // MIC_STEP_MS))
        self._idle.clear()

    def pause(self, ms: int) -> None:
        self._steps.extend(_tone(0) for _ in range(ms // MIC_STEP_MS))
        self._idle.clear()

    async def finished(self) -> None:
        await self._idle.wait()

    async def run(self, sink: MicSink) -> None:
        waiting = np.empty(0, dtype=np.int16)
        while True:
            steps = [self._steps.popleft() if self._steps else _tone(0) for _ in range(2)]
            if not self._steps:
                self._idle.set()
            if not self.muted:
                waiting = np.concatenate((waiting, *steps))
            while waiting.size >= self.chunk_samples:
                sink.on_mic(waiting[: self.chunk_samples])
                waiting = waiting[self.chunk_samples :]
            await asyncio.sleep(FRAME_MS / 1000)


def _tone(level: int) -> Int16:
    samples = np.full(MIC_STEP_SAMPLES, level, dtype=np.int16)
    samples[1::2] = -level
    return samples


class LoudEdge:
    """First stage: anything loud."""

    def voiced(self, samples: Int16) -> bool:
        return bool(np.abs(samples[0]) > 1000)


class SlowOpinion:
    """Second opinion: knows a cough from a word, but needs `steps` of being awake for it."""

    def __init__(self, steps: int = 6) -> None:
        self._steps = steps
        self._awake = 0

    def listen(self, samples: Int16, *, awake: bool) -> float | None:
        self._awake = self._awake + 1 if awake else 0
        if self._awake < self._steps:
            return None
        return 0.9 if _FIRST_LEVEL <= abs(int(samples[0])) < _NOISE_LEVEL else 0.05


def make_vad() -> VoiceActivityDetector:
    return VoiceActivityDetector(VadSettings(), opinion=SlowOpinion(), edge=LoudEdge())


class FakeRecognizer:
    """Hears a word when most of it is in the audio."""

    name = "fake-ears"

    def __init__(self, vocabulary: list[str], compute_ms: int = 60) -> None:
        self._vocabulary = vocabulary
        self.compute_ms = compute_ms
        self.passes = 0
        self.failure: DuplexError | None = None

    async def transcribe(
        self, samples: Float32, *, session_id: str, language: str = "", urgent: bool = True
    ) -> Transcript:
        self.passes += 1
        await asyncio.sleep(self.compute_ms / 1000)
        if self.failure is not None:
            raise self.failure
        levels = np.rint(np.abs(samples[::2]) * 32768).astype(int)
        found = [
            word
            for index, word in enumerate(self._vocabulary)
            if np.count_nonzero(levels == _FIRST_LEVEL + index) * 2 >= MIC_STEP_SAMPLES * 10
        ]
        return Transcript(" ".join(found), samples.size // 16, self.compute_ms)

    async def aclose(self) -> None:
        pass


# --- the client ---


@dataclass(slots=True)
class Sent:
    at_ms: float
    frame: SpeechFrame


class FakeClient:
    """A transport with a listener behind it, who plays 20 ms every 20 ms and acknowledges.

    `acks=False`: a client that never says what it played.
    """

    def __init__(self, clock: Clock, *, acks: bool = True, latency_ms: int = 20) -> None:
        self._clock = clock
        self._acks = acks
        self._latency_s = latency_ms / 1000
        self._buffer: deque[SpeechFrame] = deque()
        self._heard: dict[str, int] = {}
        self._begun: tuple[str, int] | None = None
        self._flushed = ""
        self.events: list[ServerEvent] = []
        self.sent: list[Sent] = []
        self.played: list[SpeechFrame] = []
        self.marks: list[tuple[str, str, int]] = []
        self.flushed_at_ms: list[float] = []
        self.sink: MicSink | None = None
        self.changed = asyncio.Event()

    def send_event(self, event: ServerEvent) -> None:
        self.events.append(event)
        self.changed.set()

    def begin_audio(self, utterance_id: str, seq: int, *, resumed: bool) -> None:
        self.marks.append(("resumed" if resumed else "begin", utterance_id, seq))
        self._begun = (utterance_id, seq)

    def send_frame(self, frame: SpeechFrame) -> None:
        assert self._begun == (frame.utterance_id, frame.seq), "a frame that was not announced"
        self._begun = (frame.utterance_id, frame.seq + 1)
        self.sent.append(Sent(self._clock.now_ms(), frame))
        self._buffer.append(frame)
        self.changed.set()

    def end_audio(self, utterance_id: str, frames: int) -> None:
        self.marks.append(("end", utterance_id, frames))

    def flush(self, utterance_id: str, at_ms: int) -> None:
        self.marks.append(("flush", utterance_id, at_ms))
        self.flushed_at_ms.append(self._clock.now_ms())
        self._buffer.clear()
        self._begun = None
        self._flushed = utterance_id

    def heard_seq(self, utterance_id: str) -> int:
        return self._heard.get(utterance_id, -1) if self._acks else -1

    async def run(self) -> None:
        while True:
            if self._buffer:
                self.played.append(self._buffer.popleft())
            last = self.played[-1] if self.played else None
            await asyncio.sleep(self._latency_s)
            self._acknowledge(last)

    def _acknowledge(self, last: SpeechFrame | None) -> None:
        flushed, self._flushed = self._flushed, ""
        if not self._acks or self.sink is None or last is None:
            return
        seq = self._heard[last.utterance_id] = max(last.seq, self._heard.get(last.utterance_id, -1))
        self.sink.on_playback(last.utterance_id, seq, flushed=flushed == last.utterance_id)

    def heard_audio(self, utterance_id: str) -> bytes:
        return b"".join(f.pcm for f in self.played if f.utterance_id == utterance_id)


# --- the worker ---


@dataclass(slots=True)
class WorkerScript:
    first_audio_ms: int = 50
    lead_ms: int = 60
    control_ms: int = 3
    die_after_frames: int | None = None
    marks_words: bool = True


class FakeUtterance:
    """Speaks every word in ten frames of its own; paced, with a small lead; pausable."""

    def __init__(self, utterance_id: str, worker: FakeSpeech) -> None:
        self.utterance_id = utterance_id
        self._worker = worker
        self._script = worker.script
        self._text = ""
        self._final = False
        self._changed = asyncio.Event()
        self._paused = False
        self.orders: list[ControlAction] = []
        self.emitted: list[SpeechFrame] = []
        self.stopped = False
        self.closed = False

    @property
    def text(self) -> str:
        return self._text

    def write(self, text: str) -> None:
        assert not self._final, "text after finish"
        self._text += text
        self._changed.set()

    def finish(self) -> None:
        self._final = True
        self._changed.set()

    async def control(self, action: ControlAction) -> int:
        self.orders.append(action)
        await asyncio.sleep(self._script.control_ms / 1000)
        self._paused = action is ControlAction.PAUSE
        self.stopped = self.stopped or action is ControlAction.STOP
        self._changed.set()
        return len(self.emitted) - 1

    async def aclose(self) -> None:
        self.closed = True
        self._worker.end(self)

    async def frames(self) -> AsyncIterator[SpeechFrame]:
        self._worker.begin(self)
        try:
            async for frame in self._paced():
                yield frame
        except DuplexError:
            self._worker.end(self)
            raise
        self._worker.end(self)

    async def _paced(self) -> AsyncIterator[SpeechFrame]:
        loop = asyncio.get_running_loop()
        start_s: float | None = None
        async for frame in self._synthesise():
            if start_s is None:
                await asyncio.sleep(self._script.first_audio_ms / 1000)
                start_s = loop.time()
            ahead_s = (frame.seq * FRAME_MS - self._script.lead_ms) / 1000
            if (wait_s := start_s + ahead_s - loop.time()) > 0:
                await asyncio.sleep(wait_s)
            if self._paused:
                since_s = loop.time()
                while self._paused:
                    await self._wait()
                start_s += loop.time() - since_s
            if self.stopped:
                return
            if len(self._worker.emitted) == self._script.die_after_frames:
                raise self._worker.death
            self.emitted.append(frame)
            self._worker.emitted.append(frame)
            yield frame

    async def _synthesise(self) -> AsyncIterator[SpeechFrame]:
        place = number = 0
        while True:
            while (end := self._word_end(place)) is None:
                if self._final and not self._text[place:].strip():
                    return
                await self._wait()
            start = place + len(self._text[place:]) - len(self._text[place:].lstrip())
            for index in range(_FRAMES_PER_WORD):
                seq = number * _FRAMES_PER_WORD + index
                yield self._frame(seq, start, end, marked=index == 0)
            place, number = end, number + 1

    def _word_end(self, place: int) -> int | None:
        rest = self._text[place:]
        word = rest.lstrip()
        if not word:
            return None
        length = len(word.split()[0])
        whole = self._final or len(word) > length
        return place + len(rest) - len(word) + length if whole else None

    def _frame(self, seq: int, start: int, end: int, *, marked: bool) -> SpeechFrame:
        media_ms = seq * FRAME_MS
        word = Word(self._text[start:end], media_ms, media_ms + WORD_MS, start, end, False)
        pcm = np.full(FRAME_SAMPLES, 1000 + seq, dtype="<i2").tobytes()
        words = (word,) if marked and self._script.marks_words else ()
        return SpeechFrame(self.utterance_id, seq, media_ms, pcm, words)

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class FakeSpeech:
    """A lease. Refuses a second utterance at once, as a worker does."""

    def __init__(self, request: VoiceRequest, script: WorkerScript) -> None:
        self.request = request
        self.script = script
        self.info = VoiceInfo(
            model=request.model or "default-model", voice=request.voice or "v", language="en",
            worker="w1", fallback=False, fallback_reason="", words_estimated=False,
        )  # fmt: skip
        self.utterances: list[FakeUtterance] = []
        self.emitted: list[SpeechFrame] = []
        self.speaking: FakeUtterance | None = None
        self.death: DuplexError = DuplexError("the worker is gone")
        self.closed = False

    def utterance(self, utterance_id: str) -> Utterance:
        assert not self.closed, "a voice that was given back"
        made = FakeUtterance(utterance_id, self)
        self.utterances.append(made)
        return made

    def begin(self, utterance: FakeUtterance) -> None:
        assert self.speaking is None, "two utterances at once"
        self.speaking = utterance

    def end(self, utterance: FakeUtterance) -> None:
        if self.speaking is utterance:
            self.speaking = None

    async def aclose(self) -> None:
        assert self.speaking is None, "given back while it speaks"
        self.closed = True


class FakeSpeechProvider:
    def __init__(self, script: WorkerScript | None = None, open_ms: int = 0) -> None:
        self.script = script or WorkerScript()
        self.open_ms = open_ms
        self.opened: list[FakeSpeech] = []
        self.failure: DuplexError | None = None

    async def open(self, request: VoiceRequest) -> SpeechSession:
        await asyncio.sleep(self.open_ms / 1000)
        if self.failure is not None:
            raise self.failure
        speech = FakeSpeech(request, self.script)
        self.opened.append(speech)
        return speech

    @property
    def utterances(self) -> list[FakeUtterance]:
        return [utterance for speech in self.opened for utterance in speech.utterances]


# --- the language model ---


@dataclass(slots=True)
class Asked:
    turn_id: str
    text: str
    speculative: bool
    open: bool = True


@dataclass(slots=True)
class Committed:
    turn_id: str
    user_text: str
    heard_text: str
    completed: bool


@dataclass(slots=True)
class FakeBridge:
    """Answers every question with `answer(question)`, word by word."""

    answer: Callable[[str], str]
    first_token_ms: int = 100
    token_ms: int = 20
    die_after_words: int | None = None
    death: DuplexError = field(default_factory=lambda: DuplexError("the model is gone"))
    name: str = "fake-llm"
    asked: list[Asked] = field(default_factory=list)
    committed: list[Committed] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    closed: bool = False
    failure: DuplexError | None = None

    async def open(self, session_id: str) -> BridgeSession:
        if self.failure is not None:
            raise self.failure
        return FakeConversation(self)

    async def aclose(self) -> None:
        pass


class FakeConversation:
    def __init__(self, bridge: FakeBridge) -> None:
        self.name = bridge.name
        self._bridge = bridge
        self._open = asyncio.Event()
        self._open.set()

    async def respond(
        self, turn_id: str, text: str, *, speculative: bool = False
    ) -> AsyncIterator[str]:
        bridge = self._bridge
        assert not any(one.open for one in bridge.asked), "two generations at once"
        asked = Asked(turn_id, text, speculative)
        bridge.asked.append(asked)
        self._open.set()
        try:
            await asyncio.sleep(bridge.first_token_ms / 1000)
            for index, word in enumerate(bridge.answer(text).split()):
                if index == bridge.die_after_words:
                    raise bridge.death
                await self._open.wait()
                yield word if index == 0 else f" {word}"
                await asyncio.sleep(bridge.token_ms / 1000)
        finally:
            asked.open = False

    def hold(self, turn_id: str) -> None:
        self._bridge.held.append(f"hold {turn_id}")
        self._open.clear()

    def go(self, turn_id: str) -> None:
        self._bridge.held.append(f"go {turn_id}")
        self._open.set()

    def commit(self, turn_id: str, user_text: str, heard_text: str, *, completed: bool) -> None:
        self._open.set()
        self._bridge.committed.append(Committed(turn_id, user_text, heard_text, completed))

    async def aclose(self) -> None:
        self._bridge.closed = True


class FakeObserver:
    def __init__(self) -> None:
        self.opened = 0
        self.closed: list[str] = []
        self.turns: list[Latency] = []
        self.verdicts: list[str] = []
        self.to_last_frame_ms: list[float] = []
        self.to_worker_paused_ms: list[float] = []
        self.late_ms: list[float] = []
        self.jitter_ms: list[float] = []
        self.kept: list[int] = []

    def session_opened(self) -> None:
        self.opened += 1

    def session_closed(self, reason: str) -> None:
        self.closed.append(reason)

    def turn_finished(self, latency: Latency) -> None:
        self.turns.append(latency)

    def barge_in(self, verdict: str) -> None:
        self.verdicts.append(verdict)

    def edge_to_last_frame(self, ms: float) -> None:
        self.to_last_frame_ms.append(ms)

    def edge_to_worker_paused(self, ms: float) -> None:
        self.to_worker_paused_ms.append(ms)

    def frame_sent(self, late_ms: float) -> None:
        self.late_ms.append(late_ms)

    def frame_jitter(self, ms: float) -> None:
        self.jitter_ms.append(ms)

    def frames_kept(self, count: int) -> None:
        self.kept.append(count)
