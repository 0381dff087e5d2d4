"""When is which word said, while a segment is still being made? Pure.

For engines that do not say, and stream before they know. A segment's words are laid out by their
weight (words.py) at the pace that the voice has had so far, over the audible part of what has come:
silence moves nobody on. What is left when the segment ends was said before its end. All of it is
`estimated`.
"""

from __future__ import annotations

import itertools
import threading

import numpy as np
from numpy.typing import NDArray

from src.audio.pcm import Float32
from src.tts.tts_base import WordMark
from src.tts.words import Token, tokens, weight

# Audible milliseconds per unit of weight: medians over tests/sentences.py are 53 (Piper) and 57
# (eSpeak). With it, starts are 50 ms off in the median, 200 ms at the 90th percentile.
USUAL_MS = 55.0
# A segment that was so many times slower or quicker than the voice's pace was not just read out.
_REACH = 2.0
_PRIOR_UNITS = 60.0
_MEMORY_UNITS = 1500.0
_HOP_MS = 10
_SILENCE = 10 ** (-38.0 / 20)  # of the loudest hop so far
_FLOOR = 1e-3


class WordPace:
    """How long a voice takes for a unit of weight, learnt from segments; for any thread."""

    def __init__(self, ms_per_unit: float = USUAL_MS) -> None:
        self._lock = threading.Lock()
        self._units = _PRIOR_UNITS
        self._ms = _PRIOR_UNITS * ms_per_unit

    @property
    def ms_per_unit(self) -> float:
        with self._lock:
            return self._ms / self._units

    def learn(self, units: float, audible_ms: float) -> None:
        """A whole segment of this weight took so long; the last minutes count most."""
        if units <= 0 or audible_ms <= 0:
            return
        with self._lock:
            now = self._ms / self._units
            taken = min(max(audible_ms / units, now / _REACH), now * _REACH)
            kept = _MEMORY_UNITS / (_MEMORY_UNITS + units)
            self._units = self._units * kept + units
            self._ms = self._ms * kept + units * taken


class PacedWords:
    """One segment's words, given out as its sound comes: `push` every chunk, then `end`."""

    def __init__(self, text: str, char_start: int, pace: WordPace, sample_rate: int) -> None:
        self._words = tokens(text)
        self._char_start = char_start
        self._pace = pace
        self._rate = sample_rate
        self._ms_per_unit = pace.ms_per_unit
        # Word i lies between the edges i and i + 1, in units of weight from the first word on.
        weights = [weight(word.text) for word in self._words]
        self._edges = [0.0, *itertools.accumulate(weights)]
        self._begun = 0
        self._begun_at_ms = 0.0
        self._come_ms = 0.0
        self._audible_ms = 0.0
        self._audible_until_ms = 0.0
        self._loudest = 0.0

    def extend(self, text: str, char_start: int) -> None:
        """More of the same segment, known only now."""
        moved = char_start - self._char_start
        for word in tokens(text):
            self._words.append(Token(word.text, word.start + moved, word.end + moved))
            self._edges.append(self._edges[-1] + weight(word.text))

    def push(self, samples: Float32) -> tuple[WordMark, ...]:
        """The words that begin in this chunk (mono), timed from its first sample."""
        first_ms = self._come_ms
        marks: list[WordMark] = []
        for heard in self._audible_hops(samples):
            if heard:
                marks += self._begin_due(first_ms)
                self._audible_ms += _HOP_MS
                self._audible_until_ms = self._come_ms + _HOP_MS
            self._come_ms += _HOP_MS
        self._come_ms = first_ms + samples.size * 1000 / self._rate
        return tuple(marks)

    def end(self, *, learn: bool = True) -> tuple[WordMark, ...]:
        """The segment is over: the words that have not begun, timed from its end, so before it.

        They share what was audible since the last one that began. `learn`: the segment was said to
        its end, so it tells of the voice's pace.
        """
        if not self._words:
            return ()
        if learn:
            self._pace.learn(self._edges[-1], self._audible_ms)
        first = max(0, self._begun - 1)
        since = self._begun_at_ms
        until = max(self._audible_until_ms or self._come_ms, since)
        units = self._edges[-1] - self._edges[first]
        places = [since + (until - since) * (e - self._edges[first]) / units for e in self._edges]
        left = range(self._begun, len(self._words))
        self._begun = len(self._words)
        return tuple(self._mark(i, places[i], places[i + 1], self._come_ms) for i in left)

    def _begin_due(self, first_ms: float) -> list[WordMark]:
        """The words whose turn has come by now, timed from `first_ms`."""
        marks: list[WordMark] = []
        pace = self._ms_per_unit
        while (
            self._begun < len(self._words) and self._edges[self._begun] * pace <= self._audible_ms
        ):
            late_ms = self._audible_ms - self._edges[self._begun] * pace
            start_ms = max(self._come_ms - late_ms, self._begun_at_ms)
            length_ms = (self._edges[self._begun + 1] - self._edges[self._begun]) * pace
            marks.append(self._mark(self._begun, start_ms, start_ms + length_ms, first_ms))
            self._begun += 1
            self._begun_at_ms = start_ms
        return marks

    def _mark(self, index: int, start_ms: float, end_ms: float, from_ms: float) -> WordMark:
        word = self._words[index]
        return WordMark(
            word.text,
            round(start_ms - from_ms),
            round(end_ms - from_ms),
            self._char_start + word.start,
            self._char_start + word.end,
            estimated=True,
        )

    def _audible_hops(self, samples: Float32) -> NDArray[np.bool_]:
        """Per hop of 10 ms, the last perhaps shorter: is it louder than silence?"""
        hop = self._rate * _HOP_MS // 1000
        padded = np.pad(samples, (0, -samples.size % hop)).reshape(-1, hop)
        level = np.sqrt(np.mean(np.square(padded), axis=1))
        self._loudest = max(self._loudest, float(level.max(initial=0.0)))
        audible: NDArray[np.bool_] = level > max(self._loudest * _SILENCE, _FLOOR)
        return audible
