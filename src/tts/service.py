"""The eight RPCs: what a request must look like, and which part of the worker it goes to."""

from __future__ import annotations

import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, cast

import grpc

from src.audio.opus import INSTALL as OPUS_INSTALL
from src.audio.opus import opus_available
from src.audio.pcm import FRAME_MS, SAMPLE_RATE
from src.common.logging import log_context
from src.common.tasks import leaves
from src.rpc.errors import DuplexError, Internal, InvalidArgument, Unavailable, abort
from src.rpc.generated import tts_pb2 as pb
from src.rpc.generated import tts_pb2_grpc
from src.tts.leases import LeaseInfo, ModelState, ModelStatus
from src.tts.model_manager import ModelManager
from src.tts.session import Session
from src.tts.sessions import MAX_ID_CHARS, Sessions
from src.tts.tts_base import AdapterCapabilities

log = logging.getLogger(__name__)

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
MethodT = TypeVar("MethodT", bound=Callable[..., Awaitable[Any]])

_ACTIONS = {pb.PAUSE: "pause", pb.RESUME: "resume", pb.STOP: "stop", pb.RELOAD: "reload"}
_CODECS = (pb.CODEC_PCM_S16LE, pb.CODEC_OPUS)


@dataclass(frozen=True, slots=True)
class Identity:
    """What a worker says about itself, beside its models."""

    name: str
    adapter: str
    version: str
    capabilities: AdapterCapabilities
    device: str

    @property
    def gpu(self) -> bool:
        return self.device != "cpu"


def _edge(method: MethodT) -> MethodT:
    """The one place where an error becomes a gRPC status."""

    @functools.wraps(method)
    async def call(self: TTSService, request: Any, context: Context) -> Any:
        try:
            return await method(self, request, context)
        except Exception as error:
            await abort(context, _as_typed(error))

    return call  # type: ignore[return-value]


def _as_typed(error: Exception) -> DuplexError:
    typed = next((leaf for leaf in leaves(error) if isinstance(leaf, DuplexError)), None)
    if typed is None:
        log.error("a call failed", exc_info=error)
        return Internal(f"the worker failed ({type(error).__name__}); its log says where")
    return typed


class TTSService(tts_pb2_grpc.TTSServicer):
    """`reload` re-reads configuration, catalog and voice packs, and says what changed."""

    def __init__(
        self,
        identity: Identity,
        manager: ModelManager,
        sessions: Sessions,
        reload: Callable[[], Awaitable[list[str]]],
    ) -> None:
        self._identity = identity
        self._manager = manager
        self._sessions = sessions
        self._reload = reload

    # --- sessions ---

    @_edge
    async def StartSession(
        self, request: pb.StartSessionReq, context: Context
    ) -> pb.StartSessionResp:
        _check_codec(request.codec)
        session = await self._sessions.start(request)
        return _started(session)

    @_edge
    async def Synthesize(
        self, request_iterator: AsyncIterator[pb.TextChunk], context: Context
    ) -> None:
        first = await _first_chunk(request_iterator)
        session = self._sessions.get(first.session_id)
        if self._sessions.draining:
            raise Unavailable("this worker is draining; start the session on another one")
        # Before any frame: an error that finds the first write still under way would send the
        # headers a second time, which grpc refuses, and the client would wait for ever.
        await context.send_initial_metadata(())
        with log_context(session_id=first.session_id, utterance_id=first.utterance_id):
            chunks = _again(first, request_iterator)
            await session.synthesize(first.utterance_id, chunks, context.write)

    @_edge
    async def Control(self, request: pb.ControlReq, context: Context) -> pb.ControlResp:
        if request.action not in _ACTIONS:
            raise InvalidArgument(f"Control needs an action: {', '.join(_ACTIONS.values())}")
        self._sessions.stage.metrics.controlled(_ACTIONS[request.action])
        if request.action == pb.RELOAD:
            return await self._reloaded(request)
        where = self._sessions.get(request.session_id).control(request.action, request.utterance_id)
        return pb.ControlResp(
            state=where.state, utterance_id=where.utterance_id, last_seq=where.last_seq
        )

    @_edge
    async def EndSession(self, request: pb.EndSessionReq, context: Context) -> pb.EndSessionResp:
        return pb.EndSessionResp(frames=await self._sessions.end(request.session_id))

    async def _reloaded(self, request: pb.ControlReq) -> pb.ControlResp:
        changes = await self._reload()
        log.info("reloaded", extra={"changes": changes})
        if not request.session_id:
            return pb.ControlResp(last_seq=-1, changes=changes)
        where = self._sessions.get(request.session_id).where
        return pb.ControlResp(
            state=where.state,
            utterance_id=where.utterance_id,
            last_seq=where.last_seq,
            changes=changes,
        )

    # --- models ---

    @_edge
    async def ListModels(self, request: pb.ListModelsReq, context: Context) -> pb.ListModelsResp:
        return pb.ListModelsResp(models=map(_model_info, self._manager.list_catalog()))

    @_edge
    async def LoadModel(self, request: pb.LoadModelReq, context: Context) -> pb.LoadModelResp:
        if request.wait:
            load_ms = await self._manager.load(request.model_id)
            return pb.LoadModelResp(state=pb.RESIDENT, load_ms=load_ms)
        self._manager.load_in_background(request.model_id)
        return pb.LoadModelResp(state=self._state_of(request.model_id))

    @_edge
    async def UnloadModel(self, request: pb.UnloadModelReq, context: Context) -> pb.UnloadModelResp:
        if not request.model_id:
            raise InvalidArgument("UnloadModel needs a model_id; ListModels names them")
        await self._manager.unload(request.model_id, ignore_ttl=request.ignore_ttl)
        return pb.UnloadModelResp(state=self._state_of(request.model_id))

    @_edge
    async def GetCapabilities(self, request: pb.GetCapReq, context: Context) -> pb.GetCapResp:
        own, can = self._identity, self._identity.capabilities
        models = self._manager.list_catalog()
        reason = next((m.fallback_reason for m in models if m.is_default), "")
        return pb.GetCapResp(
            name=own.name,
            adapter=own.adapter,
            version=own.version,
            streaming=True,
            zero_shot=can.zero_shot,
            lora=can.lora,
            cpu_ok=can.cpu_ok,
            emotive_zero_prompt=can.emotive_zero_prompt,
            languages=languages_of(models),
            sample_rate=SAMPLE_RATE,
            frame_ms=FRAME_MS,
            codecs=_CODECS if opus_available() else _CODECS[:1],
            gpu=own.gpu,
            vram_gb=0.0,
            default_model_id=self._manager.default_model_id,
            resident_models=[m.meta.model_id for m in models if m.state is ModelState.RESIDENT],
            fallback=bool(reason),
            fallback_reason=reason,
            draining=self._sessions.draining,
            sessions=len(self._sessions),
        )

    def _state_of(self, model_id: str) -> pb.ModelState:
        model_id = model_id or self._manager.default_model_id
        models = self._manager.list_catalog()
        state = next((m.state for m in models if m.meta.model_id == model_id), ModelState.COLD)
        return _proto_state(state)


def _proto_state(state: ModelState) -> pb.ModelState:
    return cast(pb.ModelState, int(state))


def languages_of(models: list[ModelStatus]) -> list[str]:
    """What may be asked of a worker with these models, in the order of the catalog."""
    return list(dict.fromkeys(tag for m in models for tag in (m.languages or m.meta.languages)))


async def _first_chunk(chunks: AsyncIterator[pb.TextChunk]) -> pb.TextChunk:
    first = await anext(aiter(chunks), None)
    if first is None:
        raise InvalidArgument("Synthesize needs at least one TextChunk")
    if not first.session_id or not first.utterance_id:
        raise InvalidArgument("the first TextChunk must name its session_id and utterance_id")
    if len(first.utterance_id) > MAX_ID_CHARS:
        raise InvalidArgument(f"utterance_id may be at most {MAX_ID_CHARS} characters long")
    return first


async def _again(
    first: pb.TextChunk, rest: AsyncIterator[pb.TextChunk]
) -> AsyncIterator[pb.TextChunk]:
    yield first
    async for chunk in rest:
        yield chunk


def _check_codec(codec: pb.Codec) -> None:
    if codec and codec not in _CODECS:
        raise InvalidArgument(f"unknown codec {codec}; 1 is PCM, 2 is Opus")
    if codec == pb.CODEC_OPUS and not opus_available():
        raise InvalidArgument(f"this worker has no Opus: ask for PCM, or on it run {OPUS_INSTALL}")


def _started(session: Session) -> pb.StartSessionResp:
    lease, spec = session.lease, session.spec
    return pb.StartSessionResp(
        session_id=session.session_id,
        model_id=lease.meta.model_id,
        family=lease.family,
        voice=spec.voice,
        language=spec.language,
        codec=session.codec,
        sample_rate=SAMPLE_RATE,
        frame_ms=FRAME_MS,
        native_sample_rate=lease.model.native_sample_rate,
        lease_ttl_ms=lease.ttl_ms,
        fallback=bool(lease.fallback_reason),
        fallback_reason=lease.fallback_reason,
        words_estimated=not lease.capabilities.word_times,
    )


def _model_info(model: ModelStatus) -> pb.ModelInfo:
    meta = model.meta
    return pb.ModelInfo(
        model_id=meta.model_id,
        family=meta.family,
        state=_proto_state(model.state),
        is_default=model.is_default,
        refcount=model.refcount,
        idle_ms=model.idle_ms,
        ttl_left_ms=model.ttl_left_ms,
        estimated_vram_gb=meta.estimated_vram_gb,
        native_sample_rate=model.native_sample_rate or meta.native_sr,
        languages=model.languages or meta.languages,
        voices=model.voices or meta.voices,
        tags=meta.tags,
        needs_gpu=meta.needs_gpu,
        supports_lora=meta.supports_lora,
        max_streams=model.max_streams,
        licence=meta.licence,
        load_progress=model.load_progress,
        error=model.error,
        leases=map(_lease, model.leases),
        fallback=model.fallback,
    )


def _lease(lease: LeaseInfo) -> pb.Lease:
    return pb.Lease(
        session_id=lease.session_id,
        owner=lease.owner,
        held_ms=lease.held_ms,
        expires_in_ms=lease.expires_in_ms,
    )
