"""The orchestrator's process: how it starts, what it says when it cannot, and how it ends."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from src.common.embedded_redis import EmbeddedRedis
from src.common.processes import free_port
from src.rpc.announcement import Announcement

DEAF = "asr: {engine: /nowhere/at/all}\n"


class Running:
    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"

    async def readiness(self) -> tuple[int, dict[str, Any]]:
        async with aiohttp.ClientSession() as http, http.get(f"{self.url}/readyz") as answer:
            return answer.status, (await answer.json())["checks"]

    async def eventually(self, name: str, ok: bool) -> dict[str, Any]:
        """The check called `name`, once it is `ok` or is not."""
        for _ in range(600):
            try:
                _, checks = await self.readiness()
            except aiohttp.ClientError:
                checks = {}
            if checks and checks[name]["ok"] is ok:
                found: dict[str, Any] = checks[name]
                return found
            await asyncio.sleep(0.05)
        raise AssertionError(f"{name} never became {ok}; last: {checks}")


async def launch(
    config: Path, *argv: str, env: dict[str, str] | None = None
) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "src.orchestrator.server", "--config", str(config), *argv),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": "", "REDIS_URL": "redis://127.0.0.1:1/0", **(env or {})},
    )


async def refusal(config: Path, *argv: str) -> tuple[int, str]:
    process = await launch(config, *argv)
    _, err = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode or 0, err.decode()


@asynccontextmanager
async def running(config: Path, *argv: str, redis_url: str) -> AsyncIterator[Running]:
    port = free_port()
    env = {"REDIS_URL": redis_url}
    process = await launch(config, "--ws", "--port", str(port), *argv, env=env)
    try:
        yield Running(process, port)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "orchestrator.yaml"
    path.write_text(DEAF + "server: {drain_ms: 200}\n", encoding="utf-8")
    return path


def announce(name: str) -> Announcement:
    return Announcement(name=name, addr="grpc://127.0.0.1:1", resident_models=["m"])


async def test_a_taken_port_is_named(config: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        status, said = await refusal(config, "--ws", "--port", port)
    assert status == 2
    assert f"port {port}" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["--ws", "--host", "0.0.0.0"], "DUPLEX_API_KEY"),  # noqa: S104
        (["--livekit"], "LiveKit"),
    ],
)
async def test_what_cannot_start_says_why_and_exits_with_2(
    config: Path, argv: list[str], hint: str
) -> None:
    status, said = await refusal(config, *argv)
    assert (status, hint in said, "Traceback" in said) == (2, True, False)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("asr: {engine: whisper-tine.en}", "did you mean 'whisper-tiny.en'"),
        ("sever: {}", "did you mean 'server'"),
        ("routing: {policy: fastest}", "fastest"),
    ],
)
async def test_a_mistake_in_the_file_is_found_at_the_start(
    tmp_path: Path, text: str, hint: str
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text, encoding="utf-8")
    status, said = await refusal(path, "--ws", "--port", "0")
    assert (status, "Traceback" in said) == (2, False)
    assert hint in said


async def test_it_starts_without_redis_and_finds_it_when_it_comes(config: Path) -> None:
    port = free_port()
    async with running(config, redis_url=f"redis://127.0.0.1:{port}/0") as orchestrator:
        registry = await orchestrator.eventually("registry", False)
        assert "trying again" in registry["text"]
        status, checks = await orchestrator.readiness()
        assert status == 503
        assert "just run-tts-piper" in checks["workers"]["text"]
        redis = await EmbeddedRedis.start(port)
        try:
            await orchestrator.eventually("registry", True)
        finally:
            await redis.close()
        await orchestrator.eventually("registry", False)


async def test_without_a_recogniser_it_runs_and_says_so(config: Path) -> None:
    redis = await EmbeddedRedis.start()
    try:
        async with running(config, redis_url=redis.url) as orchestrator:
            recogniser = await orchestrator.eventually("recogniser", True)
            assert "none" in recogniser["text"]
            assert "/nowhere/at/all" in recogniser["text"]
    finally:
        await redis.close()


async def test_sigterm_tells_its_sessions_and_ends_cleanly(config: Path) -> None:
    redis = await EmbeddedRedis.start()
    try:
        async with running(config, redis_url=redis.url) as orchestrator:
            await orchestrator.eventually("recogniser", True)
            async with (
                aiohttp.ClientSession() as http,
                http.ws_connect(f"{orchestrator.url}/v1/session") as socket,
            ):
                orchestrator.process.send_signal(signal.SIGTERM)
                warning = json.loads((await socket.receive(timeout=10)).data)
                assert (warning["type"], warning["code"]) == ("error", "unavailable")
                while not socket.closed:
                    await socket.receive(timeout=10)
                assert socket.close_code == 4503
            _, err = await asyncio.wait_for(orchestrator.process.communicate(), 20)
            assert orchestrator.process.returncode == 0, err.decode()[-2000:]
            assert "Traceback" not in err.decode()
    finally:
        await redis.close()
