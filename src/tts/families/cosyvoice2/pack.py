"""A CosyVoice 2 voice pack: which files, and which sizes. Nothing of it is executed. No torch.

Its `cosyvoice2.yaml` is a program: `!new:` and `!apply:` call whatever they name when the family's
package loads it, and the published one reseeds every random generator. Here it is data: tags are
dropped, and of the numbers those are taken in which one release may differ from another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from src.rpc.errors import CorruptModel

CONFIG = "cosyvoice2.yaml"
LANGUAGE_MODEL = "CosyVoice-BlankEN"
PRESETS = "spk2info.pt"
NEEDED = (
    CONFIG, "llm.pt", "flow.pt", "hift.pt", "campplus.onnx", "speech_tokenizer_v2.onnx",
    *(f"{LANGUAGE_MODEL}/{name}" for name in (
        "config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer_config.json",
    )),
)  # fmt: skip
_MOST_YAML = 1 << 18
_LARGEST = 1 << 16


@dataclass(frozen=True, slots=True)
class Sizes:
    """As published (0.5B), but for what a pack says."""

    speech_tokens: int = 6561
    encoder_heads: int = 8
    encoder_units: int = 2048
    encoder_blocks: int = 6
    flow_channels: int = 256
    flow_head: int = 64
    flow_heads: int = 8
    flow_blocks: int = 4
    flow_middle: int = 12
    vocoder_channels: int = 512
    pitch_channels: int = 512


_PLACES = {
    "speech_tokens": ("llm", "speech_token_size"),
    "encoder_heads": ("flow", "encoder", "attention_heads"),
    "encoder_units": ("flow", "encoder", "linear_units"),
    "encoder_blocks": ("flow", "encoder", "num_blocks"),
    "flow_channels": ("flow", "decoder", "estimator", "channels", 0),
    "flow_head": ("flow", "decoder", "estimator", "attention_head_dim"),
    "flow_heads": ("flow", "decoder", "estimator", "num_heads"),
    "flow_blocks": ("flow", "decoder", "estimator", "n_blocks"),
    "flow_middle": ("flow", "decoder", "estimator", "num_mid_blocks"),
    "vocoder_channels": ("hift", "base_channels"),
    "pitch_channels": ("hift", "f0_predictor", "cond_channels"),
}


class _Plain(yaml.SafeLoader):
    """Whatever a tag names, what stands under it is a mapping, a list or a text."""


def _as_data(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return node.value


_Plain.add_constructor(None, _as_data)


def read_sizes(model_id: str, path: Path) -> Sizes:
    """Raises CorruptModel for a file that is no yaml, and for sizes that cannot be."""
    try:
        if path.stat().st_size > _MOST_YAML:
            raise CorruptModel(f"{model_id}: {path.name} is too large to be a model's description")
        # The loader is PyYAML's safe one; it makes plain data of every tag.
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Plain)  # noqa: S506
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise CorruptModel(f"{model_id}: {path.name} cannot be read: {error}") from error
    found = {name: _number(content, place) for name, place in _PLACES.items()}
    sizes = {name: value for name, value in found.items() if value is not None}
    for name, value in sizes.items():
        if type(value) is not int or not 0 < value <= _LARGEST:
            place = ".".join(map(str, _PLACES[name]))
            raise CorruptModel(f"{model_id}: {place} in {path.name} is {value!r}, which is no size")
    return Sizes(**sizes)


def _number(content: Any, place: tuple[str | int, ...]) -> Any:
    for step in place:
        try:
            content = content[step]
        except (KeyError, IndexError, TypeError):
            return None
    return content


def hidden_size(model_id: str, path: Path) -> int:
    """Of the language model, from its `config.json`. Raises CorruptModel."""
    try:
        size = json.loads(path.read_text(encoding="utf-8"))["hidden_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptModel(f"{model_id}: {path.name} has no hidden_size: {error}") from error
    if type(size) is not int or not 0 < size <= _LARGEST:
        raise CorruptModel(f"{model_id}: hidden_size in {path.name} is {size!r}")
    return size


def check_files(model_id: str, files: Mapping[str, Path]) -> Path:
    """The language model's folder. Raises CorruptModel for what is missing or lies elsewhere."""
    missing = [name for name in NEEDED if name not in files]
    if missing:
        raise CorruptModel(
            f"{model_id}: {', '.join(missing)} missing; docs/VOICEPACK_COSYVOICE2.md says where"
            " the files come from and where to put them"
        )
    folder = files[f"{LANGUAGE_MODEL}/config.json"].parent
    for name, path in files.items():
        if name.startswith(f"{LANGUAGE_MODEL}/") and path != folder.parent / name:
            raise CorruptModel(
                f"{model_id}: {name} is at {path}, not in {folder};"
                " the language model is read from one folder of that name"
            )
    return folder
