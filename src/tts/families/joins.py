"""How segments that were spoken apart sound as one: silence cut off, pauses by punctuation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from src.audio.pcm import Float32
from src.tts.tts_base import PcmChunk, WordMark
from src.tts.words import audible_span

_KEEP_BEFORE_MS = 10
_KEEP_AFTER_MS = 30
_SENTENCE_MS = 280
_CLAUSE_MS = 140
_CLOSERS = "\"'”’)]}»」』】） "


def pause_after_ms(text: str) -> int:
    """How long a speaker rests after this segment; 0 after one that was cut in mid-clause."""
    last = text.rstrip(_CLOSERS)[-1:]
    if last and last in ".!?…。！？؟।۔":
        return _SENTENCE_MS
    if last and last in ",;:—–，、；：،؛":
        return _CLAUSE_MS
    return 0


class Joiner:
    """One utterance's chunks in, the same chunks trimmed and spaced out.

    A pause goes in front of the chunk that ends it, so that an utterance ends when its last word
    does and its first word comes at once.
    """

    def __init__(self, sample_rate: int) -> None:
        self._rate = sample_rate
        self._pause_ms = 0

    def join(self, text: str, samples: Float32, words: Iterable[WordMark]) -> PcmChunk:
        """`words` are timed from the first of `samples`; in the chunk, from the chunk's first."""
        begin, end = audible_span(samples, self._rate)
        begin = max(0, begin - self._rate * _KEEP_BEFORE_MS // 1000)
        end = min(samples.size, end + self._rate * _KEEP_AFTER_MS // 1000)
        lead = self._rate * self._pause_ms // 1000
        self._pause_ms = pause_after_ms(text)
        spaced = np.concatenate((np.zeros(lead, dtype=np.float32), samples[begin:end]))
        shift = round((lead - begin) * 1000 / self._rate)
        length_ms = spaced.size * 1000 // self._rate
        return PcmChunk(spaced, tuple(_moved(word, shift, length_ms) for word in words))


def _moved(word: WordMark, shift_ms: int, length_ms: int) -> WordMark:
    start = min(max(word.start_ms + shift_ms, 0), length_ms)
    return replace(word, start_ms=start, end_ms=min(max(word.end_ms + shift_ms, start), length_ms))
