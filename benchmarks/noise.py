"""False stops: noise into the microphone while the agent speaks, through the whole session.

Real engines. For each kind of noise a session of its own: the agent speaks a long text, and after a
moment the noise is laid over the room. A pause is allowed; a stop is not.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass

from benchmarks.caller import Caller, DidNotHappen, on_call
from benchmarks.figures import Aim, Result, Row, Spread, table
from benchmarks.machine import now_ms
from benchmarks.stacks import REPLY, Bench, Lab, real_stack
from src.audio.pcm import Int16
from src.rpc.ws_events import BargeIn
from tests import audio_fixtures as audio

NOISE_MS = 8_000
LEAD_S = 0.6
VERDICT_S = 1.0
AT_ONCE = 2
QUICK_KINDS = ("pink -30", "clicks -35", "coughs -30")


@dataclass(frozen=True)
class Heard:
    kind: str
    seconds: float
    pauses: int
    resumed: int
    stops: int
    reasons: list[str]


async def measure(bench: Bench) -> Result:
    kinds = audio.noise_set(2_500 if bench.quick else NOISE_MS)
    if bench.quick:
        kinds = {name: kinds[name] for name in QUICK_KINDS}
    async with real_stack(bench, "noise") as lab:
        few = asyncio.Semaphore(AT_ONCE)
        found = await asyncio.gather(
            *(_one(bench, lab, few, name, sound) for name, sound in kinds.items())
        )
    return _result([heard for heard in found if heard is not None])


async def _one(
    bench: Bench, lab: Lab, few: asyncio.Semaphore, kind: str, sound: Int16
) -> Heard | None:
    async with few, on_call(lab.stack.ws_url, frame_ms=20) as caller:
        try:
            heard = await _listen(caller, kind, sound)
        except DidNotHappen as error:
            bench.report(f"  {kind} was lost: {error}")
            return None
    bench.report(f"  {kind}: {heard.pauses} pauses, {heard.stops} stops")
    return heard


async def _listen(caller: Caller, kind: str, sound: Int16) -> Heard:
    await asyncio.sleep(LEAD_S)
    began_ms = now_ms()
    await caller.client.send_text(REPLY, speak=True)
    await caller.until_sound(began_ms)
    await asyncio.sleep(LEAD_S)
    await caller.microphone.say(sound)
    await asyncio.sleep(VERDICT_S)
    verdicts = [event for _, event in caller.events if isinstance(event, BargeIn)]
    return Heard(
        kind=kind,
        seconds=sound.size / 16_000,
        pauses=len(caller.client.flushes),
        resumed=sum(event.verdict == "false" for event in verdicts),
        stops=sum(event.verdict == "real" for event in verdicts),
        reasons=sorted({event.reason for event in verdicts if event.verdict == "real"}),
    )


def _result(found: list[Heard]) -> Result:
    stops = sum(heard.stops for heard in found)
    seconds = sum(heard.seconds for heard in found)
    rows = [
        Row(
            what=f"false stops by noise, in {seconds:.0f} s of {len(found)} kinds of it (count)",
            sessions=1,
            aim=Aim(p50=0),
            spread=Spread(n=len(found), p50=stops, p95=stops, p99=stops, worst=stops),
            unit="",
        )
    ]
    cells = ([h.kind, f"{h.seconds:.0f}", str(h.pauses), str(h.resumed), _stops(h)] for h in found)
    head = ("noise (dBFS)", "s", "pauses", "resumed", "**stops**")
    return Result(
        rows,
        {"Noise while the agent speaks": table(head, cells)},
        {"n": [asdict(h) for h in found]},
    )


def _stops(heard: Heard) -> str:
    return f"{heard.stops} ({', '.join(heard.reasons)})" if heard.stops else "0"
