"""Make an openai-whisper checkpoint from a CTranslate2 Whisper folder: the same weights, renamed.

    uv run --extra whisper python scripts/whisper_to_openai.py FOLDER OUT.pt

CTranslate2 fuses the query, key and value projections and calls things by its own names; nothing
else differs. Needs float weights (an int8 `model.bin` is refused).
"""

from __future__ import annotations

import argparse
import json
import re
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Weights = dict[str, Array]

_DTYPES: Mapping[int, type[np.generic]] = {
    0: np.float32,
    1: np.int8,
    2: np.int16,
    3: np.int32,
    4: np.float16,
}
_HEAD_SIZE = 64
"""In every Whisper that OpenAI published."""


class NotAWhisperModel(ValueError):
    pass


# --- reading ---


class _Reader:
    """CTranslate2's binary format: little-endian, names with their length and a final NUL."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self, code: str) -> int:
        value = struct.unpack_from("<" + code, self._data, self._at)[0]
        self._at += struct.calcsize(code)
        return int(value)

    def name(self) -> str:
        length = self.number("H")
        value = self._data[self._at : self._at + length - 1].decode()
        self._at += length
        return value

    def array(self) -> Array:
        shape = [self.number("I") for _ in range(self.number("B"))]
        dtype = np.dtype(_DTYPES[self.number("B")])
        size = self.number("I")
        flat = np.frombuffer(self._data, dtype, size // dtype.itemsize, self._at)
        self._at += size
        return flat.reshape(shape)


def read_ctranslate2(path: Path) -> Weights:
    reader = _Reader(path.read_bytes())
    try:
        reader.number("I")
        spec = reader.name()
        reader.number("I")
        weights = {reader.name(): reader.array() for _ in range(reader.number("I"))}
        aliases = [(reader.name(), reader.name()) for _ in range(reader.number("I"))]
    except (struct.error, UnicodeDecodeError, KeyError, ValueError) as error:
        raise NotAWhisperModel(f"{path} is not a CTranslate2 model: {error}") from error
    if spec != "WhisperSpec":
        raise NotAWhisperModel(f"{path} holds a {spec}, not a WhisperSpec")
    return weights | {alias: weights[name] for alias, name in aliases}


# --- renaming ---


def to_openai(weights: Weights) -> Weights:
    """openai-whisper's `model_state_dict`, as float32 arrays."""
    if weights["decoder/embeddings/weight"].dtype == np.int8:
        raise NotAWhisperModel("the weights are quantised to int8; convert from a float model")
    renamed = dict(_renamed(weights))
    return {name: np.array(array, dtype=np.float32) for name, array in renamed.items()}


def _renamed(weights: Weights) -> Iterator[tuple[str, Array]]:
    for conv in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            yield f"encoder.{conv}.{part}", weights[f"encoder/{conv}/{part}"]
    yield "decoder.token_embedding.weight", weights["decoder/embeddings/weight"]
    for side, norm in (("encoder", "ln_post"), ("decoder", "ln")):
        yield f"{side}.positional_embedding", weights[f"{side}/position_encodings/encodings"]
        yield from _norm(weights, f"{side}/layer_norm", f"{side}.{norm}")
        for layer in range(layers(weights, side)):
            yield from _block(weights, side, layer)


def _block(weights: Weights, side: str, layer: int) -> Iterator[tuple[str, Array]]:
    source, target = f"{side}/layer_{layer}", f"{side}.blocks.{layer}"
    attention = f"{source}/self_attention"
    yield from _norm(weights, f"{attention}/layer_norm", f"{target}.attn_ln")
    names = ("query", "key", "value")
    yield from _split(weights, f"{attention}/linear_0", f"{target}.attn", names)
    yield from _linear(weights, f"{attention}/linear_1", f"{target}.attn.out")
    if side == "decoder":
        yield from _cross_attention(weights, f"{source}/attention", target)
    yield from _norm(weights, f"{source}/ffn/layer_norm", f"{target}.mlp_ln")
    yield from _linear(weights, f"{source}/ffn/linear_0", f"{target}.mlp.0")
    yield from _linear(weights, f"{source}/ffn/linear_1", f"{target}.mlp.2")


def _cross_attention(weights: Weights, source: str, target: str) -> Iterator[tuple[str, Array]]:
    yield from _norm(weights, f"{source}/layer_norm", f"{target}.cross_attn_ln")
    yield from _linear(weights, f"{source}/linear_0", f"{target}.cross_attn.query")
    names = ("key", "value")
    yield from _split(weights, f"{source}/linear_1", f"{target}.cross_attn", names)
    yield from _linear(weights, f"{source}/linear_2", f"{target}.cross_attn.out")


def _norm(weights: Weights, source: str, target: str) -> Iterator[tuple[str, Array]]:
    yield f"{target}.weight", weights[f"{source}/gamma"]
    yield f"{target}.bias", weights[f"{source}/beta"]


def _linear(weights: Weights, source: str, target: str) -> Iterator[tuple[str, Array]]:
    yield f"{target}.weight", weights[f"{source}/weight"]
    yield f"{target}.bias", weights[f"{source}/bias"]


def _split(
    weights: Weights, source: str, target: str, names: tuple[str, ...]
) -> Iterator[tuple[str, Array]]:
    for part in ("weight", "bias"):
        for name, array in zip(
            names, np.split(weights[f"{source}/{part}"], len(names)), strict=True
        ):
            # Whisper's keys have no bias; CTranslate2 fills the gap with zeros.
            if (name, part) != ("key", "bias"):
                yield f"{target}.{name}.{part}", array


def layers(weights: Weights, side: str) -> int:
    found = (re.match(rf"{side}/layer_(\d+)/", name) for name in weights)
    return len({match.group(1) for match in found if match})


def dimensions(weights: Weights) -> dict[str, int]:
    """openai-whisper's `ModelDimensions`."""
    vocabulary, state = weights["decoder/embeddings/weight"].shape
    heads = state // _HEAD_SIZE
    return {
        "n_mels": weights["encoder/conv1/weight"].shape[1],
        "n_audio_ctx": weights["encoder/position_encodings/encodings"].shape[0],
        "n_audio_state": state,
        "n_audio_head": heads,
        "n_audio_layer": layers(weights, "encoder"),
        "n_vocab": vocabulary,
        "n_text_ctx": weights["decoder/position_encodings/encodings"].shape[0],
        "n_text_state": state,
        "n_text_head": heads,
        "n_text_layer": layers(weights, "decoder"),
    }


def convert(folder: Path, target: Path) -> dict[str, int]:
    """Write the checkpoint; returns its dimensions. Needs torch."""
    import torch

    weights = read_ctranslate2(folder / "model.bin")
    dims = dimensions(weights)
    state = {name: torch.from_numpy(array) for name, array in to_openai(weights).items()}
    torch.save({"dims": dims, "model_state_dict": state}, target)
    return dims


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="holds model.bin")
    parser.add_argument("target", type=Path, help="the checkpoint to write (.pt)")
    args = parser.parse_args()
    try:
        dims = convert(args.folder, args.target)
    except ImportError:
        print("torch is not installed; run `uv sync --extra whisper`", file=sys.stderr)
        return 2
    except (OSError, NotAWhisperModel) as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(dims))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
