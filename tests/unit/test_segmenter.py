from __future__ import annotations

import itertools
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.tts.segmenter import (
    STREAMED,
    Segmenter,
    SegmenterLimits,
    limits_for,
    soften_stops,
    speakable,
)
from src.tts.tts_base import AdapterCapabilities, Segment

PROSE = st.text(
    st.sampled_from("abcdeABI 15.,!?;:…—\n\"'*_#`()好，。😀\u0301\u200d\x00-"), max_size=400
)
ANY = st.text(st.characters(), max_size=300)


def cut(text: str, *, step: int = 1_000_000) -> list[Segment]:
    segmenter = Segmenter()
    out: list[Segment] = []
    for start in range(0, len(text), step):
        out += segmenter.push(text[start : start + step])
    return out + segmenter.flush()


def texts(text: str, *, step: int = 1_000_000) -> list[str]:
    return [segment.text for segment in cut(text, step=step)]


def cut_at(text: str, cuts: list[int]) -> list[Segment]:
    segmenter = Segmenter()
    out: list[Segment] = []
    edges = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    for start, end in itertools.pairwise(edges):
        out += segmenter.push(text[start:end])
    return out + segmenter.flush()


def assert_in_place(text: str, segments: list[Segment]) -> None:
    end = 0
    for segment in segments:
        assert segment.char_start >= end
        end = segment.char_start + len(segment.text)
        for ours, theirs in zip(segment.text, text[segment.char_start : end], strict=True):
            assert ours in (theirs, " ")


def pronounced(text: str) -> str:
    return "".join(char for char in text if char.isalnum() and ord(char) < 0x1F000)


@given(st.one_of(PROSE, ANY), st.lists(st.integers(0, 400), max_size=12))
def test_any_chunking_speaks_every_letter_once_in_order_and_in_place(
    text: str, cuts: list[int]
) -> None:
    segments = cut_at(text, cuts)
    assert_in_place(text, segments)
    spoken = "".join(segment.text for segment in segments)
    visible = "".join(c for c in text if unicodedata.category(c) not in ("Cs", "Co", "Cn"))
    assert pronounced(spoken) == pronounced(visible)
    assert all(speakable(segment.text) for segment in segments)
    assert all(len(segment.text) <= SegmenterLimits().max_chars for segment in segments)


@given(
    st.lists(st.sampled_from(["the", "Dr.", "3.14", "Yes.", "well,", "e.g.", "I", "*so*", "so…"])),
    st.lists(st.integers(0, 400), max_size=12),
)
def test_any_chunking_speaks_the_same_words(words: list[str], cuts: list[int]) -> None:
    text = " ".join(words)
    ours = " ".join(segment.text for segment in cut_at(text, cuts)).split()
    assert ours == " ".join(words).replace("*", " ").split()


@given(PROSE, st.lists(st.integers(0, 400), max_size=12))
def test_after_the_first_piece_the_cuts_do_not_depend_on_the_chunking(
    text: str, cuts: list[int]
) -> None:
    opened = "Yes. " + text
    assert cut_at(opened, cuts) == cut(opened)


@pytest.mark.parametrize("step", [1, 3, 1_000_000])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Sure. It is 3.14 here. Bye", ["Sure.", "It is 3.14 here.", "Bye"]),
        ("Yes. I met Dr. Smith. He left.", ["Yes.", "I met Dr. Smith.", "He left."]),
        ("No. See e.g. this one. Good.", ["No.", "See e.g. this one.", "Good."]),
        ("Ok. At 5 p.m. he left. Bye.", ["Ok.", "At 5 p.m. he left.", "Bye."]),
        ("Ok. It was 5 p.m. He left.", ["Ok.", "It was 5 p.m.", "He left."]),
        ("Ok. The U.S. Army came. Bye.", ["Ok.", "The U.S. Army came.", "Bye."]),
        ("Ok. J. R. Smith is in. So am I. Bye.", ["Ok.", "J. R. Smith is in.", "So am I.", "Bye."]),
        ("Yes. It cost 1,234 euros. Bye.", ["Yes.", "It cost 1,234 euros.", "Bye."]),
        ('Oh! "Is it so?" he said.', ["Oh!", '"Is it so?"', "he said."]),
        ("Well... maybe. So… yes", ["Well...", "maybe.", "So… yes"]),
        (
            "Hm. See https://a.eu/b,c?d=1.5 now. Ok",
            ["Hm.", "See https://a.eu/b,c?d=1.5 now.", "Ok"],
        ),
        ("List:\n1. One\n2. Two", ["List:", "1. One", "2. Two"]),
        ("你好，世界。今天很好！Bye.", ["你好，", "世界。", "今天很好！", "Bye."]),
        ("😀 Hi! 🎉", ["Hi!"]),
        ("... !!! 😀", []),
        ("", []),
    ],
)
def test_cuts(text: str, expected: list[str], step: int) -> None:
    assert texts(text, step=step) == expected


def test_the_first_clause_is_out_before_the_sentence_is() -> None:
    segmenter = Segmenter()
    assert segmenter.push("Well,") == []
    assert segmenter.push(" that depends") == [Segment("Well,", 0)]


def test_without_punctuation_the_first_piece_ends_where_one_breathes() -> None:
    segmenter = Segmenter()
    pushed = [segmenter.push(word + " ") for word in "The capital of France is Paris".split()]
    assert [bool(segments) for segments in pushed] == [False] * 4 + [True, False]
    assert pushed[4] == [Segment("The capital of France", 0)]


def test_a_first_clause_that_is_known_whole_is_not_cut_at_a_word() -> None:
    assert texts("I will be there in a few minutes, I hope.")[0] == (
        "I will be there in a few minutes,"
    )


def test_long_sentences_are_cut_at_clauses_and_short_ones_are_not() -> None:
    clause = "and then the river went down to the sea"
    long = "Yes. " + ", ".join([clause] * 8) + "."
    later = texts(long)[1:]
    assert len(later) > 2
    assert all(piece.endswith((",", ".")) for piece in later)
    assert texts("Yes. No. One, two, three.")[-1] == "One, two, three."


def test_markup_and_control_characters_are_not_spoken() -> None:
    spoken = " ".join(texts("**Bold** `code` _so_ snake_case C# 3 * 4\x00\x1b[0m\n# Title"))
    assert spoken.split() == "Bold code so snake_case C# 3 * 4 [0m Title".split()


def test_flush_in_the_middle_keeps_the_places_of_what_follows() -> None:
    segmenter = Segmenter()
    segmenter.push("One two")
    first = segmenter.flush()
    rest = segmenter.push(" three. ") + segmenter.flush()
    assert first == [Segment("One two", 0)]
    assert rest == [Segment("three.", 8)]
    assert segmenter.flush() == []


def test_a_letter_keeps_its_marks_when_a_word_is_too_long() -> None:
    pieces = texts("e\u0301" * 500)
    assert all(not unicodedata.combining(piece[0]) for piece in pieces)


@pytest.mark.parametrize(
    "unit", ["a", "word ", "Inc. ", "你", "a, ", "...a", ' "', "\n", ". ", "a\n", "😀", "a."]
)
def test_a_megabyte_is_cut_into_bounded_pieces_in_one_pass(unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    segmenter = _CountingSegmenter()
    segments = segmenter.push(text) + segmenter.flush()
    assert pronounced("".join(s.text for s in segments)) == pronounced(text)
    assert max((len(s.text) for s in segments), default=0) <= 140
    assert segmenter.looks <= len(text) + 2


class _CountingSegmenter(Segmenter):
    """Counts decisions: each looks at no more than one piece and moves on by a character."""

    looks = 0

    def _cut(self, *, final: bool) -> int | None:
        self.looks += 1
        return super()._cut(final=final)


def test_soften_stops_keeps_places_and_sentence_ends() -> None:
    text = "Dr. Smith is here. 1. First, at 3.14 p.m. Then"
    softened = soften_stops(text)
    assert softened == "Dr  Smith is here. 1. First, at 3.14 p.m  Then"
    assert soften_stops("1. First") == "1, First"


def test_a_family_that_streams_is_not_cut_as_early_as_one_that_makes_whole_pieces() -> None:
    text = "The keeper of the old lighthouse counted every ship that passed by in the night. Then"
    whole, streamed = SegmenterLimits(), limits_for(AdapterCapabilities(streams=True))
    assert limits_for(AdapterCapabilities()) == whole
    assert limits_for(AdapterCapabilities(streams=True, incremental_text=True)) is None
    assert streamed == STREAMED
    assert Segmenter(whole).push(text)[0].text == "The keeper of the old"
    assert (
        Segmenter(streamed).push(text)[0].text == "The keeper of the old lighthouse counted every"
    )
