"""Many callers in a process of their own: the load generator's half of `load.py`.

    python -m benchmarks.crowd --url ws://… --sessions 25 --first 0 --began_ms … --out FILE …

Every session lives through the same phases, by the clock: quiet; the agent speaks a long text;
a conversation in which the user interrupts every answer with the next question.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from benchmarks.caller import Caller, DidNotHappen, Spoken, on_call
from benchmarks.machine import now_ms
from src.audio.pcm import FRAME_MS, Int16
from src.common.tasks import leaves
from src.rpc.errors import DuplexError
from src.rpc.ws_events import AudioBegin, BargeIn
from tests.sentences import SENTENCES

LONG = " ".join(SENTENCES[:8])
SETTLE_FRAMES = 25
"""The first burst of an utterance is not on the 20 ms grid."""


class Phases(BaseModel):
    """When each phase begins, in `machine.now_ms()`."""

    connect_ms: float
    quiet_ms: float
    speak_ms: float
    steady_ms: float
    """Everybody's agent speaks by now."""
    talk_ms: float
    end_ms: float


@dataclass
class Told:
    """What one caller saw. Times in ms."""

    onset_to_edge: list[float] = field(default_factory=list)
    """From the hand-over of the onset to that of the frame that the detector decided on."""
    onset_to_flush: list[float] = field(default_factory=list)
    edge_to_silence: list[float] = field(default_factory=list)
    first_audio: list[float] = field(default_factory=list)
    edges_at: list[float] = field(default_factory=list)
    """When the deciding frame was handed over."""
    onsets_at: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    """Between arrivals of one utterance's frames, less 20 ms."""
    own_late: list[float] = field(default_factory=list)
    """How late the caller's own microphone was meanwhile."""
    verdicts: dict[str, int] = field(default_factory=dict)
    late_frames: int = 0
    """After a flush, before the next `audio.begin`."""
    underruns: int = 0
    lost: list[str] = field(default_factory=list)


async def live(url: str, number: int, clips: list[Int16], phases: Phases) -> Told:
    told = Told()
    dice = random.Random(number)
    # Anywhere in the 20 ms grid: fifty microphones that tick as one are no crowd.
    await _until(phases.connect_ms + 60 * number + dice.uniform(0, 20))
    try:
        async with on_call(url, frame_ms=20, seed=number) as caller:
            await _until(phases.speak_ms + dice.uniform(0, 1000))
            await caller.client.send_text(LONG, speak=True)
            await _until(phases.talk_ms + dice.uniform(0, 2000))
            told.gaps = gaps(caller, phases)
            told.own_late = caller.microphone.late_ms(phases.steady_ms, phases.talk_ms)
            await talk(caller, clips, dice, phases.end_ms, told)
            told.late_frames = caller.ear.dropped
            told.underruns = caller.ear.underruns
    except Exception as error:
        found = list(leaves(error))
        if not all(isinstance(leaf, (DuplexError, DidNotHappen)) for leaf in found):
            raise
        told.lost += [str(leaf) for leaf in found]
    return told


async def talk(
    caller: Caller, clips: list[Int16], dice: random.Random, end_ms: float, told: Told
) -> None:
    """Interrupt, wait for the answer, listen a while, interrupt."""
    while now_ms() + 5_000 < end_ms:
        flushes, begun_ms = len(caller.client.flushes), now_ms()
        spoken = await caller.microphone.say(dice.choice(clips))
        try:
            await caller.until(AudioBegin, "an answer", spoken.end_ms)
        except DidNotHappen as error:
            told.lost.append(str(error))
            continue
        sound = await caller.until_sound(spoken.end_ms)
        told.first_audio.append(sound.at_ms - spoken.end_ms)
        _note_pause(caller, flushes, spoken, told)
        _note_verdicts(caller, begun_ms, told)
        await asyncio.sleep(dice.uniform(1.5, 3.0))


def _note_pause(caller: Caller, index: int, spoken: Spoken, told: Told) -> None:
    """The first flush of this interruption."""
    if len(caller.client.flushes) <= index:
        return
    edge_ms = caller.microphone.handed_ms(caller.client.flushes[index].edge_ms)
    told.edges_at.append(edge_ms)
    told.onsets_at.append(spoken.onset_ms)
    told.onset_to_edge.append(edge_ms - spoken.onset_ms)
    told.onset_to_flush.append(caller.flushed_ms[index] - spoken.onset_ms)
    silent_ms = caller.silent_ms(index)
    if silent_ms is not None:
        told.edge_to_silence.append(silent_ms - edge_ms)


def _note_verdicts(caller: Caller, since_ms: float, told: Told) -> None:
    for at_ms, event in caller.events:
        if at_ms >= since_ms and isinstance(event, BargeIn) and event.verdict != "pending":
            told.verdicts[event.verdict] = told.verdicts.get(event.verdict, 0) + 1


def gaps(caller: Caller, phases: Phases) -> list[float]:
    """Of the steady phase."""
    times = [
        arrival.at_ms
        for arrival in caller.ear.arrivals[SETTLE_FRAMES:]
        if phases.steady_ms <= arrival.at_ms < phases.talk_ms
    ]
    return [float(gap) - FRAME_MS for gap in np.diff(times)]


async def _until(at_ms: float) -> None:
    await asyncio.sleep(max(0.0, at_ms - now_ms()) / 1000)


async def everybody(args: argparse.Namespace, phases: Phases) -> list[Told]:
    stored = np.load(args.clips)
    clips = [stored[name] for name in stored.files]
    numbers = range(args.first, args.first + args.sessions)
    return list(await asyncio.gather(*(live(args.url, n, clips, phases) for n in numbers)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--sessions", type=int, required=True)
    parser.add_argument("--first", type=int, required=True, help="number of the first session")
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--phases", required=True, help="JSON")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    import uvloop

    told = uvloop.run(everybody(args, Phases.model_validate_json(args.phases)))
    args.out.write_text(json.dumps([asdict(one) for one in told]), encoding="utf-8")


if __name__ == "__main__":
    main()
