"""One trial: ask, hear the answer begin, interrupt it, hear it end. The same for every side.

Sides take turns, a few trials on a fresh connection each: a jitter buffer settles at 20 or 30 ms
anew for every connection, which alone moves a figure by 10 ms.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from benchmarks.caller import DidNotHappen
from benchmarks.rooms.lab import RoomLab, fresh_room
from benchmarks.rooms.speech import QUESTION

UNDERSTOOD_AFTER_MS = 20
"""The peer's recogniser: after the last sample."""
STARTED_MS = (1_300, 1_900)
"""When an answer is interrupted: in mid-line, past the pause after its first word."""
QUIET_MS = 150
"""Longer than any gap in the line, shorter than the way to an answer."""
ANSWERED_MS = 700
"""Nothing for so long: it has answered, and has finished."""
MISSED_MS = 3_000
"""The answer was not stopped; it ended."""
PAUSE_S = (0.4, 0.6)


@dataclass
class Trial:
    """Milliseconds. `stopped`, `noticed`: from the onset, where the side tells."""

    first_audio: float
    silence: float
    onset_at: float
    silent_at: float
    stopped: float | None = None
    noticed: float | None = None
    buffer: float | None = None
    """Mean delay in the listener's jitter buffer during this trial."""


@dataclass
class Measured:
    """All of one side's."""

    trials: list[Trial] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


class Side(Protocol):
    """Whom the user talks to."""

    async def asked(self, spoken: dict[str, float]) -> None:
        """The user has begun to ask; the times are known beforehand."""
        ...

    async def interrupting(self) -> None:
        """The next thing said is an interruption."""
        ...

    async def reset(self, spoken: dict[str, float]) -> dict[str, float]:
        """Back to a silent agent that listens; returns `stop_ms` and `noticed_ms` if known."""
        ...


class Ours:
    """It answers the interruption, in one word."""

    def __init__(self, lab: RoomLab) -> None:
        self._user = lab.user

    async def asked(self, spoken: dict[str, float]) -> None:
        pass

    async def interrupting(self) -> None:
        pass

    async def reset(self, spoken: dict[str, float]) -> dict[str, float]:
        await self._user.ask("calm", since_ms=spoken["offset_ms"], quiet_ms=ANSWERED_MS)
        return {}


class Stock:
    def __init__(self, lab: RoomLab) -> None:
        self._stock = lab.stock

    async def asked(self, spoken: dict[str, float]) -> None:
        at_ms = spoken["offset_ms"] + UNDERSTOOD_AFTER_MS
        await self._stock.ask("understand", text=QUESTION, at_ms=at_ms)

    async def interrupting(self) -> None:
        await self._stock.ask("listen")

    async def reset(self, spoken: dict[str, float]) -> dict[str, float]:
        marks: dict[str, float] = await self._stock.ask("reset")
        return marks


@asynccontextmanager
async def _ours_in_a_room(lab: RoomLab, base_url: str) -> AsyncIterator[Side]:
    await lab.user.ask("join", way="room", base_url=base_url)
    yield Ours(lab)


@asynccontextmanager
async def _ours_on_websocket(lab: RoomLab) -> AsyncIterator[Side]:
    await lab.user.ask("join", way="ws", url=lab.stack.ws_url)
    yield Ours(lab)


@asynccontextmanager
async def _stock(lab: RoomLab, *, tuned: bool) -> AsyncIterator[Side]:
    room, url = fresh_room(), lab.livekit["LIVEKIT_URL"]
    await lab.stock.ask("join", url=url, token=lab.mint.agent(room), tuned=tuned)
    try:
        token = lab.mint.user(room, "user")
        await lab.user.ask("join", way="their room", url=url, token=token)
        if not tuned:
            await lab.stock.ask("warm_up")
        yield Stock(lab)
    finally:
        await lab.stock.ask("leave")


OURS, EAGER, WEBSOCKET = "ours, room", "ours, room, 100 ms of silence", "ours, WebSocket"
TUNED, DEFAULT = "AgentSession, tuned", "AgentSession, default"
SIDES: dict[str, Callable[[RoomLab], AbstractAsyncContextManager[Side]]] = {
    OURS: lambda lab: _ours_in_a_room(lab, lab.base_url),
    EAGER: lambda lab: _ours_in_a_room(lab, lab.eager_url),
    TUNED: lambda lab: _stock(lab, tuned=True),
    DEFAULT: lambda lab: _stock(lab, tuned=False),
    WEBSOCKET: _ours_on_websocket,
}


async def trial(lab: RoomLab, side: Side) -> Trial:
    """Raises DidNotHappen."""
    await asyncio.sleep(random.uniform(*PAUSE_S))
    asked = await lab.user.ask("talk", clip="question")
    await side.asked(asked)
    first_ms = await lab.user.ask("first_sound", since_ms=asked["onset_ms"])
    if first_ms < asked["offset_ms"]:
        raise DidNotHappen("an answer after the end of the question: it came before")
    await asyncio.sleep(random.uniform(*STARTED_MS) / 1000)
    await side.interrupting()
    spoken = await lab.user.ask("talk", clip="interruption")
    onset_ms = spoken["onset_ms"]
    silent_ms = await lab.user.ask("silence", since_ms=onset_ms, quiet_ms=QUIET_MS)
    if silent_ms - onset_ms > MISSED_MS:
        raise DidNotHappen("the interruption did not interrupt")
    stats = await lab.user.ask("network")
    marks = await side.reset(spoken)
    since_onset = {name: at_ms - onset_ms for name, at_ms in marks.items()}
    return Trial(
        first_audio=first_ms - asked["offset_ms"],
        silence=silent_ms - onset_ms,
        onset_at=onset_ms,
        silent_at=silent_ms,
        stopped=since_onset.get("stop_ms"),
        noticed=since_onset.get("noticed_ms"),
        buffer=stats.get("delay_ms"),
    )


async def block(
    lab: RoomLab, name: str, trials: int, measured: Measured, tick: Callable[[], None]
) -> None:
    """A connection's worth of trials. What goes wrong is counted and ends it."""
    left = trials
    try:
        async with SIDES[name](lab) as side:
            while left:
                left -= 1
                measured.trials.append(await trial(lab, side))
                tick()
        await lab.user.ask("leave")
    except DidNotHappen as error:
        lab.bench.report(f"{name}: lost a trial: {error}")
        measured.lost.append(str(error))
        for _ in range(left + 1):
            tick()


def order(names: list[str], rounds: int, seed: int = 11) -> list[list[str]]:
    """Every side once a round, each time in another order."""
    dice = random.Random(seed)
    return [dice.sample(names, len(names)) for _ in range(rounds)]
