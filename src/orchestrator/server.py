"""`python -m src.orchestrator.server`: every part of the orchestrator, wired and kept running."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import grpc
from aiohttp import web

from src.common.clock import MonotonicClock
from src.common.config import ConfigError
from src.common.embedded_redis import RedisUnavailable, redis_url_or_embedded
from src.common.logging import setup_logging
from src.common.memory import freeze_what_stays
from src.common.tasks import TaskGroup
from src.orchestrator.app import make_app
from src.orchestrator.asr import make_recognizer
from src.orchestrator.auth import ApiKeys, SessionSlots
from src.orchestrator.config import (
    HOW_TO_GET_ROOMS,
    OrchestratorConfig,
    missing_for_rooms,
    orchestrator_config,
    overrides_from,
    parser,
)
from src.orchestrator.deaf import DeafRecognizer
from src.orchestrator.http_api import Check, HttpApi
from src.orchestrator.llm_bridge import make_bridge
from src.orchestrator.llm_host import HostHub
from src.orchestrator.metrics import Metrics
from src.orchestrator.ports import Recognizer, Transport, VoiceRequest
from src.orchestrator.registry import Registry
from src.orchestrator.router import SpeechRouter
from src.orchestrator.routing import HOW_TO_START
from src.orchestrator.routing_policy import RoutingPolicy
from src.orchestrator.session import DuplexSession
from src.orchestrator.vad import VoiceActivityDetector
from src.orchestrator.web_page import WebPage
from src.orchestrator.ws_endpoint import WsEndpoint
from src.rpc.errors import DuplexError, NotFound, Unavailable
from src.rpc.ws_events import SessionStart

if TYPE_CHECKING:
    from src.orchestrator.rooms.rooms import Rooms

log = logging.getLogger("src.orchestrator.server")

WEB_ROOT = Path(__file__).resolve().parents[1] / "client" / "web"
_DEFAULT_REDIS = "redis://127.0.0.1:6379/0"
_RESIDUE_S = 5.0


class CannotStart(Exception):
    """A sentence for the person who typed the command."""


class Orchestrator:
    """One process. `run` starts it, serves until `stop` is set, and drains. Raises ConfigError."""

    def __init__(self, config: OrchestratorConfig, policy: RoutingPolicy) -> None:
        self._config = config
        self._policy = policy
        self._worker_tls = config.tts.tls.load()
        self._clock = MonotonicClock()
        self._metrics = Metrics()
        self._keys = ApiKeys(config.server.keys)
        self._hosts = HostHub()
        self._bridge = make_bridge(config.llm, self._hosts)
        self._recognizer: Recognizer | None = None
        self._recogniser_note = "loading"
        self._registry_name = ""
        self._endpoint: WsEndpoint | None = None
        self._rooms: Rooms | None = None
        self._stop = asyncio.Event()
        self._failure: CannotStart | None = None

    def stop(self) -> None:
        """Begin to drain. Idempotent."""
        self._stop.set()

    async def run(self, ready: Callable[[int], None] = lambda port: None) -> None:
        """`ready` is told the port once it is open. Raises CannotStart."""
        async with AsyncExitStack() as cleanup:
            cleanup.push_async_callback(self._bridge.aclose)
            registry = self._registry = await self._connect(cleanup)
            owner = f"orchestrator@{socket.gethostname()}"
            self._speech = SpeechRouter(registry, self._policy, owner=owner, tls=self._worker_tls)
            cleanup.push_async_callback(self._speech.aclose)
            self._metrics.count_workers(lambda: len(registry.view()))
            self._open_transports()
            site, port = await self._listen(cleanup)
            await self._open_host_port(cleanup)
            async with TaskGroup() as tasks:
                background = [
                    tasks.create_task(registry.run(), name="registry"),
                    tasks.create_task(self._load_recognizer(cleanup), name="recogniser"),
                ]
                if self._rooms is not None:
                    background.append(tasks.create_task(self._rooms.run(), name="rooms"))
                ready(port)
                await self._stop.wait()
                await site.stop()
                await self._drain()
                await self._hosts.aclose()
                for task in background:
                    task.cancel()
        if self._failure is not None:
            raise self._failure

    # --- parts ---

    def _open_transports(self) -> None:
        """Both count in the same slots. Raises CannotStart."""
        limits, transport = self._config.limits, self._config.transport
        slots = SessionSlots(limits.max_sessions, limits.max_sessions_per_key)
        if transport.ws_fallback:
            self._endpoint = WsEndpoint(
                self._make_session, slots, limits.endpoint, self._metrics, self._clock
            )
        if transport.webrtc:
            self._rooms = self._make_rooms(slots)

    def _make_rooms(self, slots: SessionSlots) -> Rooms:
        """Only here is LiveKit's SDK imported: who has no rooms does without it."""
        from src.orchestrator.rooms.agent_server import IncompatibleAgents
        from src.orchestrator.rooms.rooms import Rooms

        try:
            return Rooms(
                self._config.livekit,
                self._make_session,
                slots,
                self._metrics,
                self._clock,
                can_begin=self._need_recognizer,
            )
        except IncompatibleAgents as error:
            raise CannotStart(str(error)) from error

    async def _drain(self) -> None:
        drain_ms = self._config.server.drain_ms
        async with TaskGroup() as tasks:
            if self._endpoint is not None:
                log.info("draining", extra={"websockets": self._endpoint.live})
                tasks.create_task(self._endpoint.drain(drain_ms), name="websockets drain")
            if self._rooms is not None:
                log.info("draining", extra={"rooms": self._rooms.live})
                tasks.create_task(self._rooms.drain(drain_ms), name="rooms drain")

    async def _listen(self, cleanup: AsyncExitStack) -> tuple[web.TCPSite, int]:
        server = self._config.server
        livekit_url = self._config.livekit.client_url if self._rooms else ""
        api = HttpApi(
            keys=self._keys,
            checks=self._checks(),
            metrics=self._metrics,
            models=self._speech,
            page=WebPage(WEB_ROOT, livekit_url),
            rooms=self._rooms,
            no_rooms=f"no LiveKit rooms here: {HOW_TO_GET_ROOMS}",
            websocket=self._endpoint is not None,
        )
        hosts = self._hosts.ws_handler(self._keys.accepts)
        app = make_app(
            api=api,
            sessions=self._endpoint,
            keys=self._keys,
            metrics=self._metrics,
            allowed_origins=server.allowed_origins,
            llm_host=hosts if self._config.llm_host.websocket else None,
        )
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=_RESIDUE_S)
        await runner.setup()
        cleanup.push_async_callback(runner.cleanup)
        site = web.TCPSite(runner, server.host, server.port)
        try:
            await site.start()
        except OSError as error:
            raise _port_trouble(server.host, server.port, error) from error
        return site, int(runner.addresses[0][1])

    async def _open_host_port(self, cleanup: AsyncExitStack) -> None:
        port = self._config.llm_host.grpc_port
        if port is None:
            return
        server = grpc.aio.server()
        self._hosts.add_to_grpc(server, self._keys.accepts)
        try:
            port = server.add_insecure_port(f"{self._config.server.host}:{port}")
        except RuntimeError as error:
            raise CannotStart(f"llm_host.grpc_port {port} cannot be opened: {error}") from error
        await server.start()
        cleanup.push_async_callback(server.stop, 1.0)
        log.info("language model hosts may connect by gRPC", extra={"port": port})

    async def _connect(self, cleanup: AsyncExitStack) -> Registry:
        """The registry's view, empty at first; workers appear as they are heard of."""
        url = self._config.redis.url
        try:
            url, embedded = await redis_url_or_embedded(env={"REDIS_URL": url} if url else {})
        except RedisUnavailable as error:
            log.error("no registry yet", extra={"reason": str(error)})
            url, embedded = _DEFAULT_REDIS, None
        if embedded is not None:
            cleanup.push_async_callback(embedded.close)
        try:
            registry = Registry(url, self._clock)
        except ValueError as error:
            raise CannotStart(f"redis.url: {error}") from error
        cleanup.push_async_callback(registry.aclose)
        parts = urlsplit(url)
        self._registry_name = f"{parts.hostname}:{parts.port or 6379}"
        return registry

    async def _load_recognizer(self, cleanup: AsyncExitStack) -> None:
        settings = self._config.asr
        log.info("recogniser loads", extra={"engine": settings.engine, "backend": settings.backend})
        began_ms = self._clock.now_ms()
        try:
            recognizer = await asyncio.to_thread(make_recognizer, settings)
        except (NotFound, Unavailable) as error:
            log.warning("no recogniser: speech is noticed, not understood: %s", error)
            recognizer, self._recogniser_note = DeafRecognizer(), f"none: {error}"
        except (DuplexError, ValueError, RuntimeError, OSError) as error:
            # The engines raise the last three for a device or compute type that is not there.
            self._give_up(CannotStart(f"asr: {error}"))
            return
        else:
            self._recogniser_note = recognizer.name
        await asyncio.to_thread(VoiceActivityDetector, self._config.vad)
        cleanup.push_async_callback(recognizer.aclose)
        self._recognizer = recognizer
        freeze_what_stays()
        took_ms = round(self._clock.now_ms() - began_ms)
        log.info("recogniser is ready", extra={"engine": recognizer.name, "took_ms": took_ms})

    def _give_up(self, failure: CannotStart) -> None:
        self._failure = failure
        self.stop()

    # --- readiness ---

    def _checks(self) -> dict[str, Callable[[], Check]]:
        checks = {
            "registry": self._check_registry,
            "workers": self._check_workers,
            "recogniser": self._check_recognizer,
            "language model": lambda: Check(True, self._bridge.name),
        }
        if (rooms := self._rooms) is not None:
            # Without them, a server that has its WebSocket still holds conversations.
            alone = self._endpoint is None
            checks["rooms"] = lambda: replace(rooms.check(), needed=alone)
        return checks

    def _check_registry(self) -> Check:
        stale_since_ms = self._registry.stale_since_ms
        if stale_since_ms is None:
            return Check(True, self._registry_name)
        away_s = (self._clock.now_ms() - stale_since_ms) / 1000
        text = f"{self._registry_name} has not answered for {away_s:.0f} s; trying again"
        # Routing goes on by the last view, if there ever was one.
        return Check(bool(self._registry.view()), text)

    def _check_workers(self) -> Check:
        refused = self._speech.refused()
        there = [v.name for v in self._registry.view() if not v.announcement.draining]
        names = [name for name in there if name not in refused]
        said = [*names, *(f"{name} is not called: {why}" for name, why in refused.items())]
        text = ", ".join(said) or f"no TTS worker is announced; {HOW_TO_START}"
        return Check(bool(names), text)

    def _check_recognizer(self) -> Check:
        return Check(self._recognizer is not None, self._recogniser_note)

    # --- sessions ---

    def _need_recognizer(self) -> Recognizer:
        """Raises Unavailable while it loads."""
        if self._recognizer is None:
            raise Unavailable("the recogniser is still loading", retry_after_ms=1_000)
        return self._recognizer

    def _make_session(
        self, session_id: str, start: SessionStart, transport: Transport
    ) -> DuplexSession:
        """Raises Unavailable while the recogniser loads."""
        recognizer = self._need_recognizer()
        return DuplexSession(
            session_id=session_id,
            transport=transport,
            speech=self._speech,
            request=self._request(session_id, start),
            recognizer=recognizer,
            asr=self._config.asr,
            bridge=self._bridge,
            vad=VoiceActivityDetector(self._config.vad),
            settings=self._config.duplex,
            clock=self._clock,
            observer=self._metrics.observer(),
        )

    def _request(self, session_id: str, start: SessionStart) -> VoiceRequest:
        unnamed = start.mode in ("", "default")
        return VoiceRequest(
            session_id=session_id,
            mode=self._config.routing.policy if unnamed else start.mode,
            model=start.model,
            voice=start.voice,
            language=start.language,
            codec=start.codec,
            settings=start.settings,
        )


def _port_trouble(host: str, port: int, error: OSError) -> CannotStart:
    if error.errno == errno.EADDRINUSE:
        return CannotStart(f"port {port} on {host} is taken; choose another with --port")
    return CannotStart(f"cannot listen on {host}:{port}: {error.strerror or error}")


async def serve(config: OrchestratorConfig, policy: RoutingPolicy) -> None:
    """Until SIGTERM or Ctrl-C; a second one does not wait. Raises CannotStart, ConfigError."""
    orchestrator = Orchestrator(config, policy)
    loop = asyncio.get_running_loop()
    main = asyncio.current_task()

    def on_signal() -> None:
        for name in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(name)
            loop.add_signal_handler(name, main.cancel if main else orchestrator.stop)
        orchestrator.stop()

    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, on_signal)

    def ready(port: int) -> None:
        where = f"{config.server.host or 'every interface'}:{port}"
        log.info("listening", extra={"at": where, "api_key": bool(config.server.keys)})

    await orchestrator.run(ready)


def choose_transports(config: OrchestratorConfig) -> OrchestratorConfig:
    """What can be served. Raises CannotStart when nothing is left."""
    transport = config.transport
    if not transport.webrtc:
        if not transport.ws_fallback:
            raise CannotStart("no transport: transport.ws_fallback and transport.webrtc are off")
        return config
    missing = missing_for_rooms(config.livekit)
    if not missing:
        return config
    without = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set"
    if not transport.ws_fallback:
        raise CannotStart(f"rooms need a LiveKit server, and {without}; or start with --ws")
    print(f"no LiveKit rooms: {without}. Starting with the WebSocket only", file=sys.stderr)
    websocket_only = transport.model_copy(update={"webrtc": False})
    return config.model_copy(update={"transport": websocket_only})


def run(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        config = orchestrator_config(args.config, overrides_from(args))
        setup_logging(config.server.log_level)
        config = choose_transports(config)
        policy = config.routing.load()
        _run_loop(serve(config, policy))
    except (ConfigError, CannotStart) as error:
        print(f"cannot start: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    return 0


def _run_loop(main: Coroutine[Any, Any, None]) -> None:
    if sys.platform == "win32":
        asyncio.run(main)
        return
    import uvloop

    uvloop.run(main)


if __name__ == "__main__":
    sys.exit(run())
