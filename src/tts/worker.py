"""A TTS worker: `python -m src.tts.worker --adapter piper --port 7001`.

Exit status: 0 after a signal and a clean drain, 1 if the default model cannot be loaded, 2 for a
configuration that cannot be used or a port that is taken.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from importlib import metadata
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from src.common.clock import MonotonicClock
from src.common.config import ConfigError
from src.common.logging import setup_logging
from src.common.memory import freeze_what_stays
from src.common.tasks import TaskGroup, cancel_and_wait
from src.rpc.announcement import (
    Announcement,
    Capabilities,
    Hardware,
    ModelEntry,
)
from src.rpc.announcement import WorkerMetrics as AnnouncedMetrics
from src.rpc.errors import DuplexError, UnknownName
from src.rpc.generated import tts_pb2, tts_pb2_grpc
from src.rpc.tls import TlsError, read_authorities, read_pair, server_fault
from src.tts.adapters import adapter_for
from src.tts.announce import Announcer
from src.tts.config import (
    TlsSettings,
    WorkerConfig,
    overrides_from,
    parser,
    read_catalog,
    worker_config,
)
from src.tts.leases import ModelState, ModelStatus
from src.tts.loader import ModelLoader
from src.tts.metrics import WorkerMetrics, serve_metrics
from src.tts.model_manager import ModelManager
from src.tts.pool import SynthesisPool
from src.tts.reload import Reloader, playout_policy
from src.tts.service import Identity, TTSService, languages_of
from src.tts.sessions import Sessions
from src.tts.sources import SourceResolver
from src.tts.tts_base import RANDOM_WEIGHTS
from src.tts.utterance import Stage

log = logging.getLogger("src.tts.worker")

SERVICE = tts_pb2.DESCRIPTOR.services_by_name["TTS"].full_name
# Shorter than the ten seconds after which `docker stop` kills.
DRAIN_MS = 8_000
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_OPTIONS = (
    # Otherwise a second worker on the same port would quietly get every other call.
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)


class PortTaken(RuntimeError):
    pass


class Worker:
    """All parts of one worker, put together. `run` lasts until `stop` is set."""

    def __init__(self, config: WorkerConfig, read_config: Callable[[], WorkerConfig]) -> None:
        settings = config.worker
        clock = MonotonicClock()
        self._config = config
        self._metrics = WorkerMetrics()
        self._loader = ModelLoader(
            adapter_for,
            SourceResolver(allow_hub=settings.allow_hub),
            device=settings.device,
            allow_fallback=settings.allow_fallback,
        )
        catalog = read_catalog(config)
        self._manager = ModelManager(
            catalog,
            config.model_manager,
            self._loader,
            clock=clock,
            observer=self._metrics,
        )
        self._pool = SynthesisPool(settings.synthesis_threads, settings.max_sessions)
        stage = Stage(
            self._pool, clock, self._metrics, playout_policy(settings), settings.loudness_dbfs
        )
        self._sessions = Sessions(self._manager, stage, settings.max_sessions)
        self._reload = Reloader(config, read_config, self._manager, self._sessions)
        self._health = health_aio.HealthServicer()
        self._announcer = Announcer(config.redis.url, self._describe)
        default = catalog.get(config.model_manager.default_model_id)
        adapter = (
            self._loader.adapter_of(default)
            if settings.adapter == default.family
            else adapter_for(settings.adapter)
        )
        self._identity = Identity("", "", "", adapter.capabilities, "")
        self._addr = ""

    async def run(self, stop: asyncio.Event) -> None:
        """Raises PortTaken, and DuplexError if the default model cannot be loaded."""
        server = grpc.aio.server(options=_OPTIONS)
        port = _bind(server, self._config)
        self._know_thyself(port)
        self._register(server)
        await self._set_health(_NOT_SERVING)
        await server.start()
        try:
            await self._serve(stop)
        finally:
            await server.stop(grace=0.5)
            # A thread holds its model until it ends, and who is held is not unloaded.
            await asyncio.to_thread(self._pool.close)
            await self._manager.close()
            self._loader.close()

    def _know_thyself(self, port: int) -> None:
        settings = self._config.worker
        self._addr = settings.announced_addr(port)
        self._identity = Identity(
            name=settings.announced_name(port),
            adapter=settings.adapter,
            version=_version(),
            capabilities=self._identity.capabilities,
            device=settings.device,
        )
        _warn_of_another_name(settings.tls, self._addr)

    def _register(self, server: grpc.aio.Server) -> None:
        service = TTSService(self._identity, self._manager, self._sessions, self._reload)
        tts_pb2_grpc.add_TTSServicer_to_server(service, server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
        reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)

    async def _serve(self, stop: asyncio.Event) -> None:
        log.info("loading", extra={"addr": self._addr, "model_id": self._manager.default_model_id})
        # Before the models: what one of them leaves in cycles must be found when it is unloaded.
        freeze_what_stays()
        if not await _unless(stop, self._manager.start()):
            return
        self._metrics.fallback(bool(self._fallback_reason))
        metrics_port = self._serve_metrics()
        async with TaskGroup() as group:
            evictor = group.create_task(self._manager.run_evictor(), name="evictor")
            announcer = group.create_task(self._announcer.run(), name="announcer")
            await self._set_health(_SERVING)
            log.info(
                "ready",
                extra={
                    "worker": self._identity.name,
                    "addr": self._addr,
                    "metrics_port": metrics_port,
                },
            )
            await stop.wait()
            await self._drain()
            evictor.cancel()
            announcer.cancel()

    async def _drain(self) -> None:
        log.info("draining", extra={"sessions": len(self._sessions)})
        self._sessions.draining = True
        self._announcer.announce_now()
        await self._set_health(_NOT_SERVING)
        await self._sessions.drain(DRAIN_MS)

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ("", SERVICE):
            await self._health.set(name, status)

    def _serve_metrics(self) -> int | None:
        port = self._config.worker.metrics_port
        if port is None:
            return None
        try:
            return serve_metrics(self._metrics, self._config.worker.host, port)
        except OSError as error:
            raise PortTaken(f"metrics port {port} is taken: {error.strerror}") from error

    # --- the announcement ---

    @property
    def _fallback_reason(self) -> str:
        models = self._manager.list_catalog()
        return next((model.fallback_reason for model in models if model.is_default), "")

    def _describe(self) -> Announcement:
        settings, own, can = self._config.worker, self._identity, self._identity.capabilities
        models = self._manager.list_catalog()
        sessions, waiting = len(self._sessions), self._pool.waiting
        self._metrics.levels(sessions, waiting)
        return Announcement(
            name=own.name,
            addr=f"grpc://{self._addr}",
            tls=settings.tls.cert is not None,
            capabilities=Capabilities(
                zero_shot=can.zero_shot,
                lora=can.lora,
                cpu_ok=can.cpu_ok,
                languages=languages_of(models),
                emotive_zero_prompt=can.emotive_zero_prompt,
                fallback=bool(self._fallback_reason),
                fallback_reason=self._fallback_reason,
            ),
            hardware=Hardware(gpu=own.gpu),
            resident_models=[m.meta.model_id for m in models if m.state is ModelState.RESIDENT],
            metrics=AnnouncedMetrics(
                rtf=self._metrics.rtf,
                queue_depth=waiting,
                sessions=sessions,
                first_audio_p50_ms=self._metrics.first_audio_p50_ms,
            ),
            default_model=self._manager.default_model_id,
            models=[_entry(model) for model in models if offered(model)],
            max_sessions=settings.max_sessions,
            draining=self._sessions.draining,
            version=own.version,
        )


def offered(model: ModelStatus) -> bool:
    """Noise is offered only where somebody asked for it by name."""
    return RANDOM_WEIGHTS not in model.meta.tags or model.state is ModelState.RESIDENT


def _entry(model: ModelStatus) -> ModelEntry:
    meta = model.meta
    return ModelEntry(
        model_id=meta.model_id,
        family=meta.family,
        languages=list(model.languages or meta.languages),
        voices=list(model.voices or meta.voices),
        tags=meta.tags,
        cpu_ok=meta.cpu_ok,
        lora=meta.supports_lora,
        needs_gpu=meta.needs_gpu,
    )


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Do `work`, or give it up when asked to stop; False if given up."""
    task, stopped = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([task, stopped], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        return task.done()
    finally:
        await cancel_and_wait(stopped)
        await cancel_and_wait(task)


def _bind(server: grpc.aio.Server, config: WorkerConfig) -> int:
    address = f"{config.worker.host}:{config.worker.port}"
    credentials = _credentials(config.worker.tls)
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise PortTaken(
            f"port {config.worker.port} is taken, or {config.worker.host} is not an address of "
            "this machine: choose another with --port or --host"
        ) from error


def _credentials(tls: TlsSettings) -> grpc.ServerCredentials | None:
    if tls.cert is None or tls.key is None:
        return None
    try:
        pair = read_pair(tls.cert, tls.key, "worker.tls.cert", "worker.tls.key")
        root = read_authorities(tls.ca, "worker.tls.ca") if tls.ca else None
    except TlsError as error:
        raise ConfigError(str(error)) from error
    return grpc.ssl_server_credentials(
        [pair], root_certificates=root, require_client_auth=root is not None
    )


def _warn_of_another_name(tls: TlsSettings, addr: str) -> None:
    """Not an error: plug-ins may dial it by other names than the announced one."""
    if tls.cert is None or tls.key is None:
        return
    fault = server_fault(tls.cert, tls.key, addr.rpartition(":")[0].strip("[]"))
    if fault:
        log.warning(
            "orchestrators will refuse this certificate: %s "
            "(worker.advertise_addr has to be a subjectAltName)",
            fault,
            extra={"addr": addr, "cert": str(tls.cert)},
        )


def _version() -> str:
    try:
        return metadata.version("realtime-duplex-voice")
    except metadata.PackageNotFoundError:
        return "0.1.0"


async def _serve(config: WorkerConfig, read_config: Callable[[], WorkerConfig]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, stop.set)
    await Worker(config, read_config).run(stop)


def _use_uvloop() -> None:
    try:
        import uvloop
    except ImportError:
        return
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        config = _read(args)
        setup_logging(config.worker.log_level)
        _use_uvloop()
        asyncio.run(_serve(config, lambda: _read(args)))
    except (ConfigError, UnknownName, PortTaken) as error:
        print(error, file=sys.stderr)
        return 2
    except DuplexError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _read(args: argparse.Namespace) -> WorkerConfig:
    return worker_config(args.config, overrides_from(args))


if __name__ == "__main__":
    sys.exit(main())
