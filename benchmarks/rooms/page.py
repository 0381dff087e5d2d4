"""The same interruption in the real page: Chromium, headless, both transports.

Its microphone is a WAV file with an interruption in every SLOT_S, and the question is typed so that
the agent is in mid-line by then. The page times it itself (src/client/web/audio/barge-in-clock.js):
from the first 5 ms over -35 dBFS in what it sends to the last sample over -46 dBFS in what it
plays, both on the clock of its AudioContext. A real loudspeaker adds its output latency.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile

from benchmarks.rooms.lab import RoomLab
from benchmarks.rooms.speech import QUESTION, after_silence
from benchmarks.rooms.trials import STARTED_MS
from src.audio.pcm import Float32
from tests.audio_fixtures import RATE, at_level, pink, silence
from tests.integration.browser import CHROMIUM, chromium
from tests.integration.page import TalkingPage, talking_page

TRANSPORTS = ("livekit", "ws")
SILENT_DBFS = -60
SLOT_S = 6.0
"""An interruption, the answer to it, and half of a line."""
SPARE_SLOTS = 3
"""Pass while a page starts, or its last answer still ends."""
ROOM_DBFS = -65.0


@dataclass
class PageMeasured:
    silence: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def missing() -> str:
    """Why there can be no page; empty: there can."""
    return "" if CHROMIUM else "no Chromium on this machine (CHROMIUM names one)"


async def block(
    lab: RoomLab, transport: str, trials: int, measured: PageMeasured, tick: Callable[[], None]
) -> None:
    """A page of its own, and a few interruptions in it."""
    clip = np.load(lab.bench.out / "clips" / "rooms.npz")["interruption"]
    microphone = Path(lab.bench.logs / "livekit" / "interruptions.wav")
    soundfile.write(microphone, interruptions(clip, trials + SPARE_SLOTS), RATE, subtype="PCM_16")
    left = trials
    try:
        async with (
            chromium(microphone) as browser,
            talking_page(browser, lab.base_url, transport) as page,
        ):
            await page.live()
            while left:
                left -= 1
                measured.silence.append(await interrupt(page))
                tick()
    except AssertionError as error:  # so does the page say that it waited in vain
        lab.bench.report(f"page, {transport}: lost a trial: {error}")
        measured.lost.append(str(error)[:200])
        for _ in range(left + 1):
            tick()


def interruptions(clip: Float32, slots: int) -> Float32:
    """One at the end of every SLOT_S, in a room's noise."""
    out = silence(round(SLOT_S * 1000) * slots + 2000)
    for slot in range(1, slots + 1):
        said = after_silence(clip, random.uniform(0, 20))
        start = round(slot * SLOT_S * RATE)
        out[start : start + said.size] += said
    noise = pink(out.size * 1000 // RATE, np.random.default_rng())
    out += at_level(noise, ROOM_DBFS)
    return out


async def interrupt(page: TalkingPage) -> float:
    """Milliseconds. Raises AssertionError when something does not come."""
    heard, answers = len(await page.told("silence")), await _answers(page)
    said_s = float(await page.run("(performance.now() - streams[0].since) / 1000"))
    under_way_s = random.uniform(*STARTED_MS) / 1000
    slot = math.ceil((said_s + under_way_s) / SLOT_S)
    await asyncio.sleep(slot * SLOT_S - under_way_s - said_s)
    await page.say(QUESTION, speak=False)
    await page.event("audio.begin", more_than=answers)
    told = await page.until_told("silence", more_than=heard)
    await _until_silent(page)
    return float(told["onset_to_silence_ms"])


async def _answers(page: TalkingPage) -> int:
    return len(await page.told("event", type="audio.begin"))


async def _until_silent(page: TalkingPage) -> None:
    """It has answered the interruption in a word, and listens."""
    await page.until(
        "told('event', {type: 'state'}).at(-1).state === 'listening' && told('event', "
        f"{{type: 'heard'}}).at(-1).completed && level().agent < {SILENT_DBFS}",
        "the end of the answer",
    )
