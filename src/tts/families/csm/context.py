"""What one slot has read, and what it must read next, counted in positions. Pure.

The order of a slot's positions is that of the model's training: the voice prompt, then for every
segment its text, its frames and the frame of zeros that ends them. Nothing is ever read twice
while there is room; without room the slot goes back to the voice prompt, whose keys and values are
still in place, and reads the last finished segments again from their codes.
"""

from __future__ import annotations

import math
import re
from collections import deque
from dataclasses import dataclass

import numpy as np

from src.tts.families.csm.ports import Codes, Embeddings
from src.tts.segmenter import speakable
from src.tts.words import tokens, weight

KEPT_SEGMENTS = 2
MIN_ROOM = 64
"""Positions that a voice prompt must leave: enough for any character and some sound."""

_CUTS = tuple(
    re.compile(cut)
    for cut in (r"(?<=[.!?…])\s+|(?<=[。！？])", r"(?<=[,;:])\s+|(?<=[，、；：])", r"\s+")
)


@dataclass(frozen=True, slots=True)
class Pace:
    """How many frames of 80 ms a text may take.

    A word's weight is about the letters that one hears (`src.tts.words.weight`); English at an easy
    pace takes 0.9 frames for one.
    """

    likely_start: float = 12.0
    likely_each: float = 1.5
    """A slow reader with pauses stays below; a text is given this much room at least."""
    most_start: float = 50.0
    most_each: float = 4.0
    """Beyond it the model has lost its end mark, as CSM-1B sometimes does."""

    def likely(self, text: str) -> int:
        return math.ceil(self.likely_start + self.likely_each * _weight(text))

    def most(self, text: str) -> int:
        return math.ceil(self.most_start + self.most_each * _weight(text))


@dataclass(frozen=True, slots=True)
class Opening:
    """What a slot reads before its segment's first frame."""

    position: int
    """Where the first of `parts` goes."""
    parts: tuple[Embeddings | Codes, ...]
    """Codes are still to be embedded. The very last position is the input of the first tick."""
    frames: int
    """After so many the segment is cut."""


@dataclass(frozen=True, slots=True)
class _Spoken:
    text: Embeddings
    codes: Codes

    @property
    def positions(self) -> int:
        return len(self.text) + len(self.codes) + 1


class Context:
    """One slot's positions, `start` of them the voice prompt's. `position` < `positions` always."""

    def __init__(self, positions: int, start: int, codebooks: int) -> None:
        self.position = start
        """Where the next input goes, when the slot draws."""
        self.rebased = 0
        self._positions = positions
        self._start = start
        self._zeros: Codes = np.zeros((1, codebooks), dtype=np.int64)
        self._unread: Codes = self._zeros[:0]
        # Where the last segment ended; None: a re-base was given up, what lies there is in pieces.
        self._whole: int | None = start
        self._history: deque[_Spoken] = deque(maxlen=KEPT_SEGMENTS)
        self._text: Embeddings | None = None
        self._codes: list[Codes] = []

    def fits(self, text_positions: int, frames: int) -> bool:
        """Whether a segment can be spoken at all, with nothing but the voice prompt before it."""
        return self._start + text_positions - 1 + frames <= self._positions

    def begin(self, text: Embeddings, most_frames: int) -> Opening:
        """`text` is at least one position and leaves room for a frame (`fits`)."""
        whole, unread = self._whole, self._unread
        positions = len(unread) + len(text) - 1 + most_frames
        if whole is None or whole + positions > self._positions:
            return self._rebase(text, most_frames)
        return self._open(whole, (unread, text) if len(unread) else (text,), text, most_frames)

    def drew(self, codes: Codes) -> None:
        """A tick has read the slot's input and drawn a frame of sound, [1, codebooks]."""
        self.position += 1
        self._codes.append(codes)

    def ended(self) -> None:
        """A tick has read the slot's input and drawn the end mark."""
        self.position += 1
        self._close(self._zeros)

    def cut(self) -> None:
        """The segment ends here: after its last frame, which is drawn and not read, or, if it has
        drawn none, as if it had never begun."""
        if self._codes:
            self._close(np.concatenate((self._codes[-1], self._zeros)))
        else:
            self._text = None

    def _rebase(self, text: Embeddings, most_frames: int) -> Opening:
        self.rebased += 1
        free = self._positions - self._start - (len(text) - 1)
        # Half stays free, or the segment after this one would have to start over again as well.
        history = _last_that_fit(self._history, min(free - most_frames, free // 2))
        self._history = deque(history, maxlen=KEPT_SEGMENTS)
        parts: list[Embeddings | Codes] = []
        for spoken in history:
            parts += [spoken.text, np.concatenate((spoken.codes, self._zeros))]
        used = sum(spoken.positions for spoken in history)
        self._whole = None
        return self._open(self._start, (*parts, text), text, min(most_frames, free - used))

    def _open(
        self, position: int, parts: tuple[Embeddings | Codes, ...], text: Embeddings, frames: int
    ) -> Opening:
        self._text, self._codes = text, []
        self.position = position + sum(map(len, parts)) - 1
        return Opening(position, parts, frames)

    def _close(self, unread: Codes) -> None:
        if self._text is not None and self._codes:
            self._history.append(_Spoken(self._text, np.concatenate(self._codes)))
        self._text, self._codes = None, []
        self._whole, self._unread = self.position, unread


def pieces_of(text: str, frames: int, pace: Pace) -> list[str]:
    """`text` in pieces that likely take at most `frames` each, without those that have no sound."""
    if not speakable(text):
        return []
    if len(text) < 2 or (pace.likely(text) <= frames and len(text) <= 4 * frames):
        return [text]
    first, second = halves(text)
    return pieces_of(first, frames, pace) + pieces_of(second, frames, pace)


def halves(text: str) -> tuple[str, str]:
    """`text` (two characters or more) cut near its middle: after a sentence, else a clause, else a
    word, else anywhere."""
    middle = len(text) / 2
    for cut in _CUTS:
        places = (match.end() for match in cut.finditer(text))
        inner = [place for place in places if len(text) / 8 <= place <= len(text) * 7 / 8]
        if inner:
            place = min(inner, key=lambda place: abs(place - middle))
            return text[:place].strip(), text[place:].strip()
    return text[: len(text) // 2], text[len(text) // 2 :]


def _weight(text: str) -> float:
    return sum(weight(token.text) for token in tokens(text))


def _last_that_fit(history: deque[_Spoken], room: int) -> list[_Spoken]:
    kept: list[_Spoken] = []
    for spoken in reversed(history):
        room -= spoken.positions
        if room < 0:
            break
        kept.insert(0, spoken)
    return kept
