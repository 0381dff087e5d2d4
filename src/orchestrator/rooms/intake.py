"""What the user says and writes, for the session: audio is kept until that is open."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import numpy as np

from src.audio.pcm import Int16
from src.common.tasks import timeout
from src.orchestrator.ports import MIC_RATE, MicSink

KEEP_MS = 10_000
RECORDING_MS = 3_000
_KEEP = KEEP_MS * MIC_RATE // 1000
_SLICE = MIC_RATE // 10


class Intake:
    """16 kHz mono int16 in, the same out: what was recorded before we came, then the rest.

    Overflow: of audio that waits, the oldest is dropped. `on_end` is called with a reason when the
    user's client wants to end, or has to.
    """

    def __init__(self, on_end: Callable[[str], None], *, recording_ms: int = RECORDING_MS) -> None:
        self.on_end = on_end
        self._recording_s = recording_ms / 1000
        self._audio: deque[Int16] = deque()
        self._samples = 0
        self._recording: Int16 = np.empty(0, dtype=np.int16)
        self._recorded = asyncio.Event()
        self._recorded.set()
        self._session: MicSink | None = None
        self._caught_up = False

    # --- from the room ---

    def expect_recording(self) -> None:
        """The user's client recorded its microphone until we subscribed to it, and sends that."""
        if self._session is None and not self._recording.size:
            self._recorded.clear()

    def on_preconnect(self, samples: Int16) -> None:
        """That recording. One that comes when later audio has been heard already is of no use."""
        if not self._caught_up:
            self._recording = samples[-_KEEP:]
        self._recorded.set()

    def on_mic(self, samples: Int16) -> None:
        if self._caught_up and self._session is not None:
            self._session.on_mic(samples)
            return
        self._audio.append(samples)
        self._samples += samples.size
        while self._samples > _KEEP:
            self._samples -= self._audio.popleft().size

    def on_text(self, text: str, *, speak: bool) -> None:
        if self._session is not None:
            self._session.on_text(text, speak=speak)

    def on_model_switch(self, model: str, voice: str) -> None:
        if self._session is not None:
            self._session.on_model_switch(model, voice)

    # --- to the session ---

    async def open(self, session: MicSink) -> None:
        """Hand over what was kept, then everything as it comes. A recording that is expected is
        waited for, but not long."""
        self._session = session
        with suppress(asyncio.TimeoutError):
            async with timeout(self._recording_s):
                await self._recorded.wait()
        recording, self._recording = self._recording, self._recording[:0]
        for start in range(0, recording.size, _SLICE):
            session.on_mic(recording[start : start + _SLICE])
            # Ten seconds at one go would hold up everybody else's audio.
            await asyncio.sleep(0)
        while self._audio:
            samples = self._audio.popleft()
            self._samples -= samples.size
            session.on_mic(samples)
            await asyncio.sleep(0)
        self._caught_up = True
