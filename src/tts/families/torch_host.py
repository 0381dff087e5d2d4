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

from src.rpc.errors import CorruptModel, InvalidArgument

# What reading a file raises that was cut short or is something else (bytes changed at random).
_TORN = (
    OSError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError,
    AssertionError, struct.error,
)  # fmt: skip


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
    """
    import torch

    try:
        return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CorruptModel(
            f"{model_id}: {path.name} holds pickled objects, which may run any code, so it is not "
            f"read. If you trust its maker: uv run just voicepack-convert {path}"
        ) from error
    except _TORN as error:
        raise CorruptModel(f"{model_id}: {path.name} cannot be read: {error}") from error


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
    """Around a family's import and load: the root logger and the random generators are afterwards
    as they were, and nothing asks a hub for files."""
    import numpy as np
    import torch

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    drawn = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])
        torch.set_rng_state(drawn[2])


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
