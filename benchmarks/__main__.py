"""`just bench`: measure, keep the samples in out/benchmarks, rewrite docs/benchmarks.md's block.

    just bench                       everything below, about 9 minutes
    just bench turns                 one of them, or several: text turns scripted noise load
    just bench load --sessions 50
    just bench vad                   the detector, the recogniser and the voices by themselves
    just bench --quick               a short run of each; the page is left alone
    just bench report                the page again, from the samples that are there

A machine that does something else at the same time measures that, too: the load average before
each benchmark stands beside its figures.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import importlib
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from benchmarks import report
from benchmarks.figures import Outcome, Result, row_table
from benchmarks.machine import load_average
from benchmarks.stacks import Bench
from src.common.tasks import leaves
from src.demo.stack import ROOT

log = logging.getLogger(__name__)

SESSIONS = (1, 10, 50)
BY_THEMSELVES = ("vad", "asr", "tts_families")
"""Modules with a `main` of their own, which print."""

Benchmark = Callable[[Bench], Awaitable[Result]]


def known(sessions: Sequence[int]) -> dict[str, dict[str, Benchmark]]:
    """Group to its benchmarks, in the order in which they run."""
    from benchmarks import first_frame, load, noise, turns

    return {
        "text": {"text": first_frame.measure},
        "turns": {"turns-real": turns.real},
        "scripted": {"turns-scripted": turns.scripted},
        "noise": {"noise": noise.measure},
        "load": {f"load-{count}": partial(load.measure, sessions=count) for count in sessions},
    }


async def run_one(name: str, benchmark: Benchmark, bench: Bench, command: str) -> Outcome:
    before, taken = load_average(), datetime.datetime.now(datetime.timezone.utc)
    result = await benchmark(bench)
    return Outcome(
        name=name,
        command=command,
        taken=taken.isoformat(timespec="seconds"),
        load_before=round(before, 2),
        rows=result.rows,
        tables=result.tables,
        raw=result.raw,
    )


def run_group(group: str, members: dict[str, Benchmark], bench: Bench, console: Console) -> bool:
    """False when one of them did not run."""
    good = True
    for name, benchmark in members.items():
        began = time.monotonic()
        console.print(f"[bold]{name}[/]  [dim]load average {load_average():.1f}[/]")
        command = f"just bench {group}"
        if group == "load":
            command += f" --sessions {name.removeprefix('load-')}"
        try:
            outcome = asyncio.run(run_one(name, benchmark, bench, command))
        except Exception as error:  # the others are worth having, and nobody may be watching
            for leaf in leaves(error):
                console.print("[bold red]did not run:[/]", f"{type(leaf).__name__}: {leaf}")
            log.debug("%s did not run", name, exc_info=True)
            good = False
            continue
        path = bench.out / f"{name}.json"
        path.write_text(outcome.model_dump_json(indent=1), encoding="utf-8")
        for line in (*row_table(outcome.rows), *(x for t in outcome.tables.values() for x in t)):
            console.print(line, markup=False, soft_wrap=True)
        console.print(f"[dim]{time.monotonic() - began:.0f} s, {path}[/]\n")
    return good


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="just bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    choices = [*known(SESSIONS), *BY_THEMSELVES, "report"]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(choices)}")
    parser.add_argument("--sessions", type=int, nargs="+", default=SESSIONS, help="for load")
    parser.add_argument("--quick", action="store_true", help="short; does not touch the page")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "benchmarks")
    args, rest = parser.parse_known_args(argv)
    args.rest = rest
    unknown = [name for name in args.names if name not in choices]
    alone = len(args.names) == 1 and args.names[0] in BY_THEMSELVES
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(choices)}")
    if not alone and (args.rest or set(args.names) & set(BY_THEMSELVES)):
        parser.error(f"{', '.join(BY_THEMSELVES)} are run one at a time, with flags of their own")
    return args


def by_itself(name: str, flags: Sequence[str]) -> None:
    sys.argv = [f"just bench {name}", *flags]
    importlib.import_module(f"benchmarks.{name}").main()


def main() -> None:
    args = arguments()
    if args.names and args.names[0] in BY_THEMSELVES:
        by_itself(args.names[0], args.rest)
        return
    # Workers that somebody else announces would be measured, too.
    os.environ.pop("REDIS_URL", None)
    console = Console(highlight=False)
    out = args.out / "quick" if args.quick else args.out
    out.mkdir(parents=True, exist_ok=True)
    bench = Bench(out, args.quick, lambda line: console.print(f"[dim]  {line}[/]"))
    groups = known(args.sessions)
    good = True
    for group in args.names or groups:
        if group != "report":
            good &= run_group(group, groups[group], bench, console)
    if not args.quick:
        report.write(out, ROOT / "docs")
        console.print("wrote docs/benchmarks.md")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
