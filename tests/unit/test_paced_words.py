"""Words of a voice that does not say when it says them, given out while it speaks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.audio.pcm import Float32
from src.tts.paced_words import USUAL_MS, PacedWords, WordPace
from src.tts.words import estimate_words, weight
from tests.audio_fixtures import RATE as MIC_RATE
from tests.audio_fixtures import espeak_speech

RATE = 24_000
FRAME_MS = 80
TEXT = "seven little words to be said aloud"
UNITS = sum(weight(word) for word in TEXT.split())


def sound(ms: int, level: float = 0.3) -> Float32:
    return np.full(RATE * ms // 1000, level, dtype=np.float32)


def paced(
    text: str, samples: Float32, pace: WordPace | None = None, rate: int = RATE
) -> tuple[list[tuple[str, int, int, int]], int]:
    """(word, start, end, when it was given out), in ms of the segment; how many came at the end."""
    words = PacedWords(text, 0, pace or WordPace(), rate)
    told, at = [], 0
    for begin in range(0, samples.size, rate * FRAME_MS // 1000):
        frame = samples[begin : begin + rate * FRAME_MS // 1000]
        told += [(w.text, at + w.start_ms, at + w.end_ms, at) for w in words.push(frame)]
        at += frame.size * 1000 // rate
    late = words.end()
    told += [(w.text, at + w.start_ms, at + w.end_ms, at) for w in late]
    return told, len(late)


def test_a_word_comes_with_the_chunk_in_which_it_begins() -> None:
    told, late = paced(TEXT, sound(round(UNITS * USUAL_MS)))
    assert [word for word, *_ in told] == TEXT.split()
    assert not late
    assert all(given <= start < given + FRAME_MS for _, start, _, given in told)
    assert told[0][1] == 0
    starts = [start for _, start, *_ in told]
    assert starts == sorted(set(starts))


def test_every_mark_is_estimated_and_in_its_place_in_the_text() -> None:
    words = PacedWords("  one (two) ", 100, WordPace(), RATE)
    marks = words.push(sound(2000))
    assert [(m.text, m.char_start, m.char_end) for m in marks] == [
        ("one", 102, 105),
        ("(two)", 106, 111),
    ]
    assert all(mark.estimated for mark in marks)


def test_silence_moves_nobody_on() -> None:
    pause = np.zeros(RATE, dtype=np.float32)
    plain, _ = paced(TEXT, sound(3000))
    with_pause, _ = paced(TEXT, np.concatenate((pause, sound(1000), pause, sound(2000))))
    moved = [start + (1000 if start <= 990 else 2000) for _, start, *_ in plain]
    assert [start for _, start, *_ in with_pause] == pytest.approx(moved, abs=11)


def test_what_is_left_at_the_end_was_said_before_it() -> None:
    """The voice was quicker than its pace."""
    told, late = paced(TEXT, sound(900))
    assert [word for word, *_ in told] == TEXT.split()
    assert late >= 2
    assert told[-1][2] == 900
    for (_, _, end, _), (_, start, *_) in zip(told[-late:], told[-late + 1 :], strict=False):
        assert end == start
    assert [start for _, start, *_ in told] == sorted(start for _, start, *_ in told)


def test_the_end_of_the_last_word_is_where_sound_ends() -> None:
    told, late = paced(TEXT, np.concatenate((sound(900), np.zeros(RATE, dtype=np.float32))))
    assert late
    assert told[-1][2] == 900


def test_a_silent_segment_and_one_without_a_frame_lose_no_word() -> None:
    told, late = paced(TEXT, np.zeros(RATE, dtype=np.float32))
    assert late == len(TEXT.split())
    assert (told[0][1], told[-1][2]) == (0, 1000)
    told, _ = paced(TEXT, np.empty(0, dtype=np.float32))
    assert {(start, end) for _, start, end, _ in told} == {(0, 0)}


def test_only_punctuation_has_no_words() -> None:
    assert paced("… ?!", sound(400)) == ([], 0)


def test_the_pace_is_learnt_from_whole_segments() -> None:
    pace = WordPace()
    slow = sound(round(UNITS * USUAL_MS * 1.4))
    first, _ = paced(TEXT, slow, pace)
    for _ in range(10):
        last, late = paced(TEXT, slow, pace)
    assert pace.ms_per_unit == pytest.approx(USUAL_MS * 1.4, rel=0.05)
    assert last[-1][1] > first[-1][1] + 200
    assert not late
    # What was not said to its end tells nothing.
    words = PacedWords(TEXT, 0, pace, RATE)
    words.push(sound(80))
    before = pace.ms_per_unit
    words.end(learn=False)
    assert pace.ms_per_unit == before


def test_one_runaway_segment_does_not_spoil_the_pace() -> None:
    pace = WordPace()
    paced("yes", sound(30_000), pace)
    assert pace.ms_per_unit < USUAL_MS * 1.2


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(alphabet="ab c,.7é漢", max_size=60),
    levels=st.lists(st.sampled_from([0.0, 0.001, 0.3]), max_size=30),
    rate=st.sampled_from([40.0, 55.0, 90.0]),
)
def test_no_word_is_lost_twice_or_out_of_order(text: str, levels: list[float], rate: float) -> None:
    parts = [sound(FRAME_MS, level) for level in levels]
    samples = np.concatenate(parts) if parts else np.empty(0, dtype=np.float32)
    told, _ = paced(text, samples, WordPace(rate))
    everything = estimate_words(text, 0, sound(1000), RATE)
    assert [word for word, *_ in told] == [mark.text for mark in everything]
    starts = [start for _, start, *_ in told]
    assert starts == sorted(starts)
    assert all(0 <= start <= end for _, start, end, _ in told)
    assert all(start < samples.size * 1000 // RATE or not start for start in starts)


def test_on_speech_the_words_are_about_where_they_are_said() -> None:
    """Against the estimate that has the whole segment to look at."""
    text = "The library closes at nine in the evening, and opens again at eight."
    speech, pace = espeak_speech(text), WordPace()
    paced(text, speech, pace, MIC_RATE)
    told, _ = paced(text, speech, pace, MIC_RATE)
    whole = estimate_words(text, 0, speech, MIC_RATE)
    apart = [abs(start - mark.start_ms) for (_, start, *_), mark in zip(told, whole, strict=True)]
    assert np.median(apart) < 150
    assert max(apart) < 500
