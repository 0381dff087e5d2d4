"""Resampling of a live microphone with one constant, short delay.

soxr's stream works in blocks on the way to 16 kHz: at LQ it holds back up to 20 ms from 48 kHz and
60 ms from 8 kHz, which a speech detector would pay on every onset. This filter gives each chunk its
samples at once, about 1 ms behind (2 ms from 8 kHz).
"""

from __future__ import annotations

from math import ceil, gcd

import numpy as np
from numpy.lib.stride_tricks import as_strided

from src.audio.pcm import Float32

_STOPBAND_DB = 60.0
_TRANSITION = 0.25
"""Width of the filter's slope, as a share of the lower rate's half."""


class PolyphaseResampler:
    """Mono float32 from one rate to another, chunk by chunk; the same samples however chunked."""

    def __init__(self, source_rate: int, target_rate: int) -> None:
        common = gcd(source_rate, target_rate)
        self._up = target_rate // common
        self._down = source_rate // common
        self._phases = _design(source_rate, target_rate, self._up)
        self._taps = int(self._phases.shape[1])
        self._history: Float32 = np.zeros(self._taps - 1, dtype=np.float32)
        self._next = 0

    @property
    def delay_samples(self) -> float:
        """In samples of the source rate."""
        return (self._taps - 1) / 2

    def push(self, samples: Float32) -> Float32:
        """Everything that `samples` make known."""
        if not samples.size:
            return samples
        joined = np.concatenate((self._history, samples))
        end = samples.size * self._up
        at = np.arange(self._next, end, self._down)
        # A sliding window by hand: numpy's own costs more than the filter at these sizes.
        windows = as_strided(joined, (samples.size, self._taps), joined.strides * 2)
        taps = self._phases[at % self._up]
        out: Float32 = np.einsum("ij,ij->i", windows[at // self._up], taps)
        self._history = joined[samples.size :]
        self._next = self._next + at.size * self._down - end
        return out


def _design(source_rate: int, target_rate: int, up: int) -> Float32:
    """(phases, taps): a Kaiser-windowed sinc, cut into one short filter per output phase.

    Length and window by Kaiser's formulas (Oppenheim & Schafer, Discrete-Time Signal Processing).
    """
    half = min(source_rate, target_rate) / 2.0
    slope = 2.0 * np.pi * half * _TRANSITION / source_rate
    taps = ceil((_STOPBAND_DB - 8.0) / (2.285 * slope)) + 1
    beta = 0.1102 * (_STOPBAND_DB - 8.7)
    length = taps * up
    centred = (np.arange(length) - (length - 1) / 2.0) / up
    cutoff = 2.0 * half * (1.0 - _TRANSITION / 2.0) / source_rate
    prototype = cutoff * np.sinc(cutoff * centred) * np.kaiser(length, beta)
    phases = prototype.reshape(taps, up).T[:, ::-1]
    normalised = phases / phases.sum(axis=1, keepdims=True)
    return np.ascontiguousarray(normalised, dtype=np.float32)
