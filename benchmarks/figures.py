"""Numbers to figures: percentiles, Markdown tables, and the block of a page that they live in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import BaseModel

from src.common.config import StrictModel

NOTHING = "–"


class Spread(StrictModel):
    """How a set of measurements lies, in the unit they were taken in."""

    n: int
    p50: float
    p95: float
    p99: float
    worst: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Linear interpolation between the nearest two (numpy's). No values: all zero, n 0."""
        found = np.asarray(list(values), dtype=float)
        if not found.size:
            return cls(n=0, p50=0, p95=0, p99=0, worst=0)
        p50, p95, p99 = np.percentile(found, [50, 95, 99])
        return cls(n=found.size, p50=p50, p95=p95, p99=p99, worst=found.max())

    def text(self, digits: int = 0) -> str:
        if not self.n:
            return NOTHING
        return " / ".join(f"{value:.{digits}f}" for value in (self.p50, self.p95, self.p99))


class Aim(StrictModel):
    """What a figure should not exceed. A percentile without an aim is None."""

    p50: float | None = None
    p95: float | None = None
    p99: float | None = None

    def met(self, spread: Spread) -> bool:
        return all(
            aim is None or getattr(spread, name) <= aim for name, aim in self.model_dump().items()
        )

    def text(self) -> str:
        given = {name: aim for name, aim in self.model_dump().items() if aim is not None}
        return ", ".join(f"{name} ≤ {aim:g}" for name, aim in given.items()) or NOTHING


class Row(StrictModel):
    """One line of the table: what was measured, over how many sessions, and what it should be."""

    what: str
    sessions: int
    spread: Spread
    aim: Aim = Aim()
    digits: int = 0
    unit: str = "ms"

    def cells(self) -> list[str]:
        verdict = ""
        if self.aim != Aim() and self.spread.n:
            verdict = "met" if self.aim.met(self.spread) else "**missed**"
        return [
            self.what,
            str(self.sessions),
            f"{self.spread.text(self.digits)} {self.unit}".strip(),
            self.aim.text(),
            verdict,
            str(self.spread.n),
        ]


@dataclass
class Result:
    """What a benchmark measured. `tables`: more Markdown, title to lines. `raw`: every sample."""

    rows: list[Row]
    tables: dict[str, list[str]] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)


class Outcome(BaseModel):
    """What one benchmark leaves behind in `out/benchmarks/NAME.json`."""

    name: str
    command: str
    taken: str
    load_before: float
    """One-minute load average of the machine before it began."""
    rows: list[Row]
    tables: dict[str, list[str]]
    raw: dict[str, Any]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [_line(head), _line(["---"] * len(head))]
    return lines + [_line(row) for row in rows]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


ROW_HEAD = ("measured", "sessions", "p50 / p95 / p99", "aim", "", "n")


def row_table(rows: Iterable[Row]) -> list[str]:
    return table(ROW_HEAD, (row.cells() for row in rows))


class NoBlock(ValueError):
    """The page lacks the markers between which the figures belong."""


def replace_block(page: str, name: str, lines: Sequence[str]) -> str:
    """The page with the lines between `<!-- NAME:begin -->` and `<!-- NAME:end -->` rewritten."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, found_begin, rest = page.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not (found_begin and found_end):
        raise NoBlock(f"no {begin} … {end} in the page")
    return head + begin + "\n" + "\n".join(lines) + "\n" + end + tail


def facts(pairs: Mapping[str, str]) -> list[str]:
    return [f"- {name}: {value}" for name, value in pairs.items()]
