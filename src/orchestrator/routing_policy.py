"""How sessions choose their worker and model: configs/routing.yaml, which is its own manual."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from src.common.config import StrictModel, load_config
from src.rpc.errors import UnknownName


class ModePolicy(StrictModel):
    """How sessions of one mode choose. See configs/routing.yaml for each key at length."""

    require: list[str] = Field(default_factory=list)
    prefer_tags: list[str] = Field(default_factory=list)
    fallbacks: list[str] = Field(default_factory=list)
    prefer_resident: bool = True
    preload_preferred: bool = False
    serve_while_loading: bool = False


class AudioPolicy(StrictModel):
    sr: int = 48_000
    frame_ms: int = 20


class RoutingPolicy(StrictModel):
    routing: dict[str, ModePolicy] = Field(default_factory=lambda: {"default": ModePolicy()})
    audio: AudioPolicy = AudioPolicy()
    latency_step_ms: int = Field(default=25, ge=1)
    retry_after_ms: int = Field(default=1_000, ge=0)

    def mode(self, name: str) -> ModePolicy:
        """Raises UnknownName."""
        found = self.routing.get(name or "default")
        if found is None:
            raise UnknownName.among("mode", name, self.routing)
        return found


def load_policy(path: Path, overrides: Mapping[str, Any] | None = None) -> RoutingPolicy:
    """Raises ConfigError."""
    return load_config(path, RoutingPolicy, overrides)
