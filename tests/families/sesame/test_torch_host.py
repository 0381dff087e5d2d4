"""What every family that runs on torch does alike, with torch. Needs no family's package."""

from __future__ import annotations

import logging
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from src.rpc.errors import (
    CorruptModel,
    DuplexError,
    Internal,
    InvalidArgument,
    Unavailable,
    UnknownName,
)
from src.tts.families.torch_host import (
    check_device,
    load_plain,
    loading,
    speaking,
    well_behaved,
)

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_the_processor_is_there() -> None:
    assert check_device("m", "cpu") == torch.device("cpu")


@pytest.mark.parametrize("device", ["tpu9", "", "cuda:x", "gpu"])
def test_what_names_no_device_is_refused(device: str) -> None:
    with pytest.raises(InvalidArgument, match="names no device; try cpu"):
        check_device("m", device)


@no_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(InvalidArgument, match=f"m: asked for {device}, and this machine has none"):
        check_device("m", device)


def test_gpus_are_counted_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check_device("m", "cuda") == torch.device("cuda")
    assert check_device("m", "cuda:1") == torch.device("cuda:1")
    with pytest.raises(InvalidArgument, match="asked for cuda:2, and this machine has 2 of them"):
        check_device("m", "cuda:2")


def saved(path: Path, what: object, **options: Any) -> Path:
    torch.save(what, path, **options)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_numbers_and_texts_are_read(tmp_path: Path, zipped: bool) -> None:
    what = {"model": {"a": torch.arange(3)}, "step": 7, "name": "x", "betas": (0.8, 0.9)}
    path = saved(tmp_path / "a.pth", what, _use_new_zipfile_serialization=zipped)
    read = load_plain("m", path)
    assert torch.equal(read["model"].pop("a"), torch.arange(3))
    assert read == {"model": {}, "step": 7, "name": "x", "betas": (0.8, 0.9)}


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_objects_are_refused_with_the_way_out_and_not_run(
    tmp_path: Path, zipped: bool
) -> None:
    what = {"a": torch.zeros(1), "b": Trap(tmp_path / "ran")}
    path = saved(tmp_path / "trap.pth", what, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CorruptModel, match=r"trap\.pth.*just voicepack-convert .*trap\.pth"):
        load_plain("m", path)
    assert not (tmp_path / "ran").exists()


def test_a_bare_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "bare.pth"
    path.write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    with pytest.raises(CorruptModel, match=r"bare\.pth"):
        load_plain("m", path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        b"\x80",
        b"\x80\x02M",
        b"<html>not found</html>",
        b"\0" * 64,
        b"\x80\x02]R.",
    ],
)
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "junk.pth"
    path.write_bytes(content)
    with pytest.raises(CorruptModel, match=r"m: junk\.pth"):
        load_plain("m", path)


@pytest.mark.parametrize("left", [10, 500, 900])
def test_a_checkpoint_cut_short_is_refused(tmp_path: Path, left: int) -> None:
    path = saved(tmp_path / "cut.pth", {"a": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(CorruptModel, match=r"cut\.pth"):
        load_plain("m", path)


@pytest.mark.parametrize("zipped", [True, False])
def test_whatever_bytes_are_wrong_the_error_is_ours(tmp_path: Path, zipped: bool) -> None:
    what = {"model": {"a": torch.zeros(20)}, "step": 3, "name": "x"}
    path = saved(tmp_path / "a.pth", what, _use_new_zipfile_serialization=zipped)
    whole, chance = path.read_bytes(), random.Random(1)
    refused = 0
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            content[chance.randrange(min(600, len(whole)))] = chance.randrange(256)
        path.write_bytes(content[: chance.choice([len(content), chance.randrange(len(content))])])
        try:
            load_plain("m", path)
        except CorruptModel:
            refused += 1
    assert refused > 150


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorruptModel, match=r"none\.pth cannot be read"):
        load_plain("m", tmp_path / "none.pth")


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(1))


def test_a_family_that_seeds_leaves_nobody_where_it_seeded_them() -> None:
    states = random.getstate(), np.random.get_state()
    expected = drawn()[:2]
    random.setstate(states[0])
    np.random.set_state(states[1])
    with well_behaved():
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        after_its_seed = torch.rand(4)
        torch.manual_seed(1)
    assert drawn()[:2] == expected
    assert torch.initial_seed() != 1
    assert not torch.equal(torch.rand(4), after_its_seed)


def test_what_another_session_draws_meanwhile_is_not_drawn_again() -> None:
    torch.manual_seed(3)
    with well_behaved():
        meanwhile = torch.rand(4)
    assert torch.initial_seed() == 3
    assert not torch.equal(torch.rand(4), meanwhile)


def test_the_root_logger_is_as_before_also_after_an_error() -> None:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)

    def misbehave() -> None:
        root.setLevel(logging.DEBUG + 3)
        root.addHandler(logging.NullHandler())
        torch.manual_seed(7)
        raise ValueError("planned")

    with pytest.raises(ValueError, match="planned"), well_behaved():
        misbehave()
    assert (root.level, root.handlers) == (level, handlers)
    assert torch.initial_seed() != 7


def test_handlers_that_were_taken_away_come_back() -> None:
    root, own = logging.getLogger(), logging.NullHandler()
    root.addHandler(own)
    try:
        with well_behaved():
            logging.basicConfig(force=True)
        assert own in root.handlers
    finally:
        root.removeHandler(own)


def test_no_hub_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with well_behaved():
        assert os.environ["HF_HUB_OFFLINE"] == os.environ["TRANSFORMERS_OFFLINE"] == "1"


# Its name on every torch: from 2.5 on it is torch.OutOfMemoryError, too.
NO_MEMORY = torch.cuda.OutOfMemoryError("CUDA out of memory: 2.00 GiB")


@pytest.mark.parametrize(
    ("raised", "becomes", "says"),
    [
        (NO_MEMORY, Unavailable, "m does not fit into the memory of cuda:1"),
        (KeyError("a.weight"), CorruptModel, "m: its files cannot be read .*KeyError: 'a.weight'"),
        (RuntimeError("first\nsecond\nthird"), CorruptModel, "RuntimeError: first second$"),
        (RuntimeError("x" * 5000), CorruptModel, "x{500,600}$"),
        (UnknownName("no such voice"), UnknownName, "no such voice"),
        (ModuleNotFoundError("flash_attn"), ModuleNotFoundError, "flash_attn"),
    ],
)
def test_what_a_loader_raises_is_told_in_words(
    raised: Exception, becomes: type[Exception], says: str
) -> None:
    with pytest.raises(becomes, match=says) as told, loading("m", "cuda:1"):
        raise raised
    assert told.type is becomes


@pytest.mark.parametrize(
    ("raised", "becomes", "says"),
    [
        (NO_MEMORY, Unavailable, "m: its device ran out of memory .* lower max_streams"),
        (ValueError("what the user said"), Internal, r"m failed while speaking \(ValueError\)$"),
        (InvalidArgument("too long"), InvalidArgument, "too long"),
    ],
)
def test_what_goes_wrong_while_speaking_is_told_without_the_text(
    raised: Exception, becomes: type[DuplexError], says: str
) -> None:
    with pytest.raises(becomes, match=says) as told, speaking("m"):
        raise raised
    assert told.type is becomes


def test_memory_that_is_short_is_no_fault_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise NO_MEMORY

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(Unavailable, match="does not fit"), loading("m", "cuda:0"):
        load_plain("m", tmp_path / "a.pth", "cuda:0")
