"""The shell of presence.py: a timer, and now and then a look at the microphone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from src.common.clock import Clock
from src.orchestrator.rooms.presence import (
    Event,
    Packets,
    PresenceLimits,
    decide,
    entered,
    observe,
)

log = logging.getLogger(__name__)

_LOOK_MS = 500


class Watch:
    """`on_here` is called when the user comes, is lost, is back; `on_end` once, with a reason."""

    def __init__(
        self,
        limits: PresenceLimits,
        clock: Clock,
        *,
        on_here: Callable[[bool], None],
        on_end: Callable[[str], None],
    ) -> None:
        self.here = False
        self._limits = limits
        self._clock = clock
        self._on_here = on_here
        self._on_end = on_end
        self._presence = entered(clock.now_ms())
        self._ended = False
        self._timer: asyncio.TimerHandle | None = None
        self._consider()

    def tell(self, event: Event) -> None:
        self._presence = observe(self._presence, event, self._clock.now_ms())
        self._consider()

    async def run(self, packet_age_ms: Callable[[], Awaitable[float | None]]) -> None:
        """Look after the microphone while it is live. Runs until cancelled."""
        every_s = min(_LOOK_MS, self._limits.gone_ms / 4) / 1000
        while True:
            await asyncio.sleep(every_s)
            if self._presence.packet_ms is None:
                continue
            age_ms = await packet_age_ms()
            if age_ms is not None:
                self.tell(Packets(age_ms))

    def close(self) -> None:
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()

    def _consider(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._ended:
            return
        now_ms = self._clock.now_ms()
        decision = decide(self._presence, now_ms, self._limits)
        if decision.here != self.here:
            self.here = decision.here
            log.info("the user is here" if self.here else "the user cannot hear")
            self._on_here(self.here)
        if decision.end:
            self.close()
            self._on_end(decision.end)
        elif decision.at_ms is not None:
            self._timer = asyncio.get_running_loop().call_later(
                max(0.0, decision.at_ms - now_ms) / 1000, self._consider
            )
