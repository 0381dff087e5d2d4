"""What every family that runs on torch does alike: devices, weights, memory, manners of its import.

torch is imported inside the functions only.
"""

from __future__ import annotations

import gc
import logging
import os
import pickle
import random
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from src.rpc.errors import CorruptModel, DuplexError, Internal, InvalidArgument, Unavailable
from src.tts.pack_files import pickled_objects

# What reading a file raises that was cut short or is something else (bytes changed at random).
_TORN = (
    OSError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError,
    AssertionError, struct.error,
)  # fmt: skip
_SHORT = 600


def check_device(model_id: str, device: str) -> Any:
    """The `torch.device`. Raises InvalidArgument for one that this machine does not have."""
    import torch

    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise InvalidArgument(
            f"{model_id}: {device!r} names no device; try cpu or cuda:0"
        ) from None
    if wanted.type == "cuda":
        count = torch.cuda.device_count()
        if (wanted.index or 0) >= count:
            has = f"has {count} of them" if count else "has none, or its torch cannot use it"
            raise InvalidArgument(f"{model_id}: asked for {device}, and this machine {has}")
    return wanted


def load_plain(model_id: str, path: Path, device: Any = "cpu") -> Any:
    """A checkpoint that holds tensors, numbers and texts alone.

    Raises CorruptModel for one that cannot be read, and for one with pickled objects in it, which
    could run anything while they are read: with the command that turns it into a plain one.
    `loading` tells memory that is short.
    """
    import torch

    try:
        return torch.load(path, map_location=device, weights_only=True)
    except torch.cuda.OutOfMemoryError:
        raise  # a RuntimeError, and no fault of the file
    except pickle.UnpicklingError as error:
        raise pickled(model_id, path) from error
    except _TORN as error:
        raise CorruptModel(f"{model_id}: {path.name} cannot be read: {error}") from error


def pickled(model_id: str, path: Path) -> CorruptModel:
    """The refusal of a checkpoint that holds, or may hold, pickled objects."""
    return CorruptModel(f"{model_id}: {path.name} {pickled_objects(path)}")


@contextmanager
def loading(model_id: str, device: str, *, lower: str = "") -> Iterator[None]:
    """Around a package's own loader, which raises whatever it likes. `lower`: the settings that
    cost memory, by name.

    Raises Unavailable where memory is short, CorruptModel for all else that is wrong with the
    files; our own errors and a package that is not there pass.
    """
    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        help = f"; lower {lower} in the catalog" if lower else ""
        raise Unavailable(f"{model_id} does not fit into the memory of {device}{help}") from error
    except (DuplexError, ImportError):
        raise
    except Exception as error:
        raise CorruptModel(
            f"{model_id}: its files cannot be read or do not fit each other: {_short(error)}"
        ) from error


@contextmanager
def speaking(model_id: str) -> Iterator[None]:
    """Around what a package computes for a text. The text may be in its errors, so that only
    their kind is told.

    Raises Unavailable where memory is short, Internal for all else but our own errors.
    """
    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise Unavailable(
            f"{model_id}: its device ran out of memory while speaking; lower max_streams"
        ) from error
    except DuplexError:
        raise
    except Exception as error:
        raise Internal(f"{model_id} failed while speaking ({type(error).__name__})") from error


def _short(error: Exception) -> str:
    """Some packages put a whole model's keys into one message."""
    lines = [line.strip() for line in str(error).strip().splitlines()[:2]]
    return f"{type(error).__name__}: {' '.join(lines)}"[:_SHORT]


def own_generator(seed: int, device: Any = "cpu") -> Any:
    """A stream's own `torch.Generator`, by chance where the seed is 0: what is said does not depend
    on who else speaks, as it would with torch's one generator."""
    import torch

    generator = torch.Generator(device)
    if seed:
        generator.manual_seed(seed)
    else:
        generator.seed()
    return generator


def one_folder(model_id: str, what: str, folder: Path, files: Mapping[str, Path]) -> Path:
    """`folder`, in which all of these files lie by their names, as a family's own loader needs it.

    Raises CorruptModel for one that lies elsewhere; `what` is read: "a Parler model".
    """
    for name, path in files.items():
        if path != folder / name:
            raise CorruptModel(
                f"{model_id}: {name} is at {path}, not in {folder}; {what} is read from one folder"
            )
    return folder


def give_back_memory(device: str) -> None:
    """After the last reference to a model is gone. Not between utterances: it stalls the others."""
    gc.collect()
    if device.startswith("cuda") and (torch := sys.modules.get("torch")) is not None:
        torch.cuda.empty_cache()


@contextmanager
def well_behaved() -> Iterator[None]:
    """Around a family's import and load: nothing asks a hub for files, the root logger is as it
    was afterwards, and no generator of random numbers is where the family has seeded it.

    numpy's and Python's are put back. From torch's other sessions may draw meanwhile, and would
    draw the same numbers twice: where it was seeded, it is seeded anew, by chance.
    """
    import numpy as np
    import torch

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    drawn, seed = (random.getstate(), np.random.get_state()), torch.initial_seed()
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])
        if torch.initial_seed() != seed:
            torch.seed()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without its progress bars, and without a report in colours of what we say in an error."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
