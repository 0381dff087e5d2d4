"""A voice pack's recordings: who is heard in them, what is said, and the samples.

ref/<voice>.wav with ref/<voice>.txt   what is said in it, word for word; .flac and .ogg are as good
ref/seed.wav, ref/seed.txt             the pack's own voice, "default"

A model speaks on in the voice, the room and the level that it hears here, so what would only be
noticed as a poor voice is refused in words.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from src.audio.pcm import Float32
from src.rpc.errors import CorruptModel, InvalidArgument, UnknownName

DEFAULT_VOICE = "default"
MAX_TRANSCRIPT_CHARS = 1_000
SHORTEST_MS = 500
LONGEST_MS = 30_000
LOWEST_RATE = 16_000
SILENCE = 10 ** (-50 / 20)
"""A recording whose loudest sample is below -50 dB of full scale holds noise, not a voice."""
OVER_FULL_SCALE = 4.0
"""Float files may peak above 1; ones that hold integers as floats lie far beyond."""
_SEED = "seed"
_SOUND = (".wav", ".flac", ".ogg")
_log = logging.getLogger(__name__)


class Transcripts(Enum):
    """Does the family need to know what is said in a recording?"""

    NEEDED = auto()
    WISHED = auto()
    """Only the pack's own voice may do without, at a loss that is logged."""
    OPTIONAL = auto()


@dataclass(frozen=True, slots=True)
class Reference:
    """A recording and what is said in it."""

    audio: Path
    transcript: str


def read_references(
    model_id: str,
    files: Mapping[str, Path],
    listed: Sequence[str] = (),
    transcripts: Transcripts = Transcripts.WISHED,
) -> dict[str, Reference | None]:
    """The pack's voices by name, the default first; None: a voice without a recording.

    `listed` are the voices that the catalog entry names: these, in this order, and no others.
    Raises UnknownName for one without a recording, CorruptModel for a transcript that is missing or
    cannot be read.
    """
    sounds = _sounds(files)
    if not sounds and len(listed) <= 1:
        return {listed[0] if listed else DEFAULT_VOICE: None}
    for name in listed:
        if name not in sounds:
            raise UnknownName.among(f"recording for a voice of {model_id}", name, sounds)
    return {
        name: Reference(
            files[sounds[name]], _transcript(model_id, name, sounds[name], files, transcripts)
        )
        for name in listed or sorted(sounds, key=lambda name: (name != DEFAULT_VOICE, name))
    }


def read_recording(
    path: Path,
    sample_rate: int = 24_000,
    *,
    shortest_ms: int = SHORTEST_MS,
    longest_ms: int = LONGEST_MS,
) -> Float32:
    """A mono WAV, FLAC or Ogg file at `sample_rate`. Raises CorruptModel for a file that cannot be
    read as sound, InvalidArgument for sound that makes no voice prompt; both name the file.
    """
    samples, rate = _read(path, shortest_ms, longest_ms)
    _check_sound(path.name, samples)
    return _resample(samples, rate, sample_rate)


def _read(path: Path, shortest_ms: int, longest_ms: int) -> tuple[Float32, int]:
    import soundfile

    if not path.is_file():  # a pipe would be waited for
        raise CorruptModel(f"voice prompt {path} is not there, or is no file")
    try:
        with soundfile.SoundFile(str(path)) as file:
            _check_header(path.name, file, shortest_ms, longest_ms)
            samples: Float32 = file.read(dtype="float32")
            if samples.size < file.frames:
                raise CorruptModel(f"voice prompt {path.name} is cut off: fetch it again")
            return samples, int(file.samplerate)
    except (OSError, soundfile.LibsndfileError) as error:
        raise CorruptModel(f"voice prompt {path.name} cannot be read: {error}") from None


def _check_header(name: str, file: Any, shortest_ms: int, longest_ms: int) -> None:
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
    if not shortest_ms <= milliseconds <= longest_ms:
        raise InvalidArgument(
            f"voice prompt {name} lasts {milliseconds / 1000:.1f} s;"
            f" it has to last {shortest_ms / 1000} to {longest_ms / 1000:.0f} s, best about 10 s"
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


def _sounds(files: Mapping[str, Path]) -> dict[str, str]:
    """Voice → the name of its recording among the pack's files."""
    found: dict[str, str] = {}
    for name in sorted(files):
        path = PurePosixPath(name)
        if path.parent == PurePosixPath("ref") and path.suffix.lower() in _SOUND:
            found.setdefault(DEFAULT_VOICE if path.stem == _SEED else path.stem, name)
    return found


def _transcript(
    model_id: str, voice: str, sound: str, files: Mapping[str, Path], transcripts: Transcripts
) -> str:
    name = PurePosixPath(sound).with_suffix(".txt").as_posix()
    if name not in files:
        if transcripts is Transcripts.OPTIONAL:
            return ""
        own = PurePosixPath(sound).stem == _SEED
        if transcripts is Transcripts.NEEDED or not own:
            raise CorruptModel(
                f"{model_id}: voice {voice!r} has {sound} but not {name}; write down there what is "
                "said in the recording, word for word"
            )
        _log.warning("%s: %s has no %s; the voice will be less like it", model_id, sound, name)
        return ""
    try:
        text = " ".join(files[name].read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptModel(f"{model_id}: {name} cannot be read as UTF-8: {error}") from error
    if len(text) > MAX_TRANSCRIPT_CHARS:
        raise CorruptModel(
            f"{model_id}: {name} is {len(text)} characters long; 30 s of speech are less than "
            f"{MAX_TRANSCRIPT_CHARS}"
        )
    return text
