"""The real orchestrator that also writes down every sample of its observer, and on demand hears by
script: what the benchmarks start instead of `src.orchestrator.server`.

    python -m benchmarks.scripted_orchestrator --ws --samples out.json [--scripted_ms 40]

Takes the server's own flags besides. The samples are written when it ends, with the time (ms,
CLOCK_MONOTONIC) at which each was taken. With `--scripted_ms` the recogniser answers every pass
with the same words after that long, using no processor; everything else is the product.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections import defaultdict
from contextlib import AsyncExitStack
from pathlib import Path

from benchmarks.machine import now_ms
from src.audio.pcm import Float32
from src.common.logging import setup_logging
from src.orchestrator.config import OrchestratorConfig, orchestrator_config, overrides_from, parser
from src.orchestrator.metrics import Metrics, SessionMetrics
from src.orchestrator.ports import MIC_RATE, Transcript
from src.orchestrator.routing_policy import RoutingPolicy
from src.orchestrator.server import CannotStart, Orchestrator

LAG_EVERY_MS = 10
WORDS = "Tell me something about it."

Samples = dict[str, list[tuple[float, float]]]
"""By name: (taken at ms, value in ms)."""


class ScriptedRecognizer:
    """`ports.Recognizer` that always understands the same, after a fixed time."""

    name = "scripted"

    def __init__(self, pass_ms: int) -> None:
        self._pass_ms = pass_ms

    async def transcribe(
        self, samples: Float32, *, session_id: str, language: str = "", urgent: bool = True
    ) -> Transcript:
        await asyncio.sleep(self._pass_ms / 1000)
        return Transcript(WORDS, samples.size * 1000 // MIC_RATE, self._pass_ms)

    async def aclose(self) -> None: ...


class SampledSession(SessionMetrics):
    """One session's metrics, and every value by itself."""

    def __init__(self, metrics: Metrics, samples: Samples) -> None:
        super().__init__(metrics)
        self._samples = samples

    def edge_to_last_frame(self, ms: float) -> None:
        self._samples["edge_to_last_frame"].append((now_ms(), ms))
        super().edge_to_last_frame(ms)

    def edge_to_worker_paused(self, ms: float) -> None:
        self._samples["edge_to_worker_paused"].append((now_ms(), ms))
        super().edge_to_worker_paused(ms)

    def frame_sent(self, late_ms: float) -> None:
        self._samples["frame_late"].append((now_ms(), late_ms))
        super().frame_sent(late_ms)


class SampledMetrics(Metrics):
    def __init__(self) -> None:
        super().__init__()
        self.samples: Samples = defaultdict(list)

    def observer(self) -> SessionMetrics:
        return SampledSession(self, self.samples)


class SampledOrchestrator(Orchestrator):
    def __init__(
        self, config: OrchestratorConfig, policy: RoutingPolicy, scripted_ms: int | None
    ) -> None:
        super().__init__(config, policy)
        self._metrics = self.sampled = SampledMetrics()
        self._scripted_ms = scripted_ms

    async def _load_recognizer(self, cleanup: AsyncExitStack) -> None:
        if self._scripted_ms is None:
            await super()._load_recognizer(cleanup)
            return
        self._recognizer = ScriptedRecognizer(self._scripted_ms)
        self._recogniser_note = ScriptedRecognizer.name


async def serve(orchestrator: SampledOrchestrator) -> None:
    loop = asyncio.get_running_loop()
    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, orchestrator.stop)
    lag = asyncio.create_task(_watch_lag(orchestrator.sampled.samples["loop_late"]))
    try:
        await orchestrator.run()
    finally:
        lag.cancel()


async def _watch_lag(late: list[tuple[float, float]]) -> None:
    """How long a callback that is due waits for the event loop."""
    while True:
        due_ms = now_ms() + LAG_EVERY_MS
        await asyncio.sleep(LAG_EVERY_MS / 1000)
        late.append((due_ms, now_ms() - due_ms))


def main() -> int:
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--samples", type=Path, required=True)
    own.add_argument("--scripted_ms", type=int)
    mine, rest = own.parse_known_args()
    args = parser().parse_args(rest)
    config = orchestrator_config(args.config, overrides_from(args))
    setup_logging(config.server.log_level)
    orchestrator = SampledOrchestrator(config, config.routing.load(), mine.scripted_ms)
    try:
        import uvloop

        uvloop.run(serve(orchestrator))
    except CannotStart as error:
        print(f"cannot start: {error}", file=sys.stderr)
        return 2
    finally:
        mine.samples.write_text(json.dumps(orchestrator.sampled.samples), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
