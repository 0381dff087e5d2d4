"""What a worker leaves behind when it ends."""

from __future__ import annotations

import asyncio
import logging
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from src.common.processes import free_port
from src.rpc.generated import tts_pb2 as pb
from src.rpc.generated import tts_pb2_grpc
from src.tts.catalog import ROOT
from src.tts.config import worker_config
from src.tts.synthesis import Synthesis
from src.tts.worker import Worker

_ASK, _SERVING = health_pb2.HealthCheckRequest(), health_pb2.HealthCheckResponse.SERVING


async def test_a_thread_that_ends_late_keeps_no_model_in_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Synthesis.run

    def linger(self: Synthesis) -> None:
        run(self)
        time.sleep(1.0)

    monkeypatch.setattr(Synthesis, "run", linger)
    port = free_port()
    changed = {
        "worker.port": port,
        "worker.metrics_port": "off",
        "worker.catalog": str(ROOT / "configs" / "model_catalog.yaml"),
        "model_manager.default_model_id": "espeak-en",
        "redis.url": "",
    }
    config = worker_config(ROOT / "configs" / "worker.yaml", changed, environ={})
    stop = asyncio.Event()
    life = asyncio.create_task(Worker(config, lambda: config).run(stop))
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            while (await health.Check(_ASK, wait_for_ready=True)).status != _SERVING:
                assert not life.done(), life.result()
                await asyncio.sleep(0.02)
            stub = tts_pb2_grpc.TTSStub(channel)  # type: ignore[no-untyped-call]
            await stub.StartSession(pb.StartSessionReq(session_id="s", model_id="espeak-en"))
            text = pb.TextChunk(text="Hi.", is_final=True, session_id="s", utterance_id="u")
            assert [frame async for frame in stub.Synthesize(iter([text]))][-1].last
            await stub.EndSession(pb.EndSessionReq(session_id="s"))
    finally:
        with caplog.at_level(logging.INFO):
            stop.set()
            await life
    said = [record.getMessage() for record in caplog.records]
    assert "still held at the end, not unloaded" not in said
    assert "model unloaded" in said
