"""Piper's phoneme durations, read from voices that were exported without them.

Every Piper voice computes how many frames each phoneme lasts (a `Ceil` node), but most do not name
it as an output. An ONNX file is a protobuf message, and of two messages laid end to end the
repeated fields add up: so a few bytes after the file are enough to name one more output. The file
on disk, whose hash is pinned, stays as it is. `piper.patch_voice_with_alignment` does the same
with the `onnx` package, which is not needed here.
"""

from __future__ import annotations

from collections.abc import Iterator

# Field numbers of onnx.proto.
_MODEL_GRAPH = 7
_GRAPH_NODE = 1
_GRAPH_OUTPUT = 12
_NODE_OUTPUT = 2
_NODE_OP_TYPE = 4
_VALUE_NAME = 1

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class NotProtobuf(ValueError):
    """The bytes are not a protobuf message."""


def with_durations(model: bytes) -> bytes:
    """The same voice with the frames per phoneme as its last output.

    Unchanged if it has that output already, or if it is not clear which tensor it is. Raises
    NotProtobuf.
    """
    graph = _last(model, _MODEL_GRAPH)
    ceils = [
        bytes(_last(node, _NODE_OUTPUT))
        for node in _all(graph, _GRAPH_NODE)
        if bytes(_last(node, _NODE_OP_TYPE)) == b"Ceil"
    ]
    outputs = [bytes(_last(output, _VALUE_NAME)) for output in _all(graph, _GRAPH_OUTPUT)]
    if len(ceils) != 1 or ceils[0] in outputs:
        return model
    value = _field(_VALUE_NAME, ceils[0])
    return model + _field(_MODEL_GRAPH, _field(_GRAPH_OUTPUT, value))


def _all(message: memoryview, number: int) -> Iterator[memoryview]:
    return (value for field, value in _fields(message) if field == number)


def _last(message: bytes | memoryview, number: int) -> memoryview:
    found = memoryview(b"")
    for value in _all(memoryview(message), number):
        found = value
    return found


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(field number, content) of the length-delimited fields; the others are stepped over."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        kind = key & 7
        if kind == _BYTES:
            length, place = _varint(message, place)
            if place + length > len(message):
                raise NotProtobuf("a field reaches past the end")
            yield key >> 3, message[place : place + length]
            place += length
        elif kind == _VARINT:
            _, place = _varint(message, place)
        elif kind in (_FIXED32, _FIXED64):
            place += 4 if kind == _FIXED32 else 8
        else:
            raise NotProtobuf(f"no such wire type: {kind}")


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(message) and shift < 64:
        byte = message[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
    raise NotProtobuf("a number does not end")


def _field(number: int, content: bytes) -> bytes:
    return _encoded(number << 3 | _BYTES) + _encoded(len(content)) + content


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
