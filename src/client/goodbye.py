"""When a scripted user has had the last answer, so that the session may end. Pure."""

from __future__ import annotations

from src.rpc.ws_events import (
    AudioBegin,
    Error,
    Heard,
    ServerEvent,
    Speech,
    TranscriptEvent,
)

SETTLE_MS = 1_500
"""Silence on both sides until we believe that nothing more comes: endpoint plus recognition."""
PATIENCE_MS = 20_000


class Goodbye:
    """Counts from the moment the user has nothing more to say (`spoken_out`)."""

    def __init__(self, settle_ms: int = SETTLE_MS, patience_ms: int = PATIENCE_MS) -> None:
        self._settle_ms = settle_ms
        self._patience_ms = patience_ms
        self._hearing = False
        self._waiting = False
        self._speaking = ""
        self._last_ms = 0.0
        self._since_ms: float | None = None
        self.replies = 0

    def see(self, at_ms: float, event: ServerEvent) -> None:
        self._last_ms = at_ms
        if isinstance(event, Speech):
            self._hearing = event.phase in ("edge", "confirmed")
        elif isinstance(event, TranscriptEvent) and event.final and event.text:
            self._waiting = True
        elif isinstance(event, AudioBegin):
            self._waiting = False
            self.replies += self._speaking != event.utterance_id
            self._speaking = event.utterance_id
        elif isinstance(event, Heard) and event.utterance_id == self._speaking:
            self._speaking = ""
        elif isinstance(event, Error):
            self._waiting = False

    def asked(self, at_ms: float) -> None:
        """The user typed something that wants an answer."""
        self._last_ms = at_ms
        self._waiting = True

    def spoken_out(self, at_ms: float) -> None:
        if self._since_ms is None:
            self._since_ms = at_ms

    def due(self, now_ms: float, *, playing: bool) -> bool:
        """End now? Also when an answer that is owed does not come."""
        if self._since_ms is None:
            return False
        if playing:
            self._last_ms = now_ms
            return False
        quiet_ms = now_ms - max(self._last_ms, self._since_ms)
        settled = not (self._hearing or self._waiting or self._speaking)
        return quiet_ms >= (self._settle_ms if settled else self._patience_ms)
