"""Every voice ends up at one level, without pumping, without clipping."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.audio.loudness import MAX_GAIN_DB, Loudness
from src.audio.pcm import FRAME_SAMPLES, SAMPLE_RATE, Float32

TARGET_DBFS = -20.0


def voice(seconds: float, dbfs: float) -> Float32:
    """Syllables of 200 ms at this level, with pauses of 60 ms between them."""
    size = int(seconds * SAMPLE_RATE)
    noise = np.random.default_rng(7).standard_normal(size)
    speaking = (np.arange(size) % (SAMPLE_RATE * 260 // 1000)) < SAMPLE_RATE * 200 // 1000
    return (noise * speaking * 10 ** (dbfs / 20)).astype(np.float32)


def dbfs(samples: Float32) -> float:
    loud = samples[np.abs(samples) > 0.0]
    return float(10 * np.log10(np.mean(np.square(loud.astype(np.float64)))))


def levelled(samples: Float32, gain_db: float = 0.0) -> Float32:
    loudness = Loudness(TARGET_DBFS, gain_db)
    return np.concatenate((loudness.push(samples), loudness.flush()))


@pytest.mark.parametrize("level", [-28.0, -24.0, -20.0, -14.0])
def test_different_voices_reach_the_same_level(level: float) -> None:
    out = levelled(voice(6.0, level))
    assert abs(dbfs(out[3 * SAMPLE_RATE :]) - TARGET_DBFS) < 1.5


def test_it_does_not_pump() -> None:
    loudness = Loudness(TARGET_DBFS)
    samples = voice(6.0, -26.0)
    gains = []
    for start in range(0, samples.size, FRAME_SAMPLES):
        loudness.push(samples[start : start + FRAME_SAMPLES])
        gains.append(loudness.gain_db)
    settled = gains[150:]
    assert max(settled) - min(settled) < 1.0


def test_silence_stays_silent_and_leaves_the_gain_alone() -> None:
    loudness = Loudness(TARGET_DBFS)
    loudness.push(voice(3.0, -26.0))
    before = loudness.gain_db
    out = loudness.push(np.zeros(5 * SAMPLE_RATE, np.float32))
    assert not out.any()
    assert abs(loudness.gain_db - before) < 1.0


def test_a_whisper_is_not_blown_up_without_bound() -> None:
    loudness = Loudness(TARGET_DBFS)
    loudness.push(voice(10.0, -40.0))
    assert loudness.gain_db == pytest.approx(MAX_GAIN_DB)


@given(st.floats(0.01, 1.0), st.floats(-MAX_GAIN_DB, MAX_GAIN_DB))
def test_no_peak_reaches_full_scale(peak: float, gain_db: float) -> None:
    burst = (peak * np.sign(np.sin(np.arange(9_600) / 20))).astype(np.float32)
    assert np.max(np.abs(levelled(burst, gain_db))) < 1.0


@given(st.lists(st.integers(0, 20_000), max_size=8))
def test_chunking_makes_no_difference(cuts: list[int]) -> None:
    samples = voice(0.4, -26.0)
    loudness = Loudness(TARGET_DBFS)
    parts = [loudness.push(part) for part in np.split(samples, sorted(cuts))]
    assert np.array_equal(np.concatenate([*parts, loudness.flush()]), levelled(samples))


def test_the_next_utterance_starts_where_the_last_one_ended() -> None:
    first = Loudness(TARGET_DBFS)
    first.push(voice(3.0, -26.0))
    out = levelled(voice(0.5, -26.0), gain_db=first.gain_db)
    assert abs(dbfs(out) - TARGET_DBFS) < 1.5
