"""Which LiveKit server `just up` serves rooms of, and what it says when there is none."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from src.common.livekit_server import LiveKitServer, LiveKitUnavailable, find_binary
from src.demo.stack import Ports, Stack, find_rooms


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Stack:
    for name in ("LIVEKIT_URL", "LIVEKIT_API_KEY", "LIVEKIT_API_SECRET"):
        monkeypatch.delenv(name, raising=False)
    return Stack(Ports.free(), "espeak-en", False, "redis://127.0.0.1:1", "", {})


@pytest.fixture
async def cleanup() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def test_a_server_of_its_own_when_there_is_a_binary(
    stack: Stack, tmp_path: Path, cleanup: AsyncExitStack
) -> None:
    try:
        find_binary()
    except LiveKitUnavailable as error:
        pytest.skip(str(error))
    said: list[str] = []
    await find_rooms(stack, tmp_path, said.append, cleanup)
    assert stack.livekit is not None
    assert stack.livekit["LIVEKIT_URL"] == f"ws://127.0.0.1:{stack.ports.livekit.http}"
    assert stack.children["livekit-server"].running
    assert stack.livekit["LIVEKIT_API_SECRET"] not in "".join(said)


async def test_the_server_that_the_environment_names(
    stack: Stack, tmp_path: Path, cleanup: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIVEKIT_URL", "wss://voice.example.org")
    monkeypatch.setenv("LIVEKIT_API_SECRET", "not to be said")
    said: list[str] = []
    await find_rooms(stack, tmp_path, said.append, cleanup)
    assert stack.livekit is not None
    assert stack.livekit["LIVEKIT_URL"] == "wss://voice.example.org"
    assert not stack.children
    assert "not to be said" not in "".join(said)


async def test_without_a_binary_it_says_how_to_get_one(
    stack: Stack, tmp_path: Path, cleanup: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LIVEKIT_SERVER", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said: list[str] = []
    await find_rooms(stack, tmp_path, said.append, cleanup)
    assert stack.livekit is None
    assert len(said) == 1
    assert "just livekit-server" in said[0]
    assert "WebSocket only" in said[0]


async def test_a_taken_port_is_no_failure(
    stack: Stack, tmp_path: Path, cleanup: AsyncExitStack, livekit: LiveKitServer
) -> None:
    taken = replace(stack.ports, livekit=livekit.ports)
    stack.ports = taken
    said: list[str] = []
    await find_rooms(stack, tmp_path, said.append, cleanup)
    assert stack.livekit is None
    assert f"port {livekit.ports.http} is taken" in said[0]
    assert "LIVEKIT_URL" in said[0]


async def test_a_server_that_cannot_start_is_no_failure(
    stack: Stack, tmp_path: Path, cleanup: AsyncExitStack
) -> None:
    try:
        find_binary()
    except LiveKitUnavailable as error:
        pytest.skip(str(error))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", stack.ports.livekit.udp))
        said: list[str] = []
        await find_rooms(stack, tmp_path, said.append, cleanup)
    assert stack.livekit is None
    assert "WebSocket only" in said[0]
