"""Opus on the wire: one packet a frame, and what comes out is what went in."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from src.audio.opus import OpusDecoder, OpusEncoder, OpusMissing, opus_available
from src.audio.pcm import FRAME_BYTES, FRAME_SAMPLES, SAMPLE_RATE, Int16

needs_av = pytest.mark.skipif(not opus_available(), reason="the package av is not installed")


def tone(frames: int) -> Int16:
    time_s = np.arange(frames * FRAME_SAMPLES) / SAMPLE_RATE
    return (8_000 * np.sin(2 * np.pi * 440 * time_s)).astype(np.int16)


@needs_av
def test_one_small_packet_for_every_frame_and_back() -> None:
    samples, encoder, decoder = tone(50), OpusEncoder(), OpusDecoder()
    packets = [encoder.encode(frame) for frame in samples.reshape(50, FRAME_SAMPLES)]
    assert sum(map(len, packets)) < 50 * FRAME_BYTES / 10
    decoded = [decoder.decode(packet) for packet in packets]
    assert {frame.size for frame in decoded} == {FRAME_SAMPLES}
    heard, spoken = np.concatenate(decoded)[9_600:38_400], samples[9_600:38_400]
    spectrum = np.abs(np.fft.rfft(heard.astype(float)))
    assert spectrum.argmax() == np.abs(np.fft.rfft(spoken.astype(float))).argmax()
    assert abs(np.std(heard) / np.std(spoken) - 1.0) < 0.2


@needs_av
def test_what_is_not_opus_is_refused() -> None:
    with pytest.raises(ValueError, match="Opus"):
        OpusDecoder().decode(b"\xff" * 7)


def test_without_the_package_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(OpusMissing, match="pip install"):
        OpusEncoder()
