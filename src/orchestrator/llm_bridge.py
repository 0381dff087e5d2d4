"""The bridge to the language model: which of the three ways, and the echo when there is none."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator, Mapping

from src.orchestrator.llm_context import Gates, LlmSettings
from src.orchestrator.llm_host import HostHub
from src.orchestrator.llm_openai import OpenAIBridge
from src.orchestrator.ports import Bridge, BridgeSession

__all__ = ["EchoBridge", "HostBridge", "LlmSettings", "make_bridge"]

log = logging.getLogger(__name__)


def make_bridge(
    settings: LlmSettings, hosts: HostHub, environ: Mapping[str, str] = os.environ
) -> Bridge:
    """An endpoint when one is named; otherwise whoever connects in; until then, an echo."""
    settings = settings.with_env(environ)
    if settings.base_url:
        bridge = OpenAIBridge(settings)
        log.info("language model: endpoint", extra={"llm": bridge.name})
        return bridge
    log.warning(
        "no language model: the agent repeats what it heard until a host connects; "
        "set LLM_BASE_URL (`just run-llm` starts a small one and prints the line)"
    )
    return HostBridge(settings, hosts)


class HostBridge:
    """A connected host if there is one when the session opens, the echo if there is none."""

    def __init__(self, settings: LlmSettings, hosts: HostHub) -> None:
        self._settings = settings
        self._hosts = hosts
        self._echo = EchoBridge()

    @property
    def name(self) -> str:
        return f"host:{', '.join(names)}" if (names := self._hosts.names) else self._echo.name

    async def open(self, session_id: str) -> BridgeSession:
        if not self._hosts.names:
            return await self._echo.open(session_id)
        return self._hosts.session(
            session_id,
            first_token_timeout_ms=self._settings.first_token_timeout_ms,
            idle_timeout_ms=self._settings.idle_timeout_ms,
        )

    async def aclose(self) -> None:
        await self._hosts.aclose()


class EchoBridge:
    name = "echo"

    async def open(self, session_id: str) -> BridgeSession:
        log.info("session without a language model", extra={"session_id": session_id})
        return EchoSession()

    async def aclose(self) -> None:
        pass


class EchoSession:
    """Says what it understood, so that ears and voice can be tried without a language model."""

    name = "echo"

    def __init__(self) -> None:
        self._gates = Gates()

    def respond(
        self, turn_id: str, text: str, *, speculative: bool = False
    ) -> AsyncGenerator[str, None]:
        gate = self._gates.open(turn_id)

        async def words() -> AsyncGenerator[str, None]:
            for word in ("You", " said:", *(f" {word}" for word in text.split())):
                await gate.passed()
                yield word

        return words()

    def hold(self, turn_id: str) -> None:
        self._gates.hold(turn_id)

    def go(self, turn_id: str) -> None:
        self._gates.go(turn_id)

    def commit(self, turn_id: str, user_text: str, heard_text: str, *, completed: bool) -> None:
        self._gates.drop(turn_id)

    async def aclose(self) -> None:
        pass
