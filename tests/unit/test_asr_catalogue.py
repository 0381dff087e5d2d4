"""Engines by name or path: what is refused, and what the refusal says."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from src.orchestrator import asr
from src.orchestrator.asr import AsrSettings, Engine
from src.rpc.errors import CorruptModel, NotFound, UnknownName


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("model.bin", "config.json", "tokenizer.json"):
        (tmp_path / name).write_text(name)
    return tmp_path


def find(engine: str) -> Path:
    return asr.find_folder(AsrSettings(engine=engine))


def test_an_unknown_engine_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"whisper-tiny\.en"):
        find("whisper-tinyen")


def test_the_names_of_the_manual_are_known() -> None:
    for name in ("tiny.en", "tiny", "base", "base.en", "small", "small.en", "distil-small.en"):
        assert asr.find_engine(f"whisper-{name}").size == name


def test_a_folder_is_taken_by_path(folder: Path) -> None:
    assert find(str(folder)) == folder


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nowhere"):
        find(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("missing", ["tokenizer.json", "config.json", "model.bin"])
def test_an_incomplete_folder_is_refused_and_not_completed_from_the_network(
    folder: Path, missing: str
) -> None:
    (folder / missing).unlink()
    with pytest.raises(CorruptModel, match=missing):
        find(str(folder))


def test_a_pinned_file_with_other_content_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pin(content: bytes) -> Engine:
        digest = hashlib.sha256(content).hexdigest()
        return Engine("x", "nobody/x", packages=("wheel/model",), sha256={"model.bin": digest})

    monkeypatch.setattr(asr, "_package_folder", lambda place: folder)
    monkeypatch.setattr(asr, "ENGINES", {"x": pin(b"model.bin"), "y": pin(b"other")})
    assert find("x") == folder
    with pytest.raises(CorruptModel, match=r"model\.bin is not the file that is pinned"):
        find("y")


def test_a_known_engine_that_is_not_here_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(NotFound, match=r"allow_hub.*Systran/faster-whisper-small"):
        find("whisper-small")


def test_a_checkpoint_that_is_not_here_says_how_to_make_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    wanted = AsrSettings(engine="whisper-tiny.en", backend="openai-whisper")
    with pytest.raises(NotFound, match=r"scripts/whisper_to_openai\.py"):
        asr.find_checkpoint(wanted)
    cached = tmp_path / ".cache/whisper/tiny.en.pt"
    cached.parent.mkdir(parents=True)
    cached.touch()
    assert asr.find_checkpoint(wanted) == str(cached)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="faster-whisper"):
        AsrSettings.model_validate({"backend": "vosk"})
