"""Parler-TTS: what lies in a voice pack, checked before anything heavy is imported.

config.json, generation_config.json, tokenizer files   as `from_pretrained` reads them
model.safetensors, or its index and the shards          nothing pickled is read
description_tokenizer/                                 where descriptions have one of their own
descriptions.yaml                                      optional: voice name → description
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src.common.config import ConfigError, read_yaml
from src.rpc.errors import CorruptModel, InvalidArgument, UnknownName
from src.tts.families.settings import Words
from src.tts.families.torch_host import one_folder, pickled

DESCRIPTIONS = "descriptions.yaml"
DESCRIPTION_TOKENIZER = "description_tokenizer"
MAX_VOICES = 64
DESCRIPTION = Words(600, "how the voice sounds, in the language the model was taught (English)")
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = "pytorch_model.bin"
_SOUND = "at a moderate pace in a very close and clear recording without any background noise."
_NOBODY = "A woman with a warm voice speaks " + _SOUND


def pack_folder(model_id: str, files: Mapping[str, Path]) -> Path:
    """The folder that holds the pack, whole. Raises CorruptModel with what is missing."""
    for name in ("config.json", "generation_config.json"):
        if name not in files:
            raise CorruptModel(
                f"{model_id}: {name} is missing; docs/families/parler_tts.md says which files of "
                "the model's page to put where"
            )
        # The package takes a file that it cannot read for one that is not there.
        _read_json(model_id, name, files[name])
    folder = one_folder(model_id, "a Parler model", files["config.json"].parent, files)
    for name in _weight_files(model_id, files):
        if name not in files:
            raise CorruptModel(f"{model_id}: {name} is missing; fetch it again")
    return folder


def read_voices(model_id: str, files: Mapping[str, Path], listed: Sequence[str]) -> dict[str, str]:
    """Voice → description, the default first.

    `listed` are the names in the catalog entry: those of descriptions.yaml or, without the file, of
    the speakers that the model was taught. Raises UnknownName for a name the file does not have,
    CorruptModel and InvalidArgument for a file that holds something else.
    """
    if DESCRIPTIONS not in files:
        return {name: f"{name} speaks {_SOUND}" for name in listed} or {"default": _NOBODY}
    known = _read_descriptions(model_id, files[DESCRIPTIONS])
    for name in listed:
        if name not in known:
            raise UnknownName.among(f"description of a voice of {model_id}", name, known)
    return {name: known[name] for name in listed or known}


def _read_descriptions(model_id: str, path: Path) -> dict[str, str]:
    try:
        raw = read_yaml(path)
    except (ConfigError, OSError) as error:
        raise CorruptModel(f"{model_id}: {error}") from error
    if not isinstance(raw, dict) or not raw or len(raw) > MAX_VOICES:
        raise CorruptModel(
            f"{model_id}: {DESCRIPTIONS} must map 1 to {MAX_VOICES} voice names to descriptions"
        )
    return {str(name): _description(model_id, str(name), text) for name, text in raw.items()}


def _description(model_id: str, name: str, text: object) -> str:
    if not isinstance(text, str) or not text.strip():
        raise CorruptModel(f"{model_id}: {DESCRIPTIONS}: voice {name!r} needs a text that says how")
    try:
        return DESCRIPTION.read(name, text)
    except InvalidArgument as error:
        raise CorruptModel(f"{model_id}: {DESCRIPTIONS}: {error.message}") from None


def _weight_files(model_id: str, files: Mapping[str, Path]) -> list[str]:
    """Raises CorruptModel where there are none that we read."""
    if _WEIGHTS in files:
        return [_WEIGHTS]
    if _INDEX in files:
        return _shards(model_id, files[_INDEX])
    if _PICKLED in files:
        raise pickled(model_id, files[_PICKLED])
    raise CorruptModel(f"{model_id}: {_WEIGHTS} is missing (or {_INDEX} and the shards it names)")


def _shards(model_id: str, index: Path) -> list[str]:
    placed = _read_json(model_id, _INDEX, index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CorruptModel(f"{model_id}: {_INDEX} cannot be read: it names no shards")
    return sorted({str(name) for name in placed.values()})


def _read_json(model_id: str, name: str, path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptModel(f"{model_id}: {name} cannot be read: {error}") from error
    if not isinstance(read, dict):
        raise CorruptModel(f"{model_id}: {name} cannot be read: it holds no object")
    return read
