"""The few ONNX messages that two tiny networks need, without the `onnx` package.

Field numbers are those of onnx.proto (IR version 8).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TYPES = {"float32": 1, "int32": 6}


def model(graph: bytes) -> bytes:
    """Of opset 13."""
    opset = _field(1, b"") + _number(2, 13)
    return _number(1, 8) + _field(7, graph) + _field(8, opset)


def graph(
    nodes: Sequence[bytes],
    inputs: Sequence[bytes],
    outputs: Sequence[bytes],
    constants: Sequence[bytes],
) -> bytes:
    parts = ((1, nodes), (5, constants), (11, inputs), (12, outputs))
    return _field(2, b"tiny") + b"".join(_field(n, part) for n, all_ in parts for part in all_)


def node(kind: str, inputs: str, outputs: str, **ints: int | list[int]) -> bytes:
    """`ints`: attributes, which are whole numbers or lists of them."""
    names = b"".join(_field(1, name.encode()) for name in inputs.split())
    names += b"".join(_field(2, name.encode()) for name in outputs.split())
    return (
        names + _field(4, kind.encode()) + b"".join(_field(5, _attribute(*i)) for i in ints.items())
    )


def value(name: str, kind: type[np.generic], shape: Sequence[int | str]) -> bytes:
    dims = b"".join(
        _field(1, _number(1, d) if isinstance(d, int) else _field(2, d.encode())) for d in shape
    )
    tensor = _number(1, _TYPES[np.dtype(kind).name]) + _field(2, dims)
    return _field(1, name.encode()) + _field(2, _field(1, tensor))


def constant(name: str, array: NDArray[Any]) -> bytes:
    dims = b"".join(_number(1, d) for d in array.shape)
    kind = _number(2, _TYPES[array.dtype.name])
    return dims + kind + _field(8, name.encode()) + _field(9, array.tobytes())


def _attribute(name: str, value: int | list[int]) -> bytes:
    if isinstance(value, int):
        return _field(1, name.encode()) + _number(3, value) + _number(20, 2)
    return _field(1, name.encode()) + b"".join(_number(8, v) for v in value) + _number(20, 7)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
