"""The worker's configuration: `configs/worker.yaml`, with the command line laid over it."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from src.common.config import ConfigError, StrictModel, load_config, parse_config
from src.common.names import nearest_hint
from src.rpc.errors import UnknownName
from src.tts.catalog import Catalog, load_catalog
from src.tts.tts_base import RANDOM_WEIGHTS

DEFAULT_CONFIG = Path("configs/worker.yaml")
DEFAULT_PORT = 7001


class TlsSettings(StrictModel):
    """Files for TLS on the gRPC port; with `ca`, clients must show a certificate (mTLS)."""

    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None

    @model_validator(mode="after")
    def _cert_and_key(self) -> TlsSettings:
        if (self.cert is None) != (self.key is None):
            raise ValueError("cert and key belong together: give both or neither")
        if self.ca is not None and self.cert is None:
            raise ValueError("ca (client certificates) needs cert and key as well")
        return self


class WorkerSettings(StrictModel):
    """The `worker` section."""

    name: str = Field(default="", description="empty: tts-<adapter>@<machine>:<port>")
    adapter: str = Field(default="", description="the family; empty: that of the default model")
    device: str = "cpu"
    host: str = "127.0.0.1"
    port: int = Field(default=DEFAULT_PORT, ge=0, le=65535, description="0: any free port")
    advertise_addr: str = Field(default="", description="host:port for others; empty: host:port")
    sample_rate: Literal[48000] = 48000
    frame_ms: Literal[20] = 20
    max_sessions: int = Field(default=100, ge=1)
    synthesis_threads: int = Field(default=2, ge=1)
    overflow: Literal["stall", "drop"] = "stall"
    queue_ms: int = Field(default=2_000, ge=100)
    burst_ms: int = Field(default=60, ge=20)
    lead_ms: int = Field(default=120, ge=20)
    loudness_dbfs: float | None = Field(default=-20.0, ge=-60.0, le=0.0, description="None: off")
    allow_fallback: bool = False
    allow_hub: bool = False
    voicepacks_dir: Path = Path("voicepacks")
    catalog: Path = Path("configs/model_catalog.yaml")
    metrics_port: int | None = Field(
        default=0, ge=0, le=65535, description="0: any free; None: off"
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    tls: TlsSettings = TlsSettings()

    @field_validator("loudness_dbfs", "metrics_port", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        """YAML reads a bare `off` as False."""
        return None if value is False or value == "off" else value

    @model_validator(mode="after")
    def _burst_within_lead(self) -> WorkerSettings:
        if self.burst_ms > self.lead_ms:
            raise ValueError(f"burst_ms {self.burst_ms} is more than lead_ms {self.lead_ms}")
        return self

    def announced_addr(self, port: int) -> str:
        """host:port that others dial, once the port is known."""
        return self.advertise_addr or f"{self.host}:{port}"

    def announced_name(self, port: int) -> str:
        return self.name or f"tts-{self.adapter}@{socket.gethostname()}:{port}"


class ModelManagerSettings(StrictModel):
    """The `model_manager` section (design document §4)."""

    default_model_id: str = ""
    preload_model_ids: list[str] = Field(default_factory=list)
    ttl_ms: int = Field(default=600_000, ge=0)
    min_residency_ms: int = Field(default=120_000, ge=0)
    evict_check_interval_ms: int = Field(default=30_000, ge=1)
    resident_cap: int = Field(default=3, ge=1)
    max_parallel_loads: int = Field(default=1, ge=1)
    lease_ttl_ms: int = Field(default=60_000, ge=1)

    @model_validator(mode="after")
    def _preloads_fit(self) -> ModelManagerSettings:
        wanted = {self.default_model_id, *self.preload_model_ids} - {""}
        if len(wanted) > self.resident_cap:
            raise ValueError(
                f"the default model and the preloads are {len(wanted)} models, and resident_cap "
                f"is {self.resident_cap}; raise resident_cap or preload fewer"
            )
        return self


class RedisSettings(StrictModel):
    url: str = Field(default="redis://127.0.0.1:6379", description="empty: announce nowhere")


class WorkerConfig(StrictModel):
    worker: WorkerSettings = WorkerSettings()
    model_manager: ModelManagerSettings = ModelManagerSettings()
    redis: RedisSettings = RedisSettings()


def worker_config(
    path: Path,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> WorkerConfig:
    """The configuration as it will run: flags over environment over file, default model settled.

    `overrides` maps dotted keys ("worker.port") to values; None means not given. Raises ConfigError
    and, for an adapter or a default model that the catalog does not have, UnknownName.
    """
    laid = {key: value for key, value in (overrides or {}).items() if value is not None}
    if environ.get("REDIS_URL"):
        laid.setdefault("redis.url", environ["REDIS_URL"])
    for part in TlsSettings.model_fields:
        if value := environ.get(f"WORKER_TLS_{part.upper()}"):
            laid[f"worker.tls.{part}"] = value
    # The file's adapter and default belong together: a flag for one drops the other.
    if "worker.adapter" in laid:
        laid.setdefault("model_manager.default_model_id", "")
    elif laid.get("model_manager.default_model_id"):
        laid["worker.adapter"] = ""
    config = load_config(path, WorkerConfig, laid)
    return _settled(config, read_catalog(config))


def read_catalog(config: WorkerConfig) -> Catalog:
    """The catalog that this configuration points to, packs included. Raises ConfigError."""
    return load_catalog(config.worker.catalog, config.worker.voicepacks_dir)


def _settled(config: WorkerConfig, catalog: Catalog) -> WorkerConfig:
    """Fill in the default model from the adapter, or the adapter from the default model."""
    adapter, default = config.worker.adapter, config.model_manager.default_model_id
    if not default:
        default = _first_of_family(adapter, catalog)
    family = catalog.get(default).family
    manager = {**config.model_manager.model_dump(), "default_model_id": default}
    return config.model_copy(
        update={
            "worker": config.worker.model_copy(update={"adapter": adapter or family}),
            "model_manager": parse_config(manager, ModelManagerSettings, where="model_manager"),
        }
    )


def _first_of_family(adapter: str, catalog: Catalog) -> str:
    if not adapter:
        raise ConfigError("neither worker.adapter nor model_manager.default_model_id is given")
    models = [meta for meta in catalog.of_family(adapter) if RANDOM_WEIGHTS not in meta.tags]
    if not models:
        hint = nearest_hint(adapter, catalog.families)
        raise UnknownName(f"no model of the family {adapter!r} in the catalog{hint}")
    return models[0].model_id


def parser() -> argparse.ArgumentParser:
    """The worker's flags. One that is not given leaves the file's value alone."""
    flags = argparse.ArgumentParser(
        prog="python -m src.tts.worker",
        description="A TTS worker. Every flag has its key in configs/worker.yaml; flags win.",
        allow_abbrev=False,
    )
    flags.add_argument("--config", type=_existing, default=DEFAULT_CONFIG, help="YAML file")
    for flag, (_, kind, text) in _FLAGS.items():
        if kind is bool:
            flags.add_argument(f"--{flag}", action=argparse.BooleanOptionalAction, help=text)
        else:
            flags.add_argument(f"--{flag}", type=kind, help=text)
    return flags


def overrides_from(args: argparse.Namespace) -> dict[str, Any]:
    """Parsed flags as the dotted keys that `worker_config` takes."""
    return {key: getattr(args, flag) for flag, (key, _, _) in _FLAGS.items()}


def _existing(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return path


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


_FLAGS: dict[str, tuple[str, Any, str]] = {
    "adapter": ("worker.adapter", str, "family; without --default_model its first model"),
    "name": ("worker.name", str, "name in the registry"),
    "device": ("worker.device", str, "cpu, cuda:0, …"),
    "host": ("worker.host", str, "address to listen on"),
    "port": ("worker.port", int, "gRPC port; 0: any free one"),
    "advertise_addr": ("worker.advertise_addr", str, "host:port that others dial"),
    "max_sessions": ("worker.max_sessions", int, "sessions at once"),
    "synthesis_threads": ("worker.synthesis_threads", int, "utterances synthesised at once"),
    "overflow": ("worker.overflow", str, "stall or drop when a reader is slow"),
    "allow_fallback": ("worker.allow_fallback", bool, "a stand-in voice for missing packages"),
    "allow_hub": ("worker.allow_hub", bool, "allow downloads from Hugging Face"),
    "voicepacks_dir": ("worker.voicepacks_dir", Path, "folder of <family>/<name>/ packs"),
    "catalog": ("worker.catalog", Path, "the model catalog"),
    "metrics_port": ("worker.metrics_port", int, "Prometheus port; 0: any free one"),
    "log_level": ("worker.log_level", str, "debug, info, warning or error"),
    "redis_url": ("redis.url", str, "the registry"),
    "default_model": ("model_manager.default_model_id", str, "loaded and warmed before ready"),
    "preload_models": ("model_manager.preload_model_ids", _names, "more models: a,b"),
    "ttl_ms": ("model_manager.ttl_ms", int, "idle for this long: unloaded"),
    "min_residency_ms": ("model_manager.min_residency_ms", int, "kept for at least this long"),
    "evict_check_interval_ms": ("model_manager.evict_check_interval_ms", int, "evictor's pace"),
    "resident_cap": ("model_manager.resident_cap", int, "models in memory at once"),
    "max_parallel_loads": ("model_manager.max_parallel_loads", int, "loads at once"),
    "lease_ttl_ms": ("model_manager.lease_ttl_ms", int, "a silent session's hold ends after this"),
}
