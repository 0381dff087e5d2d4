"""Who talks in the trials: a room's user and a WebSocket's, with one kind of mouth and ear.

When speech begins, ends and is silent means the same for both (src/demo/room_audio.py): the time of
the first and last loud sample in the microphone, and of the last 2.5 ms over -46 dBFS in what the
listener's audio clock is given.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

from benchmarks.caller import DidNotHappen
from benchmarks.machine import now_ms
from src.audio.pcm import FRAME_MS, Float32
from src.client.session import VoiceClient, connect
from src.common.clock import MonotonicClock
from src.common.tasks import TaskGroup
from src.demo.room_audio import SPEECH_RATE, STEP_MS, Ear, Mouth, Spoken
from src.demo.room_user import RoomUser, fetch_token, room_user
from src.rpc.ws_events import SessionStart, SessionStarted

KEEP_MS = 15_000
PATIENCE_S = 15.0
_LOOK_S = 0.02


class Guest(Protocol):
    ear: Ear

    def talk(self, speech: Float32) -> Spoken:
        """16 kHz. Returns at once, with the times that it will have."""
        ...


class WsGuest:
    """The client library, with its 40 to 60 ms jitter buffer, and a microphone of 20 ms frames."""

    def __init__(self, client: VoiceClient, ear: Ear) -> None:
        self.ear = ear
        self._client = client
        self._mouth = Mouth(now_ms(), SPEECH_RATE)

    def talk(self, speech: Float32) -> Spoken:
        return self._mouth.talk(speech)

    async def record(self) -> None:
        while True:
            first = self._mouth.next_step()
            await asyncio.sleep(max(0.0, self._mouth.due_ms - now_ms()) / 1000)
            frame = first.tobytes() + self._mouth.next_step().tobytes()
            await self._client.send_mic(frame)


assert FRAME_MS == 2 * STEP_MS


@asynccontextmanager
async def on_websocket(url: str) -> AsyncIterator[Guest]:
    ear = Ear(KEEP_MS)
    async with (
        connect(
            url,
            SessionStart(),
            on_audio=lambda pcm: ear.hear(now_ms(), pcm),
            clock=MonotonicClock(),
        ) as client,
        TaskGroup() as tasks,
    ):
        await client.started.wait()
        guest = WsGuest(client, ear)
        recording = tasks.create_task(guest.record(), name="microphone")
        try:
            yield guest
        finally:
            await client.end()
            recording.cancel()


@asynccontextmanager
async def in_our_room(base_url: str) -> AsyncIterator[RoomUser]:
    granted = await fetch_token(base_url, events="1")
    url, token = granted["server_url"], granted["participant_token"]
    async with room_user(url, token, keep_ms=KEEP_MS) as user:
        await user.until_event(SessionStarted)
        yield user


@asynccontextmanager
async def in_their_room(url: str, token: str) -> AsyncIterator[RoomUser]:
    """Where somebody else's agent is."""
    async with room_user(url, token, keep_ms=KEEP_MS) as user:
        await user.until(lambda: user.agent_track, "the agent's track")
        yield user


# --- listening ---


async def first_sound_ms(ear: Ear, since_ms: float) -> float:
    """When the agent is first heard after that. Raises DidNotHappen."""
    give_up_ms = now_ms() + PATIENCE_S * 1000
    while now_ms() < give_up_ms:
        if (found := ear.first_loud_ms(since_ms)) is not None:
            return found
        await asyncio.sleep(_LOOK_S)
    raise DidNotHappen(f"waited {PATIENCE_S:.0f} s for the agent's voice")


async def silence_ms(ear: Ear, since_ms: float, quiet_ms: int) -> float:
    """When its last sound ended, once `quiet_ms` of silence have followed. Raises DidNotHappen,
    also when there was none after `since_ms`."""
    await calm(ear, since_ms, quiet_ms)
    found = ear.last_loud_ms(since_ms)
    if found is None:
        raise DidNotHappen("the agent was silent before it was interrupted")
    return found


async def calm(ear: Ear, since_ms: float, quiet_ms: int) -> None:
    """Until nothing was heard for `quiet_ms`, all of them after `since_ms`. Raises DidNotHappen."""
    give_up_ms = now_ms() + PATIENCE_S * 1000
    while now_ms() < since_ms + quiet_ms or ear.quiet_ms() < quiet_ms:
        if now_ms() > give_up_ms:
            raise DidNotHappen(f"waited {PATIENCE_S:.0f} s for the agent's silence")
        await asyncio.sleep(_LOOK_S)


async def network(user: RoomUser) -> dict[str, float]:
    """What the room user's jitter buffer has done so far: s of delay summed over the samples that
    left it, and how many samples left it, came, and were made up."""
    if user.agent_track is None:
        return {}
    for stats in await user.agent_track.get_stats():
        if stats.WhichOneof("stats") == "inbound_rtp":
            inbound = stats.inbound_rtp.inbound
            return {
                "delay_s": inbound.jitter_buffer_delay,
                "emitted": inbound.jitter_buffer_emitted_count,
                "received": inbound.total_samples_received,
                "concealed": inbound.concealed_samples,
            }
    return {}


def jitter_buffer(since: dict[str, float], now: dict[str, float]) -> dict[str, float]:
    """Its mean delay between two moments, and the part of the sound that it made up."""
    more = {name: now[name] - since.get(name, 0.0) for name in now}
    if not more:
        return {}
    return {
        "delay_ms": 1000 * more["delay_s"] / max(more["emitted"], 1),
        "concealed": more["concealed"] / max(more["received"], 1),
    }
