"""On a machine without CosyVoice the adapter says so, and says it before anything is loaded."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys

import pytest

from src.rpc.errors import Unavailable
from src.tts.adapters import adapter_for
from src.tts.catalog import ModelMeta
from src.tts.tts_base import MissingPackage

META = ModelMeta(model_id="cosyvoice2-en-base", family="cosyvoice2")


def test_without_the_package_check_and_load_name_the_family_and_the_way_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    adapter = adapter_for("cosyvoice2")
    for call in (adapter.check_installed, lambda: adapter.load(META, {}, "cuda", _progress)):
        with pytest.raises(MissingPackage, match=r"COSYVOICE_PYTORCH_CONFLICT\.md") as error:
            call()
        assert error.value.family == "cosyvoice2"


def test_with_the_package_it_does_not_pretend_to_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.machinery.ModuleSpec("cosyvoice", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    adapter = adapter_for("cosyvoice2")
    adapter.check_installed()
    with pytest.raises(Unavailable, match=r"cosyvoice2-en-base.*container image"):
        adapter.load(META, {}, "cuda", _progress)


def test_its_capabilities_are_known_without_the_package() -> None:
    capabilities = adapter_for("cosyvoice2").capabilities
    assert capabilities.zero_shot
    assert capabilities.emotive_zero_prompt
    assert not capabilities.cpu_ok
    assert "torch" not in sys.modules


def _progress(done: float) -> None:
    raise AssertionError("nothing may be loaded")
