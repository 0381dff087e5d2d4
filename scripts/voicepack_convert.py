"""Turns a pickled checkpoint into a plain one: tensors, numbers, texts, lists and dicts of them.

`just voicepack-convert FILE --i-trust-it`. What else the file names is not imported and not called:
an empty thing stands in its place while the file is read, and is left out afterwards, by name. A
checkpoint is replaced where it lies, the original stays beside it, hidden; pytorch_model.bin
becomes model.safetensors. Needs torch.
"""

from __future__ import annotations

import argparse
import os
import pickle
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from src.rpc.errors import CorruptModel
from src.tts.checkpoints import PLAIN_GLOBALS, BadCheckpoint, foreign_to_plain
from src.tts.pack_files import BadFile, check_file

_SHOWN = 8


class CannotConvert(RuntimeError):
    """The message says why, and what to do about it."""


class Dropped:
    """Stands for an object of a class that is not ours to import; takes anything, does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    def extend(self, _: Iterable[Any]) -> None:
        pass

    def add(self, _: Any) -> None:
        pass


class InertUnpickler(pickle.Unpickler):
    """Imports what a plain checkpoint may name, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in PLAIN_GLOBALS:
            return super().find_class(module, name)
        return type(name, (Dropped,), {"__module__": module})


def _inert_load(stream: IO[bytes], **options: Any) -> Any:
    return InertUnpickler(stream, **options).load()


def read_inert(path: Path) -> Any:
    """What is in a checkpoint, with `Dropped` where something foreign was. Raises CannotConvert."""
    import torch

    inert = SimpleNamespace(Unpickler=InertUnpickler, load=_inert_load, __name__="inert")
    try:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=inert)
    except Exception as error:  # a pickle can fail in any way, and this is somebody else's
        raise CannotConvert(
            f"{path} cannot be read without what it names ({type(error).__name__}: {error}); "
            "ask its maker for a state dict, saved alone"
        ) from error


def keep_plain(value: Any, left_out: Counter[str], depth: int = 0) -> Any:
    """A copy without what is not plain, which is counted by its class."""
    import torch

    if depth > 32:
        raise CannotConvert("it is nested deeper than a checkpoint is, or holds itself")
    if isinstance(value, torch.Tensor):
        # A parameter is pickled as an object of its class, and a view with all it is a part of.
        return value.detach().clone()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {
            key: kept
            for key, each in value.items()
            if isinstance(key, (str, int))
            and (kept := keep_plain(each, left_out, depth + 1)) is not _NOTHING
        }
    if isinstance(value, (list, tuple)):
        kept = [keep_plain(each, left_out, depth + 1) for each in value]
        plain = [each for each in kept if each is not _NOTHING]
        return tuple(plain) if isinstance(value, tuple) else plain
    left_out[f"{type(value).__module__}.{type(value).__name__}"] += 1
    return _NOTHING


_NOTHING = object()


def plain_content(path: Path, left_out: Counter[str]) -> Any:
    """Raises CannotConvert where no tensor is left."""
    content = read_inert(path)
    if path.resolve().parent.parent.name == "xtts":
        from src.tts.families.xtts.pack import plain_checkpoint

        if isinstance(content, Mapping) and "model" in content:
            return plain_checkpoint(content)
    plain = keep_plain(content, left_out)
    if not any(_tensors(plain)):
        raise CannotConvert(
            f"{path} holds no tensors of its own but objects of {_list(left_out)}; ask its maker "
            "for a state dict"
        )
    return plain


def _tensors(value: Any) -> Iterable[bool]:
    import torch

    if isinstance(value, torch.Tensor):
        yield True
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def write(content: Any, out: Path, original: Path) -> None:
    """Only what passes as a voice pack's file; what is at `out` moves to `original`.

    Raises CannotConvert, and then changes nothing.
    """
    new = out.with_name(f".{out.name}.{os.getpid()}{out.suffix}")
    try:
        if out.suffix == ".safetensors":
            _save_safetensors(content, new)
        else:
            import torch

            torch.save(content, new)
        check_file(new)
        if out.exists():
            out.replace(original)
        new.replace(out)
    except BadFile as bad:
        raise CannotConvert(f"what was written {bad}") from None
    finally:
        new.unlink(missing_ok=True)


def _save_safetensors(content: Any, path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    for name in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    flat = isinstance(content, Mapping) and all(
        isinstance(value, torch.Tensor) for value in content.values()
    )
    if not flat:
        raise CannotConvert(
            "safetensors holds tensors by name and nothing else, and there is more in this file; "
            "give --out a name that ends in .pth"
        )
    tensors = {str(name): tensor.contiguous() for name, tensor in content.items()}
    save_file(tensors, str(path), metadata={"format": "pt"})


def default_out(path: Path) -> Path:
    """Where a family looks for it: `from_pretrained` prefers safetensors, the others the name."""
    if path.suffix == ".bin":
        stem = path.stem.removeprefix("pytorch_")
        return path.with_name(f"{stem}.safetensors")
    return path


def convert(path: Path, out: Path | None, trusted: bool) -> list[str]:
    """Lines about what was done. Raises CannotConvert."""
    try:
        foreign = foreign_to_plain(path)
    except (BadCheckpoint, OSError) as error:
        raise CannotConvert(f"{path}: {error}") from None
    target = out or default_out(path)
    if not foreign and target.suffix == path.suffix:
        return [f"{path} is plain already: nothing to do"]
    if foreign and not trusted:
        raise CannotConvert(
            f"{path} names {_list(foreign)}. Nothing of that is imported or run here, but whoever "
            "made the file chose the weights too. If you trust its maker: --i-trust-it"
        )
    left_out: Counter[str] = Counter()
    content = plain_content(path, left_out)
    lines = [f"left out: {name} ({count})" for name, count in sorted(left_out.items())]
    original = target.with_name(f".{target.name}.original")
    if target.exists():
        lines.append(f"what was there is {original} now; delete it when the model speaks")
    write(content, target, original)
    return [*lines, f"{target} is plain: {target.stat().st_size} bytes"]


def _list(names: Iterable[str]) -> str:
    names = sorted(set(names))
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="voicepack-convert", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, help="another place; .safetensors for that format")
    parser.add_argument("--i-trust-it", action="store_true", help="you know who made the file")
    args = parser.parse_args(argv)
    try:
        for line in convert(args.file, args.out, args.i_trust_it):
            print(line)
    except (CannotConvert, CorruptModel, OSError, ImportError) as error:
        print(f"voicepack-convert: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
