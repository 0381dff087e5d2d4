"""Pickled checkpoints made plain with torch, and our verdict beside torch's own."""

from __future__ import annotations

import collections
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("TTS")

import torch

from scripts import voicepack_convert
from scripts.voicepack_convert import CannotConvert, convert
from src.tts.checkpoints import PLAIN_GLOBALS, foreign_to_plain
from src.tts.pack_files import check_file


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("echo run",)


class Config:
    def __init__(self) -> None:
        self.rate = 24_000


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 4, generator=generator),
        "a.half": torch.randn(5, generator=generator).to(torch.bfloat16),
        "a.count": torch.tensor(7),
    }


def saved(path: Path, value: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path, **options)
    return path


def equal(found: Any, wanted: dict[str, torch.Tensor]) -> bool:
    return list(found) == list(wanted) and all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
        for name, tensor in wanted.items()
    )


# --- the verdict ---

VALUES: dict[str, Any] = {
    "state dict": collections.OrderedDict(weights()),
    "module's": torch.nn.LSTM(2, 3).state_dict(),
    "parameter": torch.nn.Parameter(torch.zeros(2)),
    "optimizer": torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))]).state_dict(),
    "sparse": torch.eye(2).to_sparse(),
    "complex": torch.zeros(2, dtype=torch.complex64),
    "bool": torch.ones(2, dtype=torch.bool),
    "double": torch.ones(2, dtype=torch.float64),
    "size": torch.Size([1, 2]),
    "dtype": [torch.float16, torch.int64],
    "device": torch.device("cpu"),
    "numbers": {"step": 1, "big": 1 << 80, "rate": 0.1, "set": {1, 2}, "z": 1j, "b": b"bytes"},
    "numpy": np.zeros(3),
    "numpy's number": np.float64(1.0),
    "module": torch.nn.Linear(1, 1),
    "class": Config(),
    "path": Path("x"),
    "call": [Evil()],
    "function": torch.load,
}


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("name", VALUES)
def test_the_verdict_is_torch_s_own(tmp_path: Path, name: str, new: bool) -> None:
    path = saved(tmp_path / "m.pth", VALUES[name], _use_new_zipfile_serialization=new)
    try:
        torch.load(path, weights_only=True)
        plain = True
    except Exception:
        plain = False
    assert (foreign_to_plain(path) == []) is plain


def test_every_name_that_counts_as_plain_is_one_of_torch_s() -> None:
    from torch._weights_only_unpickler import _get_allowed_globals

    python_2 = {name for name in PLAIN_GLOBALS if name.startswith("__builtin__.")}
    assert PLAIN_GLOBALS - python_2 <= set(_get_allowed_globals())


# --- converting ---


def test_a_pickled_checkpoint_becomes_plain_where_it_lies_and_runs_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    extra = {"config": Config(), "trap": Evil(), "step": 5, "names": ["x", Path("y")]}
    path = saved(tmp_path / "model.pth", {"net": weights(), **extra})
    original = path.read_bytes()
    told = convert(path, None, trusted=True)
    assert capfd.readouterr().out == ""
    check_file(path)
    found = torch.load(path, weights_only=True)
    assert equal(found.pop("net"), weights())
    assert found == {"step": 5, "names": ["x"]}
    assert (tmp_path / ".model.pth.original").read_bytes() == original
    assert sorted(p.name for p in tmp_path.iterdir()) == [".model.pth.original", "model.pth"]
    left_out = [line for line in told if line.startswith("left out")]
    names = {line.partition(" (")[0].rpartition(".")[2] for line in left_out}
    assert names == {"Config", "PosixPath", "system"}


def test_without_trust_nothing_is_touched_and_what_it_names_is_said(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.pth", {"net": weights(), "trap": Evil()})
    before = path.read_bytes()
    with pytest.raises(CannotConvert, match=r"names posix\.system\..*--i-trust-it"):
        convert(path, None, trusted=False)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]
    assert path.read_bytes() == before


def test_what_is_plain_already_stays(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.pth", weights())
    before = path.read_bytes()
    assert convert(path, None, trusted=False) == [f"{path} is plain already: nothing to do"]
    assert path.read_bytes() == before


def test_a_checkpoint_from_before_1_6_is_converted_too(tmp_path: Path) -> None:
    value = {"net": weights(), "config": Config()}
    path = saved(tmp_path / "model.pth", value, _use_new_zipfile_serialization=False)
    convert(path, None, trusted=True)
    assert equal(torch.load(path, weights_only=True)["net"], weights())


@pytest.mark.parametrize("wrapped", [False, True])
def test_pytorch_model_bin_becomes_model_safetensors(tmp_path: Path, wrapped: bool) -> None:
    from safetensors.torch import load_file

    value = {"state_dict": weights(), "args": Config()} if wrapped else weights()
    path = saved(tmp_path / "pytorch_model.bin", value)
    convert(path, None, trusted=wrapped)
    made = tmp_path / "model.safetensors"
    check_file(made)
    found = load_file(made)
    assert equal({name: found[name] for name in weights()}, weights())
    assert path.exists()


def test_what_safetensors_cannot_hold_wants_another_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "pytorch_model.bin", {"net": weights(), "step": 5})
    with pytest.raises(CannotConvert, match=r"--out a name that ends in \.pth"):
        convert(path, None, trusted=True)
    assert [p.name for p in tmp_path.iterdir()] == ["pytorch_model.bin"]
    convert(path, tmp_path / "model.pth", trusted=True)
    assert torch.load(tmp_path / "model.pth", weights_only=True)["step"] == 5


def test_a_module_pickled_whole_is_refused_in_words(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.pth", torch.nn.Linear(2, 2))
    with pytest.raises(CannotConvert, match=r"no tensors of its own but objects of .*Linear"):
        convert(path, None, trusted=True)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]


def test_shared_tensors_do_not_bring_what_they_are_a_part_of(tmp_path: Path) -> None:
    large = torch.zeros(1 << 20)
    path = saved(tmp_path / "model.pth", {"part": large[:4], "config": Config()})
    assert path.stat().st_size > 1 << 22
    convert(path, None, trusted=True)
    assert path.stat().st_size < 1 << 16


def test_a_release_of_xtts_is_converted_as_its_family_says(tmp_path: Path) -> None:
    """Of a checkpoint of its trainer the weights are kept, in the form that the adapter reads."""
    from TTS.tts.configs.xtts_config import XttsConfig

    value = {"config": XttsConfig(), "model": weights(), "step": 5, "optimizer": {"lr": 0.1}}
    path = saved(tmp_path / "xtts" / "mine" / "model.pth", value)
    assert any("xtts_config" in name for name in foreign_to_plain(path))
    convert(path, None, trusted=True)
    found = torch.load(path, weights_only=True)
    assert list(found) == ["model"]
    assert equal(found["model"], weights())


@pytest.mark.parametrize("arguments", [["--i-trust-it"], []])
def test_the_command_ends_with_a_status_and_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    path = saved(tmp_path / "model.pth", {"net": weights(), "config": Config()})
    status = voicepack_convert.main([str(path), *arguments])
    said = capsys.readouterr()
    assert status == (0 if arguments else 1)
    assert "is plain" in said.out if arguments else "voicepack-convert: " in said.err


@pytest.mark.parametrize("content", [b"", b"weights", b"PK\x03\x04weights"])
def test_what_is_no_checkpoint_is_said_so(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(CannotConvert, match="checkpoint"):
        convert(path, None, trusted=True)
    with pytest.raises(CannotConvert, match="No such file"):
        convert(tmp_path / "absent.pth", None, trusted=True)


def test_a_pickle_that_calls_while_it_is_read_calls_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Protocol 0 and an INST of os.system: the opcodes that no writer of torch's makes."""
    pickled = b"(dS'net'\n(lsS'trap'\n(S'echo run'\nios\nsystem\ns."
    path = tmp_path / "model.pth"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("m/data.pkl", pickled)
        made.writestr("m/version", b"3")
    with pytest.raises(CannotConvert):
        convert(path, None, trusted=True)
    assert capfd.readouterr().out == ""
