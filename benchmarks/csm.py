"""Sesame CSM: our engine beside transformers' `generate`, same weights, same run.

    just bench-csm                         a tiny random model on the processor, about 4 minutes
    just bench-csm --size real             a random model of csm-1b's size on the GPU, no download
    just bench-csm --quick                 fewer frames and batches; the page is left alone
    just bench-csm --profile               where a tick's time goes, and a trace of it
    just bench-csm report                  the page and its picture again, from the samples

For every batch size the sides take turns, three times each, so that what else the machine does
falls on all of them. A frame is 80 ms of sound, so its time divided by 80 ms is the real-time
factor of each of the batch's voices. Samples are kept in out/benchmarks/csm-SIZE-DEVICE.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BATCHES = (1, 2, 4, 8, 16, 32, 64)
ROUNDS = 3
WARM_UP_FRAMES = 3
CELL_S = 6.0
"""A cell (one side at one batch size, one round) gets as many frames as fit, within limits."""
FEWEST_FRAMES, MOST_FRAMES = 10, 100
TRIALS = 12
OURS_ALONE = "this engine, alone"
POSITIONS = {"tiny": 512, "real": 2048}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="just bench-csm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="?", choices=["run", "report"], default="run")
    parser.add_argument("--size", choices=["tiny", "real"], default="tiny")
    parser.add_argument("--device", default=None, help="cpu, cuda or cuda:N; by default as --size")
    parser.add_argument("--batches", type=int, nargs="+", default=None)
    parser.add_argument("--context", type=int, default=0, help="positions read before speaking")
    parser.add_argument("--sides", nargs="+", choices=["ours", "eager", "static"],
                        default=["ours", "eager", "static"])  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="our engine with torch.compile")
    parser.add_argument("--seconds", type=float, default=CELL_S, help="for one cell of one round")
    parser.add_argument("--quick", action="store_true", help="short; does not touch the page")
    parser.add_argument("--profile", action="store_true", help="our engine alone, under a profiler")
    parser.add_argument("--note", default="", help="stands beside the figures")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "benchmarks")
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if args.size == "real" else "cpu")
    args.batches = args.batches or list(BATCHES[:4] if args.quick else BATCHES)
    if args.quick:
        args.seconds = min(args.seconds, 1.0)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    if args.what == "run":
        if args.profile:
            profile(args)
            return
        outcome = measure(args)
        path = store(args.out, outcome)
        print("\n" + "\n".join(tables(outcome)) + f"\n\nkept in {path}")
    if args.what == "report" or not args.quick:
        publish(args.out)


def tables(outcome: dict[str, Any]) -> list[str]:
    from benchmarks.csm_report import tables_of

    return tables_of(outcome)


def publish(out: Path) -> None:
    """The page needs what the rest of this project's benchmarks need; a GPU machine may not."""
    from benchmarks.csm_report import write

    try:
        write(out, ROOT / "docs")
    except ImportError as error:
        print(f"docs/benchmarks.md is left alone: {error}")


def store(out: Path, outcome: dict[str, Any]) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"csm-{outcome['size']}-{outcome['device'].partition(':')[0]}.json"
    path.write_text(json.dumps(outcome, indent=1), encoding="utf-8")
    return path


# --- measuring


def measure(args: argparse.Namespace) -> dict[str, Any]:
    say = Progress()
    say(f"a random model of {args.size} size on {args.device} …")
    from benchmarks import csm_sides as sides

    weights = (sides.real_weights if args.size == "real" else sides.tiny_weights)(args.device)
    made = built(args, weights, say)
    cells = [
        cell
        for batch in args.batches
        for cell in measure_batch(batch, list(made.values()), args.seconds, say)
    ]
    outcome = {
        "size": args.size,
        "device": args.device,
        "taken": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command(args),
        "note": args.note,
        "facts": facts(args.device),
        "cells": cells,
        "first_audio": first_audio(made, max(args.batches), say),
    }
    if "ours" in made:
        outcome["slot_bytes"] = made["ours"].slot_bytes
        outcome["ready_s"] = made["ours"].ready_s
    return outcome


def built(args: argparse.Namespace, weights: Any, say: Progress) -> dict[str, Any]:
    from benchmarks import csm_sides as sides

    made: dict[str, Any] = {}
    if "ours" in args.sides:
        say(f"our engine with {max(args.batches)} slots …")
        made["ours"] = sides.Ours(
            weights,
            slots=max(args.batches),
            positions=POSITIONS[args.size],
            context=args.context,
            compile=args.compile,
        )
        say(f"ready after {made['ours'].ready_s:.1f} s")
    for name in ("eager", "static"):
        if name in args.sides:
            made[name] = sides.Generate(weights, context=args.context, static=name == "static")
    return made


def measure_batch(
    batch: int, sides: Sequence[Any], seconds: float, say: Progress
) -> list[dict[str, Any]]:
    """A cell for each side. A side that fails says why in its cell, and the others go on."""
    cells = [{"side": side.name, "batch": batch, "frame_ms": [], "joules": []} for side in sides]
    frames = {}
    for side, cell in zip(sides, cells, strict=True):
        frames[side.name] = attempt(cell, partial(warm_up, side, batch, seconds))
    for round_ in range(ROUNDS):
        for side, cell in zip(sides, cells, strict=True):
            if "failed" not in cell:
                attempt(cell, partial(speak, side, batch, frames[side.name], cell))
        say(f"batch {batch}, round {round_ + 1} of {ROUNDS}: " + ", ".join(map(glance, cells)))
    return cells


def attempt(cell: dict[str, Any], work: Callable[[], Any]) -> Any:
    """A side may run out of memory, or not compile; then its row says so."""
    try:
        return work()
    except Exception as error:
        cell["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"
        return None


def warm_up(side: Any, batch: int, seconds: float) -> int:
    """How many frames fit into `seconds`; whatever compiles for this size has compiled."""
    side.run(batch, WARM_UP_FRAMES)
    frame_ms = statistics.median(side.run(batch, WARM_UP_FRAMES).frame_ms)
    frames = int(min(MOST_FRAMES, max(FEWEST_FRAMES, seconds * 1000 / frame_ms)))
    if side.fixed_length:
        side.run(batch, frames)
    return frames


def speak(side: Any, batch: int, frames: int, cell: dict[str, Any]) -> None:
    timed = side.run(batch, frames)
    cell["frame_ms"] += [round(ms, 4) for ms in timed.frame_ms]
    if timed.joules is not None:
        cell["joules"].append(timed.joules / len(timed.frame_ms))
    if timed.peak_bytes is not None:
        cell["peak_bytes"] = max(timed.peak_bytes, cell.get("peak_bytes", 0))


def glance(cell: dict[str, Any]) -> str:
    if "failed" in cell:
        return f"{cell['side']} failed"
    return f"{cell['side']} {statistics.median(cell['frame_ms']):.1f} ms"


def first_audio(made: dict[str, Any], slots: int, say: Progress) -> dict[str, list[float]]:
    """ms from a text to its first 80 ms of sound."""
    found = {}
    if "ours" in made:
        crowds = sorted({0, min(7, slots - 1), slots - 1})
        for others, times in zip(crowds, made["ours"].first_audio_ms(crowds, TRIALS), strict=True):
            found[f"this engine, joining {others} others" if others else OURS_ALONE] = times
    if "eager" in made:
        found["generate, alone (its streamer's first frame, then decoded)"] = made[
            "eager"
        ].first_audio_ms(TRIALS)
    for name, values in found.items():
        say(f"first audio of {name}: {statistics.median(values):.0f} ms")
    return found


def profile(args: argparse.Namespace) -> None:
    """Twenty ticks of the largest batch."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    args.sides = ["ours"]
    from benchmarks import csm_sides as sides

    weights = (sides.real_weights if args.size == "real" else sides.tiny_weights)(args.device)
    ours, batch = built(args, weights, Progress())["ours"], max(args.batches)
    ours.run(batch, WARM_UP_FRAMES)
    cuda = args.device.startswith("cuda")
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profiler(activities=kinds) as seen:
        ours.run(batch, 20)
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    print(seen.key_averages().table(sort_by=order, row_limit=30))
    args.out.mkdir(parents=True, exist_ok=True)
    trace = args.out / f"csm-{args.size}-batch{batch}-trace.json"
    seen.export_chrome_trace(str(trace))
    print(f"trace: {trace}")


# --- what it ran on


def command(args: argparse.Namespace) -> str:
    extra = [f"--size {args.size}", f"--device {args.device}"]
    extra += [f"--context {args.context}"] if args.context else []
    extra += ["--compile"] if args.compile else []
    return "just bench-csm " + " ".join(extra)


def facts(device: str) -> dict[str, str]:
    import torch
    import transformers

    found = {"torch": torch.__version__, "transformers": transformers.__version__}
    if device.startswith("cuda"):
        found["device"] = torch.cuda.get_device_name(device)
        found["CUDA"] = str(torch.version.cuda)
    else:
        found["processor"] = f"{processor()}, {torch.get_num_threads()} threads"
        found["load average before"] = f"{os.getloadavg()[0]:.1f}"
    return found


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


class Progress:
    """One line a step, with the time since the beginning: a terminal, a log and a pipe show it."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self, line: str) -> None:
        print(f"[{time.monotonic() - self._began:6.1f} s] {line}", flush=True)


if __name__ == "__main__":
    main()
