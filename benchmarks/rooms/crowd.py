"""Many room users in a process of their own: `python -m benchmarks.rooms.crowd --port …`.

Every user has a room to itself, an open microphone in a quiet room, and an agent that talks all the
time. What the users cost is metered apart.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import numpy as np

from benchmarks.machine import now_ms
from benchmarks.rooms.guests import in_our_room, jitter_buffer, network
from benchmarks.rooms.puppet import obey
from benchmarks.rooms.speech import LINE
from src.demo.room_audio import STEP_MS
from src.demo.room_user import RoomUser
from src.rpc.ws_events import TextInput

LINES = 5
"""About 40 s of speech."""
JOIN_APART_S = 0.15
LAG_EVERY_MS = 10


class Crowd:
    def __init__(self) -> None:
        self._around = AsyncExitStack()
        self._users: list[RoomUser] = []

    async def join(self, base_url: str, count: int) -> None:
        """Until there are `count`."""
        while len(self._users) < count:
            user = await self._around.enter_async_context(in_our_room(base_url))
            self._users.append(user)
            await asyncio.sleep(JOIN_APART_S)

    async def listen(self) -> None:
        """Have every agent talk; returns when all are heard."""
        began_ms = now_ms()
        for user in self._users:
            await user.send_control(TextInput(text=" ".join([LINE] * LINES), speak=True))
        for user in self._users:
            await user.first_sound_ms(began_ms)

    async def measure(self, ms: int) -> dict[str, Any]:
        """Gaps between 10 ms pieces of sound at the users, less 10; how late this process was."""
        before = [await network(user) for user in self._users]
        since_ms, lag = now_ms(), []
        while (due_ms := now_ms() + LAG_EVERY_MS) < since_ms + ms:
            await asyncio.sleep(LAG_EVERY_MS / 1000)
            lag.append(now_ms() - due_ms)
        after = [await network(user) for user in self._users]
        return {
            "gaps": [gap for user in self._users for gap in _gaps(user, since_ms)],
            "late": lag,
            "buffers": [jitter_buffer(*two) for two in zip(before, after, strict=True)],
        }

    async def leave(self) -> None:
        self._users.clear()
        await self._around.aclose()

    def commands(self) -> dict[str, Any]:
        names = ("join", "listen", "measure", "leave")
        return {name: getattr(self, name) for name in names}


def _gaps(user: RoomUser, since_ms: float) -> Iterator[float]:
    times = [sound.at_ms for sound in user.heard if sound.at_ms >= since_ms]
    for gap in np.diff(times):
        yield float(gap) - STEP_MS


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    await obey(args.port, Crowd().commands())


if __name__ == "__main__":
    asyncio.run(main())
