"""How Whisper is used on short turns, whichever engine runs it.

Whisper was trained on 30 s, and engines always encode that much. Turns are short, and the encoder
is most of the work: so it is shown the audio and a few seconds of silence, decoded greedily without
timestamps. A short context sometimes makes Whisper loop; then the piece is decoded once more with
all 30 s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from src.audio.pcm import Float32
from src.orchestrator import asr_guard as guard
from src.orchestrator.asr_guard import Score
from src.orchestrator.ports import MIC_RATE, Transcript
from src.orchestrator.vad_models import speech_ms
from src.rpc.errors import UnknownName

AUTO = "auto"
FULL_CONTEXT_S = 30.0
_SHORTEST = MIC_RATE // 10


@dataclass(frozen=True, slots=True)
class Decoded:
    """`spent`: the token budget ran out before the text ended."""

    tokens: list[int]
    score: Score
    spent: bool


class WhisperDecoder(Protocol):
    """One engine with its model loaded; thread-safe."""

    languages: frozenset[str]

    def decode(
        self, samples: Float32, language: str, budget: int, abandoned: Callable[[], bool]
    ) -> Decoded:
        """Greedy, over exactly these samples, at most `budget` tokens; `auto` finds the language.

        Raises PassAbandoned between encoder and decoder, the only place where an engine can stop.
        """
        ...

    def text(self, tokens: Sequence[int]) -> str: ...


class WhisperBackend:
    """Implements `asr_scheduler.Backend`."""

    def __init__(
        self,
        name: str,
        decoder: WhisperDecoder,
        *,
        default_language: str,
        context_s: float,
        context_margin_s: float,
    ) -> None:
        self.name = name
        self._decoder = decoder
        self._default_language = default_language
        self._context_s = context_s
        self._context_margin_s = context_margin_s

    def warm_up(self) -> None:
        quiet = np.zeros(MIC_RATE, dtype=np.float32)
        self._decoder.decode(self._padded(quiet, 0), self.check_language(""), 1, lambda: False)

    def check_language(self, language: str) -> str:
        """`de-AT` is `de`; '' is the configured default."""
        wanted = language or self._default_language
        code = wanted.lower().replace("_", "-").partition("-")[0]
        languages = self._decoder.languages
        if code == AUTO:
            return AUTO if len(languages) > 1 else next(iter(languages))
        if code not in languages:
            raise UnknownName.among(f"language for {self.name}", wanted, languages)
        return code

    def transcribe(
        self, samples: Float32, language: str, *, draft: bool, abandoned: Callable[[], bool]
    ) -> Transcript:
        begun = time.perf_counter()
        parts = [
            self._piece(piece, language, draft, abandoned)
            for piece in guard.chunks(samples, MIC_RATE)
            if piece.size >= _SHORTEST
        ]
        return Transcript(
            text=" ".join(text for text, _ in parts if text),
            audio_ms=samples.size * 1000 // MIC_RATE,
            compute_ms=round((time.perf_counter() - begun) * 1000),
            no_speech_prob=min((s.no_speech_prob for _, s in parts), default=1.0),
            avg_logprob=min((s.avg_logprob for _, s in parts), default=0.0),
        )

    def _piece(
        self, samples: Float32, language: str, draft: bool, abandoned: Callable[[], bool]
    ) -> tuple[str, Score]:
        budget = guard.token_budget(samples.size * 1000 // MIC_RATE)
        short = self._padded(samples, self._context_margin_s)
        found = self._decoder.decode(short, language, budget, abandoned)
        if _loops(found) and not draft and short.size < FULL_CONTEXT_S * MIC_RATE:
            full = _pad(samples, FULL_CONTEXT_S)
            found = self._decoder.decode(full, language, budget, abandoned)
        text = self._decoder.text(_said_once(found)).strip()
        if not guard.has_words(text) or _nobody_spoke(text, found.score, samples):
            return "", found.score
        return text, found.score

    def _padded(self, samples: Float32, margin_s: float) -> Float32:
        wanted_s = max(self._context_s, samples.size / MIC_RATE + margin_s)
        return _pad(samples, min(wanted_s, FULL_CONTEXT_S))


def _pad(samples: Float32, length_s: float) -> Float32:
    return np.pad(samples, (0, max(0, int(length_s * MIC_RATE) - samples.size)))


def _loops(found: Decoded) -> bool:
    return found.spent or guard.repetition(found.tokens) is not None


def _said_once(found: Decoded) -> list[int]:
    """A loop that ran into the budget says its phrase once; a short one was perhaps meant."""
    return found.tokens[: guard.repetition(found.tokens)] if found.spent else found.tokens


def _nobody_spoke(text: str, score: Score, samples: Float32) -> bool:
    return guard.is_doubtful(text, score) and guard.is_invented(text, score, speech_ms(samples))
