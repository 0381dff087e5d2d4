"""Parler-TTS: from the ids that a step draws to sound, a window at a time.

Codebook k of frame f is drawn at step f + k. The codec that turns frames into sound only looks a
few frames to either side, so a window with that much around it sounds exactly as in the whole, and
no frame is decoded twice for ever longer sounds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from src.audio.pcm import Float32
from src.rpc.errors import CorruptModel, Internal

Ids = NDArray[np.int64]
# So many frames in a row without sound (half a second) are the end of speech too.
_MUTE_FRAMES = 43


class Undelay:
    """One piece's draws (int64, one id per codebook) to frames; `ended` when speech is over.

    Ids from `codes` on are marks, not sound: one in the first codebook ends speech, a frame with
    one in another is left out.
    """

    def __init__(self, codebooks: int, codes: int) -> None:
        self.ended = False
        self._codes = codes
        self._draws: deque[Ids] = deque(maxlen=codebooks)
        self._mute = 0

    def push(self, draw: Ids) -> Ids | None:
        """The frame that this draw completes, if any; no more after the end."""
        self._draws.append(draw)
        if self.ended or len(self._draws) < self._draws.maxlen:  # type: ignore[operator]
            return None
        frame = np.array([draw[k] for k, draw in enumerate(self._draws)], dtype=np.int64)
        if (frame < self._codes).all():
            self._mute = 0
            return frame
        self._mute += 1
        self.ended = bool(frame[0] >= self._codes) or self._mute >= _MUTE_FRAMES
        return None


class WindowDecoder:
    """Frames in, sound out: `first` frames at once, then twice as many each time, up to `most`.

    `decode` takes ids (codebooks, frames) and gives `hop` samples for each frame. It looks at
    `reach` frames on either side, so the last `reach` wait for what comes after them.
    """

    def __init__(
        self, decode: Callable[[Ids], Float32], hop: int, reach: int, *, first: int, most: int
    ) -> None:
        self._decode = decode
        self._hop = hop
        self._reach = reach
        self._next = first
        self._most = most
        self._frames: list[Ids] = []
        self._said = 0
        """Of `_frames`, so many were given out and are kept for what is on their right."""

    def push(self, frame: Ids) -> Float32 | None:
        self._frames.append(frame)
        if len(self._frames) - self._said < self._next + self._reach:
            return None
        sound = self._give(self._next)
        self._next = min(2 * self._next, self._most)
        return sound

    def end(self) -> Float32:
        """What is left, perhaps nothing."""
        return self._give(len(self._frames) - self._said)

    def _give(self, count: int) -> Float32:
        if not count:
            return np.empty(0, dtype=np.float32)
        sound = self._decode(np.stack(self._frames, axis=1))
        if sound.size != len(self._frames) * self._hop or not np.isfinite(sound).all():
            raise Internal("the codec of parler_tts gave no sound for a window of frames")
        begin, self._said = self._said, self._said + count
        given = sound[begin * self._hop : self._said * self._hop]
        forgotten = max(0, self._said - self._reach)
        del self._frames[:forgotten]
        self._said -= forgotten
        return np.clip(given, -1.0, 1.0)


def reach_of(decoder: Any) -> tuple[int, int]:
    """How far a convolutional decoder looks, in frames to either side, and its samples per frame.

    A kernel of k taps, d apart, sees (k - 1) d / 2 to either side at the rate it works at; one that
    raises the rate by s sees k / 2 s of its inputs. Layers stand in the order in which they work;
    what runs beside the rest is counted too, which can only make it more.

    Raises CorruptModel for a decoder that remembers (it reaches back to the beginning).
    """
    import torch

    reach, hop = 0.0, 1
    for layer in decoder.modules():
        if isinstance(layer, torch.nn.ConvTranspose1d):
            reach += layer.kernel_size[0] / (2 * layer.stride[0] * hop)
            hop *= layer.stride[0]
        elif isinstance(layer, torch.nn.Conv1d):
            reach += (layer.kernel_size[0] - 1) * layer.dilation[0] / (2 * hop)
        elif isinstance(layer, torch.nn.RNNBase):
            raise CorruptModel("the codec of this pack is not DAC: it cannot be decoded in windows")
    return math.ceil(reach), hop
