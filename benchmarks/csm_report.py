"""docs/benchmarks.md's block on Sesame and docs/csm-batch.png, from what benchmarks.csm kept."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FRAME_MS = 80.0
BLOCK = "csm"
WANTED = {
    ("tiny", "cpu"): "A tiny model on a processor",
    ("real", "cuda"): "csm-1b's size on a GPU",
}
"""Random weights both. What was not measured has its place on the page, and says so."""
NOT_YET = "Not yet measured: `just bench-csm --size real` on a machine with a GPU fills this in."
OURS, PEERS = "this engine", ("generate", "generate, static cache")
COLOURS = {OURS: "#2563eb", PEERS[0]: "#9ca3af", PEERS[1]: "#d97706"}
AIMS_MS = {1: 8.0, 64: 25.0}
"""For the real size on an H100, the 50th percentile."""


def write(out: Path, docs: Path) -> None:
    """Rewrite the block and the picture from whatever samples there are."""
    from benchmarks.figures import replace_block

    outcomes = {key: read(out, *key) for key in WANTED}
    page = docs / "benchmarks.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(replace_block(text, BLOCK, list(block(outcomes))), encoding="utf-8")
    draw({key: found for key, found in outcomes.items() if found}, docs / "csm-batch.png")


def read(out: Path, size: str, device: str) -> dict[str, Any] | None:
    path = out / f"csm-{size}-{device}.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def block(outcomes: Mapping[tuple[str, str], dict[str, Any] | None]) -> Iterator[str]:
    for key, title in WANTED.items():
        yield from ("", f"### {title}", "")
        outcome = outcomes[key]
        yield from tables_of(outcome) if outcome else empty()
    yield ""


def empty() -> list[str]:
    rows = [[str(batch), *[""] * 8] for batch in (1, 2, 4, 8, 16, 32, 64)]
    return [NOT_YET, "", *table(head([OURS, *PEERS], energy=False), rows)]


def tables_of(outcome: Mapping[str, Any]) -> list[str]:
    """Markdown: what it ran on, a row a batch, first audio, memory."""
    lines = [f"- {name}: {value}" for name, value in said_of(outcome)]
    sides = list(dict.fromkeys(cell["side"] for cell in outcome["cells"]))
    energy = any(cell["joules"] for cell in outcome["cells"])
    lines += ["", *table(head(sides, energy), rows_of(outcome["cells"], sides, energy))]
    if outcome["first_audio"]:
        rows = [[name, spread(values)] for name, values in outcome["first_audio"].items()]
        lines += ["", *table(["text → first 80 ms of sound", "ms, p50 / p99"], rows)]
    failures = [cell for cell in outcome["cells"] if "failed" in cell]
    lines += [f"\n{c['side']}, batch {c['batch']}: {c['failed']}" for c in failures]
    return lines


def said_of(outcome: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield from outcome["facts"].items()
    yield "command", f"`{outcome['command']}`"
    yield "taken", outcome["taken"][:16].replace("T", " ") + " UTC"
    if outcome["note"]:
        yield "note", outcome["note"]
    if "slot_bytes" in outcome:
        yield "memory of one slot", f"{outcome['slot_bytes'] / 2**20:.1f} MiB"
        yield "from weights to ready", f"{outcome['ready_s']:.1f} s"


def head(sides: Sequence[str], energy: bool) -> list[str]:
    columns = ["batch"]
    for side in sides:
        columns += [f"{side}: ms a frame, p50 / p99", "RTF"]
    columns += [f"times {side}" for side in sides if side != OURS and OURS in sides]
    return columns + ([f"J a second of sound, {side}" for side in sides] if energy else [])


def rows_of(
    cells: Sequence[Mapping[str, Any]], sides: Sequence[str], energy: bool
) -> list[list[str]]:
    by = {(cell["batch"], cell["side"]): cell for cell in cells}
    rows = []
    for batch in dict.fromkeys(cell["batch"] for cell in cells):
        found = [by[batch, side] for side in sides]
        row = [str(batch)]
        for cell in found:
            row += [spread(cell["frame_ms"]), rtf(cell["frame_ms"])]
        if OURS in sides:
            ours = by[batch, OURS]
            row += [times(cell, ours) for cell in found if cell["side"] != OURS]
        if energy:
            row += [joules(cell) for cell in found]
        rows.append(row)
    return rows


def spread(values: Sequence[float]) -> str:
    if not values:
        return "failed"
    p50, p99 = np.percentile(values, [50, 99])
    return f"{p50:.1f} / {p99:.1f}"


def rtf(values: Sequence[float]) -> str:
    return f"{statistics.median(values) / FRAME_MS:.3f}" if values else ""


def times(cell: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    if not (cell["frame_ms"] and ours["frame_ms"]):
        return ""
    ratio = statistics.median(cell["frame_ms"]) / statistics.median(ours["frame_ms"])
    return f"{ratio:.1f}"


def joules(cell: Mapping[str, Any]) -> str:
    """The device's, for a second of each of the batch's voices."""
    if not cell["joules"]:
        return ""
    return f"{statistics.mean(cell['joules']) * 1000 / FRAME_MS / cell['batch']:.2f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


# --- the picture


def draw(outcomes: Mapping[tuple[str, str], Mapping[str, Any]], path: Path) -> None:
    """One pane a measurement: how a frame's time grows with the batch."""
    if not outcomes:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(outcomes), figsize=(5.2 * len(outcomes) + 1, 3.8), squeeze=False
    )
    for axis, (key, outcome) in zip(axes[0], outcomes.items(), strict=True):
        pane(axis, outcome, WANTED[key])
        if key[0] == "real":
            axis.plot(AIMS_MS.keys(), AIMS_MS.values(), "v", color="#16a34a", label="aim, H100")
    axes[0][0].set_ylabel("ms a frame of 80 ms, median", fontsize=8)
    axes[0][-1].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def pane(axis: Any, outcome: Mapping[str, Any], title: str) -> None:
    for side, colour in COLOURS.items():
        cells = [c for c in outcome["cells"] if c["side"] == side and c["frame_ms"]]
        batches = [cell["batch"] for cell in cells]
        low, mid, high = (
            [float(np.percentile(cell["frame_ms"], q)) for cell in cells] for q in (5, 50, 95)
        )
        axis.fill_between(batches, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.plot(batches, mid, "o-", color=colour, markersize=3, label=side)
    axis.axhline(FRAME_MS, color="#dc2626", linewidth=1, linestyle="--", label="real time")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    every = sorted({cell["batch"] for cell in outcome["cells"]})
    axis.set_xticks(every, [str(batch) for batch in every], fontsize=8)
    axis.tick_params(axis="y", labelsize=8)
    axis.set_xlabel("voices at once", fontsize=8)
    axis.set_title(title, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
