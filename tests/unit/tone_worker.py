"""A worker in this process: the real service and manager, and a model that beeps once per word."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import numpy as np

from src.common.clock import ManualClock, MonotonicClock
from src.rpc.errors import UnknownName
from src.rpc.generated import tts_pb2 as pb
from src.rpc.generated import tts_pb2_grpc
from src.tts.catalog import Catalog, ModelMeta
from src.tts.config import ModelManagerSettings
from src.tts.loader import LoadedModel
from src.tts.metrics import WorkerMetrics
from src.tts.model_manager import ModelManager
from src.tts.playout import PlayoutPolicy
from src.tts.pool import SynthesisPool
from src.tts.service import Identity, TTSService
from src.tts.sessions import Sessions
from src.tts.sources import Progress
from src.tts.tts_base import (
    AdapterCapabilities,
    CancelToken,
    Model,
    PcmChunk,
    Segment,
    VoiceSpec,
    WordMark,
)
from src.tts.utterance import Stage

RATE = 24_000
WORD_MS = 100
FRAMES_PER_WORD = 5
CAN = AdapterCapabilities(cpu_ok=True, word_times=True, settings={"speed": "0.5 to 2"})


class ToneModel:
    """100 ms of tone for every word, with its mark; one chunk per word."""

    native_sample_rate = RATE
    voices: tuple[str, ...] = ("low", "high")
    languages: tuple[str, ...] = ("en",)

    def __init__(self, max_streams: int = 0) -> None:
        self.max_streams = max_streams
        self.live = 0
        self.spoken: list[str] = []
        self.fail_at = ""
        self.go = threading.Event()
        self.go.set()

    def check_voice(self, spec: VoiceSpec) -> VoiceSpec:
        if spec.voice not in ("", *self.voices):
            raise UnknownName.among("voice", spec.voice, self.voices)
        if spec.language not in ("", *self.languages):
            raise UnknownName.among("language", spec.language, self.languages)
        return VoiceSpec(spec.voice or "low", "en", spec.settings)

    def stream(
        self, segments: Iterable[Segment], spec: VoiceSpec, cancel: CancelToken
    ) -> Iterator[PcmChunk]:
        self.live += 1
        try:
            for segment in segments:
                for word, start in _words(segment):
                    self.go.wait()
                    if cancel.cancelled:
                        return
                    if word == self.fail_at:
                        raise RuntimeError(f"cannot say {word}")
                    self.spoken.append(word)
                    yield PcmChunk(_TONE, (_mark(word, start),))
        finally:
            self.live -= 1

    def unload(self) -> None:
        assert not self.live


_TONE = np.sin(np.arange(RATE * WORD_MS // 1000) * 0.1).astype(np.float32) * np.float32(0.3)


def _words(segment: Segment) -> Iterator[tuple[str, int]]:
    place = 0
    for word in segment.text.split():
        place = segment.text.index(word, place)
        yield word, segment.char_start + place
        place += len(word)


def _mark(word: str, start: int) -> WordMark:
    return WordMark(word, 0, WORD_MS, start, start + len(word), False)


class ToneLoader:
    def __init__(self, model: ToneModel) -> None:
        self._model = model

    async def load(self, meta: ModelMeta, progress: Progress) -> LoadedModel:
        return LoadedModel(self._model, meta.family, "cpu", CAN)

    async def unload(self, model: Model) -> None:
        model.unload()


@dataclass
class ToneWorker:
    """The worker's parts, and a client's view of them."""

    model: ToneModel
    manager: ModelManager
    sessions: Sessions
    pool: SynthesisPool
    stub: tts_pb2_grpc.TTSStub
    lease_clock: ManualClock
    reloads: list[str] = field(default_factory=list)
    target: str = ""

    async def start(self, session_id: str = "s1", **asked: object) -> pb.StartSessionResp:
        request = pb.StartSessionReq(session_id=session_id, **asked)  # type: ignore[arg-type]
        response: pb.StartSessionResp = await self.stub.StartSession(request)
        return response

    def speak(self, text: str, utterance_id: str = "u1", session_id: str = "s1") -> Call:
        return Call(self.stub, [chunk(text, utterance_id, session_id, is_final=True)])

    async def control(
        self, action: pb.ControlAction, utterance_id: str = "", session_id: str = "s1"
    ) -> pb.ControlResp:
        request = pb.ControlReq(session_id=session_id, action=action, utterance_id=utterance_id)
        response: pb.ControlResp = await self.stub.Control(request)
        return response

    async def quiet(self) -> None:
        """Until no synthesis thread runs."""
        for _ in range(2_000):
            if not self.pool.running and not self.model.live:
                return
            await asyncio.sleep(0.005)
        raise AssertionError(f"{self.pool.running} threads never ended")


def chunk(
    text: str, utterance_id: str = "", session_id: str = "", *, is_final: bool = False
) -> pb.TextChunk:
    return pb.TextChunk(
        text=text, utterance_id=utterance_id, session_id=session_id, is_final=is_final
    )


class Call:
    """One Synthesize call, read frame by frame."""

    def __init__(self, stub: tts_pb2_grpc.TTSStub, chunks: Sequence[pb.TextChunk] = ()) -> None:
        self.rpc = stub.Synthesize(iter(chunks)) if chunks else stub.Synthesize()
        self.frames: list[pb.AudioFrame] = []

    async def next(self) -> pb.AudioFrame:
        frame = await self.rpc.read()
        assert isinstance(frame, pb.AudioFrame), "the stream ended"
        self.frames.append(frame)
        return frame

    async def take(self, count: int) -> list[pb.AudioFrame]:
        return [await self.next() for _ in range(count)]

    async def rest(self) -> list[pb.AudioFrame]:
        """All frames, end marker included; raises AioRpcError if the call failed."""
        while (frame := await self.rpc.read()) is not grpc.aio.EOF:
            self.frames.append(frame)
        return self.frames


@asynccontextmanager
async def tone_worker(
    model: ToneModel | None = None, *, max_sessions: int = 8, policy: PlayoutPolicy | None = None
) -> AsyncIterator[ToneWorker]:
    model = model or ToneModel()
    metrics, lease_clock = WorkerMetrics(), ManualClock()
    metas = [ModelMeta(model_id="tone", family="fake"), ModelMeta(model_id="hum", family="fake")]
    settings = ModelManagerSettings(default_model_id="tone", resident_cap=3, min_residency_ms=0)
    manager = ModelManager(
        Catalog.of(metas), settings, ToneLoader(model), clock=lease_clock, observer=metrics
    )
    pool = SynthesisPool(2, max_sessions)
    stage = Stage(pool, MonotonicClock(), metrics, policy or PlayoutPolicy(), None)
    sessions = Sessions(manager, stage, max_sessions)
    reloads: list[str] = ["lead_ms: 60 → 80"]

    async def reload() -> list[str]:
        return reloads

    identity = Identity("tts-fake@test", "fake", "1", CAN, "cpu")
    service = TTSService(identity, manager, sessions, reload)
    server = grpc.aio.server()
    tts_pb2_grpc.add_TTSServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = tts_pb2_grpc.TTSStub(channel)  # type: ignore[no-untyped-call]
            target = f"127.0.0.1:{port}"
            yield ToneWorker(model, manager, sessions, pool, stub, lease_clock, reloads, target)
    finally:
        model.go.set()
        await server.stop(None)
        await manager.close()
        pool.close()
