"""What a worker counts. Labels are model ids, outcomes and reasons; never text."""

from __future__ import annotations

from collections import deque
from statistics import median

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

_FIRST_AUDIO_MS = (2, 5, 10, 20, 35, 60, 100, 150, 250, 400, 650, 1_000, 2_000, 5_000)
_LOAD_MS = (50, 200, 500, 1_000, 2_500, 5_000, 10_000, 30_000, 60_000, 180_000)
_RECENT = 64


class WorkerMetrics:
    """Prometheus metrics in a registry of their own, and the few numbers that are announced."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._first_audio = Histogram(
            "tts_first_audio_ms",
            "first text of an utterance in to first frame out",
            ["model"],
            buckets=_FIRST_AUDIO_MS,
            registry=registry,
        )
        self._engine_first = Histogram(
            "tts_engine_first_chunk_ms",
            "the engine's own share of it",
            ["model"],
            buckets=_FIRST_AUDIO_MS,
            registry=registry,
        )
        self._frames = Counter("tts_frames", "frames emitted", ["model"], registry=registry)
        self._drops = Counter("tts_frames_dropped", "lost to a slow reader", registry=registry)
        self._utterances = Counter("tts_utterances", "by outcome", ["outcome"], registry=registry)
        self._control = Counter("tts_control", "control calls", ["action"], registry=registry)
        self._queue = Gauge("tts_queue_depth", "utterances that wait", registry=registry)
        self._live = Gauge("tts_sessions", "sessions", registry=registry)
        self._rtf = Gauge("tts_rtf", "compute time / audio time, recent", registry=registry)
        self._loads = Counter("tts_loads", "model loads", ["model", "outcome"], registry=registry)
        self._load_ms = Histogram(
            "tts_load_ms", "load and warm-up", ["model"], buckets=_LOAD_MS, registry=registry
        )
        self._evictions = Counter(
            "tts_evictions", "models unloaded", ["model", "reason"], registry=registry
        )
        self._expired = Counter("tts_leases_expired", "sessions gone silent", registry=registry)
        self._fallback = Gauge("tts_fallback", "1: a stand-in voice speaks", registry=registry)
        self._recent_first_ms: deque[float] = deque(maxlen=_RECENT)
        self._recent_rtf: deque[float] = deque(maxlen=_RECENT)

    # --- utterances ---

    def first_audio(self, model_id: str, ms: float) -> None:
        self._first_audio.labels(model_id).observe(ms)
        self._recent_first_ms.append(ms)

    def engine_first_chunk(self, model_id: str, ms: float) -> None:
        self._engine_first.labels(model_id).observe(ms)

    def utterance_ended(
        self, model_id: str, outcome: str, frames: int, dropped: int, rtf: float | None
    ) -> None:
        """`outcome`: done, stopped, cancelled or failed. `rtf` is None if nothing was spoken."""
        self._utterances.labels(outcome).inc()
        self._frames.labels(model_id).inc(frames)
        self._drops.inc(dropped)
        if rtf is not None:
            self._recent_rtf.append(rtf)
            self._rtf.set(self.rtf)

    def controlled(self, action: str) -> None:
        self._control.labels(action).inc()

    def levels(self, sessions: int, queue_depth: int) -> None:
        self._live.set(sessions)
        self._queue.set(queue_depth)

    def fallback(self, speaks: bool) -> None:
        self._fallback.set(int(speaks))

    @property
    def rtf(self) -> float:
        return median(self._recent_rtf) if self._recent_rtf else 0.0

    @property
    def first_audio_p50_ms(self) -> float:
        return median(self._recent_first_ms) if self._recent_first_ms else 0.0

    # --- the model manager's observer ---

    def loaded(self, model_id: str, ms: float, outcome: str) -> None:
        self._loads.labels(model_id, outcome).inc()
        self._load_ms.labels(model_id).observe(ms)

    def evicted(self, model_id: str, reason: str) -> None:
        self._evictions.labels(model_id, reason).inc()

    def lease_expired(self) -> None:
        self._expired.inc()


def serve_metrics(metrics: WorkerMetrics, host: str, port: int) -> int:
    """Serve /metrics on a thread; port 0 takes any free one. Returns the port. Raises OSError."""
    server, _ = start_http_server(port, addr=host, registry=metrics.registry)
    return int(server.server_port)
