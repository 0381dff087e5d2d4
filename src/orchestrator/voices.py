"""The voice a session speaks with, and the next one that is made ready behind it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import Any

from src.common.tasks import timeout
from src.orchestrator.ports import SpeechProvider, SpeechSession, Transport, VoiceRequest
from src.rpc.errors import DuplexError
from src.rpc.ws_events import ModelStatus

log = logging.getLogger(__name__)

Spawn = Callable[[Coroutine[Any, Any, None], str], object]
"""Starts a task in the session's group."""

_CLOSE_S = 2.0


class Voices:
    """At most one voice in use and one waiting; every other lease is given back."""

    def __init__(
        self,
        provider: SpeechProvider,
        request: VoiceRequest,
        transport: Transport,
        spawn: Spawn,
    ) -> None:
        self._provider = provider
        self._spawn = spawn
        self._request = request
        self._transport = transport
        self._current: SpeechSession | None = None
        self._next: SpeechSession | None = None
        self._opened = 0

    @property
    def current(self) -> SpeechSession:
        if self._current is None:
            raise RuntimeError("the voice is not open")
        return self._current

    async def open(self) -> None:
        """Raises DuplexError."""
        self._current = await self._lease(self._request)

    async def prepare(self, model: str, voice: str) -> None:
        """Load another voice; the current one speaks meanwhile. Raises DuplexError."""
        self._report(model, voice, "loading")
        request = replace(self._request, model=model, voice=voice)
        try:
            speech = await self._lease(request)
        except DuplexError as error:
            self._report(model, voice, "failed", error.message)
            raise
        waiting, self._next = self._next, speech
        self._request = request
        self._report(speech.info.model, speech.info.voice, "ready")
        if waiting is not None:
            await _give_back(waiting)

    def take(self) -> SpeechSession:
        """The voice for the utterance that begins now. None is being spoken."""
        if self._next is not None:
            before, self._current, self._next = self.current, self._next, None
            self._spawn(_give_back(before), "give back the voice")
        return self.current

    async def reopen(self) -> None:
        """The worker of the current voice is gone: the same voice elsewhere. Raises DuplexError."""
        before, self._current = self.current, await self._lease(self._request)
        # In a task of its own: a worker that is gone takes its time to say nothing.
        self._spawn(_give_back(before), "give back the lost voice")

    async def aclose(self) -> None:
        for speech in (self._current, self._next):
            if speech is not None:
                await _give_back(speech)
        self._current = self._next = None

    async def _lease(self, request: VoiceRequest) -> SpeechSession:
        # A worker knows a session by its id, and one session has one model: each lease has its own.
        self._opened += 1
        if self._opened > 1:
            name = f"{self._request.session_id.partition('~')[0]}~{self._opened}"
            request = replace(request, session_id=name)
        return await self._provider.open(request)

    def _report(self, model: str, voice: str, state: Any, message: str = "") -> None:
        self._transport.send_event(
            ModelStatus(model=model, voice=voice, state=state, message=message)
        )


async def _give_back(speech: SpeechSession) -> None:
    with suppress(asyncio.TimeoutError):
        try:
            async with timeout(_CLOSE_S):
                await speech.aclose()
        except DuplexError as error:
            log.info("a lease could not be given back", extra={"code": error.code})
