"""A mouth and an ear with exact times, for a user in a room.

All times are milliseconds on the clock that the user was given (monotonic: comparable between the
processes of one machine).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import soxr
from numpy.typing import NDArray

from src.audio.pcm import SAMPLE_RATE, Float32, Int16

SPEECH_RATE = 16_000
STEP_MS = 10
ROOM_NOISE_DBFS = -65.0
AUDIBLE_DBFS = -46.0
# A vowel's period at 100 Hz is 10 ms: a shorter window tells the end of a sound to a few ms.
_WINDOW = SAMPLE_RATE // 400
_EDGE_DB = 30.0


@dataclass(frozen=True)
class Spoken:
    """One clip in the microphone. Its edges are where it rises to 30 dB below its loudest part."""

    start_ms: float
    onset_ms: float
    offset_ms: float
    end_ms: float


class Mouth:
    """What a microphone picks up: 10 ms at a time on an absolute clock, room noise between words.

    Step k covers `origin_ms + 10 k` to `origin_ms + 10 (k + 1)` and exists at the end of that.
    """

    def __init__(self, origin_ms: float, sample_rate: int = SAMPLE_RATE, *, seed: int = 7) -> None:
        self._origin_ms = origin_ms
        self._rate = sample_rate
        self._step = sample_rate * STEP_MS // 1000
        self._noise = _noise(sample_rate // self._step, self._step, seed)
        self._steps = 0
        self._to_say: Float32 = np.empty(0, dtype=np.float32)

    @property
    def due_ms(self) -> float:
        """When the next step's last sample exists."""
        return self._origin_ms + (self._steps + 1) * STEP_MS

    @property
    def talking(self) -> bool:
        return bool(self._to_say.size)

    def talk(self, speech: Float32) -> Spoken:
        """16 kHz speech in [-1, 1], from the next step on or after what is still being said.

        The next step may have begun already: `start_ms` can lie up to 10 ms before now.
        """
        before_ms = self._steps * STEP_MS + self._to_say.size * 1000 / self._rate
        start_ms = self._origin_ms + before_ms
        self._to_say = np.concatenate((self._to_say, _resampled(speech, self._rate)))
        first, last = _edges(speech)
        return Spoken(
            start_ms=start_ms,
            onset_ms=start_ms + first * 1000 / SPEECH_RATE,
            offset_ms=start_ms + last * 1000 / SPEECH_RATE,
            end_ms=start_ms + speech.size * 1000 / SPEECH_RATE,
        )

    def next_step(self) -> Int16:
        """10 ms, mono."""
        sound = self._noise[self._steps % len(self._noise)].copy()
        words = self._to_say[: self._step]
        sound[: words.size] += words
        self._to_say = self._to_say[self._step :]
        self._steps += 1
        out: Int16 = np.rint(np.clip(sound, -1.0, 1.0) * 32767.0).astype(np.int16)
        return out


def _noise(steps: int, size: int, seed: int) -> Float32:
    """(steps, size): one second that is repeated, since drawing it anew costs more than sending."""
    white = np.random.default_rng(seed).standard_normal((steps, size), dtype=np.float32)
    out: Float32 = white * np.float32(10 ** (ROOM_NOISE_DBFS / 20))
    return out


def _resampled(speech: Float32, rate: int) -> Float32:
    out: Float32 = soxr.resample(speech.astype(np.float32), SPEECH_RATE, rate, "HQ")
    return out


def _edges(speech: Float32) -> tuple[int, int]:
    """First sample of the first 5 ms that are loud enough, and the one after the last."""
    block = SPEECH_RATE // 200
    whole = speech[: speech.size // block * block].reshape(-1, block)
    power = np.mean(np.square(whole, dtype=np.float64), axis=1)
    loud = np.flatnonzero(power > power.max(initial=0.0) * 10 ** (-_EDGE_DB / 10))
    return (int(loud[0]) * block, (int(loud[-1]) + 1) * block) if loud.size else (0, speech.size)


@dataclass(frozen=True)
class Sound:
    """What arrived at once, 48 kHz mono; sample j is heard at `at_ms` + j / 48."""

    at_ms: float
    samples: Int16


class Ear:
    """The last `keep_ms` of an agent's voice, with the time at which each piece arrived."""

    def __init__(self, keep_ms: int = 120_000) -> None:
        self.heard: deque[Sound] = deque(maxlen=keep_ms // STEP_MS)

    def hear(self, at_ms: float, samples: Int16) -> None:
        self.heard.append(Sound(at_ms, samples))

    def first_loud_ms(self, since_ms: float, dbfs: float = AUDIBLE_DBFS) -> float | None:
        """When the first 2.5 ms louder than `dbfs` began; None: it is silent since then."""
        for sound in self.heard:
            if sound.at_ms >= since_ms and (loud := _loud(sound, dbfs)).size:
                return sound.at_ms + int(loud[0]) * _WINDOW * 1000 / SAMPLE_RATE
        return None

    def last_loud_ms(self, since_ms: float, dbfs: float = AUDIBLE_DBFS) -> float | None:
        """When the last 2.5 ms louder than `dbfs` ended; None: it is silent since `since_ms`."""
        for sound in self._backwards(since_ms):
            if (loud := _loud(sound, dbfs)).size:
                return sound.at_ms + (int(loud[-1]) + 1) * _WINDOW * 1000 / SAMPLE_RATE
        return None

    def quiet_ms(self, dbfs: float = AUDIBLE_DBFS) -> int:
        """How much silence has arrived since the last sound."""
        quiet = 0
        for sound in self._backwards(float("-inf")):
            if _loud(sound, dbfs).size:
                break
            quiet += sound.samples.size
        return quiet * 1000 // SAMPLE_RATE

    def since(self, since_ms: float) -> Int16:
        """All that arrived since then, in one piece."""
        parts = [sound.samples for sound in self.heard if sound.at_ms >= since_ms]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int16)

    def _backwards(self, since_ms: float) -> Iterator[Sound]:
        for sound in reversed(self.heard):
            if sound.at_ms < since_ms:
                return
            yield sound


def _loud(sound: Sound, dbfs: float) -> NDArray[np.intp]:
    """Indices of the 2.5 ms windows whose level is over `dbfs`."""
    samples = sound.samples[: sound.samples.size // _WINDOW * _WINDOW].reshape(-1, _WINDOW)
    power = np.mean(np.square(samples, dtype=np.float32), axis=1)
    return np.flatnonzero(power > 32768.0**2 * 10 ** (dbfs / 10))
