"""Voices for sessions: a decision, a claim, a lease; and the models of the whole fleet."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import grpc

from src.common.clock import Clock, MonotonicClock
from src.orchestrator.ports import VoiceInfo, VoiceRequest
from src.orchestrator.registry import Registry
from src.orchestrator.routing import (
    Decision,
    Preload,
    RoutingPolicy,
    WorkerView,
    catalog,
    decide,
)
from src.orchestrator.tts_client import LOAD_MS, QUICK_MS, WorkerClient, WorkerSession
from src.rpc.errors import DuplexError, Exhausted, Unavailable, UnknownName
from src.rpc.generated import tts_pb2 as pb

log = logging.getLogger(__name__)

MAX_TRIES = 3
LEASE_TTL_MS = 30_000
_CODECS = {"": pb.CODEC_PCM_S16LE, "pcm_s16le": pb.CODEC_PCM_S16LE, "opus": pb.CODEC_OPUS}
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


class SpeechRouter:
    """The fleet as the orchestrator uses it: a `SpeechProvider`, and the `ModelAdmin` of the API.

    `owner` is what a worker shows as the holder of our leases.
    """

    def __init__(
        self,
        registry: Registry,
        policy: RoutingPolicy,
        *,
        owner: str = "orchestrator",
        clock: Clock | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self._registry = registry
        self._policy = policy
        self._owner = owner
        self._clock = clock or MonotonicClock()
        self._credentials = credentials
        self._clients: dict[tuple[str, str], WorkerClient] = {}
        self._sessions: set[WorkerSession] = set()
        self._preloads: dict[Preload, asyncio.Task[None]] = {}

    # --- sessions ---

    async def open(self, request: VoiceRequest) -> WorkerSession:
        """`session_id` must be new: a worker knows a session by it.

        Raises UnknownName, InvalidArgument, Exhausted, Unavailable, CorruptModel. A worker that is
        full or gone is passed over for the next best, up to MAX_TRIES times.
        """
        codec = _codec(request.codec)
        await self._registry.first_look()
        tried: set[str] = set()
        refusal: DuplexError | None = None
        while len(tried) < MAX_TRIES:
            decision = self._decide(request, tried, refusal)
            tried.add(decision.worker)
            try:
                return await self._open_on(decision, request, codec)
            except (Exhausted, Unavailable) as error:
                log.info("passed over", extra={"worker": decision.worker, "code": error.code})
                self._registry.failed(decision.worker, error.retry_after_ms)
                refusal = error
        raise refusal or Unavailable("no worker was tried")

    def _decide(
        self, request: VoiceRequest, tried: set[str], refusal: DuplexError | None
    ) -> Decision:
        views, now_ms = self._registry.view(), self._clock.now_ms()
        try:
            return decide(request, views, self._policy, now_ms, exclude=tried)
        except (Exhausted, Unavailable) as error:
            raise refusal or error from error

    async def _open_on(
        self, decision: Decision, request: VoiceRequest, codec: pb.Codec
    ) -> WorkerSession:
        worker, session_id = decision.worker, request.session_id
        if not await self._registry.claim(worker, session_id):
            raise Exhausted(
                f"worker {worker} is full; try again shortly",
                retry_after_ms=self._policy.retry_after_ms,
            )
        try:
            client = self._client(worker, decision.target)
            asked = _start_request(decision, request, codec, self._owner)
            started = await client.start_session(asked, QUICK_MS if decision.resident else LOAD_MS)
        except BaseException:
            await self._registry.release(worker, session_id)
            raise
        self._registry.recovered(worker)
        session = WorkerSession(client, asked, started, _info(decision, started), self._closed)
        self._sessions.add(session)
        log.info(
            "voice opened",
            extra={"worker": worker, "model": started.model_id, "reason": decision.reason},
        )
        if decision.preload is not None:
            self._preload(decision.preload)
        return session

    async def _closed(self, session: WorkerSession) -> None:
        self._sessions.discard(session)
        await self._registry.release(session.client.name, session.session_id)
        await self._drop_idle_clients()

    def _preload(self, wanted: Preload) -> None:
        if wanted not in self._preloads:
            name = f"preload {wanted.model_id}"
            self._preloads[wanted] = asyncio.create_task(self._load_there(wanted), name=name)

    async def _load_there(self, wanted: Preload) -> None:
        try:
            await self._client(wanted.worker, wanted.target).load_model(wanted.model_id, wait=False)
        except DuplexError as error:
            log.warning("preload refused", extra={"model": wanted.model_id, "code": error.code})
        finally:
            del self._preloads[wanted]

    # --- models ---

    async def fleet_models(self) -> tuple[FleetModel, ...]:
        """All workers' models, by id. Of a worker that does not answer, what it announced."""
        views = self._registry.view()
        answers = await asyncio.gather(*(self._models_of(view) for view in views))
        merged: dict[str, list[tuple[str, pb.ModelInfo]]] = {}
        for view, models in zip(views, answers, strict=True):
            for model in models:
                merged.setdefault(model.model_id, []).append((view.name, model))
        return tuple(_merge(merged[model_id]) for model_id in sorted(merged))

    async def _models_of(self, view: WorkerView) -> list[pb.ModelInfo]:
        try:
            return await self._client(view.name, view.announcement.target).list_models()
        except DuplexError:
            return [_announced(view, entry.model_id) for entry in catalog(view.announcement)]

    async def load_model(self, model_id: str, *, wait: bool = True) -> FleetModel:
        """Load it on the worker where a session that names it would go.

        Raises UnknownName, Unavailable, Exhausted, CorruptModel.
        """
        await self._registry.first_look()
        plain = RoutingPolicy(audio=self._policy.audio)
        request = VoiceRequest("", model=model_id)
        decision = decide(request, self._registry.view(), plain, self._clock.now_ms())
        client = self._client(decision.worker, decision.target)
        await client.load_model(decision.model_id, wait=wait)
        return await self._one(decision.model_id)

    async def unload_model(self, model_id: str, *, ignore_ttl: bool = True) -> FleetModel:
        """Unload it from every worker that has it. Raises UnknownName, InUse, Unavailable."""
        model = await self._one(model_id)
        targets = {view.name: view.announcement.target for view in self._registry.view()}
        holding = [
            name for name, state in model.workers.items() if state in ("resident", "loading")
        ]
        results = await asyncio.gather(
            *(
                self._client(name, targets[name]).unload_model(model_id, ignore_ttl=ignore_ttl)
                for name in holding
                if name in targets
            ),
            return_exceptions=True,
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return await self._one(model_id)

    async def _one(self, model_id: str) -> FleetModel:
        known = {model.model_id: model for model in await self.fleet_models()}
        if model_id not in known:
            raise UnknownName.among("model", model_id, known)
        return known[model_id]

    async def models(self) -> list[dict[str, Any]]:
        return [model.as_json() for model in await self.fleet_models()]

    def workers(self) -> list[dict[str, Any]]:
        return [_worker_json(view) for view in self._registry.view()]

    async def load(self, model_id: str) -> dict[str, Any]:
        return (await self.load_model(model_id)).as_json()

    async def unload(self, model_id: str) -> dict[str, Any]:
        return (await self.unload_model(model_id)).as_json()

    # --- connections ---

    def _client(self, worker: str, target: str) -> WorkerClient:
        client = self._clients.get((worker, target))
        if client is None:
            client = WorkerClient(
                worker, target, lambda: self._registry.failed(worker), self._credentials
            )
            self._clients[worker, target] = client
        return client

    async def _drop_idle_clients(self) -> None:
        """Of workers that are gone or have moved, once no session of ours is left there."""
        announced = {(view.name, view.announcement.target) for view in self._registry.view()}
        used = {(session.client.name, session.client.target) for session in self._sessions}
        idle = [
            key
            for key, client in self._clients.items()
            if key not in announced | used and not client.in_flight
        ]
        for client in [self._clients.pop(key) for key in idle]:
            await client.aclose()

    async def aclose(self) -> None:
        """End every session that is still open, and every connection."""
        for task in list(self._preloads.values()):
            task.cancel()
        await asyncio.gather(*self._preloads.values(), return_exceptions=True)
        await asyncio.gather(
            *(session.aclose() for session in list(self._sessions)), return_exceptions=True
        )
        for client in self._clients.values():
            await client.aclose()
        self._clients.clear()


def _codec(name: str) -> pb.Codec:
    if name not in _CODECS:
        raise UnknownName.among("codec", name, filter(None, _CODECS))
    return _CODECS[name]


def _start_request(
    decision: Decision, request: VoiceRequest, codec: pb.Codec, owner: str
) -> pb.StartSessionReq:
    return pb.StartSessionReq(
        session_id=request.session_id,
        model_id=decision.model_id,
        voice=decision.voice,
        language=request.language,
        codec=codec,
        # Settings belong to a family; the one that stands in would refuse them.
        settings={} if decision.substitute else dict(request.settings),
        priority=pb.PRIORITY_INTERACTIVE,
        owner=owner,
        lease_ttl_ms=LEASE_TTL_MS,
    )


def _info(decision: Decision, started: pb.StartSessionResp) -> VoiceInfo:
    reason = started.fallback_reason
    if decision.substitute and decision.preload is not None:
        reason = f"{decision.preload.model_id} is loading; {started.model_id} speaks meanwhile"
    return VoiceInfo(
        model=started.model_id,
        voice=started.voice,
        language=started.language,
        worker=decision.worker,
        fallback=started.fallback or decision.substitute,
        fallback_reason=reason,
        words_estimated=started.words_estimated,
    )


def _announced(view: WorkerView, model_id: str) -> pb.ModelInfo:
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


def _merge(found: list[tuple[str, pb.ModelInfo]]) -> FleetModel:
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


def _worker_json(view: WorkerView) -> dict[str, Any]:
    record = view.announcement
    return {
        "name": view.name,
        "gpu": record.hardware.gpu,
        "vram_gb": record.hardware.vram_gb,
        "sessions": record.metrics.sessions,
        "max_sessions": record.max_sessions,
        "draining": record.draining,
        "version": record.version,
    }


def _first(values: Iterable[str]) -> str:
    return next(filter(None, values), "")


def _union(lists: Iterable[Iterable[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(item for values in lists for item in values))
