from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.audio.pcm import Float32
from src.audio.polyphase import PolyphaseResampler

RATES = [8_000, 24_000, 32_000, 44_100, 48_000]


def tone(rate: int, hz: float, seconds: float = 0.5) -> Float32:
    return np.sin(2 * np.pi * hz * np.arange(int(rate * seconds)) / rate).astype(np.float32)


def gain_db(rate: int, hz: float) -> float:
    out = PolyphaseResampler(rate, 16_000).push(tone(rate, hz))[1600:]
    return 20 * float(np.log10(max(float(np.sqrt(2 * np.mean(out**2))), 1e-6)))


@pytest.mark.parametrize("rate", RATES)
def test_every_chunk_gives_its_samples_at_once(rate: int) -> None:
    resampler = PolyphaseResampler(rate, 16_000)
    chunk = np.zeros(rate // 50, dtype=np.float32)
    assert [resampler.push(chunk).size for _ in range(50)] == [320] * 50
    assert resampler.delay_samples / rate < 0.0035


@pytest.mark.parametrize("rate", RATES)
def test_speech_passes_and_what_would_alias_does_not(rate: int) -> None:
    assert abs(gain_db(rate, 300)) < 0.1
    assert abs(gain_db(rate, 3_000)) < 0.1
    if rate > 20_000:
        assert abs(gain_db(rate, 6_000)) < 0.1
        assert gain_db(rate, 9_500) < -50


def test_an_image_of_8_khz_audio_is_not_heard_above_4_khz() -> None:
    out = PolyphaseResampler(8_000, 16_000).push(tone(8_000, 1_000, 1.0))[2_000:12_000]
    spectrum = np.abs(np.fft.rfft(out * np.hanning(out.size)))
    hz = np.fft.rfftfreq(out.size, 1 / 16_000)
    assert 20 * np.log10(spectrum[hz > 4_500].max() / spectrum.max()) < -50


@settings(max_examples=40, deadline=None)
@given(rate=st.sampled_from(RATES), cuts=st.lists(st.integers(1, 900), min_size=1, max_size=30))
def test_the_chunking_does_not_matter(rate: int, cuts: list[int]) -> None:
    signal = np.random.default_rng(1).standard_normal(sum(cuts)).astype(np.float32)
    whole = PolyphaseResampler(rate, 16_000).push(signal)
    chunked = PolyphaseResampler(rate, 16_000)
    pieces = [chunked.push(part) for part in np.split(signal, np.cumsum(cuts)[:-1])]
    np.testing.assert_allclose(np.concatenate(pieces), whole, atol=1e-5)


def test_nothing_in_nothing_out() -> None:
    assert PolyphaseResampler(48_000, 16_000).push(np.empty(0, dtype=np.float32)).size == 0
