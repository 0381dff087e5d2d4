"""Two-stage voice activity detection: a jumpy edge within 10–20 ms, then a second opinion.

    IDLE ──edge──▶ PENDING ──Silero agrees──▶ SPEAKING ◀──voiced again── TRAILING
      ▲               │ window over              │ quiet_ms of silence      ▲ │ endpoint_ms
      └── REFRACTORY ◀┘                          └──────────────────────────┘ └──▶ IDLE

The first stage is allowed to be wrong: all it costs is a short pause in the reply. After a false
alarm the refractory rests it, longer each time; meanwhile the second opinion listens by itself, so
that a person who talks over a keyboard is still heard.

Pure: all time is audio time, 10 ms a step.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np
from pydantic import Field, field_validator

from src.audio.pcm import Int16, level_dbfs
from src.common.config import StrictModel
from src.orchestrator.echo_gate import EchoGate
from src.orchestrator.ports import MIC_STEP_MS, MIC_STEP_SAMPLES


class VadPhase(Enum):
    EDGE = "edge"
    """Something began. Pause now, judge later."""
    CONFIRMED = "confirmed"
    """It is speech."""
    REJECTED = "rejected"
    """It was not."""
    QUIET = "quiet"
    """A short silence: maybe the end. The moment to start speculative work."""
    VOICED_AGAIN = "voiced_again"
    """It was not the end."""
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class VadEvent:
    """`at_ms`: mic audio time of the decision. `onset_ms`: estimated start of this speech."""

    phase: VadPhase
    at_ms: int
    onset_ms: int
    probability: float


class VadSettings(StrictModel):
    aggressiveness: int = Field(3, ge=0, le=3, description="WebRTC detector: 3 lets least through")
    energy_steps: tuple[int, int] = Field(
        (2, 3), description="edge when k of the last n 10 ms steps rise above the floor"
    )
    energy_margin_db: float = Field(12.0, gt=0, description="what counts as risen")
    voiced_steps: tuple[int, int] = Field(
        (2, 2), description="or when WebRTC hears a voice in k of the last n steps"
    )
    voiced_margin_db: float = Field(9.0, gt=0, description="and they are this far above the floor")
    min_level_dbfs: float = Field(-55.0, le=0, description="anything softer is silence")
    confirm_threshold: float = Field(0.5, gt=0, lt=1, description="Silero: this is speech")
    confirm_window_ms: int = Field(
        140, ge=10, description="how long a pause waits for the second opinion while we speak"
    )
    listening_confirm_window_ms: int = Field(
        300, ge=10, description="the same while we listen, when nothing is interrupted"
    )
    release_threshold: float = Field(0.35, gt=0, lt=1, description="Silero: this is not speech")
    release_margin_db: float = Field(6.0, gt=0, description="speech this near the floor has ended")
    quiet_ms: int = Field(60, ge=10, description="silence after which recognition is started")
    endpoint_ms: int = Field(220, ge=20, description="silence that ends a turn")
    barge_in_endpoint_ms: int = Field(220, ge=20, description="the same, begun while we spoke")
    sentence_endpoint_ms: int = Field(
        140, ge=20, description="the same, when the words so far are a whole sentence"
    )
    refractory_ms: int = Field(250, ge=0, description="rest after a false alarm; doubles each time")
    refractory_max_ms: int = Field(2000, ge=0)
    playback_gate_db: float = Field(
        15.0, description="while we speak, a voice softer than playback by more is our echo"
    )
    playback_relaxed_db: float = Field(
        30.0, description="how far below it may sink where measured echoes are soft"
    )
    playback_margin_db: float = Field(10.0, ge=0, description="it stays so far above those echoes")
    playback_hold_ms: int = Field(400, ge=0, description="how late an echo may arrive")
    preroll_ms: int = Field(500, ge=MIC_STEP_MS, description="audio kept from before the edge")

    @field_validator("energy_steps", "voiced_steps")
    @classmethod
    def _k_of_n(cls, value: tuple[int, int]) -> tuple[int, int]:
        k, n = value
        if not 1 <= k <= n:
            raise ValueError(f"{k} of the last {n} steps can never be: write [k, n] with k ≤ n")
        return value


class EdgeDetector(Protocol):
    def voiced(self, samples: Int16) -> bool:
        """Does this 10 ms step sound like a voice? Called for every step, in order."""
        ...


class SecondOpinion(Protocol):
    def listen(self, samples: Int16, *, awake: bool) -> float | None:
        """Take a step; while awake, a probability of speech whenever there is a new one."""
        ...


class NoiseFloor:
    """The level that is nearly always there: a low percentile of the last 1.5 s."""

    _WINDOW_STEPS = 150
    _SETTLED_STEPS = 10
    _PERCENTILE = 0.15

    def __init__(self) -> None:
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, level_db: float) -> None:
        self._recent.append(level_db)
        insort(self._sorted, level_db)
        if len(self._recent) > self._WINDOW_STEPS:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]

    @property
    def level_db(self) -> float:
        """Before 100 ms were heard: the loudest so far, so that nothing stands out yet."""
        if not self._sorted:
            return 0.0
        if len(self._sorted) < self._SETTLED_STEPS:
            return self._sorted[-1]
        return self._sorted[int(len(self._sorted) * self._PERCENTILE)]


class _Recent:
    """k of the last n."""

    def __init__(self, k_of_n: tuple[int, int]) -> None:
        self._k, n = k_of_n
        self._last: deque[bool] = deque(maxlen=n)

    def step(self, value: bool) -> bool:
        self._last.append(value)
        return sum(self._last) >= self._k

    def clear(self) -> None:
        self._last.clear()


class _State(Enum):
    IDLE = "idle"
    PENDING = "pending"
    REFRACTORY = "refractory"
    SPEAKING = "speaking"
    TRAILING = "trailing"


_RESUME_STEPS = (2, 3)
_FORGET_REJECTIONS_MS = 5000
_ONSET_SLACK_STEPS = 2


class VoiceActivityDetector:
    """Takes 10 ms of 16 kHz mono a call. Not for two threads."""

    def __init__(
        self,
        settings: VadSettings,
        opinion: SecondOpinion | None = None,
        edge: EdgeDetector | None = None,
    ) -> None:
        self._settings = settings
        self._opinion = opinion or _silero()
        self._edge = edge or _webrtc(settings.aggressiveness)
        self._floor = NoiseFloor()
        self._gate = EchoGate(
            settings.playback_gate_db,
            settings.playback_relaxed_db,
            settings.playback_margin_db,
            settings.playback_hold_ms,
        )
        self._risen = _Recent(settings.energy_steps)
        self._voiced = _Recent(settings.voiced_steps)
        self._resumed = _Recent(_RESUME_STEPS)
        self._history: deque[Int16] = deque(maxlen=settings.preroll_ms // MIC_STEP_MS)
        self._levels: deque[float] = deque(maxlen=settings.preroll_ms // MIC_STEP_MS)
        self._state = _State.IDLE
        self._now_ms = 0
        self._onset_ms = 0
        self._deadline_ms = 0
        self._last_voiced_ms = 0
        self._endpoint_ms = self._enough_ms = settings.endpoint_ms
        self._probability = 0.0
        self._rejections = 0
        self._last_rejection_ms = 0

    @property
    def speaking(self) -> bool:
        """Speech is confirmed and has not ended."""
        return self._state in (_State.SPEAKING, _State.TRAILING)

    def preroll(self, ms: int) -> Int16:
        """The last `ms` of audio (bounded by `preroll_ms`), the step just taken included."""
        steps = list(self._history)[-max(1, ms // MIC_STEP_MS) :]
        return np.concatenate(steps) if steps else np.empty(0, dtype=np.int16)

    def step(
        self, samples: Int16, *, playing: bool, playback_dbfs: float = -120.0
    ) -> list[VadEvent]:
        """Decide on one step. Raises ValueError unless it has 160 samples.

        `playback_dbfs` is the level of what the listener is being played, -120 for nothing.
        """
        if samples.size != MIC_STEP_SAMPLES:
            raise ValueError(f"a step has {MIC_STEP_SAMPLES} samples, got {samples.size}")
        self._now_ms += MIC_STEP_MS
        level = level_dbfs(samples)
        self._history.append(samples)
        self._levels.append(level)
        gate = self._gate.step(level, playback_dbfs if playing else -120.0)
        edge = self._first_stage(samples, level, gate)
        begun = self._begin(playing) if edge and self._state is _State.IDLE else []
        # The pause must not wait for the second opinion: it wakes up with the next step.
        awake = self._state is not _State.IDLE and not begun
        fresh = self._opinion.listen(samples, awake=awake)
        if fresh is not None:
            self._probability = fresh
        if self._state in (_State.IDLE, _State.REFRACTORY):
            self._floor.add(level)
        return begun + self._react(level, fresh, edge, playing)

    def whole_sentence(self) -> None:
        """In a silence that may be the end: what was said needs nothing more, so less of it will
        do. Forgotten when they go on."""
        if self._state is _State.TRAILING:
            self._enough_ms = min(self._enough_ms, self._settings.sentence_endpoint_ms)

    # --- first stage ---

    def _first_stage(self, samples: Int16, level: float, gate: float) -> bool:
        settings = self._settings
        audible = level > max(settings.min_level_dbfs, gate)
        above = level - self._floor.level_db
        risen = self._risen.step(audible and above > settings.energy_margin_db)
        voice = self._edge.voiced(samples)
        voiced = self._voiced.step(voice and audible and above > settings.voiced_margin_db)
        return risen or voiced

    def _begin(self, playing: bool) -> list[VadEvent]:
        settings = self._settings
        window = settings.confirm_window_ms if playing else settings.listening_confirm_window_ms
        self._endpoint_ms = settings.barge_in_endpoint_ms if playing else settings.endpoint_ms
        self._state = _State.PENDING
        self._deadline_ms = self._now_ms + window
        self._onset_ms = self._find_onset()
        self._probability = 0.0
        self._gate.suspect()
        return [self._event(VadPhase.EDGE)]

    def _find_onset(self) -> int:
        """Back to where the level left the floor, and a little before."""
        line = max(self._floor.level_db + self._settings.release_margin_db, -90.0)
        loud = 0
        for level in reversed(self._levels):
            if level <= line:
                break
            loud += 1
        return max(0, self._now_ms - (loud + _ONSET_SLACK_STEPS) * MIC_STEP_MS)

    # --- what each state makes of a step ---

    def _react(
        self, level: float, fresh: float | None, edge: bool, playing: bool
    ) -> list[VadEvent]:
        if self._state is _State.PENDING:
            return self._while_pending(fresh)
        if self._state is _State.REFRACTORY:
            return self._while_refractory(fresh, edge, playing)
        if self._state is _State.SPEAKING:
            return self._while_speaking(self._sounds(level))
        if self._state is _State.TRAILING:
            return self._while_trailing(self._sounds(level))
        return []

    def _while_pending(self, fresh: float | None) -> list[VadEvent]:
        if self._is_speech(fresh):
            return [self._confirm()]
        return [self._reject()] if self._now_ms >= self._deadline_ms else []

    def _while_refractory(self, fresh: float | None, edge: bool, playing: bool) -> list[VadEvent]:
        if edge and self._is_speech(fresh):
            probability = self._probability
            begun = self._begin(playing)
            self._probability = probability
            return [*begun, self._confirm()]
        if self._now_ms >= self._deadline_ms:
            self._rest()
        return []

    def _while_speaking(self, sounds: bool) -> list[VadEvent]:
        if sounds:
            self._last_voiced_ms = self._now_ms
        elif self._silent_ms() >= self._settings.quiet_ms:
            self._state = _State.TRAILING
            self._enough_ms = self._endpoint_ms
            self._resumed.clear()
            return [self._event(VadPhase.QUIET)]
        return []

    def _while_trailing(self, sounds: bool) -> list[VadEvent]:
        if self._resumed.step(sounds):
            self._state = _State.SPEAKING
            self._last_voiced_ms = self._now_ms
            return [self._event(VadPhase.VOICED_AGAIN)]
        if self._silent_ms() >= self._enough_ms:
            self._gate.settle(self._silent_ms())
            self._rest()
            return [self._event(VadPhase.ENDED)]
        return []

    def _sounds(self, level: float) -> bool:
        """Energy knows the end to 10 ms; Silero lags but knows noise. Both must agree."""
        settings = self._settings
        line = max(self._floor.level_db + settings.release_margin_db, settings.min_level_dbfs)
        return level > line and self._probability >= settings.release_threshold

    # --- transitions ---

    def _is_speech(self, fresh: float | None) -> bool:
        return fresh is not None and fresh >= self._settings.confirm_threshold

    def _confirm(self) -> VadEvent:
        self._state = _State.SPEAKING
        self._last_voiced_ms = self._now_ms
        self._rejections = 0
        return self._event(VadPhase.CONFIRMED)

    def _reject(self) -> VadEvent:
        if self._now_ms - self._last_rejection_ms > _FORGET_REJECTIONS_MS:
            self._rejections = 0
        self._last_rejection_ms = self._now_ms
        rest_ms = self._settings.refractory_ms << min(self._rejections, 10)
        self._rejections += 1
        self._state = _State.REFRACTORY
        self._gate.settle(None)
        self._deadline_ms = self._now_ms + min(rest_ms, self._settings.refractory_max_ms)
        return self._event(VadPhase.REJECTED)

    def _rest(self) -> None:
        self._state = _State.IDLE
        self._risen.clear()
        self._voiced.clear()

    def _silent_ms(self) -> int:
        return self._now_ms - self._last_voiced_ms

    def _event(self, phase: VadPhase) -> VadEvent:
        return VadEvent(phase, self._now_ms, self._onset_ms, self._probability)


def _silero() -> SecondOpinion:
    from src.orchestrator.vad_models import SileroOpinion

    return SileroOpinion()


def _webrtc(aggressiveness: int) -> EdgeDetector:
    from src.orchestrator.vad_models import WebRtcEdge

    return WebRtcEdge(aggressiveness)
