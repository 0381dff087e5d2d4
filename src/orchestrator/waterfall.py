"""Where a turn's time went, from the end of the user's speech to the first frame of the answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from src.audio.pcm import Int16, to_float32
from src.orchestrator.ports import MIC_STEP_MS, MIC_STEP_SAMPLES
from src.rpc.ws_events import Latency

# The level under the loudest step at which speech counts as over (as the onset rule of the tests).
_RANGE_DB = 25.0


@dataclass(slots=True)
class Waterfall:
    """Clock times in ms; a stage that was not reached is None."""

    speech_end: float
    endpoint: float | None = None
    transcript: float | None = None
    first_token: float | None = None
    first_clause: float | None = None
    first_audio: float | None = None

    def to_event(self, turn_id: str, *, speculative: bool) -> Latency:
        return Latency(
            turn_id=turn_id,
            endpoint_ms=self._since(self.endpoint),
            transcript_ms=self._since(self.transcript),
            first_token_ms=self._since(self.first_token),
            first_clause_ms=self._since(self.first_clause),
            first_audio_ms=self._since(self.first_audio),
            speculative=speculative,
        )

    def _since(self, at_ms: float | None) -> int:
        return 0 if at_ms is None else max(0, round(at_ms - self.speech_end))


def trailing_silence_ms(samples: Int16) -> int:
    """How long the end of 16 kHz audio has been quiet, to 10 ms, against its loudest step."""
    whole = samples.size - samples.size % MIC_STEP_SAMPLES
    if not whole:
        return 0
    steps = to_float32(samples[samples.size - whole :]).reshape(-1, MIC_STEP_SAMPLES)
    power = np.mean(np.square(steps), axis=1)
    loud = np.flatnonzero(power > power.max() * 10 ** (-_RANGE_DB / 10))
    return (len(steps) - 1 - int(loud[-1])) * MIC_STEP_MS if loud.size else 0
