"""From phoneme durations to word times."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from src.tts.tts_base import Segment, WordMark
from src.tts.words import Token, tokens

_PLAIN = re.compile(r"[^\W\d_]+[^\w\s]?")
# "of the", "I have been": more words than this are not run together.
_MERGED = 4
PUNCTUATION = frozenset(".,!?:;…\"'()-¿¡")


@dataclass(frozen=True, slots=True)
class _Spoken:
    """One word as it was spoken: [start, end) in samples, and how many phonemes it has."""

    start: int
    end: int
    phonemes: int


def word_marks(
    segment: Segment,
    phonemes: Sequence[str],
    samples_per_phoneme: Sequence[int],
    sample_rate: int,
    phonemise: Callable[[str], Sequence[str]],
) -> tuple[WordMark, ...]:
    """Marks for the segment's words, timed from its first sample.

    Written words that were spoken as one ("of the") share its time by their phonemes and say
    `estimated`; all others are exact.
    """
    written = tokens(segment.text)
    spoken = _spoken(phonemes, samples_per_phoneme)
    if not written or not spoken:
        return ()
    marks: list[WordMark] = []
    for words, said, sizes in _pairs(written, spoken, phonemise):
        edges = _edges(said, sizes)
        for word, begin, end in zip(words, edges, edges[1:], strict=False):
            place = segment.char_start + word.start
            times = round(begin * 1000 / sample_rate), round(end * 1000 / sample_rate)
            marks.append(WordMark(word.text, *times, place, place + len(word.text), len(words) > 1))
    return tuple(marks)


def _spoken(phonemes: Sequence[str], samples: Sequence[int]) -> list[_Spoken]:
    """Punctuation lasts too, but it is a pause: it belongs to no word."""
    words: list[_Spoken] = []
    start = end = place = count = 0
    for phoneme, length in zip((*phonemes, " "), (*samples, 0), strict=True):
        if phoneme == " ":
            if count:
                words.append(_Spoken(start, end, count))
            count = 0
        elif phoneme not in PUNCTUATION:
            start = start if count else place
            end = place + length
            count += 1
        place += length
    return words


def _pairs(
    written: Sequence[Token], spoken: Sequence[_Spoken], phonemise: Callable[[str], Sequence[str]]
) -> list[tuple[Sequence[Token], Sequence[_Spoken], Sequence[int]]]:
    """Written words and what they were spoken as: one to one, one to several, several to one.

    The third part is the phonemes that each of the written words has when it stands alone.
    """
    if len(written) == len(spoken) and all(_PLAIN.fullmatch(word.text) for word in written):
        return [([word], [said], [1]) for word, said in zip(written, spoken, strict=True)]
    alone = [_alone(word, phonemise) for word in written]
    sizes = [max(1, sum(said.phonemes for said in words)) for words in alone]
    steps = _cheapest(sizes, [len(words) for words in alone], [said.phonemes for said in spoken])
    return [(written[i:j], spoken[k:m], sizes[i:j]) for i, j, k, m in steps]


def _cheapest(
    sizes: Sequence[int], parts: Sequence[int], said: Sequence[int]
) -> list[tuple[int, int, int, int]]:
    """Steps (written from, to, spoken from, to) with the least difference in phonemes."""
    said_before = [0, *itertools.accumulate(said)]
    written_before = [0, *itertools.accumulate(sizes)]
    best: dict[tuple[int, int], tuple[int, tuple[int, int]]] = {(0, 0): (0, (0, 0))}
    for i, k in itertools.product(range(len(sizes) + 1), range(len(said) + 1)):
        if (i, k) not in best:
            continue
        cost = best[i, k][0]
        for j, m in _steps(i, k, parts, len(said)):
            gap = abs(written_before[j] - written_before[i] - said_before[m] + said_before[k])
            total = cost + gap + (j - i > 1)
            if (j, m) not in best or total < best[j, m][0]:
                best[j, m] = total, (i, k)
    return _walk_back(best, len(sizes), len(said))


def _steps(i: int, k: int, parts: Sequence[int], spoken: int) -> Iterator[tuple[int, int]]:
    if i == len(parts) or k == spoken:
        return
    last_word = i + 1 == len(parts)
    most = spoken - k if last_word else min(parts[i] + 2, spoken - k)
    yield from ((i + 1, k + n) for n in range(1, most + 1))
    last_said = k + 1 == spoken
    most = len(parts) - i if last_said else min(_MERGED, len(parts) - i)
    yield from ((i + n, k + 1) for n in range(2, most + 1))


def _walk_back(
    best: dict[tuple[int, int], tuple[int, tuple[int, int]]], written: int, spoken: int
) -> list[tuple[int, int, int, int]]:
    steps: list[tuple[int, int, int, int]] = []
    j, m = written, spoken
    while (j, m) != (0, 0):
        i, k = best[j, m][1]
        steps.append((i, j, k, m))
        j, m = i, k
    return steps[::-1]


def _edges(said: Sequence[_Spoken], sizes: Sequence[int]) -> list[float]:
    begin, end = said[0].start, said[-1].end
    shares = itertools.accumulate(sizes, initial=0)
    return [begin + (end - begin) * share / sum(sizes) for share in shares]


def _alone(word: Token, phonemise: Callable[[str], Sequence[str]]) -> list[_Spoken]:
    phonemes = phonemise(word.text)
    return _spoken(phonemes, [1] * len(phonemes))
