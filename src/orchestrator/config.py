"""The orchestrator's configuration: `configs/orchestrator.yaml`, environment and flags over it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, field_validator

from src.common.config import ConfigError, StrictModel, load_config
from src.orchestrator.asr import AsrSettings
from src.orchestrator.auth import refuse_open_door
from src.orchestrator.duplex_settings import DuplexSettings
from src.orchestrator.llm_context import LlmSettings
from src.orchestrator.rooms.settings import LiveKitSettings
from src.orchestrator.routing_policy import RoutingPolicy, load_policy
from src.orchestrator.vad import VadSettings
from src.orchestrator.worker_tls import WorkerTlsSettings
from src.orchestrator.ws_endpoint import EndpointLimits
from src.orchestrator.ws_inbound import InboundLimits
from src.orchestrator.ws_transport import OutboundLimits

DEFAULT_CONFIG = Path("configs/orchestrator.yaml")
HOW_TO_GET_ROOMS = (
    "set LIVEKIT_URL, LIVEKIT_API_KEY and LIVEKIT_API_SECRET (or `livekit:` in the configuration) "
    "and start with --livekit; `just livekit-server` makes a server on this machine"
)

_KEY_CHARACTERS = frozenset(
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!#$%&'*+-.^_`|~"
)


class TransportSettings(StrictModel):
    """`--ws` and `--livekit`, when either is given, choose instead."""

    webrtc: bool = False
    ws_fallback: bool = True


class ServerSettings(StrictModel):
    host: str = "127.0.0.1"
    port: int = Field(8080, ge=0, le=65535, description="0: any free port")
    api_keys: tuple[SecretStr, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    drain_ms: int = Field(5_000, ge=0)
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("api_keys")
    @classmethod
    def _fit_for_a_header(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        # A WebSocket subprotocol is the narrowest place that a key travels in (RFC 9110 token).
        for key in keys:
            secret = key.get_secret_value()
            if not secret or not _KEY_CHARACTERS.issuperset(secret):
                raise ValueError("an API key is made of letters, digits and !#$%&'*+-.^_`|~")
        return keys

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(key.get_secret_value() for key in self.api_keys)


class LimitSettings(StrictModel):
    """What a client may use up."""

    max_sessions: int = Field(64, ge=1)
    max_sessions_per_key: int = Field(16, ge=1)
    max_message_bytes: int = Field(256 * 1024, ge=4096)
    max_text_bytes: int = Field(64 * 1024, ge=1024)
    max_audio_ms: int = Field(1_000, ge=20)
    mic_burst_ms: int = Field(5_000, ge=200)
    events_per_s: int = Field(100, ge=1)
    max_bad_messages: int = Field(20, ge=1)
    send_queue_bytes: int = Field(512 * 1024, ge=64 * 1024)
    stall_ms: int = Field(10_000, ge=100)
    start_timeout_ms: int = Field(10_000, ge=100)
    heartbeat_ms: int = Field(20_000, ge=1_000)

    @property
    def endpoint(self) -> EndpointLimits:
        return EndpointLimits(
            inbound=InboundLimits(
                max_text_bytes=self.max_text_bytes,
                max_audio_ms=self.max_audio_ms,
                mic_burst_ms=self.mic_burst_ms,
                events_per_s=self.events_per_s,
                max_bad_messages=self.max_bad_messages,
            ),
            outbound=OutboundLimits(max_queue_bytes=self.send_queue_bytes, stall_ms=self.stall_ms),
            max_message_bytes=self.max_message_bytes,
            start_timeout_ms=self.start_timeout_ms,
            heartbeat_ms=self.heartbeat_ms,
        )


class TtsSettings(StrictModel):
    """How workers are called."""

    tls: WorkerTlsSettings = WorkerTlsSettings()


class RoutingSettings(StrictModel):
    """Which of `file`'s modes serves sessions that name none."""

    policy: str = "default"
    prefer_resident: bool | None = None
    file: Path = Path("configs/routing.yaml")

    def load(self) -> RoutingPolicy:
        """Raises ConfigError."""
        policy = load_policy(self.file)
        if self.policy not in policy.routing:
            known = ", ".join(sorted(policy.routing))
            raise ConfigError(f"routing.policy: {self.file} has no mode {self.policy!r}; {known}")
        if self.prefer_resident is None:
            return policy
        overrides = {
            f"routing.{mode}.prefer_resident": self.prefer_resident for mode in policy.routing
        }
        return load_policy(self.file, overrides)


class RedisSettings(StrictModel):
    url: str = Field("", description="empty: a Redis on this machine, or an embedded one")


class LlmHostSettings(StrictModel):
    websocket: bool = True
    grpc_port: int | None = Field(None, ge=0, le=65535, description="None: off; 0: any free port")

    @field_validator("grpc_port", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        """YAML reads a bare `off` as False."""
        return None if value is False or value == "off" else value


class RetentionSettings(StrictModel):
    audio: Literal[False] = False

    @field_validator("audio", mode="before")
    @classmethod
    def _only_off(cls, value: Any) -> Any:
        if value not in (False, "off"):
            raise ValueError("this build never keeps audio; `off` is the only choice")
        return False


class OrchestratorConfig(StrictModel):
    transport: TransportSettings = TransportSettings()
    server: ServerSettings = ServerSettings()
    livekit: LiveKitSettings = LiveKitSettings()
    limits: LimitSettings = LimitSettings()
    asr: AsrSettings = AsrSettings()
    vad: VadSettings = VadSettings()
    duplex: DuplexSettings = DuplexSettings()
    llm: LlmSettings = LlmSettings()
    llm_host: LlmHostSettings = LlmHostSettings()
    tts: TtsSettings = TtsSettings()
    routing: RoutingSettings = RoutingSettings()
    redis: RedisSettings = RedisSettings()
    retention: RetentionSettings = RetentionSettings()


def orchestrator_config(
    path: Path, flags: Mapping[str, Any] | None = None, environ: Mapping[str, str] = os.environ
) -> OrchestratorConfig:
    """Flags over environment over file. `flags`: dotted keys; None means not given.

    Raises ConfigError, also when the door would stand open.
    """
    laid = {**_from_environment(environ), **_given(flags or {})}
    config = load_config(path, OrchestratorConfig, laid)
    refuse_open_door(config.server.host, config.server.keys)
    return config.model_copy(update={"llm": config.llm.with_env(environ)})


def missing_for_rooms(settings: LiveKitSettings) -> list[str]:
    """The settings that rooms cannot do without and that are empty, by their environment names."""
    values = {
        "LIVEKIT_URL": settings.url,
        "LIVEKIT_API_KEY": settings.api_key,
        "LIVEKIT_API_SECRET": settings.api_secret.get_secret_value(),
    }
    return [name for name, value in values.items() if not value]


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if url := environ.get("REDIS_URL"):
        found["redis.url"] = url
    for name in ("url", "public_url", "api_key", "api_secret"):
        if value := environ.get(f"LIVEKIT_{name.upper()}"):
            found[f"livekit.{name}"] = value
    for name in ("ca", "cert", "key"):
        if value := environ.get(f"DUPLEX_TTS_TLS_{name.upper()}"):
            found[f"tts.tls.{name}"] = value
    if keys := environ.get("DUPLEX_API_KEY"):
        found["server.api_keys"] = [key.strip() for key in keys.split(",") if key.strip()]
    return found


def _given(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flags.items() if value is not None}


def parser() -> argparse.ArgumentParser:
    """The orchestrator's flags. One that is not given leaves the file's value alone."""
    flags = argparse.ArgumentParser(
        prog="python -m src.orchestrator.server",
        description="The orchestrator: transports, speech detection and recognition, sessions, "
        "routing. Every flag has its key in configs/orchestrator.yaml; flags win.",
        allow_abbrev=False,
    )
    flags.add_argument("--ws", action="store_true", help="serve the WebSocket and the HTTP API")
    flags.add_argument("--livekit", action="store_true", help="take sessions in LiveKit rooms")
    flags.add_argument("--config", type=_existing, default=DEFAULT_CONFIG, help="YAML file")
    flags.add_argument("--host", help="address to listen on; others than loopback need an API key")
    flags.add_argument("--port", type=int, help="port to listen on; 0: any free one")
    flags.add_argument("--log_level", choices=["debug", "info", "warning", "error"])
    return flags


def overrides_from(args: argparse.Namespace) -> dict[str, Any]:
    """Parsed flags as the dotted keys that `orchestrator_config` takes."""
    chosen = args.ws or args.livekit
    return {
        "transport.ws_fallback": args.ws if chosen else None,
        "transport.webrtc": args.livekit if chosen else None,
        "server.host": args.host,
        "server.port": args.port,
        "server.log_level": args.log_level,
    }


def _existing(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return path
