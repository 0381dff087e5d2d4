"""Voice packs of XTTS-v2's architecture, with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from src.tts.adapters.adapter_xtts import XttsModel
from src.tts.families.xtts import stream as xtts_stream
from src.tts.families.xtts.stream import CHUNKS
from tests.families import left_out_without
from tests.families.xtts.tiny import files_of, load

collect_ignore_glob = left_out_without("torch", "TTS")


@pytest.fixture(scope="session", autouse=True)
def _narrow_vocoder() -> Iterator[None]:
    from tests.families.xtts.tiny import narrow_vocoder

    with narrow_vocoder():
        yield


@pytest.fixture(scope="session")
def tiny_pack(tmp_path_factory: pytest.TempPathFactory, _narrow_vocoder: None) -> Path:
    """Never ends a text by itself, and has two preset voices. Nobody writes to it."""
    from tests.families.xtts.tiny import make_tiny_pack

    return make_tiny_pack(tmp_path_factory.mktemp("xtts") / "tiny")


@pytest.fixture(scope="session")
def model(tiny_pack: Path) -> Iterator[XttsModel]:
    model = load(files_of(tiny_pack))
    yield model
    model.unload()


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece of text is cut off in its third chunk: these weights never end one by themselves."""
    monkeypatch.setattr(xtts_stream, "most_codes", lambda _: sum(CHUNKS[:2]) + 4)
