from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.audio.pcm import Float32
from src.tts.words import audible_span, estimate_words, tokens

RATE = 22_050


def tone(ms: int) -> Float32:
    time = np.arange(RATE * ms // 1000) / RATE
    return (0.5 * np.sin(2 * np.pi * 200 * time)).astype(np.float32)


def silence(ms: int) -> Float32:
    return np.zeros(RATE * ms // 1000, dtype=np.float32)


def audio(*parts: Float32) -> Float32:
    return np.concatenate(parts)


@given(
    st.text(st.sampled_from("ab, .!好世3😀\n'"), max_size=80),
    st.lists(st.tuples(st.booleans(), st.integers(1, 400)), max_size=8),
    st.integers(0, 5000),
)
def test_marks_are_contiguous_inside_the_audio_and_in_place(
    text: str, parts: list[tuple[bool, int]], char_start: int
) -> None:
    samples = audio(silence(1), *(tone(ms) if loud else silence(ms) for loud, ms in parts))
    marks = estimate_words(text, char_start, samples, RATE)
    assert [mark.text for mark in marks] == [token.text for token in tokens(text)]
    for mark in marks:
        place = slice(mark.char_start - char_start, mark.char_end - char_start)
        assert text[place] == mark.text
        assert mark.estimated
        assert mark.start_ms <= mark.end_ms
    for before, after in itertools.pairwise(marks):
        assert before.end_ms == after.start_ms
    if marks:
        assert marks[0].start_ms >= 0
        assert marks[-1].end_ms <= samples.size * 1000 / RATE


def test_silence_around_the_speech_belongs_to_no_word() -> None:
    marks = estimate_words("one two", 0, audio(silence(200), tone(600), silence(300)), RATE)
    assert marks[0].start_ms == pytest.approx(200, abs=6)
    assert marks[-1].end_ms == pytest.approx(800, abs=6)


def test_a_word_before_a_comma_ends_where_the_audio_pauses() -> None:
    # By letters alone, "one," would end at a fifth of the time; it ends at two thirds.
    samples = audio(tone(800), silence(150), tone(250))
    marks = estimate_words("one, twenty three four", 0, samples, RATE)
    assert marks[0].end_ms == pytest.approx(800, abs=6)


def test_the_closure_of_a_stop_is_not_taken_for_the_comma() -> None:
    samples = audio(tone(150), silence(60), tone(390), silence(250), tone(350))
    marks = estimate_words("capital letters, please now", 0, samples, RATE)
    assert marks[1].end_ms == pytest.approx(600, abs=6)


def test_a_pause_too_far_from_the_comma_is_left_alone() -> None:
    samples = audio(tone(300), silence(60), tone(5640))
    marks = estimate_words("a much longer text comes here, end", 0, samples, RATE)
    assert marks[5].end_ms > 3000


def test_longer_words_get_more_time() -> None:
    marks = estimate_words("a hippopotamus", 0, tone(1000), RATE)
    assert marks[0].end_ms < 250


def test_tokens_keep_punctuation_and_split_unspaced_scripts() -> None:
    assert [t.text for t in tokens('He said: "Hi!" — 你好，a 3.14 😀')] == [
        "He", "said:", '"Hi!"', "你", "好，", "a", "3.14",
    ]  # fmt: skip


def test_digital_silence_still_gives_marks_inside_it() -> None:
    marks = estimate_words("one two", 0, silence(100), RATE)
    assert (marks[0].start_ms, marks[-1].end_ms) == (0, 100)
    assert estimate_words("one two", 0, silence(0), RATE) == ()
    assert estimate_words("…", 0, tone(100), RATE) == ()


def test_audible_span_finds_the_edges_of_sound() -> None:
    begin, end = audible_span(audio(silence(100), tone(50), silence(100)), RATE)
    assert begin == pytest.approx(RATE * 0.1, abs=RATE * 0.005)
    assert end == pytest.approx(RATE * 0.15, abs=RATE * 0.005)
    assert audible_span(silence(100), RATE) == (0, 0)
