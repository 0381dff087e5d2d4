"""What a worker writes to Redis about itself (design document §6), and where.

The record lives at `duplex:workers:<name>` with a TTL of a few heartbeats, so it vanishes by itself
when the worker dies. Every write is also published on the channel `duplex:workers`, for routers.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

KEY_PREFIX = "duplex:workers:"
CHANNEL = "duplex:workers"
TTL_MS = 3_000
HEARTBEAT_MS = 1_000


class _Record(BaseModel):
    # A newer worker may announce more than this reader knows.
    model_config = ConfigDict(extra="allow", frozen=True)


class Capabilities(_Record):
    streaming: bool = True
    zero_shot: bool = False
    lora: bool = False
    cpu_ok: bool = False
    languages: list[str] = Field(default_factory=list)
    emotive_zero_prompt: bool = False
    fallback: bool = Field(default=False, description="a stand-in voice speaks instead")
    fallback_reason: str = ""


class Audio(_Record):
    sr: int = 48_000
    frame_ms: int = 20


class Hardware(_Record):
    gpu: bool = False
    vram_gb: float = 0.0


class WorkerMetrics(_Record):
    rtf: float = 0.0
    queue_depth: int = 0
    sessions: int = 0
    first_audio_p50_ms: float = 0.0


class ModelEntry(_Record):
    """One catalog entry as the router needs it, so that it can route without asking the worker."""

    model_id: str
    family: str
    languages: list[str] = Field(default_factory=list)
    voices: list[str] = Field(default_factory=list)
    tags: list[str] = Field(default_factory=list)
    cpu_ok: bool = False
    lora: bool = False
    needs_gpu: bool = False


class Announcement(_Record):
    name: str
    addr: str = Field(description="grpc://host:port")
    tls: bool = Field(default=False, description="it takes calls over TLS only")
    capabilities: Capabilities = Capabilities()
    audio: Audio = Audio()
    hardware: Hardware = Hardware()
    resident_models: list[str] = Field(default_factory=list)
    metrics: WorkerMetrics = WorkerMetrics()
    default_model: str = ""
    models: list[ModelEntry] = Field(default_factory=list)
    max_sessions: int = 0
    draining: bool = False
    version: str = ""

    @property
    def key(self) -> str:
        return KEY_PREFIX + self.name

    @property
    def target(self) -> str:
        """`addr` as a gRPC target."""
        return self.addr.removeprefix("grpc://")
