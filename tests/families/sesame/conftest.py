"""Voice packs of Sesame's architecture, with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families import left_out_without

collect_ignore_glob = left_out_without("torch", "transformers", "peft")


@pytest.fixture(scope="session")
def tiny_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random voice pack that never ends a segment by itself. Nobody writes to it."""
    from src.tts.families.csm.tiny import make_tiny_pack

    return make_tiny_pack(tmp_path_factory.mktemp("csm") / "tiny")


@pytest.fixture(scope="session")
def tiny_ending_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, but about one frame in twenty ends its segment."""
    from src.tts.families.csm.tiny import make_tiny_pack

    return make_tiny_pack(tmp_path_factory.mktemp("csm") / "ending", end_gain=3.5)
