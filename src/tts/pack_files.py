"""Is a file of a voice pack what its name says? Only headers are read: weights stay on the disk.

What is looked for is what really happens to a download: cut off, empty, an error page or a Git LFS
pointer in its place, a checkpoint with pickled objects in it, a yaml that names code.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from src.tts.checkpoints import BadCheckpoint, foreign_to_plain

MAX_HEADER = 100 << 20
MAX_TEXT = 64 << 20
SHARD_INDEX = ".safetensors.index.json"
WEIGHTS = (".safetensors", ".onnx", ".pt", ".pth", ".bin", ".ckpt")
_CHECKPOINTS = (".pt", ".pth", ".bin", ".ckpt")
_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
_ONNX_IR_VERSION, _ONNX_GRAPH = 1, 7
_SHOWN = 3


class BadFile(Exception):
    """The message says what is wrong with the file, and is read behind its name."""


def check_file(path: Path, *, yaml_is_data: bool = False) -> None:
    """Raises BadFile. `yaml_is_data`: who reads it drops its tags, so they may name anything."""
    size = path.stat().st_size
    if not size:
        raise BadFile("is empty")
    with path.open("rb") as stream:
        _check_beginning(stream.read(64))
    if path.suffix == ".safetensors":
        check_safetensors(path)
    elif path.suffix == ".onnx":
        check_onnx(path)
    elif path.suffix in _CHECKPOINTS:
        check_checkpoint(path)
    elif path.name.endswith(SHARD_INDEX):
        _check_shards(path)
    elif path.suffix == ".json":
        _read_json(path)
    elif path.suffix in (".yaml", ".yml"):
        check_yaml(path, yaml_is_data)


def _check_beginning(head: bytes) -> None:
    if head.startswith(b"version https://git-lfs"):
        raise BadFile("is a Git LFS pointer, not the file: `git lfs pull`, or download it again")
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise BadFile("is a web page, not the file: was the download's address a page's?")


def check_safetensors(path: Path) -> None:
    """The header, and that the file is as long as it says. Raises BadFile."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise BadFile("is cut off, or no safetensors file")
        try:
            header = json.loads(stream.read(length))
            ends = [_tensor_end(name, said) for name, said in header.items() if name[:2] != "__"]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise BadFile(f"has a header that cannot be read: {error}") from None
    data = size - 8 - length
    if max(ends, default=0) != data:
        raise BadFile(
            f"is cut off: {data} bytes of tensors, its header says {max(ends, default=0)}"
        )


def _tensor_end(name: str, said: dict[str, Any]) -> int:
    begin, end = said["data_offsets"]
    width = _BYTES.get(said["dtype"])
    if not 0 <= begin <= end or (width and end - begin != math.prod(said["shape"]) * width):
        raise BadFile(f"has a tensor {name} whose place is not as large as its shape")
    return int(end)


def check_onnx(path: Path) -> None:
    """A model's outermost fields, each as long as it says. Raises BadFile."""
    try:
        with path.open("rb") as stream:
            fields = set(_protobuf_fields(stream, path.stat().st_size))
    except EOFError:
        raise BadFile("is cut off, or no ONNX model") from None
    if not {_ONNX_IR_VERSION, _ONNX_GRAPH} <= fields:
        raise BadFile("is no ONNX model: it holds no graph")


def _protobuf_fields(stream: IO[bytes], size: int) -> Iterator[int]:
    while stream.tell() < size:
        key = _varint(stream)
        yield key >> 3
        wire = key & 7
        if wire == 0:
            _varint(stream)
            continue
        skip = {1: 8, 2: -1, 5: 4}.get(wire)
        if skip is None or not key >> 3:
            raise EOFError
        skip = _varint(stream) if skip < 0 else skip
        if stream.tell() + skip > size:
            raise EOFError
        stream.seek(skip, 1)


def _varint(stream: IO[bytes]) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = stream.read(1)
        if not byte:
            raise EOFError
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise EOFError


def check_checkpoint(path: Path) -> None:
    """Tensors, numbers and texts alone. Raises BadFile."""
    try:
        foreign = foreign_to_plain(path)
    except BadCheckpoint as bad:
        raise BadFile(f"cannot be loaded: {bad}") from None
    if foreign:
        names = ", ".join(foreign[:_SHOWN]) + (", …" if len(foreign) > _SHOWN else "")
        raise BadFile(pickled_objects(path, names))


def pickled_objects(path: Path, names: str = "") -> str:
    """What is wrong with such a file and how to mend it, after its name."""
    return (
        f"holds pickled objects{f' ({names})' if names else ''}, which may run any code, so it is "
        f"not loaded. If you trust its maker: `uv run just voicepack-convert {path} --i-trust-it`"
    )


def _check_shards(path: Path) -> None:
    index = _read_json(path)
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weights, dict):
        raise BadFile("names no shards")
    for shard in sorted({str(name) for name in weights.values()}):
        if not (path.parent / shard).is_file():
            raise BadFile(f"names {shard}, which is not there")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise BadFile(f"is no JSON: {error}") from None


def check_yaml(path: Path, is_data: bool = False) -> None:
    """Readable, and without tags that stand for code in somebody's loader. Raises BadFile."""
    tags = code_tags(path)
    if tags and not is_data:
        shown = ", ".join(tags[:_SHOWN]) + (", …" if len(tags) > _SHOWN else "")
        raise BadFile(
            f"names code to run while it is read ({shown}); nothing here reads such a file"
        )


def code_tags(path: Path) -> list[str]:
    """PyYAML's !!python/… and hyperpyyaml's !new:, !apply:, !name:, !include:. Raises BadFile."""
    import yaml

    try:
        root = yaml.compose(_text(path), Loader=yaml.SafeLoader)  # makes nodes, never objects
    except (yaml.YAMLError, RecursionError) as error:
        raise BadFile(f"is no YAML: {' '.join(str(error).split())}") from None
    plain = ("tag:yaml.org,2002:", "!ref", "!copy", "!tuple", "!PLACEHOLDER")
    return sorted(
        tag
        for tag in _tags(root)
        if not tag.startswith(plain) or tag.startswith("tag:yaml.org,2002:python/")
    )


def _tags(root: Any) -> set[str]:
    """Each node once: an alias may stand for millions."""
    found, seen, left = set(), set(), [root]
    while left:
        node = left.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, tuple):
            left += node
            continue
        found.add(node.tag)
        left += node.value if isinstance(node.value, list) else []
    return found


def _text(path: Path) -> str:
    if path.stat().st_size > MAX_TEXT:
        raise BadFile("is far too large for what it is")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadFile(f"is no text in UTF-8: {error}") from None
