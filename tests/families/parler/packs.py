"""What the tests of Parler-TTS do alike: load a pack, speak, listen to the model's steps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from src.audio.pcm import Float32
from src.tts.adapters.adapter_parler_tts import ParlerTtsAdapter, ParlerTtsModel
from src.tts.catalog import ModelMeta
from src.tts.tts_base import CancelToken, Segment, VoiceSpec

GREEDY = VoiceSpec("", "", {"temperature": "0"})


def files_of(folder: Path) -> dict[str, Path]:
    return {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}


def load(folder: Path, device: str = "cpu", **settings: str) -> ParlerTtsModel:
    meta = ModelMeta(model_id="parler-tiny", family="parler_tts", settings=settings)
    return ParlerTtsAdapter().load(meta, files_of(folder), device, lambda _: None)


def torch_model(model: ParlerTtsModel) -> Any:
    return model._engine._model


def said(model: ParlerTtsModel, text: str, spec: VoiceSpec = GREEDY) -> Float32:
    chunks = model.stream([Segment(text, 0)], spec, CancelToken())
    return np.concatenate([np.empty(0, np.float32), *(chunk.samples for chunk in chunks)])


def decibels(difference: Float32, of: Float32) -> float:
    """The level of a difference, under that of a sound."""
    ratio = float(np.mean(np.square(difference)) / np.mean(np.square(of)))
    return 10 * float(np.log10(ratio + 1e-20))


@contextmanager
def listening(model: ParlerTtsModel) -> Iterator[list[Any]]:
    """The logits (codebooks, ids) of every step, while it is open."""
    logits: list[Any] = []
    hook = torch_model(model).register_forward_hook(
        lambda _module, _inputs, out: logits.append(out.logits[:, -1].clone())
    )
    try:
        yield logits
    finally:
        hook.remove()


def copy_of(pack: Path, folder: Path) -> Path:
    return Path(shutil.copytree(pack, folder))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
