"""Word error rate, after writing numerals out: "10 days" and "ten days" are the same words."""

from __future__ import annotations

import re
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
    """Levenshtein distance over normalised words."""
    reference, hypothesis = normalise(said), normalise(recognised)
    row = list(range(len(hypothesis) + 1))
    for i, expected in enumerate(reference, start=1):
        previous, row[0] = row[0], i
        for j, got in enumerate(hypothesis, start=1):
            previous, row[j] = (
                row[j],
                min(row[j] + 1, row[j - 1] + 1, previous + (expected != got)),
            )
    return WordErrors(row[-1], len(reference))


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
