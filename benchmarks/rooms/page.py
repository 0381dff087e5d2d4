"""The same interruption in the real page: Chromium, headless, both transports.

The page times it itself (src/client/web/audio/barge-in-clock.js): from the first 5 ms over
-35 dBFS in what it sends to the last sample over -46 dBFS in what it plays, both on the clock of
its AudioContext. A real loudspeaker adds its output latency.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
from playwright.async_api import Browser

from benchmarks.rooms.lab import RoomLab
from benchmarks.rooms.speech import QUESTION, after_silence
from benchmarks.rooms.trials import PAUSE_S, STARTED_MS
from src.audio.pcm import Float32
from tests.audio_fixtures import RATE, silence
from tests.integration.browser import CHROMIUM, chromium
from tests.integration.page import TalkingPage, talking_page

TRANSPORTS = ("livekit", "ws")
SILENT_DBFS = -60
QUIET_S = 0.2


@dataclass
class PageMeasured:
    silence: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def missing() -> str:
    """Why there can be no page; empty: there can."""
    return "" if CHROMIUM else "no Chromium on this machine (CHROMIUM names one)"


@asynccontextmanager
async def browser(lab: RoomLab) -> AsyncIterator[Browser]:
    """With a microphone into which nobody talks: words are put into the page's way up."""
    quiet = Path(lab.bench.logs / "livekit" / "silence.wav")
    soundfile.write(quiet, silence(1000), RATE, subtype="PCM_16")
    async with chromium(quiet) as one:
        yield one


async def block(
    lab: RoomLab,
    browser: Browser,
    transport: str,
    trials: int,
    measured: PageMeasured,
    tick: Callable[[], None],
) -> None:
    """A page of its own, and a few interruptions in it."""
    clip = np.load(lab.bench.out / "clips" / "rooms.npz")["interruption"]
    left = trials
    try:
        async with talking_page(browser, lab.base_url, transport) as page:
            await page.live()
            while left:
                left -= 1
                measured.silence.append(await interrupt(page, clip))
                tick()
    except AssertionError as error:  # so does the page say that it waited in vain
        lab.bench.report(f"page, {transport}: lost a trial: {error}")
        measured.lost.append(str(error)[:200])
        for _ in range(left + 1):
            tick()


async def interrupt(page: TalkingPage, clip: Float32) -> float:
    """Milliseconds. Raises AssertionError when something does not come."""
    heard, answers = len(await page.told("silence")), await _answers(page)
    await page.say(QUESTION, speak=False)
    await page.event("audio.begin", more_than=answers)
    await asyncio.sleep(random.uniform(*STARTED_MS) / 1000)
    await page.talk(after_silence(clip, random.uniform(0, 20)))
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
    await asyncio.sleep(QUIET_S + random.uniform(*PAUSE_S))
