"""Prometheus metrics of the orchestrator. No text, no audio, no label that a user can choose."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from src.rpc.errors import CODES
from src.rpc.ws_events import Latency

CONTENT_TYPE = CONTENT_TYPE_LATEST

_TURN_S = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.65, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0)
_EDGE_S = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25)
_JITTER_S = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.04, 0.1, 0.5)
_VERDICTS = ("real", "false")
_STAGES = ("endpoint", "transcript", "first_token", "first_clause", "first_audio")


class Metrics:
    """All instruments, in a registry of their own unless one is given."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry = registry or CollectorRegistry()
        ProcessCollector(registry=registry)
        self.sessions = Gauge("duplex_sessions", "Sessions open now", registry=registry)
        self.sessions_ended = Counter(
            "duplex_sessions_ended", "Sessions by how they ended", ["reason"], registry=registry
        )
        self.turns = Counter("duplex_turns", "Turns answered", registry=registry)
        self.first_audio = Histogram(
            "duplex_first_audio_seconds",
            "End of the user's speech to the first frame that left for the client",
            buckets=_TURN_S,
            registry=registry,
        )
        self.stages = Histogram(
            "duplex_turn_stage_seconds",
            "End of the user's speech to the end of each stage",
            ["stage"],
            buckets=_TURN_S,
            registry=registry,
        )
        self.barge_ins = Counter(
            "duplex_barge_ins", "Interruptions by verdict", ["verdict"], registry=registry
        )
        self.edge_to_last_frame = Histogram(
            "duplex_edge_to_last_frame_seconds",
            "Speech edge to the moment after which no frame leaves",
            buckets=_EDGE_S,
            registry=registry,
        )
        self.edge_to_worker_paused = Histogram(
            "duplex_edge_to_worker_paused_seconds",
            "Speech edge to the worker's answer that it has paused",
            buckets=_EDGE_S,
            registry=registry,
        )
        self.frame_lateness = Histogram(
            "duplex_frame_lateness_seconds",
            "How late frames left for their listener; 0 while the jitter buffer is not dry",
            buckets=_JITTER_S,
            registry=registry,
        )
        self.frame_jitter = Histogram(
            "duplex_frame_jitter_seconds",
            "How far from 20 ms apart two frames of a steady stream left",
            buckets=_JITTER_S,
            registry=registry,
        )
        self.queue_depth = Gauge(
            "duplex_frames_kept", "Frames held back or not yet heard", registry=registry
        )
        self.workers = Gauge("duplex_workers", "TTS workers known", registry=registry)
        self.rooms = Gauge("duplex_rooms", "LiveKit rooms we are in", registry=registry)
        self.rooms_joined = Counter(
            "duplex_rooms_joined", "LiveKit rooms we set out for", registry=registry
        )
        self.refused = Counter(
            "duplex_refused",
            "Requests, sessions and messages that were refused, by error code",
            ["code"],
            registry=registry,
        )
        self._show_from_the_start()

    def _show_from_the_start(self) -> None:
        """A rate counts from the first value that was seen: without a zero the first of each kind
        would be on no curve."""
        for verdict in _VERDICTS:
            self.barge_ins.labels(verdict)
        for code in CODES:
            self.refused.labels(code)

    def observer(self) -> SessionMetrics:
        return SessionMetrics(self)

    def count_workers(self, known: Callable[[], int]) -> None:
        """Ask `known` at every scrape."""
        self.workers.set_function(lambda: float(known()))

    def count_rooms(self, live: Callable[[], int]) -> None:
        """Ask `live` at every scrape."""
        self.rooms.set_function(lambda: float(live()))

    def expose(self) -> bytes:
        return generate_latest(self.registry)


class SessionMetrics:
    """`ports.SessionObserver`: one session's share."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._kept = 0
        self._stages = {stage: metrics.stages.labels(stage) for stage in _STAGES}

    def session_opened(self) -> None:
        self._metrics.sessions.inc()

    def session_closed(self, reason: str) -> None:
        self.frames_kept(0)
        self._metrics.sessions.dec()
        self._metrics.sessions_ended.labels(reason).inc()

    def turn_finished(self, latency: Latency) -> None:
        self._metrics.turns.inc()
        self._metrics.first_audio.observe(latency.first_audio_ms / 1000)
        for stage, histogram in self._stages.items():
            histogram.observe(getattr(latency, f"{stage}_ms") / 1000)

    def barge_in(self, verdict: str) -> None:
        self._metrics.barge_ins.labels(verdict).inc()

    def edge_to_last_frame(self, ms: float) -> None:
        self._metrics.edge_to_last_frame.observe(ms / 1000)

    def edge_to_worker_paused(self, ms: float) -> None:
        self._metrics.edge_to_worker_paused.observe(ms / 1000)

    def frame_sent(self, late_ms: float) -> None:
        self._metrics.frame_lateness.observe(late_ms / 1000)

    def frame_jitter(self, ms: float) -> None:
        self._metrics.frame_jitter.observe(ms / 1000)

    def frames_kept(self, count: int) -> None:
        self._metrics.queue_depth.inc(count - self._kept)
        self._kept = count
