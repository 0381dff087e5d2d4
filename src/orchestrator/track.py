"""The frames of one utterance on their way to the listener: kept, paced, sent, heard."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Protocol

from src.audio.pcm import FRAME_MS, from_bytes, level_dbfs
from src.common.clock import Clock
from src.orchestrator.duplex_settings import DuplexSettings
from src.orchestrator.heard import HeardText, split_heard
from src.orchestrator.outbox import Grid, Outbox, Spacing
from src.orchestrator.ports import SessionObserver, SpeechFrame, Transport, Utterance, Word

_LEVEL_FRAMES = 5
# Every eighth sample tells a level as well, at a quarter of the price; this runs for every frame.
_LEVEL_STRIDE = 8
# Opus packets are not measured; a voice at this level is what the worker's loudness aims for.
_OPUS_DBFS = -20.0


class Booth(Protocol):
    """Where frames leave from."""

    transport: Transport
    clock: Clock
    observer: SessionObserver
    settings: DuplexSettings
    codec: str


class Track:
    """One utterance at a worker: the whole reply, or what a second worker speaks of its rest.

    `base` is its place in the reply's text. `gate_open` is asked before every frame; `on_sent` is
    told of every one that left.
    """

    def __init__(
        self,
        utterance: Utterance,
        base: int,
        booth: Booth,
        gate_open: Callable[[], bool],
        on_sent: Callable[[float], None],
    ) -> None:
        self.utterance = utterance
        self.utterance_id = utterance.utterance_id
        self.base = base
        self.total_ms: int | None = None
        self.read_to_end = False
        self.closed = False
        self.outbox = Outbox(utterance.utterance_id, booth.settings.kept_ms // FRAME_MS)
        self._booth = booth
        self._gate_open = gate_open
        self._on_sent = on_sent
        self._words: list[Word] = []
        self._grid: Grid | None = None
        self._spacing = Spacing()
        self._next_seq = -1
        self._end_told = False
        self._timer: asyncio.TimerHandle | None = None
        self._levels: deque[float] = deque(maxlen=_LEVEL_FRAMES)

    def take(self, frame: SpeechFrame) -> bool:
        """False for a frame that is not this utterance's next."""
        if not self.outbox.push(frame):
            return False
        self._words += frame.words
        return True

    def pump(self) -> None:
        """Send what may leave now: the gate is open and the frame is not too far ahead."""
        self.note_heard()
        if not self._gate_open():
            return
        now_ms = self._booth.clock.now_ms()
        while (frame := self.outbox.peek()) is not None:
            if self._grid is None:
                self._begin_audio(frame.seq, resumed=self._next_seq >= 0)
                self._grid = Grid(frame.seq, now_ms)
            early_ms = self._grid.due_ms(frame.seq) - now_ms - self._booth.settings.lead_ms
            if early_ms > 0:
                self._pump_in(early_ms)
                return
            self._send(self._grid, now_ms)
        if self.read_to_end:
            self.tell_end()

    def shut(self, at_ms: int) -> bool:
        """Silence at the listener first, bookkeeping after. True if frames were taken back."""
        booth = self._booth
        booth.transport.flush(self.utterance_id, at_ms)
        self.cancel_timer()
        self.note_heard()
        self._grid = None
        self._end_told = False
        self._levels.clear()
        taken_back = self.outbox.rewind()
        booth.observer.frames_kept(self.outbox.kept)
        return taken_back > 0

    def note_heard(self) -> None:
        """What the client acknowledged; for one that does not, what was due long enough ago."""
        booth = self._booth
        seq = booth.transport.heard_seq(self.utterance_id)
        if self._grid is not None:
            margin_ms = booth.settings.ack_margin_ms
            seq = max(seq, self._grid.played_seq(booth.clock.now_ms() - margin_ms))
        self.outbox.heard(seq)

    def heard(self, text: str) -> HeardText:
        """Of the whole reply's text."""
        self.note_heard()
        part = split_heard(text[self.base :], self._words, self.outbox.heard_ms, self.total_ms)
        return HeardText(text[: self.base] + part.heard, part.cut, part.estimated)

    def tell_end(self) -> None:
        if not self._end_told:
            self._end_told = True
            self._booth.transport.end_audio(self.utterance_id, self.outbox.last_seq + 1)

    def cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def sent_dbfs(self) -> float:
        """Level of the last ~100 ms sent; -120 for nothing."""
        return max(self._levels, default=-120.0)

    def _send(self, grid: Grid, now_ms: float) -> None:
        frame, booth = self.outbox.sent(), self._booth
        if frame.seq != self._next_seq:
            self._begin_audio(frame.seq, resumed=True)
        self._next_seq = frame.seq + 1
        booth.transport.send_frame(frame)
        booth.observer.frame_sent(grid.leave(frame.seq, now_ms))
        if (jitter_ms := self._spacing.leave(now_ms)) is not None:
            booth.observer.frame_jitter(jitter_ms)
        opus = booth.codec == "opus"
        self._levels.append(
            _OPUS_DBFS if opus else level_dbfs(from_bytes(frame.pcm)[::_LEVEL_STRIDE])
        )
        self._on_sent(now_ms)

    def _begin_audio(self, seq: int, *, resumed: bool) -> None:
        self._next_seq = seq
        self._spacing = Spacing()
        self._booth.transport.begin_audio(self.utterance_id, seq, resumed=resumed)

    def _pump_in(self, ms: float) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(ms / 1000, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.pump()
