"""Text as it is written in, pieces to speak out.

The first piece is cut short, so that the first audio is early; later pieces are whole sentences,
and long sentences are cut at their clauses. Every piece keeps its place in the text: character `i`
of a segment is character `char_start + i` of the text, or a space where the text has something
that is not for the ear (markup, emoji, control characters).

Where a cut falls depends on the text alone, with one exception: the first piece is cut at a word
boundary only while no clause end is in sight, so a text that is known whole keeps its first clause.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from enum import Enum, auto

from src.tts.tts_base import AdapterCapabilities, Segment


@dataclass(frozen=True, slots=True)
class SegmenterLimits:
    """All but `first_words` in characters."""

    first_words: int = 5
    """Without punctuation in sight, the first piece ends after at most this many words."""
    first_reach: int = 48
    """How far the first piece may go to end at punctuation instead."""
    second_clause: int = 36
    """From here on the second piece ends at any clause; the first must not run dry meanwhile."""
    later_clause: int = 80
    max_chars: int = 140
    """No piece is longer: one piece is one run of the engine, and another session waits for it."""


STREAMED = SegmenterLimits(first_words=8, first_reach=72)
"""For a family that streams: only the writer makes a long first piece late, and a short one sounds
as if the speaker had wanted to stop there."""


def limits_for(family: AdapterCapabilities) -> SegmenterLimits | None:
    """None: its text is not cut, the family takes it as it is written."""
    if family.incremental_text:
        return None
    return STREAMED if family.streams else SegmenterLimits()


class _Break(Enum):
    NONE = auto()
    CLAUSE = auto()
    SENTENCE = auto()
    UNKNOWN = auto()
    """What follows decides, and has not been written yet."""


_SENTENCE_END = ".!?…。！？؟।۔"
_CLAUSE_END = ",;:—–，、；：،؛"
_CLOSERS = "\"'”’)]}»」』】）*_`~"
# These need no space after them.
_WIDE = "。！？，、；：—।"
_MARK = re.compile(
    rf"[{re.escape(_SENTENCE_END)}]+[{re.escape(_CLOSERS + _SENTENCE_END)}]*"
    rf"|[{re.escape(_CLAUSE_END)}][{re.escape(_CLOSERS)}]*|\n"
)
_INNER_STOP = re.compile(r"(?<=\w)\.(?=\s+\S)")
_TAIL = re.compile(r"[^\s]*\Z")
_SPACES_SEEN = 8
_NEXT = re.compile(rf"\s{{0,{_SPACES_SEEN}}}")
_WORD = re.compile(r"\S+")

_TITLES = frozenset(
    "dr mr mrs ms prof st mt gen col capt lt sgt rev hon sen rep gov messrs mme mlle"
    " e.g i.e vs cf fig figs vol pp approx ca est dept u.s u.k e.u u.n".split()
)
# They end a sentence only if a capital follows.
_MAYBE_END = frozenset(
    "etc inc ltd co corp jr sr a.m p.m al jan feb mar apr jun jul aug sep sept oct nov dec"
    " ave blvd rd ph.d b.c a.d".split()
)
# A breath sounds right before these and wrong after them.
_OPENERS = frozenset(
    "and or but so because that which who where when while if then than as to in on at of for with"
    " from by about into after before until though although".split()
)
_CLINGING = _OPENERS | frozenset(
    "a an the my your his her its our their this these those is are was were be been am i you he"
    " she it we they not no very can could will would shall should may might must do does did have"
    " has had i'm you're it's that's i'll i've there's what's let's".split()
)

_HIDDEN = re.compile(
    "["
    "\u0000-\u001f\u007f-\u009f\u00ad\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ud800-\udfff\ue000-\uf8ff\ufff9-\uffff"
    "\u2022\u2190-\u21ff\u2300-\u23ff\u2500-\u27bf\u2900-\u297f\u2b00-\u2bff"
    "\u3030\u303d\ufe00-\ufe0f\u20e3\U0001f000-\U0001faff\U000e0000-\U0010ffff"
    "|`~"
    "]+"
    r"|(?<!\d)(?<!\d )\*+|\*+(?! ?\d)"  # emphasis, not a product
    r"|(?<![^\W_])_+|_+(?![^\W_])"  # emphasis, not an identifier
    r"|(?<!\S)#+(?=\s|\Z)"  # a heading, not C# or #1
)


def speakable(text: str) -> bool:
    """Is there anything to pronounce: a letter or a digit of any script?"""
    return any(char.isalnum() for char in text)


def soften_stops(text: str) -> str:
    """A segment as an engine should read it that takes every full stop for a sentence end.

    The stop of "Dr. Smith" becomes a space, that of "1. First" a comma; places stay the same.
    """

    def soften(match: re.Match[str]) -> str:
        if _stop_kind(text, 0, match.start()) is _Break.SENTENCE:
            return "."
        return "," if text[match.start() - 1].isdigit() else " "

    return _INNER_STOP.sub(soften, text)


class Segmenter:
    """One utterance's text in, segments out. Holds back less than `limits.max_chars`."""

    def __init__(self, limits: SegmenterLimits | None = None) -> None:
        self._limits = limits or SegmenterLimits()
        self._buffer = ""
        self._start = 0  # of the piece being collected, in the buffer
        self._offset = 0  # of the buffer, in the text
        self._emitted = 0

    def push(self, text: str) -> list[Segment]:
        """The segments that `text` completes; none without a letter or digit."""
        self._buffer += text
        return self._collect(final=False)

    def flush(self) -> list[Segment]:
        """Everything held back. More text may follow; it is then cut as the middle of a text."""
        return self._collect(final=True)

    def _collect(self, *, final: bool) -> list[Segment]:
        segments: list[Segment] = []
        while True:
            self._skip_spaces()
            cut = self._cut(final=final)
            if cut is None:
                break
            segment = self._take(cut)
            if segment is not None:
                segments.append(segment)
        self._offset += self._start
        self._buffer = self._buffer[self._start :]
        self._start = 0
        return segments

    def _skip_spaces(self) -> None:
        buffer, start = self._buffer, self._start
        while start < len(buffer) and buffer[start].isspace():
            start += 1
        self._start = start

    def _take(self, cut: int) -> Segment | None:
        begin, self._start = self._start, cut
        text = _audible(self._buffer[begin:cut])
        if not speakable(text):
            return None
        self._emitted += 1
        stripped = text.lstrip()
        return Segment(stripped.rstrip(), self._offset + begin + len(text) - len(stripped))

    def _cut(self, *, final: bool) -> int | None:
        """Where the piece that begins at `_start` ends; None: not known yet, or nothing left."""
        limit = self._start + self._limits.max_chars
        for mark in _MARK.finditer(self._buffer, self._start, min(limit, len(self._buffer))):
            kind = _classify(self._buffer, self._start, mark, final=final)
            if kind is _Break.UNKNOWN:
                return self._cut_early(mark.start())
            if self._wanted(kind, mark.end()) and speakable(self._buffer[self._start : mark.end()]):
                return self._first_or(mark.end())
        if early := self._cut_early(min(limit, len(self._buffer))):
            return early
        if len(self._buffer) > limit:
            return self._forced_cut(limit)
        if final and self._start < len(self._buffer):
            return len(self._buffer)
        return None

    def _wanted(self, kind: _Break, end: int) -> bool:
        if kind is _Break.CLAUSE:
            floors = (0, self._limits.second_clause)
            floor = floors[self._emitted] if self._emitted < 2 else self._limits.later_clause
            return end - self._start >= floor
        return kind is _Break.SENTENCE

    def _first_or(self, end: int) -> int:
        """`end`, or a word boundary before it if this is the first piece and `end` is far off."""
        if end - self._start <= self._limits.first_reach:
            return end
        return self._cut_early(end) or end

    def _cut_early(self, end: int) -> int | None:
        """A word boundary for the first piece, once enough words are known to choose among."""
        if self._emitted:
            return None
        words: list[re.Match[str]] = []
        for word in _WORD.finditer(self._buffer, self._start, end):
            followed = self._buffer[word.end() : word.end() + 1].isspace()
            if followed and speakable(word.group()):
                words.append(word)
            if len(words) == self._limits.first_words:
                return _breath(words)
        return None

    def _forced_cut(self, limit: int) -> int:
        """Nothing to cut at: after the last clause, else the last word, else in mid-word."""
        piece = self._buffer[self._start : limit + 1]
        half = len(piece) // 2
        clauses = [m.end() for m in _MARK.finditer(piece, half // 2) if _ends_clause(piece, m)]
        if clauses:
            return self._start + clauses[-1]
        tail = _TAIL.search(piece)
        if tail is not None and tail.start() > half:
            return self._start + tail.start()
        return self._start + _before_joined(piece, len(piece) - 1)


def _audible(raw: str) -> str:
    return _HIDDEN.sub(lambda match: " " * len(match.group()), raw)


def _classify(buffer: str, start: int, mark: re.Match[str], *, final: bool) -> _Break:
    """What kind of break the punctuation at `mark` is, in the piece that begins at `start`."""
    end = mark.end()
    if mark.group() == "\n":
        return _after_newline(buffer, end, final=final)
    # A run of punctuation may go on in what is not written yet.
    if end == len(buffer):
        return _Break.SENTENCE if final else _Break.UNKNOWN
    head = mark.group()[0]
    if not buffer[end].isspace() and head not in _WIDE:
        return _Break.NONE
    if head in _CLAUSE_END:
        return _Break.CLAUSE
    if head == "…" or mark.group().startswith(".."):
        return _by_capital(buffer, end, final=final, otherwise=_Break.CLAUSE)
    if head != ".":
        return _Break.SENTENCE
    kind = _stop_kind(buffer, start, mark.start())
    if kind is _Break.UNKNOWN:
        return _by_capital(buffer, end, final=final, otherwise=_Break.NONE)
    return kind


def _stop_kind(buffer: str, start: int, stop: int) -> _Break:
    """What the full stop at `stop` is; UNKNOWN: a sentence end only before a capital."""
    tail = _TAIL.search(buffer, max(start, stop - 24), stop)
    word = (tail.group() if tail else "").lstrip("\"'“‘([{*_").lower()
    if word in _MAYBE_END:
        return _Break.UNKNOWN
    if word in _TITLES or (len(word) == 1 and word.isalpha() and word != "i"):
        return _Break.NONE
    if word.isdigit() and len(word) <= 3 and not buffer[start : stop - len(word)].strip():
        return _Break.NONE  # "1. First" is an item of a list
    return _Break.SENTENCE


def _after_newline(buffer: str, end: int, *, final: bool) -> _Break:
    """A line that goes on in small letters was only wrapped."""
    return _by_capital(buffer, end, final=final, otherwise=_Break.NONE, small_only=True)


def _by_capital(
    buffer: str, end: int, *, final: bool, otherwise: _Break, small_only: bool = False
) -> _Break:
    """SENTENCE if a capital follows (with `small_only`: if no small letter follows)."""
    gap = _NEXT.match(buffer, end)
    follows = gap.end() if gap else end
    if follows == len(buffer) and follows - end < _SPACES_SEEN:
        return _Break.SENTENCE if final else _Break.UNKNOWN
    char = buffer[follows] if follows < len(buffer) else " "
    ends = not char.islower() if small_only else char.isupper()
    return _Break.SENTENCE if ends else otherwise


def _ends_clause(piece: str, mark: re.Match[str]) -> bool:
    if mark.group()[0] in _WIDE or mark.group() == "\n":
        return True
    return mark.end() < len(piece) and piece[mark.end()].isspace()


def _breath(words: list[re.Match[str]]) -> int:
    """The best of the later word boundaries: before an opener, never after a clinging word."""
    names = [word.group().lower() for word in words]
    candidates = range(len(words) // 2, len(words))

    def merit(index: int) -> tuple[bool, bool, int]:
        opens = index + 1 < len(names) and names[index + 1] in _OPENERS
        return names[index] not in _CLINGING, opens, index

    return words[max(candidates, key=merit)].end()


def _before_joined(piece: str, cut: int) -> int:
    """Step back so that a letter keeps its marks."""
    for place in range(cut, max(cut - 8, 1), -1):
        if not unicodedata.combining(piece[place]) and piece[place] != "\u200d":
            return place
    return cut
