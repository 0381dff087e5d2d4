"""No loops, no words out of silence."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.orchestrator import asr_guard as guard
from src.orchestrator.asr_guard import Score

CLEAR = Score(no_speech_prob=0.03, avg_logprob=-0.2)
UNSURE = Score(no_speech_prob=0.3, avg_logprob=-0.8)
NOISE = Score(no_speech_prob=0.93, avg_logprob=-2.2)


@pytest.mark.parametrize(
    ("said", "once"),
    [
        ("a b c d a b c d", 4),
        ("x a b c d a b c d", 5),
        ("n n n n", 1),
        ("a b a b a b a b", 2),
        ("a b c d x a b c d y a b c d", 5),
    ],
)
def test_a_loop_is_found_where_it_begins_again(said: str, once: int) -> None:
    assert guard.repetition([ord(c) for c in said.split()]) == once


@pytest.mark.parametrize("said", ["", "a", "n n n", "a b a b", "a b c a b c", "a b c d e f g"])
def test_emphasis_is_not_a_loop(said: str) -> None:
    assert guard.repetition([ord(c) for c in said.split()]) is None


@given(st.lists(st.integers(0, 3), max_size=40))
def test_what_is_kept_of_a_loop_is_its_beginning(tokens: list[int]) -> None:
    start = guard.repetition(tokens)
    assert start is None or 0 < start < len(tokens)


@given(st.lists(st.integers(), min_size=4, max_size=12, unique=True), st.integers(2, 5))
def test_any_phrase_said_over_and_over_is_said_once(phrase: list[int], times: int) -> None:
    assert guard.repetition(phrase * times) == len(phrase)


def test_the_budget_grows_with_the_audio() -> None:
    assert guard.token_budget(0) == 8
    assert guard.token_budget(2000) == 18


def test_clear_speech_is_never_doubted() -> None:
    assert not guard.is_doubtful("What is the capital of France?", CLEAR)


@pytest.mark.parametrize("text", ["you", "Thank you.", "Thanks for watching!", "Bye-bye."])
def test_a_polite_phrase_is_invented_unless_somebody_was_heard(text: str) -> None:
    assert guard.is_doubtful(text, CLEAR)
    assert guard.is_invented(text, CLEAR, speech_ms=64)
    assert guard.is_invented(text, UNSURE, speech_ms=160)
    assert not guard.is_invented(text, CLEAR, speech_ms=160)
    assert not guard.is_invented(text, UNSURE, speech_ms=224)


def test_one_short_word_may_be_improbable() -> None:
    alone = Score(no_speech_prob=0.1, avg_logprob=-1.8)
    assert not guard.is_invented("No.", alone, speech_ms=224)
    assert guard.is_invented("No.", alone, speech_ms=128)


def test_noise_gives_no_words_even_if_the_detector_heard_a_voice() -> None:
    assert guard.is_doubtful("I'm so tired.", NOISE)
    assert guard.is_invented("I'm so tired.", NOISE, speech_ms=900)


def test_doubtful_words_without_a_voice_are_invented() -> None:
    assert guard.is_invented("I'm going to go.", UNSURE, speech_ms=0)
    assert not guard.is_invented("I'm going to go.", UNSURE, speech_ms=500)


@pytest.mark.parametrize(
    ("text", "words"), [(" .", False), ("…", False), ("10", True), ("é", True)]
)
def test_punctuation_is_not_a_word(text: str, words: bool) -> None:
    assert guard.has_words(text) is words


def test_long_audio_is_cut_where_it_is_quiet() -> None:
    rate = 1000
    samples = np.ones(60 * rate, dtype=np.float32)
    samples[20 * rate : 20 * rate + 400] = 0.0
    pieces = guard.chunks(samples, rate)
    assert 20 * rate <= pieces[0].size <= 20 * rate + 400
    assert max(piece.size for piece in pieces) <= 26 * rate
    assert np.array_equal(np.concatenate(pieces), samples)


@given(st.integers(0, 2000))
def test_no_sample_is_lost_by_cutting(length: int) -> None:
    samples = np.random.default_rng(length).standard_normal(length).astype(np.float32)
    pieces = guard.chunks(samples, 10)
    assert np.array_equal(np.concatenate(pieces), samples)
    assert all(piece.size <= 260 for piece in pieces)
