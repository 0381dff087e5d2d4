"""Out to an OpenAI-compatible endpoint: chat/completions, streamed as server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from src.common.tasks import cancel_and_wait, timeout
from src.orchestrator.llm_context import (
    Conversation,
    Gate,
    Gates,
    LlmSettings,
    Message,
    SentenceStop,
)
from src.orchestrator.ports import BridgeSession
from src.rpc.errors import Unavailable

log = logging.getLogger(__name__)

_MAX_EVENT_BYTES = 1 << 20
_DRAIN_MS = 100
_STALE_CONNECTIONS = 3
_SETTLE_MS = 20
"""A llama.cpp slot is free again 5 ms after its client hung up (more on a busy machine). A request
that comes sooner gets another slot, without the conversation in its cache: 1.6 s, not 30 ms.
"""


class SseParser:
    """Bytes in, `data` payloads out (WHATWG server-sent events, without ids and retries).

    A field named `error`, as older llama.cpp servers send it, is handed out like `data`.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def push(self, chunk: bytes) -> list[str]:
        """Payloads that `chunk` completes. Raises Unavailable when one grows beyond 1 MiB."""
        text = self._rest + chunk
        # A final \r may be the first half of \r\n: it waits for the next chunk.
        keep = 1 if text.endswith(b"\r") else 0
        lines = text[: len(text) - keep].splitlines(keepends=True)
        whole = not lines or lines[-1].endswith((b"\n", b"\r"))
        self._rest = (b"" if whole else lines.pop()) + text[len(text) - keep :]
        if len(self._rest) > _MAX_EVENT_BYTES:
            raise Unavailable("the language model sent a line that never ends")
        return [payload for line in lines if (payload := self._line(line)) is not None]

    def _line(self, line: bytes) -> str | None:
        text = line.decode("utf-8", "replace").rstrip("\r\n")
        if not text:
            payload, self._data = "\n".join(self._data), []
            return payload or None
        field, _, value = text.partition(":")
        if field in ("data", "error"):
            self._data.append(value.removeprefix(" "))
        return None

    def end(self) -> list[str]:
        """What the last event holds when the stream ends without its blank line."""
        return [*self.push(b"\n"), *self.push(b"\n")]


@dataclass(frozen=True, slots=True)
class Delta:
    text: str
    finished: bool


def read_delta(payload: str) -> Delta:
    """One payload of a stream, or the whole body of an answer that was not streamed.

    Raises Unavailable on an error object and on anything that is not JSON.
    """
    if payload.strip() == "[DONE]":
        return Delta("", finished=True)
    try:
        message = json.loads(payload)
    except ValueError:
        raise Unavailable("the language model sent something that is not JSON") from None
    if not isinstance(message, dict):
        raise Unavailable("the language model sent something that is not a completion")
    if error := message.get("error"):
        raise Unavailable(f"the language model failed: {_reason(error)}")
    choice: dict[str, Any] = next(iter(message.get("choices") or ()), {})
    content = (choice.get("delta") or choice.get("message") or {}).get("content")
    return Delta(content if isinstance(content, str) else "", bool(choice.get("finish_reason")))


def _reason(error: object) -> str:
    text = error.get("message") if isinstance(error, dict) else error
    return str(text)[:200]


class OpenAIBridge:
    """One endpoint, one pool of kept-alive connections for all sessions."""

    def __init__(self, settings: LlmSettings) -> None:
        self._settings = settings
        self._url = _endpoint(settings.base_url)
        self.name = f"{settings.model}@{urlsplit(self._url).netloc}"
        self._http: aiohttp.ClientSession | None = None

    async def open(self, session_id: str) -> BridgeSession:
        session = OpenAISession(self.name, self._settings, _Endpoint(self._client(), self._url))
        if self._settings.warm_up:
            session.warm_up()
        return session

    def _client(self) -> aiohttp.ClientSession:
        # Made on first use: a client belongs to the event loop that it is made in.
        if self._http is None:
            key = self._settings.api_key.get_secret_value()
            self._http = aiohttp.ClientSession(
                headers={"Authorization": f"Bearer {key}"} if key else None,
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=self._settings.connect_timeout_ms / 1000
                ),
            )
        return self._http

    async def aclose(self) -> None:
        if self._http is not None:
            await self._http.close()
            self._http = None


class OpenAISession:
    def __init__(self, name: str, settings: LlmSettings, endpoint: _Endpoint) -> None:
        self.name = name
        self._settings = settings
        self._endpoint = endpoint
        self._conversation = Conversation(
            settings.system_prompt,
            settings.history_turns,
            settings.history_chars,
            settings.examples,
        )
        self._gates = Gates()
        self._warming: asyncio.Task[None] | None = None

    def respond(
        self, turn_id: str, text: str, *, speculative: bool = False
    ) -> AsyncGenerator[str, None]:
        body = self._body(self._conversation.prompt(text), self._settings.max_tokens)
        return self._reply(body, self._gates.open(turn_id))

    async def _reply(self, body: dict[str, Any], gate: Gate) -> AsyncGenerator[str, None]:
        stop = SentenceStop(self._settings.stop_after_sentences)
        limit_ms, doing = self._settings.first_token_timeout_ms, "begin to answer"
        async with aclosing(self._endpoint.stream(body)) as deltas:
            while (text := await self._next(deltas, limit_ms, doing)) is not None:
                passed = stop.push(text)
                if passed:
                    await gate.passed()
                    yield passed
                if stop.done:
                    return
                limit_ms, doing = self._settings.idle_timeout_ms, "go on"

    async def _next(self, deltas: AsyncIterator[str], limit_ms: int, doing: str) -> str | None:
        try:
            async with timeout(limit_ms / 1000):
                return await anext(deltas, None)
        except asyncio.TimeoutError:
            raise Unavailable(
                f"the language model at {self._endpoint.place} did not {doing} within {limit_ms} ms"
            ) from None

    def _body(self, messages: list[Message], max_tokens: int) -> dict[str, Any]:
        settings = self._settings
        body: dict[str, Any] = {
            "model": settings.model,
            "messages": messages,
            "stream": True,
            "temperature": settings.temperature,
            "max_tokens": max_tokens,
        }
        if settings.frequency_penalty:
            body["frequency_penalty"] = settings.frequency_penalty
        if settings.repeat_penalty is not None:
            body["repeat_penalty"] = settings.repeat_penalty
        return {**body, **settings.extra_body}

    def hold(self, turn_id: str) -> None:
        # What is not read stays in the socket, and its window stops the endpoint's writes.
        self._gates.hold(turn_id)

    def go(self, turn_id: str) -> None:
        self._gates.go(turn_id)

    def commit(self, turn_id: str, user_text: str, heard_text: str, *, completed: bool) -> None:
        self._gates.drop(turn_id)
        self._conversation.commit(user_text, heard_text, completed=completed)

    def warm_up(self) -> None:
        """Have the system prompt read before the first turn. A failure is the turn's to tell."""
        if self._warming is None:
            self._warming = asyncio.create_task(self._read_ahead(), name="llm-warm-up")

    async def _read_ahead(self) -> None:
        body = self._body(self._conversation.prompt("Hello."), max_tokens=1)
        try:
            async with (
                timeout(self._settings.first_token_timeout_ms / 1000),
                aclosing(self._endpoint.stream(body)) as deltas,
            ):
                async for _ in deltas:
                    pass
        except (Unavailable, asyncio.TimeoutError) as error:
            log.warning("the language model did not warm up", extra={"reason": str(error)})

    async def aclose(self) -> None:
        if self._warming is not None:
            await cancel_and_wait(self._warming)


class _Endpoint:
    """POST and the stream that comes back. Closing the stream closes the request."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self._http = http
        self._url = url
        self.place = urlsplit(url).netloc
        self._broken_off_at = float("-inf")

    async def stream(self, body: dict[str, Any]) -> AsyncGenerator[str, None]:
        """Text as it arrives, empty pieces left out. Raises Unavailable."""
        async with self._errors(), self._request(body) as response:
            if response.status != 200:
                raise await self._refusal(response)
            async with aclosing(_payloads(response)) as payloads:
                async for payload in payloads:
                    delta = read_delta(payload)
                    if delta.text:
                        yield delta.text
                    if delta.finished:
                        await _drain(response)
                        return
            raise Unavailable(f"the language model at {self.place} stopped in mid-answer")

    @asynccontextmanager
    async def _request(self, body: dict[str, Any]) -> AsyncIterator[aiohttp.ClientResponse]:
        since = asyncio.get_running_loop().time() - self._broken_off_at
        if since < _SETTLE_MS / 1000:
            await asyncio.sleep(_SETTLE_MS / 1000 - since)
        response = await self._post(body)
        try:
            yield response
        finally:
            # Only a connection whose answer was read to its end can serve again; closing any other
            # is what tells the endpoint to stop writing.
            if response.content.at_eof():
                response.release()
            else:
                response.close()
                self._broken_off_at = asyncio.get_running_loop().time()

    async def _post(self, body: dict[str, Any]) -> aiohttp.ClientResponse:
        for _ in range(_STALE_CONNECTIONS):
            try:
                return await self._http.post(self._url, json=body)
            except aiohttp.ClientConnectorError:
                raise
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                # A kept-alive connection that the server had closed meanwhile: take another.
                continue
        return await self._http.post(self._url, json=body)

    @asynccontextmanager
    async def _errors(self) -> AsyncIterator[None]:
        try:
            yield
        except aiohttp.ServerTimeoutError:
            raise Unavailable(f"no language model answers at {self.place}: time-out") from None
        except aiohttp.ClientConnectorError as error:
            reason = error.os_error.strerror or "connection failed"
            raise Unavailable(f"no language model answers at {self.place}: {reason}") from None
        except (aiohttp.ClientError, ConnectionError) as error:
            raise Unavailable(
                f"the language model at {self.place} broke off: {type(error).__name__}"
            ) from None

    async def _refusal(self, response: aiohttp.ClientResponse) -> Unavailable:
        if response.status in (401, 403):
            return Unavailable(
                f"the language model at {self.place} refuses the API key "
                f"({response.status}): set LLM_API_KEY"
            )
        if response.status == 404:
            return Unavailable(
                f"{self._url} does not exist (404): LLM_BASE_URL should end where "
                "/chat/completions begins, and LLM_MODEL name a model it has"
            )
        body = (await response.content.read(65_536)).decode("utf-8", "replace")
        return Unavailable(
            f"the language model at {self.place} answered {response.status}: {_error_text(body)}",
            retry_after_ms=_retry_after_ms(response),
        )


async def _payloads(response: aiohttp.ClientResponse) -> AsyncGenerator[str, None]:
    if response.content_type == "application/json":
        # It did not stream: one answer, whole.
        yield await response.text()
        return
    parser = SseParser()
    async for chunk in response.content.iter_any():
        for payload in parser.push(chunk):
            yield payload
    for payload in parser.end():
        yield payload


async def _drain(response: aiohttp.ClientResponse) -> None:
    """Read the few bytes after the last word, so that the connection can serve the next turn."""
    try:
        async with timeout(_DRAIN_MS / 1000):
            while not response.content.at_eof():
                await response.content.readany()
    except asyncio.TimeoutError:
        pass


def _error_text(body: str) -> str:
    try:
        parsed = json.loads(body)
    except ValueError:
        return body.strip()[:200] or "no reason given"
    error = parsed.get("error") if isinstance(parsed, dict) else None
    return _reason(error if error else body)


def _retry_after_ms(response: aiohttp.ClientResponse) -> int | None:
    value = response.headers.get("Retry-After", "")
    return int(value) * 1000 if value.isdigit() else None


def _endpoint(base_url: str) -> str:
    """`http://host:8091` and `http://host:8091/v1/` both mean the v1 API."""
    base = base_url.rstrip("/")
    if not urlsplit(base).path:
        base += "/v1"
    return base.removesuffix("/chat/completions") + "/chat/completions"
