"""What many rooms cost, and how evenly they sound, on an orchestrator that had none before."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil

from benchmarks.machine import Meter
from benchmarks.rooms.lab import RoomLab
from benchmarks.rooms.puppet import puppet
from src.common.processes import Child

USERS = "(the users)"
SETTLE_S = 3.0


@dataclass
class Load:
    """One crowd. `cores` and `pss_mb` by process; the jitter is the users', in ms."""

    rooms: int
    cores: dict[str, float]
    pss_mb: dict[str, float]
    gaps: list[float]
    late: list[float]
    """How late the users' own process was."""
    buffers: list[dict[str, float]]


@dataclass
class Scaled:
    empty_mb: dict[str, float]
    loads: list[Load]


async def measure(
    lab: RoomLab, counts: Sequence[int], window_ms: int, tick: Callable[[], None]
) -> Scaled:
    """`counts` ascending: who is there stays. Raises DidNotHappen, ProcessFailed."""
    logs = lab.bench.logs / "livekit"
    async with (
        lab.another("crowded") as orchestrator,
        puppet("crowd", "benchmarks.rooms.crowd", logs / "crowd.log") as crowd,
    ):
        children = {
            "orchestrator": orchestrator.child,
            "livekit-server": lab.stack.children["livekit-server"],
            "worker": lab.stack.children["worker"],
            USERS: crowd.child,
        }
        scaled, meter = Scaled(pss_mb(children), []), Meter(children)
        for count in counts:
            await crowd.ask("join", base_url=orchestrator.base_url, count=count)
            await crowd.ask("listen")
            await asyncio.sleep(SETTLE_S)
            meter.lap()
            told = await crowd.ask("measure", ms=window_ms)
            scaled.loads.append(Load(count, meter.cores(), pss_mb(children), **told))
            tick()
        await crowd.ask("leave")
    return scaled


def pss_mb(children: dict[str, Child]) -> dict[str, float]:
    """Memory with the shared part divided among those who share it."""
    return {
        name: psutil.Process(child.pid).memory_full_info().pss / 2**20
        for name, child in children.items()
    }
