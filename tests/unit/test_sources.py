"""Where model files are found, and what happens when they are not what was pinned."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from src.rpc.errors import CorruptModel
from src.tts.sources import Source, SourceResolver

CONTENT = b"weights " * 1000
PIN = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(CONTENT)
    return path


def test_the_first_place_that_has_the_file_is_taken(tmp_path: Path, weights: Path) -> None:
    other = tmp_path / "other.onnx"
    other.write_bytes(CONTENT)
    sources = [f"path:{tmp_path}/absent.onnx", f"path:{weights}", f"path:{other}"]
    assert SourceResolver().resolve("m", "model.onnx", sources, PIN) == weights


def test_a_mismatch_names_file_place_and_both_hashes_and_tries_no_other_place(
    tmp_path: Path, weights: Path
) -> None:
    wrong = tmp_path / "wrong.onnx"
    wrong.write_bytes(b"something else")
    with pytest.raises(CorruptModel) as refused:
        SourceResolver().resolve("m", "model.onnx", [f"path:{wrong}", f"path:{weights}"], PIN)
    found = hashlib.sha256(b"something else").hexdigest()
    for part in ("m: model.onnx", f"path:{wrong}", PIN, found):
        assert part in refused.value.message


def test_a_truncated_file_is_refused(weights: Path) -> None:
    weights.write_bytes(CONTENT[:-1])
    with pytest.raises(CorruptModel, match="not the file that is pinned"):
        SourceResolver().resolve("m", "model.onnx", [f"path:{weights}"], PIN)


def test_a_pin_in_capitals_is_the_same_pin(weights: Path) -> None:
    SourceResolver().resolve("m", "model.onnx", [f"path:{weights}"], PIN.upper())


def test_a_verdict_is_kept_until_the_file_changes(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolver, hashed = SourceResolver(), 0
    real = hashlib.sha256

    def counted() -> object:
        nonlocal hashed
        hashed += 1
        return real()

    monkeypatch.setattr("src.tts.sources.hashlib.sha256", counted)
    for _ in range(3):
        resolver.resolve("m", "model.onnx", [f"path:{weights}"], PIN)
    assert hashed == 1
    weights.write_bytes(CONTENT + b"more")
    with pytest.raises(CorruptModel):
        resolver.resolve("m", "model.onnx", [f"path:{weights}"], PIN)
    assert hashed == 2


def test_hashing_shows_progress_up_to_one(tmp_path: Path) -> None:
    big = tmp_path / "big.bin"
    big.write_bytes(bytes(5 << 19))
    seen: list[float] = []
    pin = hashlib.sha256(bytes(5 << 19)).hexdigest()
    SourceResolver().resolve("m", "big.bin", [f"path:{big}"], pin, seen.append)
    assert len(seen) >= 3
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_home_and_environment_are_expanded(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(weights.parent))
    monkeypatch.setenv("MODELS", str(weights.parent))
    resolver = SourceResolver()
    assert resolver.resolve("m", "f", ["path:~/model.onnx"]) == weights
    assert resolver.resolve("m", "f", ["path:$MODELS/model.onnx"]) == weights


def test_a_file_found_nowhere_lists_every_place_and_what_to_do(tmp_path: Path) -> None:
    sources = [
        f"path:{tmp_path}/model.onnx",
        "path:$NO_SUCH_VARIABLE/model.onnx",
        "package:no_such_voice/data/model.onnx",
        "package:pytest/model.onnx",
        "hub:owner/name@v1/model.onnx",
    ]
    with pytest.raises(CorruptModel) as missing:
        SourceResolver().resolve("m", "model.onnx", sources)
    message = missing.value.message
    for source in sources:
        assert source in message
    for reason in (
        "no such file",
        "$NO_SUCH_VARIABLE is not set",
        "not installed",
        "installed, but without this file",
        "the hub is off",
        "uv sync --group local-models",
        "uv run just voicepack m",
        "--allow_hub",
    ):
        assert reason in message


def test_a_data_package_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "boobytrapped_voice" / "data"
    data.mkdir(parents=True)
    (data.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    (data / "model.onnx").write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(tmp_path))
    resolver = SourceResolver()
    by_path = resolver.resolve("m", "f", ["package:boobytrapped_voice/data/model.onnx"], PIN)
    by_dots = resolver.resolve("m", "f", ["package:boobytrapped_voice.data/model.onnx"], PIN)
    assert by_path == by_dots == data / "model.onnx"
    assert "boobytrapped_voice" not in sys.modules


def test_the_hub_is_asked_for_repo_revision_and_file_when_allowed(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str, str]] = []

    def download(repo: str, file: str, *, revision: str) -> str:
        asked.append((repo, file, revision))
        return str(weights)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    source = "hub:rhasspy/piper-voices@v1.0.0/en/model.onnx"
    assert SourceResolver(allow_hub=True).resolve("m", "f", [source], PIN) == weights
    assert asked == [("rhasspy/piper-voices", "en/model.onnx", "v1.0.0")]


def test_a_hub_that_cannot_be_reached_is_a_place_without_the_file(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(repo: str, file: str, *, revision: str) -> str:
        raise ConnectionError("offline")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    resolver = SourceResolver(allow_hub=True)
    with pytest.raises(CorruptModel, match="offline"):
        resolver.resolve("m", "f", ["hub:a/b@v1/f"])
    assert resolver.resolve("m", "f", ["hub:a/b@v1/f", f"path:{weights}"]) == weights


@pytest.mark.parametrize(
    "text", ["model.onnx", "ftp:x/y", "package:only_a_module", "hub:owner/name/file", "path:", ""]
)
def test_a_source_that_nobody_can_read_is_refused_with_the_shapes(text: str) -> None:
    with pytest.raises(ValueError, match=r"path:<file>|package:<module>|hub:<repo>"):
        Source.parse(text)
