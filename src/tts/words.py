"""When was which word heard? Estimated from the audio, for engines that do not say.

Words are what stands between spaces, with their punctuation; in scripts without spaces every
character counts as a word. Times are spread over the audible part by length, and a word that ends
in punctuation is made to end where the audio pauses.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from src.audio.pcm import Float32
from src.tts.tts_base import WordMark

_HOP_MS = 5
_SILENCE_DB = -38.0  # below the loudest hop
_PAUSE_MS = 50
_REACH_MS = 600.0
_REST = 3.0  # of a comma, in the unit of `weight`

_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_TOKEN = re.compile(rf"[{_UNSPACED}][^\s\w]*|[^\s{_UNSPACED}]+")
_VOWELS = re.compile(r"[aeiouyàâäáãåæèéêëìíîïòóôöõøùúûüýÿœаеёиоуыэюя]+", re.IGNORECASE)
_PAUSING = re.compile(r"[.,;:!?…—–。！？，、；：][^\w\s]*\Z")


@dataclass(frozen=True, slots=True)
class Token:
    """`text` is text[start:end] of the segment."""

    text: str
    start: int
    end: int


def tokens(text: str) -> list[Token]:
    """The words of a segment, in order; only those with something to pronounce."""
    return [
        Token(match.group(), match.start(), match.end())
        for match in _TOKEN.finditer(text)
        if any(char.isalnum() for char in match.group())
    ]


def estimate_words(
    text: str, char_start: int, samples: Float32, sample_rate: int
) -> tuple[WordMark, ...]:
    """Marks for a segment's words: contiguous, inside `samples` (mono), all `estimated`.

    The first begins where sound does and the last ends where it does.
    """
    words = tokens(text)
    if not words or not samples.size:
        return ()
    loud = _audible_hops(samples, sample_rate)
    hop_ms = _hop(sample_rate) * 1000 / sample_rate
    onset, offset = _span_ms(loud, hop_ms, samples.size * 1000 / sample_rate)
    edges = _spread(words, onset, offset, _pauses_ms(loud, hop_ms))
    return tuple(
        WordMark(word.text, begin, end, char_start + word.start, char_start + word.end, True)
        for word, begin, end in zip(words, edges, edges[1:], strict=False)
    )


def audible_span(samples: Float32, sample_rate: int) -> tuple[int, int]:
    """First and one past the last sample that is not silence; (0, 0) if all is."""
    loud = np.flatnonzero(_audible_hops(samples, sample_rate))
    if not loud.size:
        return 0, 0
    hop = _hop(sample_rate)
    return int(loud[0]) * hop, min(int(loud[-1] + 1) * hop, samples.size)


def weight(word: str) -> float:
    """How long a word takes to say, in about the time of one letter."""
    total = 0.0
    for char in word:
        if char.isdigit():
            total += 4.0  # a digit is a word of its own
        elif char.isalpha():
            # A character of a script without cases is a syllable or most of one.
            total += 1.0 if char.lower() != char.upper() else 2.5
    return max(1.0, total + len(_VOWELS.findall(word)) - 0.7)


def _spread(
    words: Sequence[Token], onset: float, offset: float, pauses: Sequence[tuple[float, float]]
) -> list[int]:
    """len(words) + 1 edges in ms, rising, from `onset` to `offset`.

    A pause counts with the word after it, but takes no part in the spreading.
    """
    weights = [weight(word.text) for word in words]
    rests = [_REST if _PAUSING.search(word.text) else 0.0 for word in words[:-1]]
    places = list(itertools.accumulate(map(sum, zip(weights, [0.0, *rests], strict=True))))
    scale = (offset - onset) / places[-1]
    ends = [i + 1 for i, rest in enumerate(rests) if rest]
    pairs = _match([onset + places[end - 1] * scale for end in ends], pauses)
    stops = [*((ends[i], *pauses[j]) for i, j in pairs), (len(words), offset, offset)]
    edges: list[float] = []
    first, edge, begin = 0, onset, onset
    for last, stop, resume in stops:
        inner = np.cumsum(weights[first:last])
        edges += [edge, *(begin + inner[:-1] / inner[-1] * (stop - begin)).tolist()]
        first, edge, begin = last, stop, resume
    return [int(edge) for edge in [*edges, offset]]


def _match(
    guesses: Sequence[float], pauses: Sequence[tuple[float, float]]
) -> list[tuple[int, int]]:
    """Pair guessed edges with pauses in order, at the least cost; indexes into both.

    An edge without a pause costs as much as a distance of `_REACH_MS`, so far ones stay unpaired.
    """
    rows, columns = len(guesses) + 1, len(pauses) + 1
    cost: NDArray[np.float64] = np.zeros((rows, columns))
    cost[:, 0] = np.arange(rows) * _REACH_MS
    for row in range(1, rows):
        for column in range(1, columns):
            paired = cost[row - 1, column - 1] + _distance(guesses[row - 1], pauses[column - 1])
            alone = cost[row - 1, column] + _REACH_MS
            cost[row, column] = min(paired, alone, cost[row, column - 1])
    pairs: list[tuple[int, int]] = []
    row, column = rows - 1, columns - 1
    while row and column:
        if cost[row, column] == cost[row, column - 1]:
            column -= 1
        elif cost[row, column] == cost[row - 1, column] + _REACH_MS:
            row -= 1
        else:
            row, column = row - 1, column - 1
            pairs.append((row, column))
    return pairs[::-1]


def _distance(guess: float, pause: tuple[float, float]) -> float:
    # Long pauses are the ones that punctuation makes; short ones are closures of stops.
    return abs(guess - (pause[0] + pause[1]) / 2) - min(pause[1] - pause[0], 300)


def _hop(sample_rate: int) -> int:
    return max(1, sample_rate * _HOP_MS // 1000)


def _audible_hops(samples: Float32, sample_rate: int) -> NDArray[np.bool_]:
    hop = _hop(sample_rate)
    padded = np.pad(samples, (0, -samples.size % hop)).reshape(-1, hop)
    level = np.sqrt(np.mean(np.square(padded), axis=1))
    loudest = float(level.max(initial=0.0))
    audible: NDArray[np.bool_] = level > max(loudest * 10 ** (_SILENCE_DB / 20), 1e-4)
    return audible


def _span_ms(loud: NDArray[np.bool_], hop_ms: float, length_ms: float) -> tuple[float, float]:
    hops = np.flatnonzero(loud)
    if not hops.size:
        return 0.0, length_ms
    return float(hops[0] * hop_ms), min(float((hops[-1] + 1) * hop_ms), length_ms)


def _pauses_ms(loud: NDArray[np.bool_], hop_ms: float) -> list[tuple[float, float]]:
    """Silences of at least `_PAUSE_MS` between the first and the last sound."""
    hops = np.flatnonzero(loud)
    gaps = np.flatnonzero((np.diff(hops) - 1) * hop_ms >= _PAUSE_MS)
    return [(float((hops[i] + 1) * hop_ms), float(hops[i + 1] * hop_ms)) for i in gaps]
