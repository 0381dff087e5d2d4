"""Samples to figures: rows with aims, and the tables that show both sides."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

from benchmarks.figures import NOTHING, Aim, Result, Row, Spread, table
from benchmarks.rooms.greetings import Greeted
from benchmarks.rooms.page import PageMeasured
from benchmarks.rooms.scale import Load, Scaled
from benchmarks.rooms.trials import EAGER, OURS, TUNED, Measured

SILENCE_ROOM = Aim(p50=140, p95=155)
SILENCE_PAGE = Aim(p50=125, p95=140)
RATIO = Aim(p50=0.65)
CORES = Aim(p50=0.08)
PSS_MB = Aim(p50=5)
NAMES = {"livekit": "LiveKit", "ws": "WebSocket"}
SCALE_AIM_AT = 10
"""Rooms at which cost has an aim: with one, what is fixed is all."""


# --- trials ---


def trials(measured: Mapping[str, Measured], shut_at: Sequence[float]) -> Result:
    """`shut_at`: when a gate of our orchestrator shut, ascending."""
    ours = measured.get(OURS, Measured())
    rows = [
        Row(
            what="mic onset → silence, at a room's subscriber",
            sessions=1,
            aim=SILENCE_ROOM,
            spread=Spread.of(trial.silence for trial in ours.trials),
        ),
        *_ratios(measured),
    ]
    raw = {name: asdict(one) for name, one in measured.items()}
    lines = side_by_side(measured, shut_at)
    return Result(rows, {"Side by side": lines}, {"measured": raw, "shut_at": list(shut_at)})


def _ratios(measured: Mapping[str, Measured]) -> Iterable[Row]:
    what = "end of speech → first audio, median: ours over the tuned AgentSession's"
    theirs = _first_audio(measured, TUNED)
    for side, label, aim in (
        (OURS, what, RATIO),
        (EAGER, "– both after 100 ms of silence", Aim()),
    ):
        ours = _first_audio(measured, side)
        if ours.n and theirs.n:
            ratio = single(ours.p50 / theirs.p50)
            yield Row(what=label, sessions=1, aim=aim, digits=2, unit="", spread=ratio)


def _first_audio(measured: Mapping[str, Measured], side: str) -> Spread:
    return Spread.of(trial.first_audio for trial in measured.get(side, Measured()).trials)


def side_by_side(measured: Mapping[str, Measured], shut_at: Sequence[float]) -> list[str]:
    head = ("p50 / p95, ms", "onset → voice stopped", "**onset → silence**",
            "**end of speech → first audio**", "jitter buffer", "n", "lost")  # fmt: skip
    cells = []
    for name, one in measured.items():
        cells.append(
            [
                name,
                short(stopped(one, shut_at if name.startswith("ours") else ())),
                short(trial.silence for trial in one.trials),
                short(trial.first_audio for trial in one.trials),
                short(trial.buffer for trial in one.trials if trial.buffer is not None),
                str(len(one.trials)),
                str(len(one.lost)),
            ]
        )
    return table(head, cells)


def stopped(measured: Measured, shut_at: Sequence[float]) -> list[float]:
    """Each onset to the stop: the side's own mark, or the first gate that shut before silence."""
    found = []
    for trial in measured.trials:
        if trial.stopped is not None:
            found.append(trial.stopped)
            continue
        index = bisect_left(shut_at, trial.onset_at)
        if index < len(shut_at) and shut_at[index] <= trial.silent_at:
            found.append(shut_at[index] - trial.onset_at)
    return found


# --- page ---


def page(measured: Mapping[str, PageMeasured]) -> Result:
    rows = [
        Row(
            what=f"mic onset → silence, in the page (Chromium), {NAMES[transport]}",
            sessions=1,
            aim=SILENCE_PAGE if transport == "livekit" else Aim(),
            spread=Spread.of(one.silence),
        )
        for transport, one in measured.items()
    ]
    lost = [f"{NAMES[transport]}: {why}" for transport, one in measured.items() for why in one.lost]
    tables = {"Lost in the page": [f"- {why}" for why in lost]} if lost else {}
    return Result(rows, tables, {name: asdict(one) for name, one in measured.items()})


# --- greetings ---


def greetings(greeted: Mapping[str, Greeted]) -> Result:
    rows = [
        Row(
            what=f"join → first word of a greeting heard, entry `{entry}`",
            sessions=1,
            spread=Spread.of(join["heard_ms"] for join in found.joins),
        )
        for entry, found in greeted.items()
    ]
    head = ("p50 / p95, ms after the wish to talk", "token", "in the room", "greeting heard", "n",
            "lost")  # fmt: skip
    cells = [
        [
            entry,
            *(short(j[key] for j in found.joins) for key in ("token_ms", "joined_ms", "heard_ms")),
            str(len(found.joins)),
            str(len(found.lost)),
        ]
        for entry, found in greeted.items()
    ]
    raw = {entry: asdict(found) for entry, found in greeted.items()}
    return Result(rows, {"Into a room": table(head, cells)}, raw)


# --- scale ---


def scale(scaled: Scaled) -> Result:
    rows = [row for load in scaled.loads for row in _load_rows(load, scaled.empty_mb)]
    return Result(rows, {"What rooms cost": _cost(scaled)}, asdict(scaled))


def _load_rows(load: Load, empty_mb: Mapping[str, float]) -> list[Row]:
    aimed = load.rooms >= SCALE_AIM_AT
    more_mb = load.pss_mb["orchestrator"] - empty_mb["orchestrator"]
    return [
        Row(
            what="cores per room with a talking agent, orchestrator",
            sessions=load.rooms,
            aim=CORES if aimed else Aim(),
            digits=3,
            unit="",
            spread=single(load.cores["orchestrator"] / load.rooms),
        ),
        Row(
            what="memory (PSS) per room, orchestrator",
            sessions=load.rooms,
            aim=PSS_MB if aimed else Aim(),
            digits=1,
            unit="MB",
            spread=single(more_mb / load.rooms),
        ),
        Row(
            what="jitter at the subscribers: abs(gap − 10 ms)",
            sessions=load.rooms,
            digits=1,
            spread=Spread.of(map(abs, load.gaps)),
        ),
        Row(
            what="– of which the users' own: how late their event loop was",
            sessions=load.rooms,
            digits=1,
            spread=Spread.of(load.late),
        ),
        Row(
            what="– delay in their jitter buffers",
            sessions=load.rooms,
            spread=Spread.of(stats["delay_ms"] for stats in load.buffers if stats),
        ),
    ]


def _cost(scaled: Scaled) -> list[str]:
    names = list(scaled.empty_mb)
    head = ["rooms", *(f"cores: {name}" for name in names), *(f"PSS MB: {name}" for name in names),
            "made up by the jitter buffers"]  # fmt: skip
    empty = ["0", *("" for _ in names), *(f"{scaled.empty_mb[name]:.0f}" for name in names), ""]
    cells = [
        [
            str(load.rooms),
            *(f"{load.cores[name]:.2f}" for name in names),
            *(f"{load.pss_mb[name]:.0f}" for name in names),
            _made_up(load),
        ]
        for load in scaled.loads
    ]
    note = "The users share the cores with the rest, and are no part of the product."
    return [*table(head, [empty, *cells]), "", note]


def _made_up(load: Load) -> str:
    shares = [stats["concealed"] for stats in load.buffers if stats]
    return f"{100 * sum(shares) / len(shares):.2f} %" if shares else NOTHING


# --- words ---


def single(value: float) -> Spread:
    return Spread(n=1, p50=value, p95=value, p99=value, worst=value)


def short(values: Iterable[float]) -> str:
    spread = Spread.of(values)
    return f"{spread.p50:.0f} / {spread.p95:.0f}" if spread.n else NOTHING
