"""A real livekit-server on the loopback, for `just up`, tests and benchmarks.

It takes three ports of its own, listens on 127.0.0.1 only and dies with its parent. Where the
binary comes from: `just livekit-server` builds it (deploy/livekit-server/), or it is in PATH.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from src.common.processes import Child, ProcessFailed, free_port

VERSION = "1.13.4"
DEFAULT_PORT = 7880
DEV_KEY = "devkey"
READY_S = 20.0
_ANY_PORT_TRIES = 5
_STOP_GRACE_S = 0.5
HOW_TO_GET = (
    "no livekit-server on this machine: `just livekit-server` builds one (needs Go), or "
    "`docker run --rm --network host livekit/livekit-server --dev`"
)


class LiveKitUnavailable(RuntimeError):
    """No livekit-server could be found or started; the message says what to do."""


@dataclass(frozen=True)
class LiveKitPorts:
    http: int
    tcp: int
    udp: int

    @classmethod
    def free(cls) -> LiveKitPorts:
        return cls(free_port(), free_port(), free_port())


FIXED_PORTS = LiveKitPorts(http=DEFAULT_PORT, tcp=7881, udp=7882)


class LiveKitServer:
    """A running server. Made by `start`; `kill` and `restart` are what tests do to it."""

    def __init__(
        self, binary: Path, child: Child, ports: LiveKitPorts, log: Path, api_secret: str
    ) -> None:
        self._binary = binary
        self._child = child
        self.ports = ports
        self.log = log
        self.api_key, self.api_secret = DEV_KEY, api_secret

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.ports.http}"

    @property
    def environ(self) -> dict[str, str]:
        """What a LiveKit client library reads."""
        return {
            "LIVEKIT_URL": self.url,
            "LIVEKIT_API_KEY": self.api_key,
            "LIVEKIT_API_SECRET": self.api_secret,
        }

    @property
    def child(self) -> Child:
        return self._child

    @classmethod
    async def start(cls, log: Path, ports: LiveKitPorts | None = None) -> LiveKitServer:
        """Returns when it answers; on free ports if none are given. Raises LiveKitUnavailable."""
        binary = find_binary()
        # Not `--dev`'s own "secret": any page in a local browser could make itself a token with it.
        api_secret = secrets.token_urlsafe(32)
        tries = [ports] if ports else [LiveKitPorts.free() for _ in range(_ANY_PORT_TRIES)]
        for ports in tries:
            try:
                child = await _launch(binary, ports, log, api_secret)
            except LiveKitUnavailable:  # somebody took a port in between
                if ports is tries[-1]:
                    raise
            else:
                return cls(binary, child, ports, log, api_secret)
        raise AssertionError("the last try returns or raises")

    async def kill(self) -> None:
        """SIGKILL: the way a server dies that nobody expected to."""
        with suppress(ProcessLookupError):
            os.kill(self._child.pid, signal.SIGKILL)
        await self._child.wait()

    async def restart(self) -> None:
        """On the same ports, after `kill`."""
        self._child = await _launch(self._binary, self.ports, self.log, self.api_secret)

    async def close(self) -> None:
        """Idempotent. Asked to stop, it waits for its rooms to empty, and just after its start it
        does not hear: it has nothing to lose, so it is not waited for."""
        await self._child.stop(grace_s=_STOP_GRACE_S)


async def _launch(binary: Path, ports: LiveKitPorts, log: Path, api_secret: str) -> Child:
    argv = [str(binary), "--dev", "--node-ip", "127.0.0.1"]
    # Not an argument: everybody on the machine can read those.
    env = {"LIVEKIT_CONFIG": json.dumps(_config(ports, api_secret))}
    child = await Child.start("livekit-server", argv, log=log, env=env)
    try:
        await child.ready(lambda: _answers(ports.http), READY_S)
    except ProcessFailed as error:
        await child.stop()
        raise LiveKitUnavailable(str(error)) from error
    return child


def _config(ports: LiveKitPorts, api_secret: str) -> dict[str, object]:
    """JSON is YAML. Without the filters it would also offer the machine's other addresses."""
    return {
        "port": ports.http,
        "keys": {DEV_KEY: api_secret},
        "bind_addresses": ["127.0.0.1"],
        "rtc": {
            "tcp_port": ports.tcp,
            "udp_port": ports.udp,
            "use_external_ip": False,
            "enable_loopback_candidate": True,
            "interfaces": {"includes": ["lo"]},
            "ips": {"includes": ["127.0.0.1/32"]},
        },
        "logging": {"level": "info", "json": False},
    }


async def _answers(port: int) -> bool:
    with suppress(OSError):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
        return True
    return False


def find_binary() -> Path:
    """LIVEKIT_SERVER, PATH, then the cache of `just livekit-server`. Raises LiveKitUnavailable."""
    if named := os.environ.get("LIVEKIT_SERVER"):
        if not os.access(named, os.X_OK):
            raise LiveKitUnavailable(f"LIVEKIT_SERVER={named}: no such program")
        return Path(named)
    if found := shutil.which("livekit-server"):
        return Path(found)
    cached = cache_path()
    if os.access(cached, os.X_OK):
        return cached
    raise LiveKitUnavailable(HOW_TO_GET)


def cache_path() -> Path:
    """Where `just livekit-server` puts what it builds."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "duplex-voice" / "livekit-server" / f"livekit-server-{VERSION}"
