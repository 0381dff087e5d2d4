"""What happened, checked against what should have: the demo's table and its exit status."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

from rich.table import Table

from src.demo.play import Happened
from src.demo.recording import Recording
from src.demo.wer import word_errors
from src.rpc.ws_events import AudioBegin, AudioEnd, Heard

# One word in three: a small recogniser on a small machine, but it must have understood.
MAX_ERROR_RATE = 0.34


@dataclass(frozen=True)
class Check:
    """One thing that must have happened."""

    what: str
    ok: bool
    detail: str = ""


def checks(recording: Recording, happened: Happened, *, understands: bool) -> list[Check]:
    out = [*_recognised(recording)] if understands else []
    out += [
        _paused_and_resumed(recording, happened),
        _nothing_lost(recording, happened),
        _interrupted(recording, happened),
        Check(
            "the voice was switched, and the new one spoke",
            bool(happened.switched_to and happened.spoke_after_switch),
            happened.switched_to,
        ),
    ]
    return out


def _recognised(recording: Recording) -> Iterator[Check]:
    finals = recording.finals()
    lines = [said.text for said in recording.said if said.text]
    for index, line in enumerate(lines):
        got = finals[index].text if index < len(finals) else ""
        found = word_errors(line, got)
        ok = bool(got) and found.rate <= MAX_ERROR_RATE
        yield Check(f"turn {index + 1} was understood", ok, f"{found.errors} of {found.words}")


def _paused_and_resumed(recording: Recording, happened: Happened) -> Check:
    verdicts = [cut.verdict for cut in recording.cuts()]
    resumed = any(
        event.resumed and event.utterance_id == happened.cough_utterance
        for _, event in recording.of(AudioBegin)
    )
    ok = "false" in verdicts and resumed
    return Check("the cough paused the voice, and it went on", ok, ", ".join(verdicts))


def _nothing_lost(recording: Recording, happened: Happened) -> Check:
    """The resumed audio begins with the frame after the last one heard."""
    resumes = [event for _, event in recording.of(AudioBegin) if event.resumed]
    for begin, cut in zip(resumes, recording.cuts(), strict=False):
        if begin.utterance_id == happened.cough_utterance:
            heard = cut.flush.heard_seq
            return Check(
                "nothing was lost or repeated at the resume",
                begin.seq == heard + 1,
                f"heard frame {heard}, resumed at {begin.seq}",
            )
    return Check("nothing was lost or repeated at the resume", False, "it never resumed")


def _interrupted(recording: Recording, happened: Happened) -> Check:
    for event in recording.heard():
        if event.utterance_id == happened.interrupted_utterance:
            heard, cut = len(event.heard.split()), len(event.cut.split())
            return Check(
                "the interruption cut the story at the heard word",
                not event.completed and heard > 0,
                f"{heard} words heard, {cut} cut",
            )
    return Check("the interruption cut the story at the heard word", False, "no such reply")


def turn_table(recording: Recording, *, understands: bool) -> Table:
    """One row per spoken turn."""
    table = Table(title="Turns", title_justify="left", header_style="bold")
    for column in ("said", "recognised", "errors"):
        table.add_column(column, overflow="fold")
    for column in ("transcript", "first token", "first audio"):
        table.add_column(f"{column} ms", justify="right")
    lines = [said.text for said in recording.said if said.text]
    finals = recording.finals()
    for line, final in zip_longest(lines, finals[: len(lines)]):
        got = final.text if final else "—"
        found = word_errors(line, got)
        row = [line, got, f"{found.errors}/{found.words}" if understands else "—"]
        one = recording.latency_of(final.turn_id) if final else None
        if one is not None:
            row += [str(one.transcript_ms), str(one.first_token_ms), str(one.first_audio_ms)]
        table.add_row(*row)
    return table


def barge_in_table(recording: Recording) -> Table:
    table = Table(title="Interruptions", title_justify="left", header_style="bold")
    for column in (
        "what",
        "verdict",
        "onset → pause ms",
        "edge → silence at the client ms",
        "verdict after ms",
    ):
        table.add_column(column, justify="left" if column in ("what", "verdict") else "right")
    for cut in recording.cuts():
        said = _said_at(recording, cut.edge_ms)
        table.add_row(
            said[1] or "a cough",
            "false alarm, resumed" if cut.verdict == "false" else "real, stopped",
            f"{cut.edge_ms - said[0]:.0f}",
            f"{cut.silence_ms - cut.edge_ms:.0f}",
            f"{cut.verdict_ms - cut.edge_ms:.0f}",
        )
    return table


def _said_at(recording: Recording, edge_ms: float) -> tuple[float, str]:
    before = [said for said in recording.said if said.start_ms <= edge_ms]
    return (before[-1].start_ms, before[-1].text) if before else (edge_ms, "?")


def heard_table(recording: Recording) -> Table:
    table = Table(title="What the user heard", title_justify="left", header_style="bold")
    table.add_column("heard", overflow="fold", ratio=3)
    table.add_column("cut", overflow="fold", ratio=2, style="strike dim")
    table.add_column("frames", justify="right")
    frames = {event.utterance_id: event.frames for _, event in recording.of(AudioEnd)}
    for heard in recording.heard():
        table.add_row(heard.heard, _first_words(heard), str(frames.get(heard.utterance_id, "")))
    return table


def _first_words(event: Heard, count: int = 14) -> str:
    words = event.cut.split()
    return " ".join(words[:count]) + (" …" if len(words) > count else "")
