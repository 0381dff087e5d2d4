"""1, 10 or 50 conversations at once, words and replies scripted: what is left is ours.

Phases: everybody connected and quiet; every agent speaks (jitter, processor time per speaking
session); every user interrupts every answer. The callers live in processes of their own.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from benchmarks.clips import questions, save
from benchmarks.crowd import Phases
from benchmarks.figures import Aim, Result, Row, Spread, table
from benchmarks.machine import Meter, now_ms
from benchmarks.stacks import Bench, Lab, scripted_stack
from src.common.processes import Child, ProcessFailed

PER_PROCESS = 50
PHASES = ("quiet", "speaking", "talking")
QUIET_S, STEADY_S = 4.0, 10.0
TALK_S = {1: 90.0}
TALK_MANY_S = 40.0
CALLERS = "the callers"
OURS = ("orchestrator", "worker")

Told = list[dict[str, Any]]


async def measure(bench: Bench, sessions: int) -> Result:
    name = f"load-{sessions}"
    clips_file = bench.logs / name / "clips.npz"
    save(clips_file, questions(bench.out / "clips"))
    async with scripted_stack(bench, name) as lab:
        empty_mb = lab.meter.rss_mb()
        phases = _phases(bench, sessions)
        crowd = await _start_crowd(bench, lab, name, sessions, phases)
        try:
            used = await _watch(bench, lab, Meter(crowd), phases)
            for child in crowd.values():
                if await child.wait():
                    raise ProcessFailed(f"{child.name} failed; see {child.log}")
        finally:
            for child in crowd.values():
                await child.stop()
    told = [one for file in crowd for one in json.loads(_read(bench, name, file))]
    return _result(sessions, told, lab, phases, {"empty_mb": empty_mb, **used})


def _phases(bench: Bench, sessions: int) -> Phases:
    talk_s = 15.0 if bench.quick else TALK_S.get(sessions, TALK_MANY_S)
    connect_ms = now_ms() + 2_500
    quiet_ms = connect_ms + 60 * sessions + 1_000
    speak_ms = quiet_ms + QUIET_S * 1000
    steady_ms = speak_ms + 2_500
    talk_ms = steady_ms + STEADY_S * 1000
    return Phases(
        connect_ms=connect_ms,
        quiet_ms=quiet_ms,
        speak_ms=speak_ms,
        steady_ms=steady_ms,
        talk_ms=talk_ms,
        end_ms=talk_ms + talk_s * 1000,
    )


async def _start_crowd(
    bench: Bench, lab: Lab, name: str, sessions: int, phases: Phases
) -> dict[str, Child]:
    """By the file that each will write."""
    crowd: dict[str, Child] = {}
    for first in range(0, sessions, PER_PROCESS):
        file = f"crowd-{first}"
        argv = [sys.executable, "-m", "benchmarks.crowd", "--url", lab.stack.ws_url]
        argv += ["--sessions", str(min(PER_PROCESS, sessions - first)), "--first", str(first)]
        argv += ["--clips", str(bench.logs / name / "clips.npz")]
        argv += ["--phases", phases.model_dump_json()]
        argv += ["--out", str(bench.logs / name / f"{file}.json")]
        crowd[file] = await Child.start(file, argv, log=bench.logs / name / f"{file}.log")
    return crowd


def _read(bench: Bench, name: str, file: str) -> str:
    return (bench.logs / name / f"{file}.json").read_text(encoding="utf-8")


async def _watch(
    bench: Bench, lab: Lab, callers: Meter, phases: Phases
) -> dict[str, dict[str, float]]:
    """Cores and memory by process in each phase."""
    used: dict[str, dict[str, float]] = {}
    for name, begin_ms, end_ms in (
        ("quiet", phases.quiet_ms, phases.speak_ms),
        ("speaking", phases.steady_ms, phases.talk_ms),
        ("talking", phases.talk_ms + 2_000, phases.end_ms - 5_000),
    ):
        await asyncio.sleep(max(0.0, begin_ms - now_ms()) / 1000)
        bench.report(f"  everybody is {name}")
        lab.meter.lap()
        callers.lap()
        await asyncio.sleep(max(0.0, end_ms - now_ms()) / 1000)
        used[name] = lab.meter.cores() | {CALLERS: sum(callers.cores().values())}
        used[f"{name}_mb"] = lab.meter.rss_mb()
    return used


def _all(told: Told, name: str) -> list[float]:
    return [float(value) for one in told for value in one[name]]


def _taken(
    lab: Lab, name: str, since_ms: float = 0.0, until_ms: float = float("inf")
) -> list[float]:
    return [value for at_ms, value in lab.samples.get(name, []) if since_ms <= at_ms < until_ms]


def shut_after_onset(told: Told, shut_at: list[float]) -> list[float]:
    """Each interruption's onset to the first moment, not before its edge, at which a gate shut."""
    found = []
    for one in told:
        for onset_ms, edge_ms in zip(one["onsets_at"], one["edges_at"], strict=True):
            shut_ms = next((at for at in shut_at if at >= edge_ms), None)
            if shut_ms is not None:
                found.append(shut_ms - onset_ms)
    return found


def _result(
    sessions: int, told: Told, lab: Lab, phases: Phases, used: dict[str, dict[str, float]]
) -> Result:
    rows = [
        *_pause_rows(sessions, told, lab),
        Row(
            what="end of speech → first audio, scripted, in mid-conversation",
            sessions=sessions,
            aim=Aim(p50=250, p95=350),
            spread=Spread.of(_all(told, "first_audio")),
        ),
        Row(
            what="frame jitter at the client, steady: abs(gap − 20 ms)",
            sessions=sessions,
            aim=Aim(p99=10),
            digits=1,
            spread=Spread.of(map(abs, _all(told, "gaps"))),
        ),
        Row(
            what="– of which the callers' own: how late their microphones were",
            sessions=sessions,
            digits=1,
            spread=Spread.of(_all(told, "own_late")),
        ),
        Row(
            what="– frames later than the listener needed them",
            sessions=sessions,
            digits=1,
            spread=Spread.of(_taken(lab, "frame_late", phases.steady_ms)),
        ),
        Row(
            what="how late the orchestrator's event loop is, everybody speaking or talking",
            sessions=sessions,
            digits=1,
            spread=Spread.of(_taken(lab, "loop_late", phases.steady_ms, phases.end_ms)),
        ),
        _cpu_row(sessions, used),
    ]
    tables = {f"What {sessions} session{'s' * (sessions > 1)} cost": _cost(sessions, used, told)}
    raw = {"told": told, "used": used, "samples": {k: v for k, v in lab.samples.items()
           if k != "frame_late"}}  # fmt: skip
    return Result(rows, tables, raw)


def _pause_rows(sessions: int, told: Told, lab: Lab) -> list[Row]:
    rows = [
        Row(
            what="speech onset → flush received by the client",
            sessions=sessions,
            spread=Spread.of(_all(told, "onset_to_flush")),
        ),
        Row(
            what="edge → last frame out",
            sessions=sessions,
            aim=Aim(p50=1, p95=3),
            digits=2,
            spread=Spread.of(_taken(lab, "edge_to_last_frame")),
        ),
        Row(
            what="edge → worker has paused",
            sessions=sessions,
            aim=Aim(p50=5, p95=15),
            digits=1,
            spread=Spread.of(_taken(lab, "edge_to_worker_paused")),
        ),
        Row(
            what="edge → silence in the client's buffer",
            sessions=sessions,
            aim=Aim(p50=15, p95=30),
            digits=1,
            spread=Spread.of(_all(told, "edge_to_silence")),
        ),
    ]
    if sessions == 1:
        # With many, whose gate it was cannot be told.
        shut_at = [at_ms for at_ms, _ in lab.samples.get("edge_to_last_frame", [])]
        onset = Row(
            what="speech onset → pause at the server, quiet room",
            sessions=sessions,
            aim=Aim(p50=35, p95=60),
            spread=Spread.of(shut_after_onset(told, shut_at)),
        )
        rows.insert(0, onset)
    return rows


def _cpu_row(sessions: int, used: dict[str, dict[str, float]]) -> Row:
    cores = sum(used["speaking"][name] for name in OURS) / sessions
    return Row(
        what="cores per speaking session, orchestrator and worker together",
        sessions=sessions,
        aim=Aim(p50=0.03),
        digits=3,
        unit="",
        spread=Spread(n=1, p50=cores, p95=cores, p99=cores, worst=cores),
    )


def _cost(sessions: int, used: dict[str, dict[str, float]], told: Told) -> list[str]:
    head = ("process", "cores: quiet", "speaking", "interrupting", "RSS MB: empty", "talking",
            "per session")  # fmt: skip
    cells = []
    for name in OURS:
        empty_mb, full_mb = used["empty_mb"][name], used["talking_mb"][name]
        cells.append(
            [
                name,
                *(f"{used[phase][name]:.2f}" for phase in PHASES),
                f"{empty_mb:.0f}",
                f"{full_mb:.0f}",
                f"{(full_mb - empty_mb) / sessions:.1f}",
            ]
        )
    cells.append([f"({CALLERS})", *(f"{used[phase][CALLERS]:.2f}" for phase in PHASES), "", "", ""])
    verdicts = {"real": 0, "false": 0}
    for one in told:
        for verdict, count in one["verdicts"].items():
            verdicts[verdict] += count
    lost = [reason for one in told for reason in one["lost"]]
    return [
        *table(head, cells),
        "",
        f"Interruptions judged: {verdicts['real']} real, {verdicts['false']} false. Frames after a "
        f"flush: {sum(one['late_frames'] for one in told)}. Times the client's buffer ran dry: "
        f"{sum(one['underruns'] for one in told)}. Lost: {len(lost)}"
        + (f" ({'; '.join(sorted(set(lost)))})." if lost else "."),
    ]
