"""Text as XTTS can read it: pieces that it speaks whole, numbers that its package can spell.

Pure but for the package's tokenizer, which is handed in.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from src.rpc.errors import Internal, Unavailable
from src.tts.paced_words import USUAL_MS
from src.tts.segmenter import speakable
from src.tts.words import tokens, weight

NEEDS = {
    "zh-cn": (("pypinyin",), "pypinyin"),
    "ja": (("cutlet", "fugashi", "unidic_lite"), "cutlet 'fugashi[unidic-lite]'"),
}
"""Language → modules that its text needs, and what brings them."""
_USUAL_LIMIT = 250
_SHARE = 0.6
"""Of the longest sound that the model makes, what a piece may take by our guess."""
_BRACKETS = str.maketrans("[]", "  ")
_CLAUSE = re.compile(r"[.,;:!?…؟،؛।]\s|[。！？，、；：]")
_SPACE = re.compile(r"\s")
_NUMBER = re.compile(r"[$€£]?\d[\d.,:]*\d|[$€£]?\d")
# `num2words` has no Hindi, so the package can read no number of it at all.
_DIGITS = {"hi": ("शून्य", "एक", "दो", "तीन", "चार", "पाँच", "छह", "सात", "आठ", "नौ")}


class Tokenizer(Protocol):
    """The package's `VoiceBpeTokenizer`."""

    char_limits: Mapping[str, int]

    def encode(self, txt: str, lang: str) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """`text` is what the listener hears of the utterance from `char_start` on; `ids` its tokens."""

    text: str
    char_start: int
    ids: Sequence[int]

    @property
    def usual_ms(self) -> float:
        return spoken_ms(self.text)


class Reader:
    """For any thread: the dictionaries of some languages are not made for several at once."""

    def __init__(self, tokenizer: Tokenizer, *, max_tokens: int, longest_ms: float) -> None:
        """A piece has less than `max_tokens` tokens and is a good way below `longest_ms`."""
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._longest_ms = longest_ms * _SHARE
        self._lock = threading.Lock()

    def pieces(self, text: str, char_start: int, language: str) -> Iterator[Piece]:
        """The text in pieces that the model speaks to their end, cut between words.

        More would not be refused by the package, but spoken in part.
        """
        waiting = [(char_start, text)]
        while waiting:
            start, part = waiting.pop()
            ids = self._fitting(part, language)
            if ids is not None:
                yield Piece(part, start, ids)
            elif speakable(part):
                cut = _cut_before(part, self._most_chars(part, language))
                waiting += [(start + cut, part[cut:]), (start, part[:cut])]

    def _fitting(self, text: str, language: str) -> list[int] | None:
        """Its tokens, if it is a piece."""
        if not speakable(text) or len(text) > self._limit(language):
            return None
        if spoken_ms(text) > self._longest_ms and len(text) > 1:
            return None
        ids = self._encode(text, language)
        return ids if len(ids) < self._max_tokens or len(text) == 1 else None

    def _most_chars(self, text: str, language: str) -> int:
        """How much of a text that does not fit may be tried next: less than all of it."""
        limit = self._limit(language)
        return limit if len(text) > limit else len(text) // 2

    def _limit(self, language: str) -> int:
        return self._tokenizer.char_limits.get(language.partition("-")[0], _USUAL_LIMIT)

    def _encode(self, text: str, language: str) -> list[int]:
        # In brackets stand the marks of the model's vocabulary, which are no part of any text.
        plain = text.translate(_BRACKETS).strip().lower()
        tag = language.partition("-")[0]
        failed = ""
        with self._lock:
            for reading in (plain, digit_by_digit(plain, tag)):
                try:
                    return self._tokenizer.encode(reading, tag)
                except ImportError as error:
                    raise missing_extras(language) from error
                except Exception as error:  # at a number; of any kind, and quoting the text
                    failed = type(error).__name__
        raise Internal(f"xtts cannot read a piece of this text ({failed})")


def spoken_ms(text: str) -> float:
    """How long a usual voice takes for it."""
    return sum(weight(word.text) for word in tokens(text)) * USUAL_MS


def digit_by_digit(text: str, tag: str) -> str:
    """Every number as its digits, each a word."""

    def spelled(number: re.Match[str]) -> str:
        digits = [int(char) for char in number.group() if char.isdecimal()]
        names = _DIGITS.get(tag)
        return f" {' '.join(names[digit] if names else str(digit) for digit in digits)} "

    return _NUMBER.sub(spelled, text)


def speaks(languages: Iterable[str]) -> tuple[str, ...]:
    """Those whose packages are here."""
    return tuple(tag for tag in languages if not _lacks(tag))


def check_extras(language: str) -> None:
    """Raises Unavailable with the command that brings what this language's text needs."""
    if _lacks(language):
        raise missing_extras(language)


def missing_extras(language: str) -> Unavailable:
    _, packages = NEEDS.get(language, ((), ""))
    return Unavailable(
        f"to speak {language!r}, xtts needs packages that this worker does not have; install them "
        f"there: uv pip install --python {sys.executable} {packages}"
    )


def _lacks(language: str) -> bool:
    modules, _ = NEEDS.get(language, ((), ""))
    return any(importlib.util.find_spec(module) is None for module in modules)


def _cut_before(text: str, most: int) -> int:
    """Where to cut, after at most `most` characters: after a clause, else a word, else there."""
    for end, least in ((_CLAUSE, most // 2), (_SPACE, 0)):
        if ends := [match.end() for match in end.finditer(text, least, most)]:
            return ends[-1]
    return max(1, most)
