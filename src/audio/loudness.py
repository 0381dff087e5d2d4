"""One level for every voice, without pumping.

The gain follows the level of the speech itself, averaged over seconds, with pauses left out, and it
moves slowly. Peaks that the gain would push too high go through a soft knee, so nothing ever clips.
Work is done on whole 20 ms blocks of the stream, so how the audio was chunked makes no difference.
"""

from __future__ import annotations

import numpy as np

from src.audio.pcm import FRAME_SAMPLES, SAMPLE_RATE, Float32

MAX_GAIN_DB = 12.0
_SLEW_DB_PER_S = 6.0
_AVERAGE_MS = 3_000.0
# Quieter than this is a pause or breath, and says nothing about how loud the voice is.
_SPEECH_POWER = 10.0 ** (-45.0 / 10.0)
_KNEE = 0.80
_CEILING = 0.98

_EMPTY: Float32 = np.empty(0, dtype=np.float32)


class Loudness:
    """Mono float32 at 48 kHz in, the same number of samples out, nearer to `target_dbfs` RMS.

    `gain_db` may start where an earlier utterance of the same voice ended. Holds back less than one
    20 ms block, which the framing after it would hold back anyway.
    """

    def __init__(self, target_dbfs: float, gain_db: float = 0.0) -> None:
        self._target_dbfs = target_dbfs
        self.gain_db = gain_db
        self._power = 0.0
        self._blocks = 0
        self._rest = _EMPTY

    def push(self, samples: Float32) -> Float32:
        """Levelled audio for every block that `samples` complete."""
        joined = np.concatenate((self._rest, samples)) if self._rest.size else samples
        whole = joined.size - joined.size % FRAME_SAMPLES
        self._rest = joined[whole:].copy()
        return self._level(joined[:whole])

    def flush(self) -> Float32:
        """What was held back."""
        rest, self._rest = self._rest, _EMPTY
        return self._level(rest)

    def _level(self, samples: Float32) -> Float32:
        if not samples.size:
            return _EMPTY
        starts = range(0, samples.size, FRAME_SAMPLES)
        return np.concatenate([self._block(samples[i : i + FRAME_SAMPLES]) for i in starts])

    def _block(self, block: Float32) -> Float32:
        before = self.gain_db
        self._listen(block)
        after = self.gain_db = self._step(block.size)
        gains = 10.0 ** (np.linspace(before, after, block.size, dtype=np.float32) / 20.0)
        return _soft_limit((block * gains).astype(np.float32))

    def _listen(self, block: Float32) -> None:
        power = float(np.mean(np.square(block)))
        if power < _SPEECH_POWER:
            return
        self._blocks += 1
        longest = _AVERAGE_MS * SAMPLE_RATE / 1000.0 / FRAME_SAMPLES
        self._power += (power - self._power) / min(self._blocks, longest)

    def _step(self, samples: int) -> float:
        """The gain at the end of this block: towards what the level asks for, at a bounded rate."""
        if not self._blocks:
            return self.gain_db
        wanted = self._target_dbfs - 10.0 * float(np.log10(self._power))
        wanted = min(max(wanted, -MAX_GAIN_DB), MAX_GAIN_DB)
        reach = _SLEW_DB_PER_S * samples / SAMPLE_RATE
        return self.gain_db + min(max(wanted - self.gain_db, -reach), reach)


def _soft_limit(samples: Float32) -> Float32:
    """Untouched up to the knee, bent smoothly below the ceiling above it."""
    size = np.abs(samples)
    if float(size.max()) <= _KNEE:
        return samples
    room = _CEILING - _KNEE
    bent = _KNEE + room * np.tanh((size - _KNEE) / room)
    out: Float32 = np.where(size > _KNEE, np.sign(samples) * bent, samples).astype(np.float32)
    return out
