"""Partial transcripts by local agreement: what two passes in a row say the same is kept. Pure.

After Macháček, Dabre, Bojar (2023), "Turning Whisper into Real-Time Transcription System": words
that two consecutive hypotheses share as a prefix are committed and never taken back.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Partial:
    """`text[:stable_chars]` will not change for the rest of the turn. Over `audio_ms` of audio."""

    text: str
    stable_chars: int
    audio_ms: int


class LocalAgreement:
    """One turn."""

    def __init__(self) -> None:
        self._stable: list[str] = []
        self._last: list[str] = []

    def push(self, hypothesis: str, audio_ms: int) -> Partial:
        words = hypothesis.split()
        agreed = _common_prefix(self._last, words)
        # The word at the very end is still being spoken: it may yet grow ("to" into "tomorrow").
        agreed = min(agreed, len(words) - 1)
        if agreed > len(self._stable):
            self._stable += words[len(self._stable) : agreed]
        self._last = words
        stable = " ".join(self._stable)
        text = " ".join([*self._stable, *words[len(self._stable) :]])
        return Partial(text, len(stable), audio_ms)


def _common_prefix(left: list[str], right: list[str]) -> int:
    count = 0
    for a, b in zip(left, right, strict=False):
        if _bare(a) != _bare(b):
            break
        count += 1
    return count


def _bare(word: str) -> str:
    """Case and punctuation change with every pass; the word is what counts."""
    return "".join(c for c in word.lower() if c.isalnum()) or word
