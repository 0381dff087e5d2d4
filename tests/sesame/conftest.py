"""These tests run real torch modules. `just test-sesame` brings them; the default installation does
not, and leaves this folder out."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

collect_ignore_glob = [] if find_spec("torch") else ["test_*.py"]

# Nothing here may ask the hub for anything, not even whether it knows a newer file.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Many small products on two cores: a second thread costs more than it does."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random voice pack that never ends a segment by itself. Nobody writes to it."""
    from src.tts.csm.tiny import make_tiny_pack

    return make_tiny_pack(tmp_path_factory.mktemp("csm") / "tiny")


@pytest.fixture(scope="session")
def tiny_ending_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, but about one frame in twenty ends its segment."""
    from src.tts.csm.tiny import make_tiny_pack

    return make_tiny_pack(tmp_path_factory.mktemp("csm") / "ending", end_gain=3.5)
