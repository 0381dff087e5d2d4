"""Streaming resampling: no seams, no drift, almost nothing held back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.audio.pcm import SAMPLE_RATE, Float32
from src.audio.resample import StreamResampler


def tone(rate: int, seconds: float, hz: float = 1_000.0) -> Float32:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def resampled(samples: Float32, rate: int, step: int) -> Float32:
    resampler = StreamResampler(rate)
    parts = [resampler.push(samples[i : i + step]) for i in range(0, samples.size, step)]
    parts.append(resampler.push(np.empty(0, np.float32), last=True))
    return np.concatenate(parts)


@pytest.mark.parametrize("rate", [16_000, 22_050, 24_000, 44_100])
def test_length_follows_the_rate(rate: int) -> None:
    out = resampled(tone(rate, 1.0), rate, rate // 50)
    assert abs(out.size - SAMPLE_RATE) <= 1


@pytest.mark.parametrize("rate", [16_000, 22_050, 24_000])
def test_a_tone_stays_that_tone(rate: int) -> None:
    out = resampled(tone(rate, 1.0), rate, rate // 50)
    expected = tone(SAMPLE_RATE, 1.0)
    middle = slice(2_000, 46_000)
    noise = out[middle] - expected[middle]
    snr_db = 10 * np.log10(np.mean(expected[middle] ** 2) / np.mean(noise**2))
    assert snr_db > 60.0


@given(st.integers(1, 3_000))
def test_no_seams_whatever_the_chunking(step: int) -> None:
    samples = tone(22_050, 0.2)
    whole, pieces = resampled(samples, 22_050, samples.size), resampled(samples, 22_050, step)
    assert whole.size == pieces.size
    assert np.max(np.abs(whole - pieces)) < 1e-5


def test_less_than_two_milliseconds_are_held_back() -> None:
    resampler = StreamResampler(22_050)
    given_samples = out_samples = 0
    for _ in range(50):
        given_samples += 441
        out_samples += resampler.push(tone(22_050, 0.02)).size
        assert given_samples / 22_050 - out_samples / SAMPLE_RATE < 0.002


def test_the_same_rate_passes_through_untouched() -> None:
    samples = tone(SAMPLE_RATE, 0.02)
    assert StreamResampler(SAMPLE_RATE).push(samples) is samples


def test_an_empty_push_gives_nothing() -> None:
    assert StreamResampler(16_000).push(np.empty(0, np.float32)).size == 0
