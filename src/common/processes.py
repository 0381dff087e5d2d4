"""Child processes that die with us, write to their own log, and say why when they end too soon."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from src.common.tasks import timeout

TAIL_LINES = 12
# Longer than a worker drains (src/tts/worker.py).
STOP_GRACE_S = 10.0
POLL_S = 0.05
_TIE = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
if os.getppid() != int(sys.argv[1]):  # it died before we asked
    os._exit(1)
signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and that would be inherited
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"{sys.argv[2]}: {error.strerror}")
"""
_LOWEST_PORT, _KERNELS_PORTS = 15_000, 32_000
_TRIES = 200
_given: set[int] = set()


class ProcessFailed(RuntimeError):
    """A child ended, or was not ready in time; the message ends with the last lines of its log."""


class Child:
    """One running child process."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.log = log
        self._process = process

    @classmethod
    async def start(
        cls, name: str, argv: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None
    ) -> Child:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as sink:
            process = await asyncio.create_subprocess_exec(
                *tied(argv),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sink,
                stderr=asyncio.subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                # Ctrl-C in a terminal is for the parent, which then stops its children in order.
                start_new_session=True,
            )
        return cls(name, process, log)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    async def ready(self, probe: Callable[[], Awaitable[bool]], timeout_s: float) -> None:
        """Poll `probe` until it is true. Raises ProcessFailed if the child ends, or is too late."""
        try:
            async with timeout(timeout_s):
                while not await probe():
                    if not self.running:
                        raise self._failed(f"ended with status {self._process.returncode}")
                    await asyncio.sleep(POLL_S)
        except asyncio.TimeoutError:  # the builtin's other name, but not before 3.11
            raise self._failed(f"was not ready after {timeout_s:.0f} s") from None

    async def wait(self) -> int:
        return await self._process.wait()

    async def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """SIGTERM, `grace_s` seconds to finish, then SIGKILL. Idempotent."""
        if not self.running:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            async with timeout(grace_s):
                await self._process.wait()
        except asyncio.TimeoutError:
            self._process.kill()
            await self._process.wait()

    def _failed(self, what: str) -> ProcessFailed:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        tail = "\n".join(f"  {line}" for line in lines[-TAIL_LINES:])
        return ProcessFailed(f"{self.name} {what}; the end of {self.log}:\n{tail}")


def tied(argv: Sequence[str]) -> list[str]:
    """`argv` for a child that is sent SIGTERM when we end, however we end (Linux; else as it is).

    The child asks for that itself and then becomes what it is to be. Not in a `preexec_fn`: that
    takes a fork, which gRPC's threads do not survive (one child of fifteen aborted, grpcio 1.85).
    """
    if sys.platform != "linux":
        return list(argv)
    return [sys.executable, "-I", "-S", "-c", _TIE, str(os.getpid()), *argv]


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody holds at this moment, and that this process was not given before.

    Below the range out of which the kernel takes the near ends of connections (32768 and up on
    Linux, 49152 and up elsewhere): a port of that range is soon somebody's.
    """
    for _ in range(_TRIES):
        port = random.randrange(_LOWEST_PORT, _KERNELS_PORTS)
        if port not in _given and is_free(port, host):
            _given.add(port)
            return port
    raise OSError(f"{_TRIES} ports of {host} were tried, and none is free")
