"""The trials' user, in a process of its own: `python -m benchmarks.rooms.user --port … --clips …`.

All times are milliseconds of CLOCK_MONOTONIC, which the processes of a machine share.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.caller import DidNotHappen
from benchmarks.machine import now_ms
from benchmarks.rooms.guests import (
    Guest,
    calm,
    first_sound_ms,
    in_our_room,
    in_their_room,
    jitter_buffer,
    network,
    on_websocket,
    silence_ms,
)
from benchmarks.rooms.puppet import obey
from benchmarks.rooms.speech import after_silence
from src.common.tasks import leaves
from src.demo.room_user import RoomUser, fetch_token, room_user

PHASE_MS = 20.0
"""An Opus packet, and a frame of the WebSocket's microphone."""
WAYS: dict[str, Callable[..., AbstractAsyncContextManager[Guest]]] = {
    "ws": on_websocket,
    "room": in_our_room,
    "their room": in_their_room,
}


class User:
    """One guest at a time, held by a task of its own: who enters a session must also leave it."""

    def __init__(self, clips: Path) -> None:
        stored = np.load(clips)
        self._clips = {name: stored[name] for name in stored.files}
        self._guest: Guest | None = None
        self._network: dict[str, float] = {}
        self._leave = asyncio.Event()
        self._staying: asyncio.Task[None] | None = None

    @property
    def guest(self) -> Guest:
        if self._guest is None:
            raise DidNotHappen("nobody is there")
        return self._guest

    async def join(self, way: str, **where: str) -> dict[str, float]:
        with suppress(DidNotHappen):  # of the stay before, which is over
            await self.leave()
        began_ms, entered = now_ms(), asyncio.Event()
        self._leave.clear()
        self._staying = asyncio.create_task(self._stay(WAYS[way](**where), entered))
        waiting = asyncio.create_task(entered.wait())
        await asyncio.wait([waiting, self._staying], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self._staying.done():
            await self.leave()
        return {"took_ms": now_ms() - began_ms}

    async def _stay(
        self, visit: AbstractAsyncContextManager[Guest], entered: asyncio.Event
    ) -> None:
        async with visit as self._guest:
            entered.set()
            await self._leave.wait()

    async def talk(self, clip: str) -> dict[str, float]:
        """When its onset and its end will have been in the microphone."""
        speech = after_silence(self._clips[clip], random.uniform(0, PHASE_MS))
        return asdict(self.guest.talk(speech))

    async def first_sound(self, since_ms: float) -> float:
        return await first_sound_ms(self.guest.ear, since_ms)

    async def silence(self, since_ms: float, quiet_ms: int) -> float:
        return await silence_ms(self.guest.ear, since_ms, quiet_ms)

    async def calm(self, since_ms: float, quiet_ms: int) -> None:
        await calm(self.guest.ear, since_ms, quiet_ms)

    async def network(self) -> dict[str, float]:
        """What the jitter buffer did since it was asked before; empty without one."""
        if not isinstance(self._guest, RoomUser):
            return {}
        before, self._network = self._network, await network(self._guest)
        return jitter_buffer(before, self._network)

    async def leave(self) -> None:
        """Raises DidNotHappen for what ended the stay."""
        staying, self._network = self._staying, {}
        self._guest, self._staying = None, None
        self._leave.set()
        if staying is not None:
            await asyncio.wait([staying])
            if (error := staying.exception()) is not None:
                why = "; ".join(f"{type(leaf).__name__}: {leaf}" for leaf in leaves(error))
                raise DidNotHappen(why)

    async def greeting(self, base_url: str) -> dict[str, float]:
        """From the wish to talk: when we were in the room, and when the greeting was heard."""
        began_ms = now_ms()
        granted = await fetch_token(base_url)
        asked_ms = now_ms() - began_ms
        url, token = granted["server_url"], granted["participant_token"]
        async with room_user(url, token) as user:
            joined_ms = now_ms() - began_ms
            heard_ms = await first_sound_ms(user.ear, began_ms) - began_ms
        return {"token_ms": asked_ms, "joined_ms": joined_ms, "heard_ms": heard_ms}

    def commands(self) -> dict[str, Any]:
        names = ("join", "talk", "first_sound", "silence", "calm", "network", "leave", "greeting")
        return {name: getattr(self, name) for name in names}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--clips", type=Path, required=True)
    args = parser.parse_args()
    await obey(args.port, User(args.clips).commands())


if __name__ == "__main__":
    asyncio.run(main())
