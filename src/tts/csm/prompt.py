"""A reference recording on disk to the samples that a voice prompt is encoded from.

The model speaks on in the voice, the room and the level that it hears here, so what would only be
noticed as a poor voice is refused in words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from src.audio.pcm import Float32
from src.rpc.errors import CorruptModel, InvalidArgument

SHORTEST_MS = 500
LONGEST_MS = 30_000
"""375 of a slot's 2048 positions: what a prompt takes is not there for speech."""
LOWEST_RATE = 16_000
SILENCE = 10 ** (-50 / 20)
"""A recording whose loudest sample is below -50 dB of full scale holds noise, not a voice."""
OVER_FULL_SCALE = 4.0
"""Float files may peak above 1; ones that hold integers as floats lie far beyond."""


def read_prompt(path: Path, sample_rate: int = 24_000) -> Float32:
    """A mono WAV, FLAC or Ogg file at `sample_rate`. Raises CorruptModel for a file that cannot be
    read as sound, InvalidArgument for sound that makes no voice prompt; both name the file.
    """
    samples, rate = _read(path)
    _check_sound(path.name, samples)
    return _resample(samples, rate, sample_rate)


def _read(path: Path) -> tuple[Float32, int]:
    import soundfile

    if not path.is_file():  # a pipe would be waited for
        raise CorruptModel(f"voice prompt {path} is not there, or is no file")
    try:
        with soundfile.SoundFile(str(path)) as file:
            _check_header(path.name, file)
            samples: Float32 = file.read(dtype="float32")
            if samples.size < file.frames:
                raise CorruptModel(f"voice prompt {path.name} is cut off: fetch it again")
            return samples, int(file.samplerate)
    except (OSError, soundfile.LibsndfileError) as error:
        raise CorruptModel(f"voice prompt {path.name} cannot be read: {error}") from None


def _check_header(name: str, file: Any) -> None:
    """Before any sound is read, so that what is refused costs nothing."""
    if file.channels != 1:
        raise InvalidArgument(
            f"voice prompt {name} has {file.channels} channels, and a voice is mono;"
            f" mix it down: ffmpeg -i {name} -ac 1 mono.wav"
        )
    if file.samplerate < LOWEST_RATE:
        raise InvalidArgument(
            f"voice prompt {name} is sampled at {file.samplerate} Hz: below {LOWEST_RATE} Hz the"
            " upper half of a voice is missing, and the model would speak like a telephone"
        )
    milliseconds = file.frames * 1000 // file.samplerate
    if not SHORTEST_MS <= milliseconds <= LONGEST_MS:
        raise InvalidArgument(
            f"voice prompt {name} lasts {milliseconds / 1000:.1f} s;"
            f" it has to last {SHORTEST_MS / 1000} to {LONGEST_MS / 1000:.0f} s, best about 10 s"
        )


def _check_sound(name: str, samples: Float32) -> None:
    if not np.isfinite(samples).all():
        raise CorruptModel(f"voice prompt {name} holds samples that are not numbers")
    peak = float(np.abs(samples).max())
    if peak < SILENCE:
        raise InvalidArgument(f"voice prompt {name} is silent: its peak is {peak:.5f} of 1")
    if peak > OVER_FULL_SCALE:
        raise InvalidArgument(
            f"voice prompt {name} peaks at {peak:.0f} where full scale is 1;"
            " scale its samples to [-1, 1]"
        )


def _resample(samples: Float32, rate: int, wanted: int) -> Float32:
    import soxr

    out: Float32 = soxr.resample(samples, rate, wanted, quality="VHQ")
    return out
