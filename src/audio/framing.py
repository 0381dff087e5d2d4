"""PCM of any chunking in, frames of one length out."""

from __future__ import annotations

import numpy as np

from src.audio.pcm import FRAME_SAMPLES, Int16


class Framer:
    """Cut a stream into equal frames. The same samples give the same frames, however chunked."""

    def __init__(self, frame_samples: int = FRAME_SAMPLES) -> None:
        if frame_samples <= 0:
            raise ValueError(f"frame_samples must be positive, got {frame_samples}")
        self._frame_samples = frame_samples
        self._rest: Int16 = np.empty(0, dtype=np.int16)

    def push(self, samples: Int16) -> list[Int16]:
        """The frames that `samples` complete; what is left over waits for the next call."""
        size = self._frame_samples
        joined = np.concatenate((self._rest, samples)) if self._rest.size else samples
        whole = joined.size - joined.size % size
        self._rest = joined[whole:].copy()
        return [joined[start : start + size] for start in range(0, whole, size)]

    def flush(self) -> list[Int16]:
        """The rest, padded with silence to a whole frame; empty if there is none."""
        if not self._rest.size:
            return []
        frame = np.zeros(self._frame_samples, dtype=np.int16)
        frame[: self._rest.size] = self._rest
        self._rest = np.empty(0, dtype=np.int16)
        return [frame]

    @property
    def pending_samples(self) -> int:
        return int(self._rest.size)
