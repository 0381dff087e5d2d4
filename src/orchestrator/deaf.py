"""The recogniser of a machine that has none: it knows that somebody spoke, and for how long."""

from __future__ import annotations

from src.audio.pcm import Float32
from src.orchestrator.ports import MIC_RATE, Transcript

_SHORTEST_MS = 200


class DeafRecognizer:
    """`ports.Recognizer` without a model, so that voice and barge-in can be tried."""

    name = "none"

    async def transcribe(
        self, samples: Float32, *, session_id: str, language: str = "", urgent: bool = True
    ) -> Transcript:
        audio_ms = samples.size * 1000 // MIC_RATE
        text = f"{audio_ms / 1000:.1f} seconds of speech, which nobody here understands"
        heard = text if urgent and audio_ms >= _SHORTEST_MS else ""
        return Transcript(heard, audio_ms=audio_ms, compute_ms=0)

    async def aclose(self) -> None:
        pass
