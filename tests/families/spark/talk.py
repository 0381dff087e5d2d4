"""What the tests of this family say and load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import soundfile

from src.audio.pcm import Float32
from src.tts.adapters.adapter_spark_tts import SparkTtsAdapter
from src.tts.catalog import ModelMeta
from src.tts.families.spark.speech import SparkTtsModel
from src.tts.tts_base import CancelToken, PcmChunk, Segment, VoiceSpec

TEXT = "Hello there, my friend."
GREEDY = {"temperature": "0"}


def files_of(*folders: Path) -> dict[str, Path]:
    return {
        path.relative_to(folder).as_posix(): path
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file()
    }


def load(
    files: Mapping[str, Path], device: str = "cpu", voices: Iterable[str] = (), **settings: str
) -> SparkTtsModel:
    meta = ModelMeta(
        model_id="spark-tts-tiny", family="spark_tts", voices=list(voices), settings=settings
    )
    return SparkTtsAdapter().load(meta, files, device, lambda _: None)


def chunks(
    model: SparkTtsModel, text: str = TEXT, voice: str = "", **settings: str
) -> list[PcmChunk]:
    return list(model.stream([Segment(text, 0)], VoiceSpec(voice, "", settings), CancelToken()))


def sound(model: SparkTtsModel, text: str = TEXT, voice: str = "", **settings: str) -> Float32:
    said = [chunk.samples for chunk in chunks(model, text, voice, **settings)]
    return np.concatenate([np.empty(0, dtype=np.float32), *said])


def record(path: Path, seconds: float = 2.0, rate: int = 24_000, seed: int = 0) -> Path:
    """A recording of nobody."""
    path.parent.mkdir(exist_ok=True)
    noise = np.random.default_rng(seed).normal(0, 0.1, int(seconds * rate))
    soundfile.write(path, noise.astype(np.float32), rate)
    return path


def without_memory(*_: object, **__: object) -> None:
    """In place of what would take some."""
    import torch

    raise torch.OutOfMemoryError("planned")


def linked(pack: Path, folder: Path) -> Path:
    """A pack of its own, for changes: links to the files of another."""
    for name, path in files_of(pack).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(path)
    return folder


def own(pack: Path, name: str) -> Path:
    """A file of a linked pack, as a copy to write to."""
    path = pack / name
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    return path
