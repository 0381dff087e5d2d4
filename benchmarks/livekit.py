"""`just bench-livekit`: rooms as their users hear them, beside a stock AgentSession.

    just bench-livekit                  all, 13 minutes; rewrites docs/benchmarks.md's LiveKit block
    just bench-livekit --quick          three minutes; the page is left alone
    just bench-livekit trials page      some of: trials page greetings scale
    just bench-livekit scale --rooms 1 20

One real livekit-server, one worker with eSpeak for everybody, the user, the peer and the crowd in
processes of their own. Samples go to out/livekit. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import logging
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.figures import Outcome, Result, row_table
from benchmarks.machine import load_average
from benchmarks.rooms import greetings, page, report, results, scale, trials
from benchmarks.rooms.lab import RoomLab, room_lab
from benchmarks.stacks import Bench
from src.common.tasks import leaves
from src.demo.stack import ROOT

log = logging.getLogger(__name__)

ROOMS = (1, 5, 10)
Tick = Callable[[], None]
Finish = Callable[[], Result]
"""After the lab is gone: its orchestrator writes its samples when it ends."""


@dataclass(frozen=True)
class Size:
    rounds: int
    per_block: int
    joins: int
    window_ms: int


FULL = Size(rounds=4, per_block=3, joins=12, window_ms=8_000)
QUICK = Size(rounds=2, per_block=2, joins=4, window_ms=4_000)


class Run:
    """One lab, and the parts that were asked for, one after the other."""

    def __init__(self, lab: RoomLab, size: Size, rooms: Sequence[int]) -> None:
        self._lab = lab
        self._size = size
        self._rooms = rooms

    def steps(self) -> dict[str, int]:
        size = self._size
        talks = size.rounds * size.per_block
        return {
            "trials": talks * len(trials.SIDES),
            "page": talks * len(page.TRANSPORTS),
            "greetings": size.joins * len(greetings.ENTRIES),
            "scale": len(self._rooms),
        }

    async def trials(self, tick: Tick) -> Finish:
        measured = {name: trials.Measured() for name in trials.SIDES}
        for sides in trials.order(list(measured), self._size.rounds):
            for name in sides:
                await trials.block(self._lab, name, self._size.per_block, measured[name], tick)
        return lambda: results.trials(measured, _gates(self._lab.samples))

    async def page(self, tick: Tick) -> Finish:
        measured = {name: page.PageMeasured() for name in page.TRANSPORTS}
        for transports in trials.order(list(measured), self._size.rounds):
            for name in transports:
                await page.block(self._lab, name, self._size.per_block, measured[name], tick)
        return lambda: results.page(measured)

    async def greetings(self, tick: Tick) -> Finish:
        greeted = await greetings.measure(self._lab, self._size.joins, tick)
        return lambda: results.greetings(greeted)

    async def scale(self, tick: Tick) -> Finish:
        scaled = await scale.measure(self._lab, self._rooms, self._size.window_ms, tick)
        return lambda: results.scale(scaled)


def _gates(samples: Sequence[Path]) -> list[float]:
    """When a gate was shut; one user at a time talks to all of the orchestrators together."""
    taken = [json.loads(path.read_text(encoding="utf-8")) for path in samples]
    return sorted(at_ms for one in taken for at_ms, _ in one.get("edge_to_last_frame", []))


@dataclass
class Done:
    part: str
    taken: str
    load_before: float
    finish: Finish


async def run_parts(bench: Bench, args: argparse.Namespace, progress: Progress) -> list[Done]:
    """Those that ran. Raises what keeps all of them from running."""
    done = []
    async with room_lab(bench) as lab:
        run = Run(lab, QUICK if args.quick else FULL, sorted(args.rooms))
        for part in args.parts or report.PARTS:
            if part == "page" and (why := page.missing()):
                bench.report(f"page: {why}")
                continue
            shown = progress.add_task(part, total=run.steps()[part])
            measure: Callable[[Tick], Awaitable[Finish]] = getattr(run, part)
            taken, before = datetime.datetime.now(datetime.timezone.utc), load_average()
            try:
                finish = await measure(lambda shown=shown: progress.advance(shown))  # type: ignore[misc]
            except Exception as error:  # the others are worth having, and nobody may be watching
                for leaf in leaves(error):
                    bench.report(f"{part} did not run: {type(leaf).__name__}: {leaf}")
                log.debug("%s did not run", part, exc_info=True)
                continue
            done.append(Done(part, taken.isoformat(timespec="seconds"), round(before, 2), finish))
    return done


def outcome(one: Done) -> Outcome:
    result = one.finish()
    return Outcome(
        name=one.part,
        command=f"just bench-livekit {one.part}",
        taken=one.taken,
        load_before=one.load_before,
        rows=result.rows,
        tables=result.tables,
        raw=result.raw,
    )


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="just bench-livekit",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(report.PARTS)}")
    parser.add_argument("--rooms", type=int, nargs="+", default=ROOMS, help="for scale")
    parser.add_argument("--quick", action="store_true", help="short; does not touch the page")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "livekit")
    args = parser.parse_args(argv)
    if unknown := [part for part in args.parts if part not in report.PARTS]:
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(report.PARTS)}")
    if min(args.rooms) < 1:
        parser.error("--rooms counts from 1")
    return args


def main() -> None:
    args = arguments()
    # The scripted language model is served here, and whoever interrupts it hangs up on it.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
    console = Console(highlight=False)
    out = args.out / "quick" if args.quick else args.out
    out.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description:10}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bench = Bench(out, args.quick, lambda line: progress.console.print(f"[dim]  {line}[/]"))
        try:
            done = asyncio.run(run_parts(bench, args, progress))
        except Exception as error:
            log.debug("nothing ran", exc_info=True)
            why = "; ".join(f"{type(leaf).__name__}: {leaf}" for leaf in leaves(error))
            sys.exit(f"cannot measure: {why}")
    for one in done:
        found = outcome(one)
        (out / f"{one.part}.json").write_text(found.model_dump_json(indent=1), encoding="utf-8")
        for line in (*row_table(found.rows), *(x for t in found.tables.values() for x in ["", *t])):
            console.print(line, markup=False, soft_wrap=True)
    if not args.quick:
        report.write(out, ROOT / "docs")
        console.print("wrote docs/benchmarks.md")
    asked = len(args.parts or report.PARTS)
    sys.exit(0 if len(done) == asked else 1)


if __name__ == "__main__":
    main()
