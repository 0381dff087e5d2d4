"""Codes in as they are drawn, sound out in windows. Pure.

BiCodec's decoder is a stack of convolutions over the whole utterance; its own call decodes once, at
the end. Here it decodes windows: what is new, with some of what came before it and a little of what
comes after. Two windows differ where they meet, because neither hears as far as the decoder does;
so the end of one is faded into the beginning of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from src.audio.pcm import Float32

Decode = Callable[[Sequence[int]], Float32]
"""Codes to samples (mono), as many for each code."""

_NOTHING: Float32 = np.empty(0, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """In codes, 20 ms each."""

    left: int = 25
    right: int = 4
    """Drawn before their neighbours are heard: the first sound waits for them."""
    sizes: tuple[int, ...] = (25, 50, 100)
    """New codes of the first window, the second, and so on; the last one repeats."""


class Windows:
    """One segment. Raises what `decode` raises."""

    def __init__(self, decode: Decode, samples_per_code: int, plan: WindowPlan) -> None:
        self._decode = decode
        self._hop = samples_per_code
        self._plan = plan
        self._codes: list[int] = []
        self._done = 0
        self._windows = 0
        # What the last window says of the codes after its own: the next one is faded in over it.
        self._overlap = _NOTHING

    def push(self, code: int) -> Float32:
        """Sound, when this code completes a window; else none."""
        self._codes.append(code)
        size = self._plan.sizes[min(self._windows, len(self._plan.sizes) - 1)]
        if len(self._codes) - self._done < size + self._plan.right:
            return _NOTHING
        return self._window(self._done + size)

    def end(self) -> Float32:
        """Sound of all codes that are left."""
        return self._window(len(self._codes)) if self._done < len(self._codes) else _NOTHING

    def _window(self, until: int) -> Float32:
        first = max(0, self._done - self._plan.left)
        last = min(len(self._codes), until + self._plan.right)
        sound = self._decode(self._codes[first:last])
        begin, end = ((place - first) * self._hop for place in (self._done, until))
        fresh: Float32 = sound[begin:end].copy()
        over = self._overlap.size
        if over:
            rising = _rise(over)
            fresh[:over] = fresh[:over] * rising + self._overlap * (1 - rising)
        self._overlap = sound[end : end + min(1, last - until) * self._hop]
        self._done = until
        self._windows += 1
        return fresh


def _rise(samples: int) -> Float32:
    """From 0 to 1, level at both ends."""
    steps = (np.arange(samples, dtype=np.float32) + 0.5) / samples
    out: Float32 = (0.5 - 0.5 * np.cos(np.pi * steps)).astype(np.float32)
    return out
