"""Voice packs of Parler-TTS's architecture, with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families import left_out_without

collect_ignore_glob = left_out_without("torch", "transformers", "parler_tts")


@pytest.fixture(scope="session")
def tiny_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random voice pack that never ends a piece by itself. Nobody writes to it."""
    from tests.families.parler.tiny import make_tiny_pack

    return make_tiny_pack(tmp_path_factory.mktemp("parler") / "tiny")


@pytest.fixture(scope="session")
def brief_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, but after 91 frames (1.06 s) the pack allows no more."""
    from tests.families.parler.tiny import make_tiny_pack

    return make_tiny_pack(tmp_path_factory.mktemp("parler") / "brief", max_length=100)
