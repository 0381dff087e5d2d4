"""The `livekit:` part of `configs/orchestrator.yaml`."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator

from src.common.config import StrictModel


class LiveKitSettings(StrictModel):
    """LIVEKIT_URL, LIVEKIT_API_KEY and LIVEKIT_API_SECRET lie over the first three."""

    url: str = ""
    api_key: str = ""
    api_secret: SecretStr = SecretStr("")
    public_url: str = Field("", description="what clients are told; empty: `url`")
    entry: Literal["direct", "agentserver"] = "direct"
    agent_name: str = Field("duplex", min_length=1)
    dispatch: Literal["explicit", "automatic"] = "explicit"
    token_ttl_ms: int = Field(600_000, ge=10_000)
    join_timeout_ms: int = Field(30_000, ge=1_000)
    # A silent microphone sends a packet every 420 ms (Opus DTX): less would take that for absence.
    user_gone_ms: int = Field(3_000, ge=1_000)
    reconnect_grace_ms: int = Field(20_000, ge=1_000)
    lead_ms: int = Field(20, ge=10, le=100)
    red: bool = True
    dtx: bool = True

    @field_validator("url", "public_url")
    @classmethod
    def _ws_url(cls, url: str) -> str:
        if url and not url.startswith(("ws://", "wss://", "http://", "https://")):
            raise ValueError("a LiveKit URL begins with ws:// or wss://")
        parts = urlsplit(url)  # raises ValueError, and so does a wrong port
        if url and (not parts.hostname or parts.port == 0):
            raise ValueError("a LiveKit URL names a host, e.g. ws://127.0.0.1:7880")
        return url

    @property
    def client_url(self) -> str:
        return self.public_url or self.url
