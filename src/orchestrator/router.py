"""Voices for sessions: a decision, a claim, a lease; and the models of the whole fleet."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from typing import Any

from src.common.clock import Clock, MonotonicClock
from src.orchestrator.fleet_models import FleetModel, announced_model, merged_model, worker_json
from src.orchestrator.ports import VoiceInfo, VoiceRequest
from src.orchestrator.registry import Registry
from src.orchestrator.routing import Decision, Preload, WorkerView, catalog, decide
from src.orchestrator.routing_policy import RoutingPolicy
from src.orchestrator.tts_client import LOAD_MS, QUICK_MS, WorkerClient, WorkerSession
from src.orchestrator.worker_tls import WorkerTls
from src.rpc.errors import DuplexError, Exhausted, Unavailable, UnknownName
from src.rpc.generated import tts_pb2 as pb

log = logging.getLogger(__name__)

MAX_TRIES = 3
LEASE_TTL_MS = 30_000
_CODECS = {"": pb.CODEC_PCM_S16LE, "pcm_s16le": pb.CODEC_PCM_S16LE, "opus": pb.CODEC_OPUS}


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
        tls: WorkerTls | None = None,
    ) -> None:
        self._registry = registry
        self._policy = policy
        self._owner = owner
        self._clock = clock or MonotonicClock()
        self._tls = tls or WorkerTls()
        self._refusals: dict[str, str] = {}
        # By name, target and whether it is called over TLS.
        self._clients: dict[tuple[str, str, bool], WorkerClient] = {}
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
            decision = self._decide(request, self._policy, tried, refusal)
            tried.add(decision.worker)
            try:
                return await self._open_on(decision, request, codec)
            except (Exhausted, Unavailable) as error:
                log.info("passed over", extra={"worker": decision.worker, "code": error.code})
                self._registry.failed(decision.worker, error.retry_after_ms)
                refusal = error
        raise refusal or Unavailable("no worker was tried")

    def _decide(
        self,
        request: VoiceRequest,
        policy: RoutingPolicy,
        tried: Collection[str] = (),
        refusal: DuplexError | None = None,
    ) -> Decision:
        views, now_ms = self._registry.view(), self._clock.now_ms()
        refused = self.refused()
        try:
            return decide(request, views, policy, now_ms, exclude={*tried, *refused})
        except (Exhausted, Unavailable) as error:
            if refusal is None and refused and isinstance(error, Unavailable):
                # If one of them could have done it, that is what there is to say.
                could = decide(request, views, policy, now_ms, exclude=tried).worker
                if could in refused:
                    raise Unavailable(f"worker {could}: {refused[could]}") from error
            raise refusal or error from error

    def refused(self) -> dict[str, str]:
        """The announced workers that we do not call, and why; logged when it is news."""
        records = [view.announcement for view in self._registry.view()]
        found = {record.name: self._tls.refusal(record.target, record.tls) for record in records}
        refused = {name: reason for name, reason in found.items() if reason}
        for name, reason in refused.items():
            if self._refusals.get(name) != reason:
                log.warning("worker is not called", extra={"worker": name, "reason": reason})
        self._refusals = refused
        return refused

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
            client = self._client(worker, decision.target, decision.tls)
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
            client = self._client(wanted.worker, wanted.target, wanted.tls)
            await client.load_model(wanted.model_id, wait=False)
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
        return tuple(merged_model(merged[model_id]) for model_id in sorted(merged))

    async def _models_of(self, view: WorkerView) -> list[pb.ModelInfo]:
        try:
            return await self._client_of(view).list_models()
        except DuplexError:
            return [announced_model(view, entry.model_id) for entry in catalog(view.announcement)]

    async def load_model(self, model_id: str, *, wait: bool = True) -> FleetModel:
        """Load it on the worker where a session that names it would go.

        Raises UnknownName, Unavailable, Exhausted, CorruptModel.
        """
        await self._registry.first_look()
        plain = RoutingPolicy(audio=self._policy.audio)
        request = VoiceRequest("", model=model_id)
        decision = self._decide(request, plain)
        client = self._client(decision.worker, decision.target, decision.tls)
        await client.load_model(decision.model_id, wait=wait)
        return await self._one(decision.model_id)

    async def unload_model(self, model_id: str, *, ignore_ttl: bool = True) -> FleetModel:
        """Unload it from every worker that has it. Raises UnknownName, InUse, Unavailable."""
        model = await self._one(model_id)
        holding = [
            view
            for view in self._registry.view()
            if model.workers.get(view.name) in ("resident", "loading")
        ]
        results = await asyncio.gather(
            *(self._unload_from(view, model_id, ignore_ttl) for view in holding),
            return_exceptions=True,
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return await self._one(model_id)

    async def _unload_from(self, view: WorkerView, model_id: str, ignore_ttl: bool) -> None:
        await self._client_of(view).unload_model(model_id, ignore_ttl=ignore_ttl)

    async def _one(self, model_id: str) -> FleetModel:
        known = {model.model_id: model for model in await self.fleet_models()}
        if model_id not in known:
            raise UnknownName.among("model", model_id, known)
        return known[model_id]

    async def models(self) -> list[dict[str, Any]]:
        return [model.as_json() for model in await self.fleet_models()]

    def workers(self) -> list[dict[str, Any]]:
        return [worker_json(view) for view in self._registry.view()]

    async def load(self, model_id: str) -> dict[str, Any]:
        return (await self.load_model(model_id)).as_json()

    async def unload(self, model_id: str) -> dict[str, Any]:
        return (await self.unload_model(model_id)).as_json()

    # --- connections ---

    def _client_of(self, view: WorkerView) -> WorkerClient:
        return self._client(view.name, view.announcement.target, view.announcement.tls)

    def _client(self, worker: str, target: str, tls: bool) -> WorkerClient:
        """Raises Unavailable for a worker that must not be called this way."""
        if reason := self._tls.refusal(target, tls):
            raise Unavailable(f"worker {worker}: {reason}")
        client = self._clients.get((worker, target, tls))
        if client is None:
            client = WorkerClient(
                worker,
                target,
                lambda: self._registry.failed(worker),
                self._tls.client if tls else None,
            )
            self._clients[worker, target, tls] = client
        return client

    async def _drop_idle_clients(self) -> None:
        """Of workers that are gone or have moved, once no session of ours is left there."""
        records = [view.announcement for view in self._registry.view()]
        announced = {(record.name, record.target, record.tls) for record in records}
        used = {session.client for session in self._sessions}
        idle = [
            key
            for key, client in self._clients.items()
            if key not in announced and client not in used and not client.in_flight
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
