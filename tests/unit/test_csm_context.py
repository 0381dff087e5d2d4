"""What a slot reads: every position once while there is room, and exactly the same again after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from src.tts.families.csm.context import (
    KEPT_SEGMENTS,
    MIN_ROOM,
    Context,
    Opening,
    Pace,
    halves,
    pieces_of,
)
from src.tts.families.csm.ports import Codes
from src.tts.segmenter import speakable
from tests.fake_csm import CODEBOOKS, FakeEmbeddings

ZERO = "0"


@dataclass
class Reader:
    """A slot's keys and values, and what ought to be in them."""

    positions: int = 200
    start: int = 10
    read: list[str] = field(default_factory=list)
    spoken: list[list[str]] = field(default_factory=list)
    """Every finished segment as it is read: text, frames, end mark."""
    drawn: int = 0

    def __post_init__(self) -> None:
        self.read = [f"p{i}" for i in range(self.start)]
        self.context = Context(self.positions, self.start, CODEBOOKS)

    def begin(self, text: str, most: int) -> Opening:
        rebased = self.context.rebased
        opening = self.context.begin(FakeEmbeddings(list(text)), most)
        if self.context.rebased > rebased:
            # What found nothing to say is not read again: it would teach silence.
            self.spoken = [one for one in self.spoken if any(map(str.isdigit, one[:-1]))]
        items = [item for part in opening.parts for item in _items(part)]
        assert opening.position <= len(self.read), "a gap"
        self.read[opening.position :] = items[:-1]
        assert len(self.read) == self.context.position
        self._input, self._segment = items[-1], list(text)
        return opening

    def tick(self, *, end: bool = False) -> None:
        assert self.context.position == len(self.read) < self.positions
        self.read.append(self._input)
        if end:
            self.context.ended()
            self._finish()
            return
        self.drawn += 1
        self.context.drew(np.full((1, CODEBOOKS), self.drawn, dtype=np.int64))
        self._input = str(self.drawn)
        self._segment.append(self._input)

    def cut(self) -> None:
        self.context.cut()
        self._finish()

    def say(self, text: str, frames: int, *, cut: bool = False) -> Opening:
        opening = self.begin(text, frames)
        for _ in range(frames):
            self.tick()
        if cut:
            self.cut()
        else:
            self.tick(end=True)
        return opening

    def is_exact(self) -> bool:
        """The keys and values are those of a fresh reading of the voice prompt, the last segments
        and as much of the present one as is read."""
        prompt = [f"p{i}" for i in range(self.start)]
        for kept in range(len(self.spoken) + 1):
            before = [item for one in self.spoken[len(self.spoken) - kept :] for item in one]
            present = (prompt + before + self._segment)[: len(self.read)]
            if present == self.read and len(self.read) >= len(prompt + before):
                return True
        return False

    def _finish(self) -> None:
        self.spoken.append([*self._segment, ZERO])


def _items(part: FakeEmbeddings | Codes | object) -> list[str]:
    if isinstance(part, FakeEmbeddings):
        return part.items
    assert isinstance(part, np.ndarray)
    return [str(row[0]) for row in part]


def lengths(opening: Opening) -> list[int]:
    return [len(part) for part in opening.parts]


def test_a_text_that_follows_reads_the_end_mark_and_itself() -> None:
    reader = Reader()
    assert lengths(reader.begin("one", 50)) == [3]
    reader.tick()
    reader.tick(end=True)
    following = reader.begin("second", 50)
    assert (following.position, lengths(following)) == (14, [1, 6])
    assert reader.is_exact()


def test_after_a_cut_the_last_frame_is_read_too() -> None:
    reader = Reader()
    reader.say("one", 5, cut=True)
    assert lengths(reader.begin("second", 50)) == [2, 6]
    assert reader.is_exact()


def test_a_text_without_any_sound_is_closed_like_any_other() -> None:
    reader = Reader()
    reader.say("one", 0)
    assert lengths(reader.begin("second", 50)) == [1, 6]
    assert reader.is_exact()


def test_a_text_given_up_before_its_first_frame_leaves_no_trace() -> None:
    reader = Reader()
    reader.say("one", 5)
    first = reader.begin("second", 50)
    reader.context.cut()
    assert reader.begin("third", 50).position == first.position
    assert reader.is_exact()


def test_without_room_it_starts_again_from_the_prompt_and_the_last_segments() -> None:
    reader = Reader()
    for text in ("first", "second", "third"):
        reader.say(text, 40)
    opening = reader.begin("fourth", 60)
    assert reader.context.rebased == 1
    assert (opening.position, lengths(opening)) == (10, [5, 41, 6])
    assert reader.read[10:15] == list("third")
    assert reader.is_exact()


def test_a_rebase_reads_at_most_so_many_segments() -> None:
    reader = Reader(positions=1000)
    while not reader.context.rebased:
        reader.say("some text", 20)
    assert reader.read[10 : 10 + KEPT_SEGMENTS * 30].count(ZERO) == KEPT_SEGMENTS


def test_after_a_rebase_there_is_room_for_more_than_one_segment() -> None:
    """Else every segment from then on would read the last ones again."""
    reader = Reader(positions=400, start=0)
    for _ in range(12):
        reader.say("some text", 40)
    assert reader.context.rebased <= 2


def test_a_rebase_given_up_half_way_is_made_again() -> None:
    reader = Reader()
    for text in ("first", "second", "third"):
        reader.say(text, 40)
    reader.begin("fourth", 60)
    del reader.read[20:]
    reader.context.cut()
    assert lengths(reader.begin("fifth", 60)) == [5, 41, 5]
    assert reader.is_exact()


def test_a_segment_may_draw_what_the_positions_hold_and_not_more() -> None:
    reader = Reader(positions=100, start=10)
    opening = reader.say("some text", 82, cut=True)
    assert opening.frames == 82
    assert reader.begin("more", 500).frames == 87


def test_the_last_position_is_used_before_anything_is_read_again() -> None:
    for most, rebased in ((89, 0), (90, 1)):
        reader = Reader(positions=100, start=0)
        reader.say("one", 5)
        # Eight positions are read; an end mark and two letters go before the first tick.
        assert reader.say("two", most, cut=True).frames == most
        assert reader.context.rebased == rebased


def test_fits_is_the_last_position() -> None:
    context = Context(100, 10, CODEBOOKS)
    assert context.fits(9, 82)
    assert not context.fits(9, 83)


_segments = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 40), st.booleans()), max_size=25)


@settings(deadline=None)
@given(st.integers(MIN_ROOM, 300), st.integers(0, 100), _segments)
def test_whatever_is_said_the_positions_hold_exactly_that(
    room: int, start: int, segments: list[tuple[int, int, bool]]
) -> None:
    reader = Reader(positions=start + room, start=start)
    for size, frames, ends in segments:
        opening = reader.begin("x" * size, max(1, frames))
        assert opening.frames >= 1
        for _ in range(min(frames, opening.frames)):
            reader.tick()
            assert reader.is_exact()
        if ends and frames < opening.frames:
            reader.tick(end=True)
        elif frames:
            reader.cut()
        else:
            reader.context.cut()
        assert len(reader.read) <= reader.positions


# --- pace and pieces ---


def test_a_sentence_has_room_at_any_pace_of_speech() -> None:
    text = "The quick brown fox jumps over the lazy dog."
    assert 3000 / 80 <= Pace().likely(text) <= 8000 / 80
    assert Pace().most(text) >= 2 * Pace().likely(text)


def test_digits_and_scripts_without_spaces_take_longer_than_letters() -> None:
    assert Pace().most("1984") > Pace().most("word")
    assert Pace().most("你好世界") > Pace().most("word")


def test_what_has_no_sound_has_no_pieces() -> None:
    assert [pieces_of(text, 1000, Pace()) for text in ("", " ", "... !?", "—")] == [[], [], [], []]


def test_a_text_is_cut_at_a_sentence_before_a_clause_before_a_word() -> None:
    assert halves("One, two. Three, four five.") == ("One, two.", "Three, four five.")
    assert halves("One and two, three and four") == ("One and two,", "three and four")
    assert halves("one two three four") == ("one two", "three four")
    assert halves("onetwothreefour") == ("onetwot", "hreefour")


def test_a_number_is_not_cut_at_its_point() -> None:
    assert halves("it is 3.14159 long") != ("it is 3.", "14159 long")


def words_of(texts: Sequence[str]) -> str:
    return "".join("".join(texts).split())


@settings(deadline=None)
@given(st.text(max_size=400), st.integers(MIN_ROOM, 500))
def test_pieces_are_short_enough_and_lose_nothing(text: str, room: int) -> None:
    pieces = pieces_of(text, room, Pace())
    assert all(speakable(piece) for piece in pieces)
    assert all(Pace().likely(piece) <= room or len(piece) == 1 for piece in pieces)
    letters = [char for char in words_of(pieces) if char.isalnum()]
    assert letters == [char for char in words_of([text]) if char.isalnum()]


def test_five_thousand_characters_become_pieces_that_fit() -> None:
    text = "Somebody has pasted a whole chapter, and wants to hear it. " * 85
    pieces = pieces_of(text, 1800, Pace())
    assert 4 <= len(pieces) <= 16
    assert all(piece.endswith(".") for piece in pieces)
    assert words_of(pieces) == words_of([text])
