"""From the wish to talk to the first word heard, by either way into a room."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from benchmarks.caller import DidNotHappen
from benchmarks.rooms.lab import RoomLab

ENTRIES = ("direct", "agentserver")
GREETING = "Yes, hello."


@dataclass
class Greeted:
    """Of one entry; the keys are `benchmarks.rooms.user`'s."""

    joins: list[dict[str, float]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


async def measure(lab: RoomLab, rounds: int, tick: Callable[[], None]) -> dict[str, Greeted]:
    """One join each, in turn. Raises ProcessFailed."""
    greeted = {entry: Greeted() for entry in ENTRIES}
    async with AsyncExitStack() as cleanup:
        urls = {}
        for entry in ENTRIES:
            # A name of its own, or the dispatch would not know which orchestrator is meant.
            overrides = {"livekit__entry": entry, "livekit__agent_name": f"bench-{entry}"}
            one = await cleanup.enter_async_context(
                lab.another(f"greeting-{entry}", duplex__greeting=GREETING, **overrides)
            )
            urls[entry] = one.base_url
        for _ in range(rounds):
            for entry, found in greeted.items():
                try:
                    found.joins.append(await lab.user.ask("greeting", base_url=urls[entry]))
                except DidNotHappen as error:
                    lab.bench.report(f"{entry}: lost a greeting: {error}")
                    found.lost.append(str(error))
                tick()
    return greeted
