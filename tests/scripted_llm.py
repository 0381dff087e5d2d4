"""An OpenAI-compatible endpoint that says what it is told, when it is told.

A real HTTP server, for tests and benchmarks: `python -m tests.scripted_llm --port 8099`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Script = Callable[[list[dict[str, str]]], "Answer"]


@dataclass(frozen=True)
class Answer:
    """One reply: its pieces and when they come."""

    pieces: Sequence[str]
    first_ms: int = 0
    gap_ms: int = 0
    status: int = 200
    error: str = ""
    """With a status: the refusal's message. Without: an error object after the pieces."""
    die: bool = False
    """Cut the connection after the pieces instead of ending the answer."""
    before: bytes = b""
    """Send this at once, before the wait for the first piece."""
    raw: bytes = b""
    """Send exactly this as the body, instead of the pieces."""
    content_type: str = "text/event-stream"


def words(text: str, *, first_ms: int = 0, gap_ms: int = 0) -> Answer:
    """A reply in pieces of one word."""
    split = text.split(" ")
    pieces = [split[0], *(f" {word}" for word in split[1:])]
    return Answer(pieces, first_ms=first_ms, gap_ms=gap_ms)


@dataclass
class ScriptedLlm:
    """Counts what it is asked, so that a test can look."""

    script: Script
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    peers: set[int] = field(default_factory=set)
    hung_up: int = 0
    """Answers whose client left before the end."""
    pieces_sent: int = 0
    base_url: str = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        if request.transport is not None:
            self.peers.add(request.transport.get_extra_info("peername")[1])
        answer = self.script(body["messages"])
        if answer.status != 200:
            return web.json_response({"error": {"message": answer.error}}, status=answer.status)
        try:
            return await self._stream(request, answer)
        except (ConnectionError, asyncio.CancelledError):
            self.hung_up += 1
            raise

    async def _stream(self, request: web.Request, answer: Answer) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": answer.content_type})
        await response.prepare(request)
        await response.write(answer.before)
        await asyncio.sleep(answer.first_ms / 1000)
        if answer.raw:
            await response.write(answer.raw)
        for index, piece in enumerate(answer.pieces):
            await asyncio.sleep(answer.gap_ms / 1000 if index else 0)
            await response.write(_event({"choices": [{"index": 0, "delta": {"content": piece}}]}))
            self.pieces_sent += 1
        if answer.die and request.transport is not None:
            request.transport.abort()
        elif answer.error:
            await response.write(_event({"error": {"message": answer.error}}))
        elif not answer.raw:
            end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
            await response.write(_event(end) + b"data: [DONE]\n\n")
        return response

    @asynccontextmanager
    async def serving(self, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[ScriptedLlm]:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.handle)
        # A handler is cancelled when its client leaves: that is how the script sees a hang-up.
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, host, port).start()
        self.base_url = f"http://{host}:{runner.addresses[0][1]}/v1"
        try:
            yield self
        finally:
            await runner.cleanup()


def _event(message: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(message).encode() + b"\n\n"


async def _main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8099)
    parser.add_argument("--first_ms", type=int, default=0, help="request to first word")
    parser.add_argument("--gap_ms", type=int, default=10, help="between words")
    parser.add_argument("--reply", default="", help="what it says; default: the question again")
    args = parser.parse_args(argv)

    def script(messages: list[dict[str, str]]) -> Answer:
        text = args.reply or f"You asked: {messages[-1]['content']}"
        return words(text, first_ms=args.first_ms, gap_ms=args.gap_ms)

    async with ScriptedLlm(script).serving(args.host, args.port) as llm:
        print(f"LLM_BASE_URL={llm.base_url}", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main())
