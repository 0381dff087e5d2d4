"""What every room agrees on: 20 ms frames of 48 kHz mono, s16le on the wire, float32 inside."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

SAMPLE_RATE = 48_000
FRAME_MS = 20
FRAME_SAMPLES = SAMPLE_RATE * FRAME_MS // 1000
FRAME_BYTES = FRAME_SAMPLES * 2

Float32 = NDArray[np.float32]
Int16 = NDArray[np.int16]


def to_int16(samples: Float32) -> Int16:
    """float32 in [-1, 1] to int16; louder is clipped, never wrapped."""
    out: Int16 = np.rint(np.clip(samples, -1.0, 1.0) * 32767.0).astype(np.int16)
    return out


def to_float32(samples: Int16) -> Float32:
    out: Float32 = samples.astype(np.float32) / np.float32(32768.0)
    return out


def from_bytes(pcm: bytes) -> Int16:
    """s16le bytes to samples, without a copy. Raises ValueError on an odd length."""
    return np.frombuffer(pcm, dtype="<i2")


def level_dbfs(samples: Int16) -> float:
    """RMS level of a block in dB below full scale; -120 for digital silence."""
    if samples.size == 0:
        return -120.0
    loud = samples.astype(np.float32)
    power = float(np.dot(loud, loud)) / samples.size / 32768.0**2
    return 10.0 * math.log10(max(power, 1e-12))
