"""Is a torch checkpoint plain? Told from its opcodes, without torch and without unpickling it.

A plain one holds tensors, numbers, texts and containers of them: `torch.load(weights_only=True)`
reads it. Whatever else a pickle names is code that would run while it is read. The rules are those
of torch/_weights_only_unpickler.py (2.11); what they allow is written here by name, since asking
torch would take importing it.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import IO, cast

MAX_PICKLE = 64 << 20
"""Bytes. The pickle of a billion parameters takes some hundred kilobytes; the rest is data."""

_ZIP = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PICKLES = 5
"""Before torch 1.6: magic number, version, sizes of types, the object, the keys of its storages."""

_OPCODES = frozenset(
    """GLOBAL NEWOBJ REDUCE BUILD APPEND APPENDS SETITEM SETITEMS MARK TUPLE TUPLE1 TUPLE2 TUPLE3
    NONE NEWFALSE NEWTRUE EMPTY_TUPLE EMPTY_LIST EMPTY_DICT EMPTY_SET BININT BININT1 BININT2
    BINFLOAT BINUNICODE SHORT_BINSTRING BINPERSID BINGET LONG_BINGET BINPUT LONG_BINPUT LONG1
    PROTO STOP""".split()
)
_BUILTINS = ("bytearray", "set", "complex")
PLAIN_GLOBALS = frozenset(
    """collections.OrderedDict collections.Counter _codecs.encode torch.nn.parameter.Parameter
    torch.Size torch.Tensor torch.device torch.serialization._get_layout
    torch._tensor._rebuild_from_type_v2 torch._utils._rebuild_parameter
    torch._utils._rebuild_parameter_with_state torch._utils._rebuild_qtensor
    torch._utils._rebuild_tensor torch._utils._rebuild_tensor_v2 torch._utils._rebuild_tensor_v3
    torch._utils._rebuild_sparse_tensor torch._utils._rebuild_meta_tensor_no_storage
    torch.float64 torch.float32 torch.float16 torch.bfloat16 torch.complex64 torch.complex128
    torch.int64 torch.int32 torch.int16 torch.int8 torch.uint8 torch.bool
    torch.DoubleStorage torch.FloatStorage torch.HalfStorage torch.BFloat16Storage
    torch.LongStorage torch.IntStorage torch.ShortStorage torch.CharStorage torch.ByteStorage
    torch.BoolStorage torch.ComplexFloatStorage torch.ComplexDoubleStorage
    torch.storage.UntypedStorage""".split()
) | {f"{module}.{name}" for module in ("builtins", "__builtin__") for name in _BUILTINS}


class BadCheckpoint(Exception):
    """Cannot be read as a checkpoint at all; the message says what it is instead."""


def foreign_to_plain(path: Path) -> list[str]:
    """What the checkpoint names that a plain one does not: classes, functions, opcodes.

    Empty: it is plain. Raises BadCheckpoint.
    """
    with path.open("rb") as stream:
        if stream.read(len(_ZIP)) == _ZIP:
            return _in_zip(path)
        stream.seek(0)
        return _in_legacy(stream)


def _in_zip(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            pickles = [name for name in names if name.endswith(".pkl")]
            _check_members(names, pickles)
            found: list[str] = []
            for name in pickles:
                if archive.getinfo(name).file_size > MAX_PICKLE:
                    raise BadCheckpoint(f"{name} in it is too large to be looked through")
                with archive.open(name) as stream:
                    found += _foreign(_bounded(stream))
            return sorted(set(found))
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError) as error:
        raise BadCheckpoint(f"it is cut off, or no checkpoint: {error}") from None


def _check_members(names: list[str], pickles: list[str]) -> None:
    if len(set(names)) != len(names):
        # What is looked through here could be another than what torch reads.
        raise BadCheckpoint("it holds two members of one name")
    if any(name.endswith("/constants.pkl") for name in names):
        raise BadCheckpoint("it is a TorchScript archive, which holds a program")
    if not any(name.endswith("/data.pkl") for name in pickles):
        raise BadCheckpoint("it is an archive, but not a checkpoint: there is no data.pkl in it")


def _in_legacy(stream: IO[bytes]) -> list[str]:
    bounded = _bounded(stream)
    try:
        magic = [argument for _, argument, _ in pickletools.genops(bounded)]
    except ValueError:
        magic = []
    if _LEGACY_MAGIC not in magic:
        raise BadCheckpoint("it is no checkpoint of torch's")
    found: list[str] = []
    for _ in range(_LEGACY_PICKLES - 1):
        found += _foreign(bounded)
    return sorted(set(found))


def _foreign(stream: IO[bytes]) -> list[str]:
    """Of one pickle. A name is only taken from GLOBAL, where it is written out: the opcodes that
    take theirs from the stack are foreign themselves.
    """
    found: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "GLOBAL":
                name = ".".join(str(argument).split(" ", 1))
                if name not in PLAIN_GLOBALS:
                    found.append(name)
            elif opcode.name not in _OPCODES:
                found.append(f"opcode {opcode.name}")
    except ValueError as error:
        raise BadCheckpoint(f"its pickle cannot be read: {error}") from None
    return found


def _bounded(stream: IO[bytes]) -> IO[bytes]:
    return cast("IO[bytes]", _Bounded(stream))


class _Bounded:
    """A stream that ends before it fills the memory."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._left = MAX_PICKLE

    def read(self, count: int) -> bytes:
        return self._taken(self._stream.read(min(count, self._left)))

    def readline(self) -> bytes:
        return self._taken(self._stream.readline(self._left))

    def _taken(self, data: bytes) -> bytes:
        self._left -= len(data)
        return data
