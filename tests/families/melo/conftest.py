"""A small voice pack of MeloTTS's architecture, with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from src.tts.families.melo.sources import SOURCE
from tests.families import left_out_without

collect_ignore_glob = left_out_without("torch", "transformers", "numba", "inflect")
# What stands beside the family: the parts of the torch families that need torch and no package.
if not collect_ignore_glob and SOURCE.find() is None:
    collect_ignore_glob = ["test_melo_*.py"]


@pytest.fixture(scope="session")
def tiny_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nobody writes to it."""
    from tests.families.melo.tiny import make_tiny_pack

    return make_tiny_pack(tmp_path_factory.mktemp("melo") / "tiny")
