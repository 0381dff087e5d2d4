"""PCM of any chunking in, the same frames out: the framer alone, and the whole way to the wire."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from src.audio.framing import Framer
from src.audio.loudness import Loudness
from src.audio.pcm import FRAME_BYTES, FRAME_MS, FRAME_SAMPLES, Float32, Int16, to_int16
from src.audio.ramps import fade_in, fade_out
from src.tts.playout import Frame
from src.tts.render import Renderer
from src.tts.tts_base import PcmChunk, WordMark

CUTS = st.lists(st.integers(0, 6_000), max_size=12)
NATIVE_RATE = 22_050


def chunked(samples: Float32, cuts: list[int]) -> list[Float32]:
    places = sorted(min(cut, samples.size) for cut in cuts)
    return list(np.split(samples, places))


@given(hnp.arrays(np.int16, st.integers(0, 5_000)), CUTS)
def test_any_chunking_gives_the_same_frames(samples: Int16, cuts: list[int]) -> None:
    whole, pieces = Framer(), Framer()
    expected = whole.push(samples) + whole.flush()
    got = [frame for piece in np.split(samples, sorted(cuts)) for frame in pieces.push(piece)]
    got += pieces.flush()
    assert [frame.tobytes() for frame in got] == [frame.tobytes() for frame in expected]
    assert all(frame.size == FRAME_SAMPLES for frame in got)


@given(hnp.arrays(np.int16, st.integers(0, 3_000)))
def test_nothing_is_lost_and_the_tail_is_padded_with_silence(samples: Int16) -> None:
    framer = Framer()
    frames = framer.push(samples)
    assert framer.pending_samples == samples.size - FRAME_SAMPLES * len(frames)
    joined = np.concatenate([np.empty(0, np.int16), *frames, *framer.flush()])
    assert np.array_equal(joined[: samples.size], samples)
    assert not joined[samples.size :].any()
    assert framer.flush() == []


def test_frame_length_must_be_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        Framer(0)


def test_loud_samples_clip_and_never_wrap() -> None:
    loud = np.array([2.0, -2.0, 1.0, -1.0, 0.0], dtype=np.float32)
    assert to_int16(loud).tolist() == [32767, -32767, 32767, -32767, 0]


def test_fades_keep_length_and_end_in_silence() -> None:
    flat = np.full(FRAME_SAMPLES, 10_000, dtype=np.int16)
    rising, falling = fade_in(flat, 480), fade_out(flat, 480)
    assert rising.size == falling.size == FRAME_SAMPLES
    assert rising[0] < 10
    assert np.array_equal(rising[480:], flat[480:])
    assert not falling[480:].any()
    assert np.all(np.diff(falling[:480].astype(int)) <= 0)


# --- the renderer: native PCM to numbered frames ---


def speech_like(seconds: float) -> Float32:
    time_s = np.arange(int(seconds * NATIVE_RATE)) / NATIVE_RATE
    swell = 0.2 * (1.0 + np.sin(2 * np.pi * 3.0 * time_s))
    return (swell * np.sin(2 * np.pi * 180.0 * time_s)).astype(np.float32)


def render(chunks: list[PcmChunk], *, level: bool = True) -> tuple[list[Frame], list[str]]:
    renderer = Renderer(NATIVE_RATE, Loudness(-20.0) if level else None)
    frames = [frame for chunk in chunks for frame in renderer.push(chunk)]
    rest, words = renderer.finish()
    return frames + rest, [word.text for word in words]


@given(CUTS)
def test_the_wire_does_not_depend_on_how_the_engine_chunks(cuts: list[int]) -> None:
    samples = speech_like(0.3)
    expected, _ = render([PcmChunk(samples)])
    got, _ = render([PcmChunk(piece) for piece in chunked(samples, cuts)])
    assert len(got) == len(expected) == 15
    assert [frame.seq for frame in got] == list(range(15))
    for one, other in zip(got, expected, strict=True):
        ours, theirs = np.frombuffer(one.payload, "<i2"), np.frombuffer(other.payload, "<i2")
        # The resampler works in single precision: its sums may round differently by chunk.
        assert np.max(np.abs(ours.astype(int) - theirs.astype(int))) <= 1


def test_every_frame_is_whole() -> None:
    frames, _ = render([PcmChunk(speech_like(0.25))])
    assert {len(frame.payload) for frame in frames} == {FRAME_BYTES}
    assert [frame.media_time_ms for frame in frames] == [FRAME_MS * i for i in range(len(frames))]


def word(text: str, start_ms: int) -> WordMark:
    return WordMark(text, start_ms, start_ms + 50, 0, len(text), False)


def test_words_count_from_the_utterance_and_ride_on_the_frame_they_begin_in() -> None:
    first = PcmChunk(speech_like(0.1), (word("one", 0), word("two", 45)))
    second = PcmChunk(speech_like(0.1), (word("three", 30),))
    frames, left = render([first, second])
    at = {mark.text: (frame.seq, mark.start_ms) for frame in frames for mark in frame.words}
    assert at == {"one": (0, 0), "two": (2, 45), "three": (6, 130)}
    assert left == []


def test_a_word_that_arrives_late_rides_on_the_next_frame_and_none_is_lost() -> None:
    early = PcmChunk(speech_like(0.1))
    late = PcmChunk(np.empty(0, np.float32), (word("late", -80), word("never", 5_000)))
    frames, left = render([early, late, PcmChunk(speech_like(0.1))])
    texts = [mark.text for frame in frames for mark in frame.words]
    assert texts == ["late"]
    assert left == ["never"]


def test_nothing_in_nothing_out() -> None:
    assert render([]) == ([], [])
