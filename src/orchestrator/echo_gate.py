"""The level under which a voice may be the agent's own, coming back through the microphone.

    fixed ──LEARN_MS of playback, and little came back──▶ relaxed to what came back + margin
      ▲                                                                        │
      └── what it let in may have been an echo: fixed again, for REST_MS ──────┘

Until an echo was measured, every playback is guarded against alike. Where the client cancels
echoes, or nobody hears the loudspeaker, far less comes back, and a user's soft consonant need not
wait for the vowel. It never asks more of a user than the fixed gate does.

Pure: all time is audio time, 10 ms a step; levels are in dBFS, ratios in dB.
"""

from __future__ import annotations

import math
from collections import deque

from src.orchestrator.ports import MIC_STEP_MS

SILENT_DBFS = -60.0
"""Playback softer than this has no echo."""
MEASURED_DBFS = -30.0
"""Of softer playback the echo cannot be told from a quiet room's noise."""
LEARN_MS = 600
"""Of playback whose echo would have come by now, before what came back is believed."""
MEMORY_MS = 2000
"""Of playback. Longer than the pauses of a voice, in which nothing comes back either."""
PROBATION_MS = 200
"""A sound counts as an echo if within this time it did not turn out to be the onset of a voice."""
REST_MS = 30_000
"""Of playback: a canceller that leaks now and then interrupts no more often than this."""


class SlidingMax:
    """The largest of the last `steps` values, in constant time."""

    def __init__(self, steps: int) -> None:
        self._steps = max(1, steps)
        self._count = 0
        self._falling: deque[tuple[int, float]] = deque()

    def push(self, value: float) -> float:
        self._count += 1
        while self._falling and self._falling[-1][1] <= value:
            self._falling.pop()
        self._falling.append((self._count, value))
        if self._falling[0][0] <= self._count - self._steps:
            self._falling.popleft()
        return self._falling[0][1]


class EchoGate:
    """`fixed_db`, `relaxed_db`: how far below the playback the gate is at least, and at most.
    `margin_db`: how far above the measured echo. `hold_ms`: how late an echo may arrive."""

    def __init__(self, fixed_db: float, relaxed_db: float, margin_db: float, hold_ms: int) -> None:
        self._fixed_db = fixed_db
        self._relaxed_db = max(fixed_db, relaxed_db)
        self._margin_db = margin_db
        self._held = SlidingMax(hold_ms // MIC_STEP_MS)
        self._returns = SlidingMax(MEMORY_MS // MIC_STEP_MS)
        self._return_db = 0.0
        self._probation: deque[float] = deque()
        self._suspect_db: float | None = None
        self._unplayed_ms = 0
        self._learn_ms = hold_ms + LEARN_MS
        self._wait_ms = self._learn_ms

    @property
    def below_db(self) -> float:
        """How far below the playback the gate is."""
        if self._wait_ms > 0:
            return self._fixed_db
        return min(max(-self._return_db - self._margin_db, self._fixed_db), self._relaxed_db)

    def step(self, mic_dbfs: float, playback_dbfs: float) -> float:
        """The gate for this step, in dBFS. `playback_dbfs`: what is being played."""
        held = self._held.push(playback_dbfs)
        gate = held - self.below_db
        if held > SILENT_DBFS:
            self._unplayed_ms = 0
        else:
            self._unplayed_ms += MIC_STEP_MS
            self._probation.clear()
        if held > MEASURED_DBFS:
            self._measure(mic_dbfs - held)
        return gate

    def suspect(self) -> None:
        """A voice may have begun: from its onset on, nothing is measured until `settle`."""
        self._suspect_db = max(self._probation, default=-math.inf)
        self._probation.clear()

    def settle(self, silent_ms: int | None) -> None:
        """It is over. `silent_ms`: since when, if it was a voice; None: it was none.

        An echo does not outlive what it echoes. What the fixed gate would have let in as well says
        little; anything softer was let in by having relaxed too far.
        """
        loudest, self._suspect_db = self._suspect_db, None
        outlived = silent_ms is not None and silent_ms < self._unplayed_ms
        if loudest is None or loudest == -math.inf or outlived:
            return
        self._wait_ms = max(
            self._wait_ms, REST_MS if loudest <= -self._fixed_db else self._learn_ms
        )

    def _measure(self, return_db: float) -> None:
        if self._suspect_db is not None:
            self._suspect_db = max(self._suspect_db, return_db)
            return
        self._probation.append(return_db)
        if len(self._probation) > PROBATION_MS // MIC_STEP_MS:
            self._return_db = self._returns.push(self._probation.popleft())
            self._wait_ms = max(0, self._wait_ms - MIC_STEP_MS)
