"""A voice pack's recordings, each read once into a voice prompt (src/tts/recordings.py)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from src.audio.pcm import Float32
from src.rpc.errors import InvalidArgument
from src.tts.families.csm.engine import Engine
from src.tts.families.csm.ports import CsmModel, Prefix, Sampling, Voice
from src.tts.recordings import Reference, read_recording


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
    samples = read_recording(reference.audio, engine.sample_rate)
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
