"""The conversation as a picture: two lanes, voice activity, every pause and what became of it."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from src.audio.pcm import SAMPLE_RATE, Int16
from src.demo.recording import MIC_RATE, Recording
from src.rpc.ws_events import AudioBegin, Heard, ReplyText

ROW_S = 16.0
USER, AGENT, INK, SOFT = "#2563eb", "#d97706", "#1f2937", "#9ca3af"
VERDICT = {"false": ("#15803d", "false alarm: resumed"), "real": ("#b91c1c", "real: stopped")}


def draw(recording: Recording, path: Path, title: str) -> None:
    """Write a PNG. Rows of 16 s, the user's lane above the agent's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = max(1, int(np.ceil(recording.length_ms / 1000 / ROW_S)))
    figure, axes = pyplot.subplots(rows, 1, figsize=(15, 2.9 * rows + 0.7), squeeze=False)
    for index, axis in enumerate(axes[:, 0]):
        _row(axis, recording, index * ROW_S)
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, color=INK, weight="bold")
    axes[-1, 0].set_xlabel("seconds", color=INK)
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _row(axis: Any, recording: Recording, start_s: float) -> None:
    axis.set_xlim(start_s, start_s + ROW_S)
    axis.set_ylim(-2.75, 2.75)
    axis.set_yticks([1.0, -1.0], ["user", "agent"])
    axis.tick_params(colors=INK, length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.axhline(0, color=SOFT, linewidth=0.5)
    _wave(axis, recording.mic, MIC_RATE, 1.0, USER, start_s)
    _wave(axis, recording.agent, SAMPLE_RATE, -1.0, AGENT, start_s)
    for span in recording.voice_spans():
        axis.axvspan(span.start_ms / 1e3, span.end_ms / 1e3, 0.5, 0.86, color=USER, alpha=0.10)
    _captions(axis, recording, start_s)
    _cuts(axis, recording, start_s)


def _wave(axis: Any, pcm: Int16, rate: int, middle: float, colour: str, start_s: float) -> None:
    """Peak envelope in 10 ms steps."""
    step = rate // 100
    part = pcm[int(start_s * rate) : int((start_s + ROW_S) * rate)]
    part = part[: part.size // step * step]
    if not part.size:
        return
    peaks = np.abs(part.reshape(-1, step).astype(np.float32)).max(axis=1) / 32768.0
    scale = 0.85 * np.sqrt(peaks)
    times = start_s + np.arange(peaks.size) / 100
    axis.fill_between(times, middle - scale, middle + scale, color=colour, linewidth=0, alpha=0.85)


def _captions(axis: Any, recording: Recording, start_s: float) -> None:
    for said in recording.said:
        _text(axis, said.start_ms, 2.12, said.text or "(cough)", USER, start_s, said.end_ms)
    begins = {event.utterance_id: at for at, event in reversed(list(recording.of(AudioBegin)))}
    for _, event in recording.of(Heard):
        at = begins.get(event.utterance_id)
        if at is not None:
            cut = f"  ✂ {_short(event.cut)}" if event.cut else ""
            _text(axis, at, -2.55, _short(event.heard, 180) + cut, AGENT, start_s, at + 6_000)


def _text(
    axis: Any, at_ms: float, y: float, text: str, colour: str, start_s: float, end_ms: float
) -> None:
    if start_s <= at_ms / 1e3 < start_s + ROW_S:
        width = max(30, int((end_ms - at_ms) / 1e3 * 16))
        lines = "\n".join(textwrap.wrap(text, width)[:2])
        axis.text(at_ms / 1e3, y, lines, color=colour, fontsize=8.5, va="bottom", clip_on=True)


def _cuts(axis: Any, recording: Recording, start_s: float) -> None:
    for cut in recording.cuts():
        if not start_s <= cut.edge_ms / 1e3 < start_s + ROW_S:
            continue
        colour, words = VERDICT[cut.verdict]
        axis.plot([cut.edge_ms / 1e3] * 2, [-1.9, 1.9], color=colour, linewidth=1.2)
        axis.plot([cut.verdict_ms / 1e3] * 2, [-1.9, -0.1], color=colour, linewidth=1.2, ls=":")
        mark = "▶" if cut.verdict == "false" else "■"
        axis.text(cut.edge_ms / 1e3, 0.06, "❚❚", color=colour, fontsize=9, ha="right")
        axis.text(
            cut.verdict_ms / 1e3 + 0.05,
            -0.36,
            f"{mark} {words}",
            color=colour,
            fontsize=8.5,
            weight="bold",
        )


def _short(text: str, limit: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def reply_texts(recording: Recording) -> dict[str, str]:
    """Everything the language model wrote, by utterance, heard or not."""
    out: dict[str, str] = {}
    for _, event in recording.of(ReplyText):
        out[event.utterance_id] = out.get(event.utterance_id, "") + event.text
    return out
