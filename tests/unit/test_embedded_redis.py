"""The embedded registry is a real server process, so these tests start real ones."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis

from src.common import embedded_redis, processes
from src.common.embedded_redis import (
    Answer,
    EmbeddedRedis,
    RedisUnavailable,
    find_binary,
    redis_url_or_embedded,
    who_answers,
)


def _has_binary() -> bool:
    try:
        find_binary()
    except RedisUnavailable:
        return False
    return True


needs_binary = pytest.mark.skipif(not _has_binary(), reason="no valkey or redis server binary")


@asynccontextmanager
async def running(port: int = 0) -> AsyncIterator[EmbeddedRedis]:
    server = await EmbeddedRedis.start(port)
    try:
        yield server
    finally:
        await server.close()


@asynccontextmanager
async def listener(reply: bytes) -> AsyncIterator[int]:
    """Something on a port that answers every connection with `reply`, or with nothing."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(reply)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def gone(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def wait_until_gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not gone(pid):
        time.sleep(0.02)
    return gone(pid)


@needs_binary
async def test_serves_and_is_gone_after_close() -> None:
    async with running() as server:
        async with Redis.from_url(server.url) as client:
            await client.set("greeting", "hello")
            assert await client.get("greeting") == b"hello"
            assert (await client.config_get("save"))["save"] == ""
            assert (await client.config_get("bind"))["bind"] == "127.0.0.1"
        assert server.source == str(find_binary())
        pid, port = server.pid, server.port
    assert not server.running
    assert gone(pid)
    assert await who_answers(port=port) is Answer.NOBODY
    await server.close()


@needs_binary
async def test_two_on_any_port_do_not_collide() -> None:
    async with running() as first, running() as second:
        assert first.port != second.port


@needs_binary
async def test_a_port_held_by_another_redis_is_an_error_that_says_why() -> None:
    async with running() as first:
        with pytest.raises(
            RedisUnavailable, match=r"Failed listening on port|(?i:address already in use)"
        ):
            await EmbeddedRedis.start(first.port)
        assert first.running


@needs_binary
@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_dies_with_a_parent_that_is_killed() -> None:
    code = (
        "import asyncio, sys\n"
        "from src.common.embedded_redis import EmbeddedRedis\n"
        "async def main():\n"
        "    server = await EmbeddedRedis.start()\n"
        "    print(server.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not gone(pid)
    finally:
        parent.kill()
        parent.wait()
    assert wait_until_gone(pid)


async def test_without_a_binary_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embedded_redis, "_wheel_binary", lambda: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RedisUnavailable, match="uv sync") as caught:
        await EmbeddedRedis.start()
    assert "REDIS_URL" in str(caught.value)


async def test_a_server_that_ends_at_once_is_reported_with_its_last_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    binary = tmp_path / "valkey-server"
    binary.write_text("#!/bin/sh\necho 'cannot open the moon'\nexit 1\n")
    binary.chmod(0o755)
    monkeypatch.setattr(embedded_redis, "_wheel_binary", lambda: binary)
    with pytest.raises(RedisUnavailable, match="cannot open the moon"):
        await EmbeddedRedis.start()


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", Answer.OTHER),
        (b"", Answer.OTHER),
        (b"-NOAUTH Authentication required.\r\n", Answer.LOCKED),
        (b"-LOADING the dataset\r\n", Answer.REDIS),
    ],
)
async def test_tells_who_sits_on_a_port(reply: bytes, expected: Answer) -> None:
    async with listener(reply) as port:
        assert await who_answers(port=port) is expected


async def test_a_url_from_the_environment_is_taken_as_it_is() -> None:
    url = "redis://registry.example:6379/3"
    assert await redis_url_or_embedded(env={"REDIS_URL": url}) == (url, None)


@needs_binary
async def test_a_redis_that_already_runs_is_used() -> None:
    async with running() as server:
        url, started = await redis_url_or_embedded(port=server.port, env={})
        assert started is None
        assert url == server.url


@needs_binary
async def test_starts_its_own_where_others_look_for_it(free_port: int) -> None:
    url, started = await redis_url_or_embedded(port=free_port, env={})
    assert started is not None
    try:
        assert url == f"redis://127.0.0.1:{free_port}/0"
    finally:
        await started.close()


@needs_binary
async def test_two_that_start_together_share_one_server(free_port: int) -> None:
    results = await asyncio.gather(*(redis_url_or_embedded(port=free_port, env={}) for _ in "12"))
    servers = [server for _, server in results if server is not None]
    try:
        assert len(servers) == 1
        assert len({url for url, _ in results}) == 1
    finally:
        for server in servers:
            await server.close()


@needs_binary
async def test_who_loses_the_port_waits_until_the_winner_answers(
    free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = EmbeddedRedis.start

    async def lose(port: int) -> EmbeddedRedis:
        raise RedisUnavailable("Failed listening")

    monkeypatch.setattr(EmbeddedRedis, "start", lose)
    loser = asyncio.create_task(redis_url_or_embedded(port=free_port, env={}))
    await asyncio.sleep(0.1)
    winner = await start(free_port)
    try:
        assert await loser == (winner.url, None)
    finally:
        await winner.close()


@needs_binary
async def test_moves_to_a_free_port_when_a_stranger_holds_the_usual_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with listener(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        url, started = await redis_url_or_embedded(port=port, env={})
        assert started is not None
        await started.close()
        assert str(port) not in url
        assert f"REDIS_URL={url}" in caplog.text


@pytest.fixture
def free_port() -> int:
    return processes.free_port()


def run_cli(port: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "src.common.embedded_redis", "--port", str(port)],
        stdout=subprocess.PIPE,
        text=True,
    )


@needs_binary
async def test_command_line_runs_until_interrupted(free_port: int) -> None:
    process = run_cli(free_port)
    assert process.stdout is not None
    try:
        line = await asyncio.to_thread(process.stdout.readline)
        assert f"redis://127.0.0.1:{free_port}/0" in line
        assert await who_answers(port=free_port) is Answer.REDIS
        os.kill(process.pid, signal.SIGINT)
        assert await asyncio.to_thread(process.wait, 20) == 0
        assert await who_answers(port=free_port) is Answer.NOBODY
    finally:
        process.kill()
        process.wait()


@needs_binary
async def test_command_line_is_content_with_a_redis_that_runs() -> None:
    async with running() as server:
        process = run_cli(server.port)
        out, _ = await asyncio.to_thread(process.communicate, None, 20)
        assert process.returncode == 0
        assert "already answers" in out


async def test_command_line_refuses_a_port_that_a_stranger_holds() -> None:
    async with listener(b"SSH-2.0-x\r\n") as port:
        process = run_cli(port)
        out, _ = await asyncio.to_thread(process.communicate, None, 20)
        assert process.returncode == 2
        assert "not Redis" in out
