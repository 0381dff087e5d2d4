"""Loading a pack, copies of it that are wrong, and what a model says."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from src.audio.pcm import Float32
from src.tts.adapters.adapter_cosyvoice2 import CosyVoice2Adapter
from src.tts.catalog import ModelMeta
from src.tts.families.cosyvoice2.speech import CosyVoice2Model, Manner
from src.tts.tts_base import CancelToken, PcmChunk, Segment, VoiceSpec


def files_of(folder: Path) -> dict[str, Path]:
    return {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}


def load(folder: Path, device: str = "cpu", **entry: Any) -> CosyVoice2Model:
    meta = ModelMeta(model_id="cosyvoice2-tiny", family="cosyvoice2", **entry)
    return CosyVoice2Adapter().load(meta, files_of(folder), device, lambda _: None)


def changed(pack: Path, folder: Path, change: Callable[[Path], object]) -> Path:
    """A copy of the pack with `change(copy)` done to it; what it does not touch is linked."""
    copy = folder / "changed"
    shutil.copytree(pack, copy, copy_function=lambda a, b: Path(b).hardlink_to(a))
    change(copy)
    return copy


def rewrite(path: Path, content: str | bytes) -> None:
    """Not through the link."""
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def spec(voice: str = "", **settings: str) -> VoiceSpec:
    return VoiceSpec(voice, "", {"seed": "7", **settings})


def chunks(
    model: CosyVoice2Model,
    text: str | Iterable[Segment],
    how: VoiceSpec | None = None,
    most: int | None = None,
) -> list[PcmChunk]:
    """The first `most` chunks; then the stream is closed."""
    segments = [Segment(text, 0)] if isinstance(text, str) else text
    stream = model.stream(segments, how or spec(), CancelToken())
    try:
        return list(islice(stream, most))
    finally:
        stream.close()  # type: ignore[attr-defined]


def sound(found: Iterable[PcmChunk]) -> Float32:
    return np.concatenate([chunk.samples for chunk in found])


def engine_of(model: CosyVoice2Model) -> Any:
    return model._engine


def drawn(model: CosyVoice2Model, text: str, manner: Manner) -> list[int]:
    return list(engine_of(model).tokens(text, manner))
