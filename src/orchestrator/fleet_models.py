"""The models and workers of the whole fleet, as the API lists them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from src.orchestrator.routing import WorkerView, catalog
from src.rpc.generated import tts_pb2 as pb

_STATES = {
    pb.COLD: "cold",
    pb.LOADING: "loading",
    pb.RESIDENT: "resident",
    pb.UNLOADING: "unloading",
    pb.FAILED: "failed",
}
# The best state that any worker has a model in is the fleet's.
_BEST_FIRST = ("resident", "loading", "unloading", "cold", "failed")


@dataclass(frozen=True, slots=True)
class FleetModel:
    """One model id across all workers."""

    model_id: str
    family: str
    state: str
    workers: dict[str, str]
    """Worker name → its state of the model."""
    languages: tuple[str, ...]
    voices: tuple[str, ...]
    tags: tuple[str, ...]
    licence: str
    default_of: tuple[str, ...]
    fallback: bool
    load_progress: float
    error: str
    refcount: int = 0
    """Sessions that hold it, on all workers together."""
    idle_ms: int = 0
    """Since anybody last held it."""
    ttl_left_ms: int = -1
    """Until the last worker that has it lets it go; -1: never for idleness, or not resident."""
    estimated_vram_gb: float = 0.0
    measured_vram_gb: float = 0.0
    """Of one copy; 0 until measured."""

    def as_json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__slots__ if name != "model_id"}
        listed = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
        return {"id": self.model_id, **listed}


def announced_model(view: WorkerView, model_id: str) -> pb.ModelInfo:
    record = view.announcement
    entry = next(entry for entry in catalog(record) if entry.model_id == model_id)
    return pb.ModelInfo(
        model_id=model_id,
        family=entry.family,
        state=pb.RESIDENT if model_id in record.resident_models else pb.COLD,
        is_default=model_id == record.default_model,
        languages=entry.languages,
        voices=entry.voices,
        tags=entry.tags,
    )


def merged_model(found: list[tuple[str, pb.ModelInfo]]) -> FleetModel:
    workers = {name: _STATES.get(model.state, "cold") for name, model in found}
    models = [model for _, model in found]
    loading = [model.load_progress for model in models if model.state == pb.LOADING]
    resident = [model for model in models if model.state == pb.RESIDENT]
    ttls = [model.ttl_left_ms for model in resident]
    return FleetModel(
        model_id=models[0].model_id,
        family=_first(model.family for model in models),
        state=min(workers.values(), key=_BEST_FIRST.index),
        workers=workers,
        languages=_union(model.languages for model in models),
        voices=_union(model.voices for model in models),
        tags=_union(model.tags for model in models),
        licence=_first(model.licence for model in models),
        default_of=tuple(name for name, model in found if model.is_default),
        fallback=all(model.fallback for model in models),
        load_progress=max(loading, default=0.0),
        error=_first(model.error for model in models),
        refcount=sum(model.refcount for model in models),
        idle_ms=min((model.idle_ms for model in resident), default=0),
        ttl_left_ms=-1 if not ttls or min(ttls) < 0 else max(ttls),
        estimated_vram_gb=round(max(model.estimated_vram_gb for model in models), 3),
        measured_vram_gb=round(max(model.measured_vram_gb for model in models), 3),
    )


def worker_json(view: WorkerView) -> dict[str, Any]:
    record = view.announcement
    return {
        "name": view.name,
        "gpu": record.hardware.gpu,
        "vram_gb": record.hardware.vram_gb,
        "sessions": record.metrics.sessions,
        "max_sessions": record.max_sessions,
        "draining": record.draining,
        "tls": record.tls,
        "version": record.version,
    }


def _first(values: Iterable[str]) -> str:
    return next(filter(None, values), "")


def _union(lists: Iterable[Iterable[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(item for values in lists for item in values))
