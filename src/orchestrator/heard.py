"""Which words were heard: milliseconds of an utterance to a place in its text. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from src.orchestrator.ports import Word

HALF_FRAME_MS = 10
# Conversational English is 150-160 words a minute, about six characters each with the space.
_CHARS_PER_S = 15.0


@dataclass(frozen=True, slots=True)
class HeardText:
    """`heard + cut` is the whole text; the cut begins at a word or with the space before it."""

    heard: str
    cut: str
    estimated: bool


def split_heard(
    text: str, words: Sequence[Word], heard_ms: int, total_ms: int | None = None
) -> HeardText:
    """Split after the last word whose end was heard (to within half a frame).

    `words` are in order, but need not cover the text: a stretch without them is shared out in
    proportion to its characters and marked estimated. `total_ms` is the utterance's length once it
    is known; without it the last stretch is taken to be spoken at an ordinary pace.
    """
    if heard_ms <= 0:
        return HeardText("", text, estimated=False)
    if total_ms is not None and heard_ms + HALF_FRAME_MS >= total_ms:
        return HeardText(text, "", estimated=False)
    done = 0
    while done < len(words) and words[done].end_ms <= heard_ms + HALF_FRAME_MS:
        done += 1
    estimated = any(word.estimated for word in words[max(0, done - 1) : done + 1])
    start_ms, start = (words[done - 1].end_ms, words[done - 1].char_end) if done else (0, 0)
    end_ms, end = _next_mark(text, words, done, total_ms, start_ms, start)
    if not _has_word(text[start:end]):
        place = past_punctuation(text, start)
        return HeardText(text[:place], text[place:], estimated)
    share = min(1.0, max(0.0, (heard_ms - start_ms) / max(1, end_ms - start_ms)))
    place = _whole_words(text, start, start + int(share * (end - start)))
    return HeardText(text[:place], text[place:], estimated=True)


def _next_mark(
    text: str,
    words: Sequence[Word],
    done: int,
    total_ms: int | None,
    start_ms: int,
    start: int,
) -> tuple[int, int]:
    if done < len(words):
        return words[done].start_ms, words[done].char_start
    if total_ms is not None:
        return total_ms, len(text)
    return start_ms + int((len(text) - start) / _CHARS_PER_S * 1000), len(text)


def _has_word(text: str) -> bool:
    return any(char.isalnum() for char in text)


def past_punctuation(text: str, place: int) -> int:
    """The comma belongs to the word before it."""
    while place < len(text) and not text[place].isspace() and not text[place].isalnum():
        place += 1
    return place


def _whole_words(text: str, start: int, place: int) -> int:
    """The end of the last word that is whole at `place`, never before `start`."""
    if place >= len(text):
        return len(text)
    inside = place > 0 and text[place].isalnum()
    while inside and place > start and not text[place - 1].isspace():
        place -= 1
    while place > start and text[place - 1].isspace():
        place -= 1
    return past_punctuation(text, place)
