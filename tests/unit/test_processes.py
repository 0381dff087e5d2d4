from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

import grpc
import pytest

from src.common.processes import Child, ProcessFailed, free_port, is_free


async def never() -> bool:
    return False


async def test_a_child_that_ends_before_it_is_ready_shows_the_end_of_its_log(
    tmp_path: Path,
) -> None:
    argv = [sys.executable, "-c", "print('no such voice'); raise SystemExit(3)"]
    child = await Child.start("worker", argv, log=tmp_path / "logs" / "worker.log")
    with pytest.raises(ProcessFailed, match=r"(?s)worker ended with status 3.*no such voice"):
        await child.ready(never, 30)
    await child.stop()


async def test_a_child_that_is_never_ready_fails_in_time_and_can_be_stopped(tmp_path: Path) -> None:
    child = await Child.start(
        "sleeper", [sys.executable, "-c", "import time; time.sleep(60)"], log=tmp_path / "log"
    )
    with pytest.raises(ProcessFailed, match="was not ready"):
        await child.ready(never, 0.2)
    assert child.running
    await child.stop()
    await child.stop()
    assert not child.running


async def test_a_child_that_does_not_hear_is_killed_after_its_grace(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); "
    child = await Child.start(
        "deaf", [sys.executable, "-c", deaf + "time.sleep(60)"], log=tmp_path / "log"
    )

    async def deafened() -> bool:
        return "deaf" in child.log.read_text()

    await child.ready(deafened, 30)
    await child.stop(grace_s=0.05)
    assert await child.wait() == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="optional: parent death signals are Linux's")
async def test_a_child_does_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import asyncio, sys, pathlib\n"
        "from src.common.processes import Child\n"
        "async def main():\n"
        "    c = await Child.start('c', [sys.executable, '-c', 'import time; time.sleep(60)'],"
        f" log=pathlib.Path({str(tmp_path / 'log')!r}))\n"
        "    print(c.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    parent.kill()
    await parent.wait()
    for _ in range(500):
        if not _alive(pid):
            return
        await asyncio.sleep(0.02)
    raise AssertionError("the child is still there")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie that nobody has reaped yet is dead enough.
    return "Z" not in Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1][:3]


async def test_children_start_while_grpc_works(tmp_path: Path) -> None:
    """A plain fork would lose one in fifteen."""
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await channel.channel_ready()
        ended = [
            await (await Child.start("true", ["true"], log=tmp_path / "log")).wait()
            for _ in range(80)
        ]
    await server.stop(0)
    assert ended == [0] * 80


async def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    child = await Child.start("nobody", ["no-such-program"], log=tmp_path / "log")
    with pytest.raises(ProcessFailed, match="no-such-program: No such file"):
        await child.ready(never, 30)


def test_a_port_is_free_until_somebody_listens() -> None:
    port = free_port()
    assert is_free(port)
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))
        server.listen()
        assert not is_free(port)


def test_free_ports_are_different_and_not_those_that_connections_begin_at() -> None:
    ports = [free_port() for _ in range(50)]
    assert len(set(ports)) == 50
    assert all(15_000 <= port < 32_000 and is_free(port) for port in ports)
