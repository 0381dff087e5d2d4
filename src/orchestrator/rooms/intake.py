"""The user's audio on its way to the session: kept until that is open, then passed on."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import Protocol

import numpy as np

from src.audio.pcm import Int16
from src.common.tasks import timeout
from src.orchestrator.ports import MIC_RATE

KEEP_MS = 10_000
PRECONNECT_MS = 3_000
_SLICE = MIC_RATE // 10


class Ear(Protocol):
    def on_mic(self, samples: Int16) -> None: ...


class Intake:
    """16 kHz mono int16 in, the same out: what was recorded before we came, then the rest.

    Overflow: of more than `KEEP_MS` that wait, the oldest is dropped.
    """

    def __init__(self, *, preconnect_ms: int = PRECONNECT_MS) -> None:
        self._preconnect_s = preconnect_ms / 1000
        self._kept: deque[Int16] = deque()
        self._kept_samples = 0
        self._recorded: Int16 = np.empty(0, dtype=np.int16)
        self._complete = asyncio.Event()
        self._complete.set()
        self._ear: Ear | None = None

    def expect_recording(self) -> None:
        """The user's client recorded its microphone until we subscribed to it, and sends that."""
        if self._ear is None and not self._recorded.size:
            self._complete.clear()

    def on_recording(self, samples: Int16) -> None:
        """All of it. One that comes when later audio has been heard already is of no use."""
        if self._ear is None:
            self._recorded = samples[-KEEP_MS * MIC_RATE // 1000 :]
        self._complete.set()

    def on_mic(self, samples: Int16) -> None:
        if self._ear is not None:
            self._ear.on_mic(samples)
            return
        self._kept.append(samples)
        self._kept_samples += samples.size
        while self._kept_samples > KEEP_MS * MIC_RATE // 1000:
            self._kept_samples -= self._kept.popleft().size

    async def open(self, ear: Ear) -> None:
        """Deliver what was kept, then everything at once. Waits for a recording that is expected,
        but not long."""
        with suppress(asyncio.TimeoutError):
            async with timeout(self._preconnect_s):
                await self._complete.wait()
        recorded, self._recorded = self._recorded, np.empty(0, dtype=np.int16)
        for start in range(0, recorded.size, _SLICE):
            ear.on_mic(recorded[start : start + _SLICE])
            # Ten seconds at one go would hold up everybody else's audio.
            await asyncio.sleep(0)
        while self._kept:
            samples = self._kept.popleft()
            self._kept_samples -= samples.size
            ear.on_mic(samples)
            await asyncio.sleep(0)
        self._ear = ear
