"""Voice packs of Spark-TTS's architecture, with random weights; the package is SPARK_HOME's."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.families import left_out_without

if TYPE_CHECKING:
    from src.tts.families.spark.speech import SparkTtsModel

collect_ignore_glob = left_out_without(
    "torch", "torchaudio", "transformers", "omegaconf", "einops", "einx"
)
if not collect_ignore_glob:
    from src.tts.families.spark.pack import SOURCE

    # Not a package: its tests run where a checkout is named.
    collect_ignore_glob = [] if SOURCE.find() else ["test_*.py"]
    SOURCE.offer()


@pytest.fixture(scope="session")
def tiny_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its greedy sentences never end. Nobody writes to it."""
    from tests.families.spark.tiny import make_tiny_pack

    return make_tiny_pack(tmp_path_factory.mktemp("spark") / "tiny")


@pytest.fixture(scope="session")
def voiced_pack(tiny_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two recordings, of one of which it is known what is said."""
    from tests.families.spark.talk import linked, record

    pack = linked(tiny_pack, tmp_path_factory.mktemp("spark") / "voiced")
    record(pack / "ref" / "seed.wav")
    record(pack / "ref" / "anna.flac", rate=48_000, seed=1)
    (pack / "ref" / "anna.txt").write_text("Words of hers.")
    return pack


@pytest.fixture(scope="session")
def model(voiced_pack: Path) -> Iterator[SparkTtsModel]:
    """Voices: default, anna, controllable."""
    from tests.families.spark.talk import files_of, load

    model = load(files_of(voiced_pack))
    yield model
    model.unload()


@pytest.fixture(scope="session")
def package(voiced_pack: Path) -> Any:
    """The package itself on the same pack, its language model in float32 as ours."""
    sys.path.append(os.environ["SPARK_HOME"])
    made = import_module("cli.SparkTTS").SparkTTS(voiced_pack, "cpu")
    made.model.float().eval()
    return made
