"""The models of all workers as one list: what `/v1/models` tells the page's shelf."""

from __future__ import annotations

import json

from src.orchestrator.fleet_models import merged_model, worker_json
from src.orchestrator.routing import WorkerView
from src.rpc.announcement import Announcement, Hardware, WorkerMetrics
from src.rpc.generated import tts_pb2 as pb
from src.tts.catalog import ROOT, load_catalog
from src.tts.leases import ModelState, ModelStatus
from src.tts.service import _model_info


def model(state: int, **fields: object) -> pb.ModelInfo:
    return pb.ModelInfo(model_id="m", family="piper", state=state, **fields)  # type: ignore[arg-type]


def test_leases_are_added_up_and_the_last_to_let_go_counts() -> None:
    one = model(pb.RESIDENT, refcount=2, idle_ms=0, ttl_left_ms=5_000, estimated_vram_gb=0.25)
    other = model(pb.RESIDENT, refcount=1, idle_ms=700, ttl_left_ms=9_000, measured_vram_gb=0.5)
    shown = merged_model(
        [("a", one), ("b", other), ("c", model(pb.COLD, ttl_left_ms=-1))]
    ).as_json()
    assert (shown["id"], shown["state"]) == ("m", "resident")
    assert shown["workers"] == {"a": "resident", "b": "resident", "c": "cold"}
    assert (shown["refcount"], shown["idle_ms"], shown["ttl_left_ms"]) == (3, 0, 9_000)
    assert (shown["estimated_vram_gb"], shown["measured_vram_gb"]) == (0.25, 0.5)
    assert json.loads(json.dumps(shown)) == shown


def test_one_that_is_never_let_go_has_no_time_left_to_count() -> None:
    found = [("a", model(pb.RESIDENT, ttl_left_ms=-1)), ("b", model(pb.RESIDENT, ttl_left_ms=1))]
    assert merged_model(found).ttl_left_ms == -1
    assert merged_model([("a", model(pb.COLD))]).ttl_left_ms == -1


def test_the_licence_of_every_shipped_model_reaches_whoever_asks_which_there_are() -> None:
    """From the catalog through ListModels, cold as it is, to /v1/models."""
    catalog = load_catalog(ROOT / "configs" / "model_catalog.yaml")
    for meta in catalog.models.values():
        listed = _model_info(ModelStatus(meta, ModelState.COLD, is_default=False))
        assert listed.licence == meta.licence
        assert merged_model([("a", listed)]).as_json()["licence"] == meta.licence
    assert "NON-COMMERCIAL" in catalog.get("xtts-v2-en").licence
    assert "NON-COMMERCIAL" in catalog.get("spark-tts-0.5b").licence


def test_a_loading_model_shows_how_far_it_is() -> None:
    shown = merged_model(
        [("a", model(pb.LOADING, load_progress=0.5)), ("b", model(pb.COLD))]
    ).as_json()
    assert (shown["state"], shown["load_progress"]) == ("loading", 0.5)


def test_a_worker_tells_its_memory_and_its_seats() -> None:
    record = Announcement(
        name="tts-a",
        addr="grpc://127.0.0.1:1",
        hardware=Hardware(gpu=True, vram_gb=24.0),
        metrics=WorkerMetrics(sessions=3),
        max_sessions=8,
        version="2.1",
    )
    assert worker_json(WorkerView(record)) == {
        "name": "tts-a",
        "gpu": True,
        "vram_gb": 24.0,
        "sessions": 3,
        "max_sessions": 8,
        "draining": False,
        "tls": False,
        "version": "2.1",
    }
