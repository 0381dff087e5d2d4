"""Milliseconds of an utterance to the words that were heard."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.orchestrator.heard import split_heard
from src.orchestrator.ports import Word

TEXT = 'Well, hello there! "Fine" — you?'
WORD_MS = 300


def mark(text: str, *, skip: tuple[str, ...] = (), estimated: bool = False) -> list[Word]:
    """Every word takes 300 ms."""
    words, place = [], 0
    for index, word in enumerate(text.split()):
        start = text.index(word, place)
        place = start + len(word)
        core = word.strip('.,!?"—')
        if core and core not in skip:
            at = text.index(core, start)
            words.append(
                Word(core, index * WORD_MS, (index + 1) * WORD_MS, at, at + len(core), estimated)
            )
    return words


@pytest.mark.parametrize(
    ("heard_ms", "heard"),
    [
        (0, ""),
        (280, ""),
        (289, ""),
        (290, "Well,"),
        (300, "Well,"),
        (599, "Well, hello"),
        (900, "Well, hello there!"),
        (1200, 'Well, hello there! "Fine"'),
        (1700, 'Well, hello there! "Fine"'),
        (1800, TEXT),
    ],
)
def test_a_word_is_heard_when_its_end_was(heard_ms: int, heard: str) -> None:
    split = split_heard(TEXT, mark(TEXT), heard_ms)
    assert split.heard == heard
    assert split.heard + split.cut == TEXT
    assert not split.estimated


def test_estimated_words_say_so() -> None:
    assert split_heard(TEXT, mark(TEXT, estimated=True), 300).estimated


def test_all_of_a_known_length_is_all_of_the_text() -> None:
    split = split_heard("one two three", [], 995, total_ms=1000)
    assert (split.heard, split.cut, split.estimated) == ("one two three", "", False)


def test_without_words_it_is_shared_out_in_proportion() -> None:
    split = split_heard("aaaa bbbb cccc dddd", [], 900, total_ms=2000)
    assert (split.heard, split.estimated) == ("aaaa", True)
    assert split_heard("aaaa bbbb cccc dddd", [], 1000, total_ms=2000).heard == "aaaa bbbb"


def test_without_words_or_length_it_is_an_ordinary_pace() -> None:
    split = split_heard("aaaa bbbb cccc dddd", [], 700)
    assert (split.heard, split.estimated) == ("aaaa bbbb", True)


def test_a_stretch_without_words_is_estimated_between_its_neighbours() -> None:
    text = "one two three four five"
    words = mark(text, skip=("two", "three", "four"))
    assert split_heard(text, words, 300).heard == "one"
    middle = split_heard(text, words, 800)
    assert (middle.heard, middle.estimated) == ("one two", True)
    assert split_heard(text, words, 1200).heard == "one two three four"
    assert split_heard(text, words, 1500).heard == text


def test_nothing_was_said() -> None:
    assert split_heard("", [], 500) == split_heard("", [], 500, total_ms=400)


@given(
    text=st.text(alphabet="ab ,.—\n", max_size=60),
    marked=st.sets(st.integers(0, 30)),
    heard_ms=st.integers(-10, 12_000),
    total=st.booleans(),
)
def test_nothing_is_lost_and_no_word_is_torn(
    text: str, marked: set[int], heard_ms: int, total: bool
) -> None:
    words = [word for index, word in enumerate(mark(text)) if index in marked]
    total_ms = len(text.split()) * WORD_MS if total else None
    split = split_heard(text, words, heard_ms, total_ms)
    assert split.heard + split.cut == text
    if split.heard and split.cut:
        assert not (split.heard[-1].isalnum() and split.cut[0].isalnum())
    if heard_ms <= 0:
        assert split.heard == ""


@given(text=st.text(alphabet="abc ,.", max_size=60), step=st.integers(1, 400))
def test_more_time_never_takes_a_word_back(text: str, step: int) -> None:
    words = mark(text)
    lengths = [
        len(split_heard(text, words, ms).heard) for ms in range(0, len(words) * WORD_MS, step)
    ]
    assert lengths == sorted(lengths)
