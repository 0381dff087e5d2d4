"""The conversation as a picture: two lanes, voice activity, every pause and what became of it."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from src.audio.pcm import SAMPLE_RATE, Int16
from src.demo.recording import MIC_RATE, Recording
from src.rpc.ws_events import AudioBegin, Heard

LONGEST_ROW_S = 16.0
CHARS_PER_ROW = 212
USER, AGENT, INK, SOFT = "#2563eb", "#d97706", "#1f2937", "#9ca3af"
VERDICT = {"false": ("#15803d", "false alarm: resumed"), "real": ("#b91c1c", "real: stopped")}


def draw(recording: Recording, path: Path, title: str) -> None:
    """Write a PNG. Equal rows of at most 16 s, the user's lane above the agent's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    length_s = recording.length_ms / 1000
    rows = max(1, int(np.ceil(length_s / LONGEST_ROW_S)))
    row_s = length_s / rows
    figure, axes = pyplot.subplots(rows, 1, figsize=(15, 2.9 * rows + 0.7), squeeze=False)
    for index, axis in enumerate(axes[:, 0]):
        _row(_Row(axis, index * row_s, row_s), recording)
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, color=INK, weight="bold")
    axes[-1, 0].set_xlabel("seconds", color=INK)
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


@dataclass(frozen=True)
class _Row:
    axis: Any
    start_s: float
    length_s: float

    @property
    def end_s(self) -> float:
        return self.start_s + self.length_s

    def holds(self, at_ms: float) -> bool:
        return self.start_s <= at_ms / 1e3 < self.end_s


def _row(row: _Row, recording: Recording) -> None:
    axis = row.axis
    axis.set_xlim(row.start_s, row.end_s)
    axis.set_ylim(-2.75, 2.75)
    axis.set_yticks([1.0, -1.0], ["user", "agent"])
    axis.tick_params(colors=INK, length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.axhline(0, color=SOFT, linewidth=0.5)
    _wave(row, recording.mic, MIC_RATE, 1.0, USER)
    _wave(row, recording.agent, SAMPLE_RATE, -1.1, AGENT)
    for span in recording.voice_spans():
        axis.axvspan(span.start_ms / 1e3, span.end_ms / 1e3, 0.5, 0.86, color=USER, alpha=0.10)
    _captions(row, recording)
    _cuts(row, recording)


def _wave(row: _Row, pcm: Int16, rate: int, middle: float, colour: str) -> None:
    """Peak envelope in 10 ms steps."""
    step = rate // 100
    part = pcm[int(row.start_s * rate) : int(row.end_s * rate)]
    part = part[: part.size // step * step]
    if not part.size:
        return
    peaks = np.abs(part.reshape(-1, step).astype(np.float32)).max(axis=1) / 32768.0
    scale = 0.72 * np.sqrt(peaks)
    times = row.start_s + np.arange(peaks.size) / 100
    row.axis.fill_between(
        times, middle - scale, middle + scale, color=colour, linewidth=0, alpha=0.85
    )


def _captions(row: _Row, recording: Recording) -> None:
    for said in recording.said:
        length_ms = said.end_ms - said.start_ms
        _text(row, said.start_ms, 2.05, said.text or "(cough)", USER, length_ms, va="bottom")
    begins = {e.utterance_id: at for at, e in reversed(list(recording.of(AudioBegin)))}
    for _, event in recording.of(Heard):
        at_ms = begins.get(event.utterance_id)
        if at_ms is not None:
            cut = f"  ✂ {_short(event.cut)}" if event.cut else ""
            _text(row, at_ms, -1.95, _short(event.heard, 180) + cut, AGENT, 5_000, va="top")


def _text(
    row: _Row, at_ms: float, y: float, text: str, colour: str, length_ms: float, va: str
) -> None:
    """At most two lines, about as wide as what they caption; pulled in at the row's end."""
    if not row.holds(at_ms):
        return
    chars_per_s = CHARS_PER_ROW / row.length_s
    lines = textwrap.wrap(text, max(28, int(length_ms / 1e3 * chars_per_s)))[:2]
    width_s = max(map(len, lines), default=0) / chars_per_s
    x = max(row.start_s, min(at_ms / 1e3, row.end_s - width_s))
    row.axis.text(x, y, "\n".join(lines), color=colour, fontsize=8.5, va=va)


def _cuts(row: _Row, recording: Recording) -> None:
    for cut in recording.cuts():
        if not row.holds(cut.edge_ms):
            continue
        colour, words = VERDICT[cut.verdict]
        mark = "▶" if cut.verdict == "false" else "■"
        row.axis.plot([cut.edge_ms / 1e3] * 2, [-1.85, 1.9], color=colour, linewidth=1.2)
        row.axis.plot([cut.verdict_ms / 1e3] * 2, [-1.85, 0], color=colour, linewidth=1.2, ls=":")
        row.axis.text(cut.edge_ms / 1e3 - 0.04, 0.08, "❚❚", color=colour, fontsize=8, ha="right")
        row.axis.text(
            cut.verdict_ms / 1e3,
            0.08,
            f"{mark} {words}",
            color=colour,
            fontsize=8.5,
            weight="bold",
        )


def _short(text: str, limit: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
