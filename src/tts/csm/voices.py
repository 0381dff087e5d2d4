"""A voice pack's voices: recordings beside the weights, each read once into a voice prompt.

ref/<voice>.wav with ref/<voice>.txt   what is said in it, word for word; .flac and .ogg are as good
ref/seed.wav                           the pack's own voice, "default"; ref/seed.txt may be missing
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from src.audio.pcm import Float32
from src.rpc.errors import CorruptModel, InvalidArgument, UnknownName
from src.tts.csm.engine import Engine
from src.tts.csm.ports import CsmModel, Prefix, Sampling, Voice
from src.tts.csm.prompt import read_prompt

DEFAULT_VOICE = "default"
MAX_TRANSCRIPT_CHARS = 1_000
_SEED = "seed"
_SOUND = (".wav", ".flac", ".ogg")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reference:
    """A recording and what is said in it."""

    audio: Path
    transcript: str


def read_references(
    model_id: str, files: Mapping[str, Path], listed: Sequence[str] = ()
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
        name: Reference(files[sounds[name]], _transcript(model_id, name, sounds[name], files))
        for name in listed or sorted(sounds, key=lambda name: (name != DEFAULT_VOICE, name))
    }


def load_voices(
    engine: Engine,
    references: Mapping[str, Reference | None],
    *,
    speaker: int,
    sampling: Sampling,
    adapter: int = 0,
) -> dict[str, Voice]:
    """The voices of these recordings, while others may speak; in the same order.

    Raises InvalidArgument for a recording that is no voice prompt or leaves too little context to
    speak in, CorruptModel for one that cannot be read.
    """
    return {
        name: Voice(speaker, _prefix(engine, reference, speaker, adapter), sampling, adapter)
        for name, reference in references.items()
    }


def _prefix(
    engine: Engine, reference: Reference | None, speaker: int, adapter: int
) -> Prefix | None:
    if reference is None:
        return None
    samples = read_prompt(reference.audio, engine.sample_rate)
    return engine.run(
        lambda model: _read(model, samples, reference, speaker=speaker, adapter=adapter)
    )


def _read(
    model: CsmModel, samples: Float32, reference: Reference, *, speaker: int, adapter: int
) -> Prefix:
    codes = model.encode(samples)
    ended = np.concatenate((codes, np.zeros((1, model.codebooks), dtype=np.int64)))
    said = model.embed_text(reference.transcript, speaker)
    prompt = model.join([said, model.embed_frames(ended)])
    if 2 * len(prompt) > model.positions:
        raise InvalidArgument(
            f"voice prompt {reference.audio.name} takes {len(prompt)} of {model.positions} "
            "positions, and it may take half: use a shorter recording, or more positions"
        )
    return model.prefix_of(prompt, adapter)


def _sounds(files: Mapping[str, Path]) -> dict[str, str]:
    """Voice → the name of its recording among the pack's files."""
    found: dict[str, str] = {}
    for name in sorted(files):
        path = PurePosixPath(name)
        if path.parent == PurePosixPath("ref") and path.suffix.lower() in _SOUND:
            found.setdefault(DEFAULT_VOICE if path.stem == _SEED else path.stem, name)
    return found


def _transcript(model_id: str, voice: str, sound: str, files: Mapping[str, Path]) -> str:
    name = PurePosixPath(sound).with_suffix(".txt").as_posix()
    if name not in files:
        if PurePosixPath(sound).stem != _SEED:
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
