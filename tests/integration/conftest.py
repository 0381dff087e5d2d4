"""Real processes on free ports, and a real registry."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from src.common import processes
from src.common.embedded_redis import EmbeddedRedis, RedisUnavailable
from src.common.livekit_server import LiveKitServer, LiveKitUnavailable
from src.rpc.generated import tts_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]
READY_S = 60.0
STOP_S = 20.0


@pytest.fixture
def free_port() -> Callable[[], int]:
    return processes.free_port


@pytest.fixture
async def redis_url() -> AsyncIterator[str]:
    try:
        server = await EmbeddedRedis.start()
    except RedisUnavailable as error:
        pytest.skip(str(error))
    yield server.url
    await server.close()


@pytest.fixture
async def livekit(tmp_path: Path) -> AsyncIterator[LiveKitServer]:
    """A server of the test's own, so that it may be killed."""
    try:
        server = await LiveKitServer.start(tmp_path / "livekit-server.log")
    except LiveKitUnavailable as error:
        pytest.skip(str(error))
    yield server
    await server.close()


@dataclass
class RunningWorker:
    """A worker process, ready to be called."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    channel: grpc.aio.Channel
    stub: tts_pb2_grpc.TTSStub

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    async def wait(self) -> int:
        """Exit status."""
        return await asyncio.to_thread(self.process.wait, STOP_S)

    async def health(self) -> int:
        stub = health_pb2_grpc.HealthStub(self.channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest())
        return int(answer.status)


class StartWorker(Protocol):
    async def __call__(self, *flags: str, ready: bool = True) -> RunningWorker:
        """`python -m src.tts.worker` with eSpeak, no registry and a free port unless `flags` say
        otherwise; returns when it is healthy, or at once without `ready`."""
        ...


@pytest.fixture
async def start_worker(tmp_path: Path) -> AsyncIterator[StartWorker]:
    workers: list[RunningWorker] = []

    async def start(*flags: str, ready: bool = True) -> RunningWorker:
        port = _port_in(flags) or processes.free_port()
        log = tmp_path / f"worker-{len(workers)}.log"
        worker = _launch(port, flags, log)
        workers.append(worker)
        if ready:
            await _until_serving(worker)
        return worker

    yield start
    for worker in workers:
        await worker.channel.close()
        if worker.process.poll() is None:
            worker.process.kill()
            worker.process.wait()


def _launch(port: int, flags: tuple[str, ...], log: Path) -> RunningWorker:
    defaults = {"--adapter": "espeak", "--redis_url": "", "--port": str(port)}
    if "--default_model" in flags:
        del defaults["--adapter"]
    missing = (part for pair in defaults.items() if pair[0] not in flags for part in pair)
    environ = {key: value for key, value in os.environ.items() if key != "REDIS_URL"}
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "src.tts.worker", *missing, *flags],
            cwd=ROOT,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=environ,
        )
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
    stub = tts_pb2_grpc.TTSStub(channel)  # type: ignore[no-untyped-call]
    return RunningWorker(process, port, log, channel, stub)


def _port_in(flags: tuple[str, ...]) -> int | None:
    return int(flags[flags.index("--port") + 1]) if "--port" in flags else None


async def _until_serving(worker: RunningWorker) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if worker.process.poll() is not None:
            break
        try:
            if await worker.health() == health_pb2.HealthCheckResponse.SERVING:
                return
        except grpc.aio.AioRpcError:
            pass
        await asyncio.sleep(0.05)
    pytest.fail(f"the worker did not become ready:\n{worker.log.read_text()}")
