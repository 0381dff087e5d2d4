"""The LiveKit block of docs/benchmarks.md and docs/livekit-latency.png, from out/livekit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import ROW_HEAD, Outcome, facts, replace_block, table
from benchmarks.machine import description
from src.common.livekit_server import VERSION

BLOCK = "livekit"
PARTS = ("trials", "page", "greetings", "scale")
PANELS = {
    "silence": "the user's onset → the agent is silent",
    "first_audio": "end of the user's speech → first audio",
}
COLOURS = {"ours": "#2563eb", "Agen": "#6b7280"}


def write(out: Path, docs: Path) -> None:
    """From whatever parts were run. Raises benchmarks.figures.NoBlock."""
    outcomes = [
        Outcome.model_validate_json(path.read_text(encoding="utf-8"))
        for path in (out / f"{part}.json" for part in PARTS)
        if path.exists()
    ]
    page = docs / "benchmarks.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(replace_block(text, BLOCK, block(outcomes)), encoding="utf-8")
    for outcome in outcomes:
        if outcome.name == "trials":
            draw(outcome.raw["measured"], docs / "livekit-latency.png")


def block(outcomes: Sequence[Outcome]) -> list[str]:
    if not outcomes:
        return ["Nothing has been measured yet: `just bench-livekit`."]
    lines = facts({**description(), **_software(), "taken": outcomes[0].taken[:10]})
    for title, more in _tables(outcomes, first=True):
        lines += ["", f"### {title}", "", *more]
    lines += ["", "### Aims", ""]
    lines += table(ROW_HEAD, (row.cells() for outcome in outcomes for row in outcome.rows))
    for title, more in _tables(outcomes, first=False):
        lines += ["", f"### {title}", "", *more]
    loads = ", ".join(f"{outcome.name} {outcome.load_before:.2f}" for outcome in outcomes)
    return [*lines, "", f"Load average before each part: {loads}."]


def _software() -> dict[str, str]:
    names = ("livekit-agents", "livekit")
    return {
        "LiveKit": f"server {VERSION}, " + ", ".join(f"{name} {version(name)}" for name in names)
    }


def _tables(outcomes: Sequence[Outcome], *, first: bool) -> list[tuple[str, list[str]]]:
    """The trials' own tables come before the aims, the others after."""
    return [
        (title, lines)
        for outcome in outcomes
        if (outcome.name == "trials") is first
        for title, lines in outcome.tables.items()
    ]


# --- the picture ---


def draw(measured: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """A dot for every trial, a line at the median; sides from top to bottom."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 0.5 * len(measured) + 1.1), sharey=True)
    dice = np.random.default_rng(5)
    for axis, (key, title) in zip(panels, PANELS.items(), strict=True):
        for lane, (name, one) in enumerate(measured.items()):
            values = [trial[key] for trial in one["trials"]]
            if values:
                _lane(axis, len(measured) - 1 - lane, values, COLOURS[name[:4]], dice)
        axis.set_title(title, fontsize=9)
        axis.set_xlim(left=0)
        axis.tick_params(axis="x", labelsize=8)
        axis.set_xlabel("ms", fontsize=8)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(measured)), list(measured)[::-1], fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _lane(
    axis: Any, y: float, values: Sequence[float], colour: str, dice: np.random.Generator
) -> None:
    heights = y + dice.uniform(-0.18, 0.18, len(values))
    axis.scatter(values, heights, s=14, color=colour, alpha=0.55, linewidths=0)
    median = float(np.median(values))
    axis.plot([median, median], [y - 0.3, y + 0.3], color=colour, linewidth=2)
    axis.text(median, y + 0.33, f"{median:.0f}", ha="center", va="bottom", fontsize=8, color=colour)
