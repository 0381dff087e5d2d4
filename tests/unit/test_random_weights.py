"""A model that speaks noise is there to be asked for by name, and comes to nobody else."""

from __future__ import annotations

from pathlib import Path

import pytest

from src.rpc.errors import UnknownName
from src.tts.catalog import ROOT, ModelMeta
from src.tts.config import read_catalog, worker_config
from src.tts.leases import ModelState, ModelStatus
from src.tts.worker import offered

NOISE = "{model_id: noise, family: sesame, tags: [random-weights], settings: {tiny: '1'}}"


def test_the_family_starts_with_the_real_model() -> None:
    config = worker_config(ROOT / "configs" / "worker.yaml", {"worker.adapter": "sesame"}, {})
    assert config.model_manager.default_model_id == "sesame-csm-1b"


def test_a_family_of_noise_alone_has_no_first_model(tmp_path: Path) -> None:
    (tmp_path / "catalog.yaml").write_text(f"models: [{NOISE}]")
    (tmp_path / "worker.yaml").write_text(
        f"worker: {{catalog: {tmp_path}/catalog.yaml, voicepacks_dir: {tmp_path}/none}}"
    )
    with pytest.raises(UnknownName, match="no model of the family 'sesame'"):
        worker_config(tmp_path / "worker.yaml", {"worker.adapter": "sesame"}, {})
    by_name = {"model_manager.default_model_id": "noise"}
    config = worker_config(tmp_path / "worker.yaml", by_name, {})
    assert config.worker.adapter == "sesame"


@pytest.mark.parametrize("state", list(ModelState))
def test_noise_is_announced_only_where_it_was_loaded(state: ModelState) -> None:
    noise = ModelMeta(model_id="noise", family="sesame", tags=["random-weights"])
    speech = ModelMeta(model_id="speech", family="sesame")
    assert offered(ModelStatus(noise, state, is_default=False)) is (state is ModelState.RESIDENT)
    assert offered(ModelStatus(speech, state, is_default=False))


def test_the_shipped_tiny_model_is_tagged() -> None:
    config = worker_config(ROOT / "configs" / "worker.yaml", {"worker.adapter": "sesame"}, {})
    assert "random-weights" in read_catalog(config).get("tiny-csm-random").tags
