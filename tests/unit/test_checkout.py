"""A family's package in a checkout: found by a variable or on the path, importable alone."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from src.tts.families.checkout import Source

SOURCE = Source("OWLTALK_HOME", "owltalk", "voice.py", under="lib")


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    path = list(sys.path)
    yield
    sys.path[:] = path
    for name in [name for name in sys.modules if name.split(".")[0] in ("owltalk", "tools")]:
        del sys.modules[name]


def checkout(folder: Path, says: str = "hoo", under: str = "lib") -> Path:
    package = folder / under / "owltalk"
    package.mkdir(parents=True)
    (package / "voice.py").write_text(f"CALL = {says!r}\n")
    (folder / under / "tools").mkdir()
    (folder / under / "tools" / "hidden.py").write_text("")
    return package


def call() -> str:
    said: str = importlib.import_module("owltalk.voice").CALL
    return said


def test_a_named_checkout_is_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = checkout(tmp_path)
    monkeypatch.setenv("OWLTALK_HOME", str(tmp_path))
    assert SOURCE.find() == package
    path = list(sys.path)
    SOURCE.offer()
    assert call() == "hoo"
    assert sys.path == path
    with pytest.raises(ImportError):
        importlib.import_module("tools.hidden")


def test_the_users_home_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = checkout(tmp_path / "src")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OWLTALK_HOME", "~/src")
    assert SOURCE.find() == package


def test_without_a_name_it_is_looked_for_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OWLTALK_HOME", raising=False)
    assert SOURCE.find() is None
    package = checkout(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "lib")
    assert SOURCE.find() == package
    SOURCE.offer()
    assert call() == "hoo"
    assert SOURCE.find() == package  # imported, and without a spec now


def test_a_named_checkout_is_the_only_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "lib")
    monkeypatch.setenv("OWLTALK_HOME", str(tmp_path / "elsewhere"))
    assert SOURCE.find() is None


def test_another_package_of_this_name_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = checkout(tmp_path)
    (package / "voice.py").rename(package / "other.py")
    monkeypatch.setenv("OWLTALK_HOME", str(tmp_path))
    assert SOURCE.find() is None
    SOURCE.offer()
    with pytest.raises(ImportError):
        importlib.import_module("owltalk.other")


def test_another_checkout_takes_the_place_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, says in (("first", "hoo"), ("second", "twit")):
        checkout(tmp_path / folder, says)
        monkeypatch.setenv("OWLTALK_HOME", str(tmp_path / folder))
        SOURCE.offer()
        assert call() == says


def test_offered_twice_is_imported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout(tmp_path)
    monkeypatch.setenv("OWLTALK_HOME", str(tmp_path))
    SOURCE.offer()
    first = importlib.import_module("owltalk.voice")
    SOURCE.offer()
    assert importlib.import_module("owltalk.voice") is first
