"""An utterance's PCM at its native rate to numbered 20 ms frames and their words. No I/O."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from src.audio.framing import Framer
from src.audio.loudness import Loudness
from src.audio.opus import OpusEncoder
from src.audio.pcm import FRAME_MS, Float32, Int16, to_int16
from src.audio.resample import StreamResampler
from src.common.nvtx import nvtx_range
from src.tts.playout import Frame
from src.tts.tts_base import PcmChunk, WordMark

_EMPTY: Float32 = np.empty(0, dtype=np.float32)


class Renderer:
    """Resample, level, quantise, cut, and encode if `opus`. Holds back less than one frame.

    Word times of a chunk count from its first sample; those of a frame from the utterance's start.
    """

    def __init__(self, native_rate: int, loudness: Loudness | None, *, opus: bool = False) -> None:
        self._native_rate = native_rate
        self._resampler = StreamResampler(native_rate)
        self._loudness = loudness
        self._framer = Framer()
        self._opus = OpusEncoder() if opus else None
        self._samples_in = 0
        self._frames = 0
        self._words: list[WordMark] = []

    @property
    def audio_ms(self) -> int:
        return self._frames * FRAME_MS

    def push(self, chunk: PcmChunk) -> list[Frame]:
        start_ms = self._samples_in * 1000 // self._native_rate
        self._samples_in += chunk.samples.size
        self._words += (_shift(word, start_ms) for word in chunk.words)
        with nvtx_range("repacketize"):
            return self._cut(self._resampler.push(chunk.samples))

    def finish(self) -> tuple[list[Frame], tuple[WordMark, ...]]:
        """The rest, and the words that begin after the last frame. The renderer is spent."""
        if not self._samples_in:
            return [], tuple(self._words)
        samples = self._level(self._resampler.push(_EMPTY, last=True))
        if self._loudness is not None:
            samples = np.concatenate((samples, self._loudness.flush()))
        blocks = self._framer.push(to_int16(samples)) + self._framer.flush()
        frames = list(self._number(blocks))
        return frames, tuple(self._words)

    def _cut(self, samples: Float32) -> list[Frame]:
        return list(self._number(self._framer.push(to_int16(self._level(samples)))))

    def _level(self, samples: Float32) -> Float32:
        return samples if self._loudness is None else self._loudness.push(samples)

    def _number(self, blocks: list[Int16]) -> Iterator[Frame]:
        for block in blocks:
            self._frames += 1
            yield Frame(self._frames - 1, self._encode(block), self._words_before(self.audio_ms))

    def _encode(self, block: Int16) -> bytes:
        return block.tobytes() if self._opus is None else self._opus.encode(block)

    def _words_before(self, end_ms: int) -> tuple[WordMark, ...]:
        begun = tuple(word for word in self._words if word.start_ms < end_ms)
        if begun:
            self._words = [word for word in self._words if word.start_ms >= end_ms]
        return begun


def _shift(word: WordMark, by_ms: int) -> WordMark:
    return replace(word, start_ms=word.start_ms + by_ms, end_ms=word.end_ms + by_ms)
