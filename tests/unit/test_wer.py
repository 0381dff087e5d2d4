from __future__ import annotations

import pytest

from src.demo.wer import WordErrors, letter_error_rate, normalise, spell, word_errors


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (365, "three hundred sixty five"),
        (2024, "two thousand twenty four"),
        (100_000, "one hundred thousand"),
    ],
)
def test_numbers_are_spelt_as_they_are_spoken(number: int, words: str) -> None:
    assert spell(number) == words


def test_case_punctuation_and_numerals_do_not_count() -> None:
    assert normalise("It's 7 days, isn't it?") == normalise("its seven days isnt it")


def test_errors_are_substitutions_insertions_and_deletions() -> None:
    assert word_errors("one two three four", "one too three") == WordErrors(2, 4)
    assert word_errors("yes", "oh yes indeed").errors == 2
    assert word_errors("", "").rate == 0.0


def test_a_name_written_as_two_words_costs_nothing_in_letters() -> None:
    assert letter_error_rate("a farmer named Grimgold", "A farmer, named Grim Gold.") == 0.0
    assert letter_error_rate("abcd", "abxd") == 0.25
    assert letter_error_rate("the story of a horse", "seven days in a week") > 0.6
