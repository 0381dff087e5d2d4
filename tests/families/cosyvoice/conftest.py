"""A voice pack of CosyVoice 2's architecture with random weights, loaded by its real sources."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from src.tts.families.cosyvoice2.package import check_sources
from src.tts.families.cosyvoice2.speech import CosyVoice2Model
from src.tts.tts_base import MissingPackage
from tests.families.cosyvoice.packs import load


def _left_out() -> list[str]:
    """The sources are no package: COSYVOICE_HOME names them."""
    try:
        check_sources()
    except MissingPackage:
        return ["test_*.py"]
    return []


collect_ignore_glob = _left_out()


@dataclass
class Manners:
    """What the process was like before the first import of the package, and after."""

    before: Any
    after: Any


def _process() -> Any:
    import numpy as np
    import torch

    root = logging.getLogger()
    drawn = random.getstate(), np.random.get_state()[1].tobytes()  # type: ignore[index]
    handlers = [handler for handler in root.handlers if "pytest" not in type(handler).__module__]
    return root.level, handlers, drawn, torch.initial_seed(), list(sys.path)


@pytest.fixture(scope="session")
def manners(tmp_path_factory: pytest.TempPathFactory) -> Manners:
    """Of the package's import and one whole load."""
    from src.tts.families.cosyvoice2.package import import_package
    from src.tts.families.torch_host import well_behaved

    before = _process()
    with well_behaved():
        import_package()
    return Manners(before, _process())


@pytest.fixture(scope="session")
def pack(manners: Manners, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nobody writes to it: see `changed`."""
    from tests.families.cosyvoice.tiny import make_tiny_pack

    return make_tiny_pack(tmp_path_factory.mktemp("cosyvoice") / "tiny")


@pytest.fixture(scope="session")
def model(pack: Path) -> Iterator[CosyVoice2Model]:
    model = load(pack)
    yield model
    model.unload()
