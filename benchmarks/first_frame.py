"""Text in to first frame at a gRPC client, less the engine's own time.

eSpeak speaks a short sentence; the client's clock runs from the first text chunk's write to the
first frame's arrival. The engine's share is the worker's own figure for the same utterance: the
growth of `tts_engine_first_chunk_ms` between two scrapes. With more than one session, the others
speak long texts meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import aiohttp
import grpc

from benchmarks.engine import EngineClock
from benchmarks.figures import Aim, Result, Row, Spread
from benchmarks.machine import now_ms
from benchmarks.stacks import REPLY, Bench
from src.common.processes import Child, free_port
from src.common.tasks import TaskGroup
from src.demo.stack import worker_argv, worker_serves
from src.rpc.generated import tts_pb2 as pb
from src.rpc.generated import tts_pb2_grpc
from tests.sentences import SENTENCES

MODEL = "espeak-en"
READY_S = 60.0
LISTEN_S = 0.3
WARM_UP = 3
SESSIONS = (1, 10, 50)


class Worker:
    """A worker by itself, and a client of it."""

    def __init__(self, stub: Any, engine: EngineClock) -> None:
        self._stub = stub
        self.engine = engine

    async def session(self) -> str:
        session_id = f"bench-{uuid4().hex[:8]}"
        await self._stub.StartSession(pb.StartSessionReq(session_id=session_id, model_id=MODEL))
        return session_id

    async def first_frame_ms(self, session_id: str, text: str) -> float:
        """Listens a little longer, then leaves."""
        began_ms = now_ms()
        call = self._stub.Synthesize(_text(session_id, text))
        await call.read()
        took_ms = now_ms() - began_ms
        await asyncio.sleep(LISTEN_S)
        call.cancel()
        return took_ms

    async def speak_for_ever(self) -> None:
        session_id = await self.session()
        while True:
            async for _ in self._stub.Synthesize(_text(session_id, REPLY)):
                pass


async def _text(session_id: str, text: str) -> AsyncIterator[pb.TextChunk]:
    yield pb.TextChunk(
        session_id=session_id, utterance_id=uuid4().hex[:8], text=text, is_final=True
    )


async def measure(bench: Bench) -> Result:
    port, metrics_port = free_port(), free_port()
    argv = worker_argv(MODEL, port, "--metrics_port", str(metrics_port))
    child = await Child.start("worker", argv, log=bench.logs / "text" / "worker.log")
    try:
        await child.ready(lambda: worker_serves(f"127.0.0.1:{port}"), READY_S)
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
            aiohttp.ClientSession() as http,
        ):
            stub = tts_pb2_grpc.TTSStub(channel)  # type: ignore[no-untyped-call]
            worker = Worker(stub, EngineClock(http, metrics_port))
            found = {count: await _probe(bench, worker, count) for count in SESSIONS}
    finally:
        await child.stop()
    return _result(found)


async def _probe(bench: Bench, worker: Worker, sessions: int) -> list[tuple[float, float]]:
    """(at the client, in the engine) for each utterance, while `sessions - 1` others speak."""
    count = 10 if bench.quick else 30
    async with TaskGroup() as group:
        others = [group.create_task(worker.speak_for_ever()) for _ in range(sessions - 1)]
        await asyncio.sleep(2.0 if others else 0.0)
        session_id = await worker.session()
        found = []
        for index in range(WARM_UP + count):
            await worker.engine.lap()
            took_ms = await worker.first_frame_ms(session_id, SENTENCES[index % len(SENTENCES)])
            found.append((took_ms, await worker.engine.lap()))
        for other in others:
            other.cancel()
    bench.report(f"  {sessions} sessions: {Spread.of(took for took, _ in found[WARM_UP:]).text(1)}")
    return found[WARM_UP:]


def _result(found: dict[int, list[tuple[float, float]]]) -> Result:
    rows = []
    for sessions, pairs in found.items():
        rows.append(
            Row(
                what="text → first frame at the client, less the engine's own time",
                sessions=sessions,
                aim=Aim(p50=5, p95=12),
                digits=1,
                spread=Spread.of(took - engine for took, engine in pairs),
            )
        )
        rows.append(
            Row(
                what="– with the engine (eSpeak)",
                sessions=sessions,
                digits=1,
                spread=Spread.of(took for took, _ in pairs),
            )
        )
    return Result(rows, raw={str(sessions): pairs for sessions, pairs in found.items()})
