"""The ports of a spoken session: what it needs from the world, without saying who provides it.

`DuplexSession` (session.py) is written against these; transports, recognisers, bridges and the TTS
client implement them; tests put fakes here and nowhere else. All calls are made on the event loop.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from src.audio.pcm import Float32, Int16
from src.rpc.ws_events import Latency, ServerEvent

MIC_RATE = 16_000
MIC_STEP_MS = 10
MIC_STEP_SAMPLES = MIC_RATE * MIC_STEP_MS // 1000


# --- speech out: one utterance of a TTS session ---


@dataclass(frozen=True, slots=True)
class Word:
    """[start_ms, end_ms) in the utterance's media time, [char_start, char_end) in its text."""

    text: str
    start_ms: int
    end_ms: int
    char_start: int
    char_end: int
    estimated: bool


@dataclass(frozen=True, slots=True)
class SpeechFrame:
    """20 ms of 48 kHz mono (s16le, or one Opus packet) and the words that begin in it."""

    utterance_id: str
    seq: int
    media_time_ms: int
    pcm: bytes
    words: tuple[Word, ...] = ()


class ControlAction(Enum):
    PAUSE = "pause"
    RESUME = "resume"
    STOP = "stop"


class Utterance(Protocol):
    """Text in, frames out. Closing or cancelling the iteration stops the worker's side too."""

    utterance_id: str

    def write(self, text: str) -> None:
        """Hand over text as it is written. Never blocks; bounded by the length of a reply."""
        ...

    def finish(self) -> None:
        """No more text follows."""
        ...

    def frames(self) -> AsyncIterator[SpeechFrame]:
        """Frames in order; ends after the last one or after STOP. Raises DuplexError."""
        ...

    async def control(self, action: ControlAction) -> int:
        """Returns the last seq the worker emitted (-1: none). Idempotent."""
        ...

    async def aclose(self) -> None: ...


@dataclass(frozen=True, slots=True)
class VoiceInfo:
    model: str
    voice: str
    language: str
    worker: str
    fallback: bool
    fallback_reason: str
    words_estimated: bool


class SpeechSession(Protocol):
    """A lease on one model of one worker."""

    info: VoiceInfo

    def utterance(self, utterance_id: str) -> Utterance: ...

    async def aclose(self) -> None: ...


@dataclass(frozen=True, slots=True)
class VoiceRequest:
    session_id: str
    mode: str = "default"
    model: str = ""
    voice: str = ""
    language: str = ""
    codec: str = "pcm_s16le"
    settings: Mapping[str, str] = field(default_factory=dict)


class SpeechProvider(Protocol):
    """The router with the TTS client behind it."""

    async def open(self, request: VoiceRequest) -> SpeechSession:
        """Raises UnknownName, Exhausted, Unavailable."""
        ...


# --- speech in ---


@dataclass(frozen=True, slots=True)
class Transcript:
    text: str
    audio_ms: int
    compute_ms: int
    no_speech_prob: float = 0.0
    avg_logprob: float = 0.0
    speculative: bool = False
    """The pass had been started before the end of speech was certain."""


class Recognizer(Protocol):
    """One recogniser for all sessions: work runs off the event loop, bounded and fair."""

    name: str

    async def transcribe(
        self, samples: Float32, *, session_id: str, language: str = "", urgent: bool = True
    ) -> Transcript:
        """16 kHz mono float32. `urgent` passes (finals) go before partials; within a class sessions
        take turns. Cancelling drops a pass that has not begun. Empty text: nothing was said.
        Raises Exhausted when its queue is full.
        """
        ...

    async def aclose(self) -> None: ...


# --- the language model ---


class BridgeSession(Protocol):
    """One conversation with a language model."""

    @property
    def name(self) -> str: ...

    def respond(self, turn_id: str, text: str, *, speculative: bool = False) -> AsyncIterator[str]:
        """Stream the reply to what the user said. Closing the iterator cancels the generation.

        It does not change the conversation: `commit` does. Raises Unavailable when the model is
        down, slow beyond its time-out, or dies in mid-answer (after what it had said).
        """
        ...

    def hold(self, turn_id: str) -> None:
        """The user may be interrupting: stop handing out text. Idempotent."""
        ...

    def go(self, turn_id: str) -> None:
        """It was a false alarm: hand out text again. Idempotent."""
        ...

    def commit(self, turn_id: str, user_text: str, heard_text: str, *, completed: bool) -> None:
        """The turn is over; the context keeps what the user said and only what was heard."""
        ...

    async def aclose(self) -> None: ...


class Bridge(Protocol):
    @property
    def name(self) -> str: ...

    async def open(self, session_id: str) -> BridgeSession: ...

    async def aclose(self) -> None: ...


# --- the client's side ---


class Transport(Protocol):
    """A WebSocket or a room, as the session sees it. Sends never block.

    A client that does not read is cut off by the transport when its bounded buffer is full.
    """

    def send_event(self, event: ServerEvent) -> None: ...

    def begin_audio(self, utterance_id: str, seq: int, *, resumed: bool) -> None:
        """The next `send_frame` carries this utterance from this frame on."""
        ...

    def send_frame(self, frame: SpeechFrame) -> None: ...

    def end_audio(self, utterance_id: str, frames: int) -> None: ...

    def flush(self, utterance_id: str, at_ms: int) -> None:
        """Silence at the listener, now: overtakes every frame not yet written to the wire."""
        ...

    def heard_seq(self, utterance_id: str) -> int:
        """Last frame known to be heard (-1: none): acknowledged, or read off the playout clock."""
        ...


class MicSink(Protocol):
    """What a transport calls. Implemented by `DuplexSession`."""

    def on_mic(self, samples: Int16) -> None:
        """16 kHz mono, any length; the session steps through it in 10 ms pieces."""
        ...

    def on_playback(self, utterance_id: str, seq: int, *, flushed: bool) -> None: ...

    def on_text(self, text: str, *, speak: bool) -> None: ...

    def on_model_switch(self, model: str, voice: str) -> None: ...

    def on_presence(self, *, here: bool) -> None:
        """Whether the user can hear now. Not told by a transport that ends when it breaks."""
        ...


class SessionObserver(Protocol):
    """Where a session reports what it measured. Never text, never audio."""

    def session_opened(self) -> None: ...

    def session_closed(self, reason: str) -> None: ...

    def turn_finished(self, latency: Latency) -> None: ...

    def barge_in(self, verdict: str) -> None:
        """One of `real`, `false`."""
        ...

    def edge_to_last_frame(self, ms: float) -> None:
        """From the detector's edge to the moment after which no frame leaves."""
        ...

    def edge_to_worker_paused(self, ms: float) -> None: ...

    def frame_sent(self, late_ms: float) -> None:
        """How late a frame left for its listener: 0 as long as the jitter buffer is not dry."""
        ...

    def frame_jitter(self, ms: float) -> None:
        """How far from 20 ms apart two frames left, once the opening burst is over."""
        ...

    def frames_kept(self, count: int) -> None:
        """Frames held back or not yet heard: the session's queue depth."""
        ...
