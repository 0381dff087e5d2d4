"""docs/benchmarks.md's block and docs/latency.png, from the outcomes in out/benchmarks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import ROW_HEAD, Outcome, Spread, facts, replace_block, table
from benchmarks.machine import description

ORDER = ("load-1", "load-10", "load-50", "text", "turns-scripted", "turns-real", "noise")
BLOCK = "measured"
STAGES = {
    "transcript": ("words", "#2563eb"),
    "endpoint": ("end of turn called", "#64748b"),
    "first_token": ("first token", "#9333ea"),
}
PEERS = {
    "Pipecat 1.14 tuned, 8 s context": 757,
    "LiveKit 1.8 tuned, 8 s context": 832,
    "Pipecat 1.14 tuned": 1299,
    "LiveKit 1.8 tuned": 1319,
    "Pipecat 1.14 default": 1389,
    "LiveKit 1.8 default": 1662,
}
"""First audio after the end of speech, p50 in ms: same engines, questions and method."""


def write(out: Path, docs: Path) -> None:
    """Rewrite the block and the picture from whatever outcomes there are."""
    outcomes = list(stored(out))
    page = docs / "benchmarks.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(replace_block(text, BLOCK, block(outcomes)), encoding="utf-8")
    draw(outcomes, docs / "latency.png")


def stored(out: Path) -> Iterator[Outcome]:
    """In the page's order; what was not run is left out, other session counts come last."""
    names = {path.stem for path in out.glob("*.json")}
    for name in (*(n for n in ORDER if n in names), *sorted(names - set(ORDER))):
        yield Outcome.model_validate_json((out / f"{name}.json").read_text(encoding="utf-8"))


def block(outcomes: Sequence[Outcome]) -> list[str]:
    if not outcomes:
        return ["Nothing has been measured yet: `just bench`."]
    days = sorted({outcome.taken[:10] for outcome in outcomes})
    lines = [
        *facts({**description(), "taken": " to ".join(dict.fromkeys((days[0], days[-1])))}),
        "",
    ]
    lines += table(ROW_HEAD, (row.cells() for outcome in outcomes for row in outcome.rows))
    for outcome in outcomes:
        for title, more in outcome.tables.items():
            lines += ["", f"### {title}", "", *more]
    lines += ["", "### How each was run", ""]
    lines += table(
        ("command", "taken (UTC)", "load average before"),
        ([f"`{o.command}`", o.taken[:16].replace("T", " "), f"{o.load_before:.2f}"]
         for o in outcomes),
    )  # fmt: skip
    return lines


# --- the picture ---


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """One lane a run: when each stage was reached, counted from the end of the user's speech."""
    runs = {o.name: o.raw["turns"] for o in outcomes if o.name.startswith("turns-")}
    if not any(runs.values()):
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lanes = {"turns-real": "this project", "turns-scripted": "this project, scripted engines"}
    labels = [lanes[name] for name in runs] + list(PEERS)
    figure, axis = pyplot.subplots(figsize=(9, 0.42 * len(labels) + 1.2))
    for index, turns in enumerate(runs.values()):
        _lane(axis, len(labels) - 1 - index, turns)
    for index, total in enumerate(PEERS.values()):
        y = len(PEERS) - 1 - index
        axis.barh(y, total, height=0.5, color="#d1d5db")
        axis.text(total + 12, y, f"{total}", va="center", fontsize=8, color="#4b5563")
    axis.set_yticks(range(len(labels)), labels[::-1], fontsize=8)
    axis.set_xlabel("ms from the end of speech to the first audio (median)", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.legend(*_legend(pyplot), fontsize=8, loc="upper right", frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _lane(axis: Any, y: float, turns: Sequence[dict[str, Any]]) -> None:
    total = Spread.of(turn["first_audio_ms"] for turn in turns).p50
    axis.barh(y, total, height=0.5, color="#fde68a")
    axis.text(total + 12, y, f"{total:.0f}", va="center", fontsize=8, weight="bold")
    for stage, (_, colour) in STAGES.items():
        at_ms = float(np.median([_at_ms(turn, stage) for turn in turns]))
        axis.plot([at_ms, at_ms], [y - 0.32, y + 0.32], color=colour, linewidth=2.5)


def _at_ms(turn: dict[str, Any], stage: str) -> float:
    """From the end of speech as the caller knows it; the server's estimate is a little earlier."""
    stages = turn["stages_ms"]
    return float(stages[stage] - stages["first_audio"] + turn["first_audio_ms"])


def _legend(pyplot: Any) -> tuple[list[Any], list[str]]:
    lines = [pyplot.Line2D([], [], color=colour, linewidth=2.5) for _, colour in STAGES.values()]
    return lines, [name for name, _ in STAGES.values()]
