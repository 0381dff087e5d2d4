"""A speech server on the loopback: real sockets, a thread of its own, doing what a test tells."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from aiohttp import web

from src.audio.pcm import Float32, to_int16

RATE = 24_000
PATIENCE_S = 20.0


def tone(ms: int, rate: int = RATE, hz: float = 220.0) -> Float32:
    samples: Float32 = (0.3 * np.sin(2 * np.pi * hz * np.arange(rate * ms // 1000) / rate)).astype(
        np.float32
    )
    return samples


def pcm(ms: int, rate: int = RATE) -> bytes:
    return to_int16(tone(ms, rate)).tobytes()


def wav(
    data: bytes,
    *,
    rate: int = RATE,
    channels: int = 1,
    bits: int = 16,
    tag: int = 1,
    size: int | None = None,
    before: bytes = b"",
) -> bytes:
    """`size`: what the header says of the data; None: the truth. `before`: chunks before it."""
    block = channels * bits // 8
    form = struct.pack("<HHIIHH", tag, channels, rate, rate * block, block, bits)
    said = len(data) if size is None else size
    head = b"WAVE" + struct.pack("<4sI", b"fmt ", len(form)) + form + before
    head += struct.pack("<4sI", b"data", said)
    total = min(0xFFFFFFFF, len(head) + said)
    return b"RIFF" + struct.pack("<I", total) + head + data


@dataclass
class Asked:
    """One request as it came."""

    body: dict[str, Any]
    headers: Mapping[str, str]
    peer: Any
    sent: int = 0
    """Bytes of sound that the system has taken."""
    over: threading.Event = field(default_factory=threading.Event)
    """Its handler has ended, in whatever way."""
    lost: bool = False
    """The client hung up before the end."""


class Reply:
    """What a script does to answer one request."""

    def __init__(self, request: web.Request, asked: Asked) -> None:
        self.request = request
        self.asked = asked
        self.closes = False
        """The connection ends with the answer."""
        self._response: web.StreamResponse | None = None

    async def begin(
        self,
        kind: str = "audio/pcm",
        *,
        length: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """The head alone; chunked, unless the length is told."""
        self._response = web.StreamResponse(headers={"Content-Type": kind, **(headers or {})})
        if length is not None:
            self._response.content_length = length
        if self.closes:
            self._response.force_close()
        await self._response.prepare(self.request)

    async def send(self, data: bytes) -> None:
        if self._response is None:
            await self.begin()
        assert self._response is not None
        await self._response.write(data)
        self.asked.sent += len(data)

    def write_as_it_is(self, data: bytes) -> None:
        """Head and all, past the HTTP server."""
        assert self.request.transport is not None
        self.request.transport.write(data)

    async def refuse(
        self, status: int, text: str = "", kind: str = "application/json", **headers: str
    ) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self._response = web.Response(
            status=status, text=text, headers=named, content_type=kind or None
        )

    def die(self) -> None:
        """As a process that is killed: nothing more, not even an end."""
        transport = self.request.transport
        assert transport is not None
        transport.abort()

    def over(self) -> web.StreamResponse:
        return self._response or web.Response()


Script = Callable[[Reply], Awaitable[None]]


async def told(event: threading.Event) -> None:
    """Waits for what another thread sets."""
    while not event.is_set():  # noqa: ASYNC110
        await asyncio.sleep(0.002)


async def hangs(reply: Reply) -> None:
    """Never answers; ends when the client hangs up."""
    await asyncio.Event().wait()


async def speaks(reply: Reply) -> None:
    """100 ms, at once."""
    await reply.send(pcm(100))


class FakeSpeechServer:
    """Answers every request by `script`; a list of them is for one request each, then the last."""

    def __init__(self) -> None:
        self.script: Script = speaks
        self.scripts: list[Script] = []
        self.asked: list[Asked] = []
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._came = threading.Condition()

    def wait_for_request(self, number: int = 1) -> Asked:
        """The request with this number, from 1 on, once it has come."""
        with self._came:
            assert self._came.wait_for(lambda: len(self.asked) >= number, PATIENCE_S)
        return self.asked[number - 1]

    def connections(self) -> int:
        return len({asked.peer for asked in self.asked})

    def call(self, function: Callable[[], None]) -> None:
        """On the server's loop, from any thread."""
        self._loop.call_soon_threadsafe(function)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        peer = request.transport.get_extra_info("peername")
        # Else the system takes megabytes from a server whose client reads nothing.
        wire = request.transport.get_extra_info("socket")
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
        asked = Asked(json.loads(await request.read()), dict(request.headers), peer)
        with self._came:
            self.asked.append(asked)
            self._came.notify_all()
        reply = Reply(request, asked)
        script = self.scripts.pop(0) if self.scripts else self.script
        try:
            await script(reply)
            return reply.over()
        except (ConnectionError, asyncio.CancelledError):
            asked.lost = True
            raise
        finally:
            asked.over.set()

    async def _serve(self, ready: threading.Event, context: Any) -> None:
        app = web.Application()
        app.router.add_post("/v1/audio/speech", self._handle)
        # A client that hangs up cancels the handler: that is what the tests look at.
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        scheme = "https" if context else "http"
        host, port = runner.addresses[0][:2]
        self.url = f"{scheme}://{host}:{port}/v1/audio/speech"
        ready.set()
        await self._stop.wait()
        await runner.cleanup()

    @contextlib.contextmanager
    def running(self, context: Any = None) -> Iterator[FakeSpeechServer]:
        ready = threading.Event()
        thread = threading.Thread(
            target=lambda: self._loop.run_until_complete(self._serve(ready, context))
        )
        thread.start()
        try:
            assert ready.wait(PATIENCE_S)
            yield self
        finally:
            self.call(self._stop.set)
            thread.join()
            self._loop.close()
