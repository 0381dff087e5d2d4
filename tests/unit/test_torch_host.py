"""What torch families share, without torch; with it: tests/families/sesame/test_torch_host.py."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest

from src.tts.families.torch_host import give_back_memory

ROOT = Path(__file__).resolve().parents[2]


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, src.tts.families.torch_host; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


class Node:
    """In a cycle with itself, as modules with hooks are."""

    def __init__(self) -> None:
        self.me = self


def test_memory_is_given_back_with_what_is_in_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    gc.disable()
    try:
        dead = weakref.ref(Node())
        assert dead() is not None
        give_back_memory("cpu")
        assert dead() is None
    finally:
        gc.enable()


def test_only_a_gpu_that_was_used_is_asked_for_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    cuda = SimpleNamespace(empty_cache=lambda: asked.append("cache"))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    give_back_memory("cpu")
    assert asked == []
    give_back_memory("cuda:1")
    assert asked == ["cache"]
    monkeypatch.delitem(sys.modules, "torch")
    give_back_memory("cuda:0")
    assert asked == ["cache"]
