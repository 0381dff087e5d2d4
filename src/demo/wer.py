"""Error rates, after writing numerals out: "10 days" and "ten days" are the same words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_SPELT = {"colour": "color", "okay": "ok", "mmhmm": "mhm", "grey": "gray"}


@dataclass(frozen=True)
class WordErrors:
    errors: int
    words: int

    @property
    def rate(self) -> float:
        return self.errors / max(self.words, 1)


def word_errors(said: str, recognised: str) -> WordErrors:
    """Over normalised words."""
    reference, hypothesis = normalise(said), normalise(recognised)
    return WordErrors(_distance(reference, hypothesis), len(reference))


def letter_error_rate(said: str, recognised: str) -> float:
    """Over the letters of the normalised words, without spaces.

    Fairer than words to names that a recogniser has never seen: "Grimgold", "Grim Gold".
    """
    reference, hypothesis = "".join(normalise(said)), "".join(normalise(recognised))
    return _distance(reference, hypothesis) / max(len(reference), 1)


def _distance(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """Levenshtein's."""
    row = list(range(len(hypothesis) + 1))
    for i, expected in enumerate(reference, start=1):
        previous, row[0] = row[0], i
        for j, got in enumerate(hypothesis, start=1):
            previous, row[j] = (
                row[j],
                min(row[j] + 1, row[j - 1] + 1, previous + (expected != got)),
            )
    return row[-1]


def normalise(text: str) -> list[str]:
    """Lower case, no punctuation, numerals as words."""
    text = re.sub(r"\d{1,6}", lambda found: f" {spell(int(found[0]))} ", text.replace(",", ""))
    words = re.sub(r"[^a-z\s]", "", text.lower().replace("-", " ")).split()
    return [_SPELT.get(word, word) for word in words]


def spell(number: int) -> str:
    """0 to 999 999, as spoken in English."""
    if number < 20:
        return _UNITS[number]
    if number < 100:
        tens, rest = divmod(number, 10)
        return _TENS[tens - 2] + (f" {_UNITS[rest]}" if rest else "")
    if number < 1000:
        hundreds, rest = divmod(number, 100)
        return f"{_UNITS[hundreds]} hundred" + (f" {spell(rest)}" if rest else "")
    thousands, rest = divmod(number, 1000)
    return f"{spell(thousands)} thousand" + (f" {spell(rest)}" if rest else "")
