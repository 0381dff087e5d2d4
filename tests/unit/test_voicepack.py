"""`just voicepack`, `voicepack-check` and the document's setup script, against a hub of our own."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from scripts import voicepack
from src.tts.catalog import ROOT, load_catalog
from src.tts.download import Fetched, Hub, HubFile, download
from src.tts.packs import find_packs
from tests.fake_hub import COMMIT, FakeHub, running

HEADER = json.dumps({"w": {"dtype": "U8", "shape": [4096], "data_offsets": [0, 4096]}}).encode()
WEIGHTS = struct.pack("<Q", len(HEADER)) + HEADER + bytes(4096)
SHA = hashlib.sha256(WEIGHTS).hexdigest()
CATALOG = """
models:
  - model_id: tone-one
    family: tone
    files:
      config.json:
        sources:
          - path:voicepacks/tone/one/config.json
          - hub:owner/tone@main/config.json
      weights/model.safetensors:
        sha256: "%s"
        sources:
          - path:voicepacks/tone/one/weights/model.safetensors
          - hub:owner/other@v1/model.safetensors
      presets.pt:
        optional: true
        sources:
          - path:voicepacks/tone/one/presets.pt
          - hub:owner/tone@main/presets.pt
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    files = {"owner/tone/config.json": b"{}", "owner/other/model.safetensors": WEIGHTS}
    with running(FakeHub(files)) as fake:
        for name in ("HF_TOKEN", "HF_TOKEN_PATH", "https_proxy", "http_proxy", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        for name, value in fake.env().items():
            monkeypatch.setenv(name, value)
        yield fake


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return catalog(tmp_path, SHA)


def catalog(root: Path, sha256: str) -> Path:
    (root / "configs").mkdir(exist_ok=True)
    (root / "voicepacks").mkdir(exist_ok=True)
    (root / "configs" / "model_catalog.yaml").write_text(CATALOG % sha256)
    return root


def fetch(root: Path, *arguments: str) -> int:
    return voicepack.main(["fetch", *(arguments or ("tone", "one")), "--root", str(root)])


def check(root: Path, *arguments: str) -> int:
    return voicepack.main(["check", *arguments, "--root", str(root)])


Said = pytest.CaptureFixture[str]


# --- fetch ---


def test_what_is_missing_is_fetched_and_its_hash_is_told(
    hub: FakeHub, root: Path, capsys: Said
) -> None:
    assert fetch(root) == 0
    folder = root / "voicepacks" / "tone" / "one"
    assert (folder / "weights" / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.asked_for == [
        "/owner/tone/resolve/main/config.json",
        "/owner/other/resolve/v1/model.safetensors",
        "/owner/tone/resolve/main/presets.pt",
    ]
    said = capsys.readouterr().err
    assert f"weights/model.safetensors: {len(WEIGHTS)} bytes, sha256 {SHA} (as pinned)" in said
    config = hashlib.sha256(b"{}").hexdigest()
    assert f"config.json: 2 bytes, sha256 {config} (not pinned)" in said
    assert "presets.pt: the hub does not have it, and a load does without" in said


def test_the_worker_then_finds_the_pack(hub: FakeHub, root: Path) -> None:
    fetch(root)
    found = load_catalog(root / "configs" / "model_catalog.yaml", root / "voicepacks", root)
    assert found.problems == ()
    assert found.get("tone-one").family == "tone"


def test_what_is_there_is_not_fetched_again(hub: FakeHub, root: Path) -> None:
    fetch(root)
    hub.asked.clear()
    assert fetch(root) == 0
    assert hub.asked_for == ["/owner/tone/resolve/main/presets.pt"]


def test_a_file_of_one_s_own_is_never_replaced(hub: FakeHub, root: Path, capsys: Said) -> None:
    mine = root / "voicepacks" / "tone" / "one" / "weights" / "model.safetensors"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    assert fetch(root) == 1
    assert mine.read_bytes() == b"mine"
    assert "is not the file that is pinned" in capsys.readouterr().err


def test_a_model_id_alone_names_the_pack(hub: FakeHub, root: Path) -> None:
    assert fetch(root, "tone-one") == 0


def test_progress_shows_bytes_and_speed(hub: FakeHub, root: Path) -> None:
    hub.files["owner/tone/config.json"] = b'"%s"' % (b"x" * 4_000_000)
    found = load_catalog(root / "configs" / "model_catalog.yaml", root / "voicepacks", root)
    (pack,) = find_packs(found, root / "voicepacks").values()
    shown = io.StringIO()
    console = Console(file=shown, width=120, force_terminal=True)
    with voicepack._progress(console) as progress:
        voicepack.fetch(pack, Hub(hub.base), progress)
    done = {task.description: (task.completed, task.total) for task in progress.tasks}
    sizes = {"config.json": 4_000_002, "weights/model.safetensors": len(WEIGHTS)}
    assert done == {name: (size, size) for name, size in sizes.items()}, "what came, and that alone"
    assert "4.0/4.0 MB" in shown.getvalue()
    assert "/s" in shown.getvalue()


def test_another_content_than_the_pinned_one_is_refused(
    hub: FakeHub, tmp_path: Path, capsys: Said
) -> None:
    root = catalog(tmp_path, "0" * 64)
    assert fetch(root) == 1
    assert not (root / "voicepacks/tone/one/weights/model.safetensors").exists()
    assert f"the catalog pins {'0' * 64}" in capsys.readouterr().err


@pytest.mark.parametrize("status", [401, 403])
def test_a_page_with_terms_says_where_to_accept_them_and_which_file_goes_where(
    hub: FakeHub, root: Path, capsys: Said, status: int
) -> None:
    hub.refuse["owner/other"] = status
    assert fetch(root) == 1
    said = capsys.readouterr().err
    assert "tone one: 1 of 3 files did not come" in said
    assert f"from {hub.base}/owner/other/resolve/v1/model.safetensors\n" in said
    assert f"to   {root}/voicepacks/tone/one/weights/model.safetensors\n" in said
    assert f"Accept the terms on {hub.base}/owner/other" in said
    assert "HF_TOKEN" in said
    assert (root / "voicepacks/tone/one/config.json").exists(), "the others come all the same"


def test_the_token_opens_it(hub: FakeHub, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.refuse["owner/other"] = 401
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert fetch(root) == 0


def test_a_file_that_the_hub_has_no_more_is_said_by_its_address(
    hub: FakeHub, root: Path, capsys: Said
) -> None:
    del hub.files["owner/tone/config.json"]
    assert fetch(root) == 1
    said = capsys.readouterr().err
    assert "config.json: the hub answers 404 EntryNotFound" in said
    assert f"from {hub.base}/owner/tone/resolve/main/config.json\n" in said


def test_without_a_network_it_says_once_for_all_what_goes_where(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        base = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", base)
        monkeypatch.setenv("HF_HUB_OFFLINE", "")
        tried: list[Path] = []

        def counted(place: HubFile, target: Path, hub: Hub, **options: Any) -> Fetched:
            tried.append(target)
            return download(place, target, hub, **options)

        monkeypatch.setattr(voicepack, "download", counted)
        assert fetch(root) == 1
    assert len(tried) == 1, "who waited for one file need not wait for the others"
    said = capsys.readouterr().err
    for name, address in {
        "config.json": "owner/tone/resolve/main/config.json",
        "weights/model.safetensors": "owner/other/resolve/v1/model.safetensors",
    }.items():
        assert f"from {base}/{address}\n    to   {root}/voicepacks/tone/one/{name}\n" in said
    assert "presets.pt (optional):" in said
    assert "https_proxy" in said


def test_without_a_network_a_pack_that_has_what_it_needs_is_good(
    hub: FakeHub, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    fetch(root)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    capsys.readouterr()
    assert fetch(root) == 0
    assert "presets.pt (optional): HF_HUB_OFFLINE is set" in capsys.readouterr().err


def test_without_a_network_a_pack_of_optional_files_alone_is_not_called_good(
    hub: FakeHub, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    """As Sesame's is, which may have been saved under other names."""
    path = root / "configs" / "model_catalog.yaml"
    entries = yaml.safe_load(path.read_text())
    for file in entries["models"][0]["files"].values():
        file["optional"] = True
    path.write_text(yaml.safe_dump(entries))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch(root) == 1
    assert "fetch it: uv run just voicepack tone one" in capsys.readouterr().err


def test_a_cut_that_lasts_leaves_the_part_for_the_next_call(
    hub: FakeHub, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.tts.download._TRIES", 1)
    (root / "voicepacks/tone/one").mkdir(parents=True)
    (root / "voicepacks/tone/one/config.json").write_text("{}")
    hub.cut_after = [1000, 0]
    assert fetch(root) == 1
    hub.asked.clear()
    assert fetch(root) == 0
    assert hub.asked[0][1]["range"] == "bytes=1000-"


def test_pin_prints_what_the_catalog_takes(hub: FakeHub, root: Path, capsys: Said) -> None:
    assert fetch(root, "tone", "one", "--pin") == 0
    printed = capsys.readouterr().out
    files = yaml.safe_load(printed)["files"]
    assert files["weights/model.safetensors"] == {
        "sha256": SHA,
        "sources": [
            "path:voicepacks/tone/one/weights/model.safetensors",
            f"hub:owner/other@{COMMIT}/model.safetensors",
        ],
    }
    assert files["config.json"]["sha256"] == hashlib.sha256(b"{}").hexdigest()
    assert files["presets.pt"]["optional"] is True
    assert "sha256" not in files["presets.pt"]
    pinned = "models:\n  - model_id: tone-one\n    family: tone\n" + printed
    (root / "configs" / "model_catalog.yaml").write_text(pinned)
    hub.asked.clear()
    assert check(root, "tone", "one") == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("tome", "one"), "unknown family 'tome'; did you mean 'tone'?"),
        (("tone", "on"), "unknown voice pack of tone 'on'; did you mean 'one'?"),
        (("tone-on",), "unknown voice pack 'tone-on'; did you mean 'tone-one'?"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(
    hub: FakeHub, root: Path, capsys: Said, arguments: tuple[str, ...], said: str
) -> None:
    assert fetch(root, *arguments) == 1
    assert f"voicepack: {said}" in capsys.readouterr().err
    assert hub.asked == []


# --- check ---


def test_all_packs_are_looked_over_and_what_is_not_there_yet_is_no_fault(
    hub: FakeHub, root: Path, capsys: Said
) -> None:
    assert check(root) == 0
    assert "not fetched" in capsys.readouterr().err
    assert check(root, "tone", "one") == 1, "asked for by name it is"
    assert "fetch it: uv run just voicepack tone one" in capsys.readouterr().err
    fetch(root)
    assert check(root) == 0
    assert check(root, "tone", "one") == 0


def test_a_bad_pack_is_named_with_its_file(hub: FakeHub, root: Path, capsys: Said) -> None:
    fetch(root)
    pickled = root / "voicepacks" / "tone" / "two" / "model.pth"
    pickled.parent.mkdir()
    (pickled.parent / "metadata.yaml").write_text("languages: [en]\n")
    with zipfile.ZipFile(pickled, "w") as made:
        made.writestr("m/data.pkl", pickle.dumps({"config": Path("x")}, 2))
    capsys.readouterr()
    assert check(root) == 1
    said = capsys.readouterr().err
    assert "tone two: model.pth holds pickled objects (pathlib." in said
    assert check(root, "tone", "one") == 0
    assert check(root, "tone", "two") == 1


def test_metadata_that_cannot_be_read_is_a_bad_pack(root: Path, capsys: Said) -> None:
    folder = root / "voicepacks" / "tone" / "three"
    folder.mkdir(parents=True)
    (folder / "metadata.yaml").write_text("langages: [en]\n")
    for arguments in ((), ("tone", "three")):
        assert check(root, *arguments) == 1
        assert "did you mean 'languages'" in capsys.readouterr().err


# --- the recipes, and the script of the document's name ---


SCRIPT = ROOT / "scripts" / "setup_cosyvoice_voicepack.sh"


def setup(root: Path, hub: FakeHub) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [shutil.which("bash") or "bash", str(SCRIPT), "--root", str(root)],
        env={**os.environ, **hub.env(), "PYTHON": sys.executable, "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    (tmp_path / "configs").mkdir()
    shutil.copy(ROOT / "configs" / "model_catalog.yaml", tmp_path / "configs")
    return tmp_path


def test_the_setup_script_parses() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert os.access(SCRIPT, os.X_OK)


def test_the_setup_script_brings_every_file_of_cosyvoice(shipped: Path, hub: FakeHub) -> None:
    meta = load_catalog(shipped / "configs" / "model_catalog.yaml").get("cosyvoice2-en-base")
    plain = io.BytesIO()
    with zipfile.ZipFile(plain, "w") as made:
        made.writestr("m/data.pkl", pickle.dumps({}, 2))
    by_kind = {
        ".safetensors": WEIGHTS,
        ".pt": plain.getvalue(),
        ".onnx": b"\x08\x08\x3a\x01a",
        ".json": b"{}",
    }
    repo = "FunAudioLLM/CosyVoice2-0.5B"
    hub.files = {
        f"{repo}/{name}": by_kind.get(Path(name).suffix, b"a: !new:b {}\n")
        for name in meta.files
        if name != "spk2info.pt"
    }
    done = setup(shipped, hub)
    folder = shipped / "voicepacks" / "cosyvoice2" / "en-base"
    assert done.returncode == 1, "the weights are there, and no voice yet"
    assert "there is no voice in it: put 5 to 15 s of one into ref/seed.wav" in done.stderr
    came = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert came == {*meta.files} - {"spk2info.pt"} | {"metadata.yaml"}
    (folder / "spk2info.pt").write_bytes(plain.getvalue())
    hub.asked.clear()
    done = setup(shipped, hub)
    assert done.returncode == 0, done.stderr
    assert hub.asked == []


def test_the_setup_script_fails_where_the_tool_does(shipped: Path, hub: FakeHub) -> None:
    done = setup(shipped, hub)
    assert done.returncode == 1
    assert f"{hub.base}/FunAudioLLM/CosyVoice2-0.5B/resolve/main/llm.pt" in done.stderr
    assert f"{shipped}/voicepacks/cosyvoice2/en-base/llm.pt" in done.stderr
