"""Streaming resampling.

soxr LQ holds back under 1 ms; its better presets work in blocks and hold back 24-43 ms.
"""

from __future__ import annotations

import numpy as np
import soxr

from src.audio.pcm import SAMPLE_RATE, Float32

_EMPTY: Float32 = np.empty(0, dtype=np.float32)


class StreamResampler:
    """Mono float32 from one rate to another, chunk by chunk, without seams."""

    def __init__(self, source_rate: int, target_rate: int = SAMPLE_RATE) -> None:
        self._same = source_rate == target_rate
        self._stream = (
            None
            if self._same
            else soxr.ResampleStream(source_rate, target_rate, 1, dtype="float32", quality="LQ")
        )

    def push(self, samples: Float32, *, last: bool = False) -> Float32:
        """Resampled audio so far; with `last` the tail too, after which the resampler is spent."""
        if self._stream is None:
            return samples
        if not samples.size and not last:
            return _EMPTY
        out: Float32 = self._stream.resample_chunk(samples, last=last)
        return out
