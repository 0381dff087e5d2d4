"""Bytes of an answer to samples: raw PCM and WAV, however the network cuts them."""

from __future__ import annotations

import itertools
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.audio.pcm import Float32, to_int16
from src.rpc.errors import Internal
from src.tts.families.http_speech.audio import SpeechDecoder
from tests.speech_server import RATE, pcm, tone, wav

HALF_MS = 60
HALF = pcm(HALF_MS)
LIST = struct.pack("<4sI", b"LIST", 5) + b"title" + b"\0"


def decoded(
    data: bytes, cuts: list[int] | None = None, *, wav: bool = False
) -> tuple[Float32, SpeechDecoder]:
    decoder = SpeechDecoder(RATE, wav=wav)
    edges = [0, *sorted(cuts or []), len(data)]
    pieces = [decoder.push(data[a:b]) for a, b in itertools.pairwise(edges)]
    return np.concatenate([*pieces, decoder.finish()]), decoder


def same(samples: Float32, expected: Float32) -> bool:
    return samples.size == expected.size and bool(np.all(np.abs(samples - expected) < 1e-4))


WHOLE = {
    "raw": HALF,
    "wav": wav(HALF),
    "wav of size 0": wav(HALF, size=0),
    "wav of size -1": wav(HALF, size=0xFFFFFFFF),
    "wav of a great size": wav(HALF, size=0x7FFFFFFF - 36),
    "wav with a title": wav(HALF, before=LIST),
    "wav with something after": wav(HALF) + LIST,
    "two wavs": wav(HALF[:1000]) + wav(HALF[1000:]),
    "extensible": wav(HALF).replace(
        struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, RATE, RATE * 2, 2, 16),
        struct.pack("<4sIHHIIHH", b"fmt ", 40, 0xFFFE, 1, RATE, RATE * 2, 2, 16)
        + struct.pack("<HHIH", 22, 16, 4, 1)
        + bytes(14),
    ),
}


@pytest.mark.parametrize("name", WHOLE)
@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, len(HALF) + 40), max_size=60))
def test_wherever_the_network_cuts_the_samples_are_the_same(name: str, cuts: list[int]) -> None:
    data = WHOLE[name]
    samples, decoder = decoded(data, [min(cut, len(data)) for cut in cuts])
    assert same(samples, tone(HALF_MS))
    assert decoder.rate == RATE
    assert not decoder.broken_off


@pytest.mark.parametrize("name", WHOLE)
def test_byte_by_byte(name: str) -> None:
    data = WHOLE[name]
    assert same(decoded(data, list(range(len(data))))[0], tone(HALF_MS))


def test_sound_is_handed_on_while_it_comes() -> None:
    decoder = SpeechDecoder(RATE, wav=False)
    assert decoder.push(HALF[:100]).size == 0
    assert decoder.push(HALF[100:1001]).size == 500
    assert decoder.push(HALF[1001:2001]).size == 500


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF])
def test_a_header_that_knows_no_length_lets_the_sound_through_at_once(size: int) -> None:
    decoder = SpeechDecoder(RATE, wav=True)
    assert decoder.push(wav(HALF[:1000], size=size)).size == 500
    assert decoder.push(HALF[1000:2000]).size == 500


def test_half_a_sample_at_the_end_is_dropped() -> None:
    assert decoded(HALF + b"\x01")[0].size == len(HALF) // 2


def test_the_header_s_rate_wins() -> None:
    samples, decoder = decoded(wav(pcm(100, 16_000), rate=16_000))
    assert (decoder.rate, samples.size) == (16_000, 1_600)


def test_stereo_is_mixed_across_cuts() -> None:
    left, right = tone(60), -0.5 * tone(60)  # mixed: a quarter
    both = np.stack((left, right), axis=1).reshape(-1)
    data = wav(to_int16(both).tobytes(), channels=2)
    samples, _ = decoded(data, list(range(0, len(data), 7)))
    assert same(samples, 0.25 * tone(60))


def test_floats_are_taken_and_what_is_no_number_is_silence() -> None:
    loud = np.array([0.5, np.nan, 7.0, -0.25], dtype="<f4")
    samples, _ = decoded(wav(loud.tobytes(), bits=32, tag=3))
    assert samples.tolist() == [0.5, 0.0, 1.0, -0.25]


def test_a_wav_that_is_shorter_than_it_says_is_broken_off() -> None:
    samples, decoder = decoded(wav(HALF, size=len(HALF) + 2))
    assert decoder.broken_off
    assert samples.size == len(HALF) // 2
    assert decoded(wav(b"", size=200))[1].broken_off


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (wav(HALF, bits=24), "24 bits"),
        (wav(HALF, bits=8), "8 bits"),
        (wav(HALF, tag=7), "format 7"),
        (wav(HALF, channels=9), "9 channels"),
        (wav(HALF, channels=0), "0 channels"),
        (wav(HALF, rate=400), "400 Hz"),
        (b"RIFF\0\0\0\0AVI LIST", "not WAVE"),
        (b"RIFF\0\0\0\0WAVEdata\0\0\0\0", "no format"),
        (b"RIFF\0\0\0\0WAVEfmt \4\0\0\0abcd", "damaged"),
        (b"RIFF\0\0\0\0WAVEjunk\xff\xff\xff\x00", "longer than"),
        (wav(HALF) + wav(HALF, rate=48_000), "changes its sample rate"),
        (b"ID3\x04 and so on", "MP3"),
        (b"OggS and so on", "Ogg"),
    ],
)
def test_what_cannot_be_played_is_refused_in_words(data: bytes, said: str) -> None:
    with pytest.raises(Internal, match=said):
        decoded(data)


def test_a_promised_wav_that_is_none_is_refused() -> None:
    with pytest.raises(Internal, match="that is not WAV"):
        decoded(HALF, wav=True)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400), st.booleans())
def test_any_bytes_are_sound_or_refused(data: bytes, header: bool) -> None:
    try:
        samples, _ = decoded(wav(b"")[:36] + data if header else data, [3, 50])
    except Internal:
        return
    assert samples.dtype == np.float32
    assert np.all(np.abs(samples) <= 1.0)
