"""Short fades, so that a cut or a resume does not click."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from src.audio.pcm import Int16


def fade_in(samples: Int16, ramp_samples: int) -> Int16:
    """Raised cosine over the first `ramp_samples`; returns a copy."""
    ramp = _ramp(min(ramp_samples, samples.size))
    out: Int16 = samples.copy()
    out[: ramp.size] = np.rint(samples[: ramp.size] * ramp).astype(np.int16)
    return out


def fade_out(samples: Int16, ramp_samples: int) -> Int16:
    """Raised cosine to silence over the *first* `ramp_samples`; everything after is silence."""
    length = min(ramp_samples, samples.size)
    out = np.zeros_like(samples)
    out[:length] = np.rint(samples[:length] * _ramp(length)[::-1]).astype(np.int16)
    return out


def _ramp(length: int) -> NDArray[np.float64]:
    ramp: NDArray[np.float64] = 0.5 - 0.5 * np.cos(np.pi * (np.arange(length) + 0.5) / length)
    return ramp
