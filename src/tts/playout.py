"""Which frame of an utterance may leave now: the pause gate and the pacer.

The listener's play-out is modelled by a clock that starts with the first frame and stands still
while paused. A frame may leave if it ends at most an allowance ahead of that clock: `burst_ms`,
which fills the client's jitter buffer, and `lead_ms` once the listener has run dry. So no more than
real time plus the larger of the two ever leaves, however often it is paused and resumed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from enum import Enum

from src.audio.pcm import FRAME_MS
from src.tts.tts_base import WordMark


class Overflow(str, Enum):
    """What a full queue does: make the synthesis wait, or lose the oldest if the reader lags.

    `DROP` too waits while emission keeps up or is paused: an engine faster than real time is no
    reason to lose speech.
    """

    STALL = "stall"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class PlayoutPolicy:
    queue_ms: int = 2_000
    burst_ms: int = 60
    lead_ms: int = 60
    overflow: Overflow = Overflow.STALL

    def ahead(self, lead_ms: int) -> PlayoutPolicy:
        """For a listener with a queue of its own; 0 leaves everything as it is."""
        return replace(self, burst_ms=lead_ms, lead_ms=lead_ms) if lead_ms else self

    @property
    def capacity(self) -> int:
        return max(1, self.queue_ms // FRAME_MS)


@dataclass(frozen=True, slots=True)
class Frame:
    """20 ms of sound as it goes over the wire, and the words that begin in it."""

    seq: int
    payload: bytes
    words: tuple[WordMark, ...] = ()

    @property
    def media_time_ms(self) -> int:
        return self.seq * FRAME_MS


class Playout:
    """One utterance's frames between synthesis and stream. Every method is total and idempotent."""

    def __init__(self, policy: PlayoutPolicy) -> None:
        self.policy = policy
        self._queue: deque[Frame] = deque()
        self._allowance_ms = max(policy.burst_ms, FRAME_MS)
        # When the listener hears media time 0; unknown until the first frame leaves.
        self._origin_ms: float | None = None
        self._paused_at_ms: float | None = None
        self._finished = False
        self._orphans: tuple[WordMark, ...] = ()
        self.stopped = False
        self.emitted = 0
        self.dropped = 0
        self.last_seq = -1

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def paused(self) -> bool:
        return self._paused_at_ms is not None

    @property
    def done(self) -> bool:
        """Nothing will leave any more, except the end marker."""
        return self.stopped or (self._finished and not self._queue and not self.paused)

    @property
    def words_left(self) -> tuple[WordMark, ...]:
        """Words for which no frame is left: the end marker carries them."""
        return () if self.stopped else self._orphans

    # --- the synthesis side ---

    def room(self, now_ms: float) -> int:
        """How many frames may be pushed now."""
        free = self.policy.capacity - len(self._queue)
        if free > 0 or self.stopped:
            return max(free, 1)
        return int(self.policy.overflow is Overflow.DROP and self._reader_lags(now_ms))

    def push(self, frame: Frame) -> None:
        """Queue the next frame. Beyond `room`, the oldest one is dropped and its words move on."""
        if self.stopped:
            return
        if len(self._queue) >= self.policy.capacity:
            self._drop_oldest()
        if self._orphans:
            frame = replace(frame, words=self._orphans + frame.words)
            self._orphans = ()
        self._queue.append(frame)

    def finish(self, words: tuple[WordMark, ...] = ()) -> None:
        """No frame follows; `words` are those that begin in none."""
        self._finished = True
        self._orphans += words

    # --- the stream's side ---

    def pull(self, now_ms: float) -> Frame | None:
        """The next frame, if it may leave now."""
        if self.stopped or self.paused or not self._queue:
            return None
        self._settle(now_ms)
        if self._due_ms(now_ms) > now_ms:
            return None
        frame = self._queue.popleft()
        self.emitted += 1
        self.last_seq = frame.seq
        return frame

    def next_due(self, now_ms: float) -> float | None:
        """When to pull again; None: nothing is due until a push, a resume, a finish or a stop."""
        if self.stopped or self.paused or not self._queue:
            return None
        return max(now_ms, self._due_ms(now_ms))

    def pause(self, now_ms: float) -> None:
        if not self.done and not self.paused:
            self._paused_at_ms = now_ms

    def resume(self, now_ms: float) -> None:
        """Go on with the next frame, as far ahead of the listener as it was when it was paused."""
        if self._paused_at_ms is not None and self._origin_ms is not None:
            self._origin_ms += now_ms - self._paused_at_ms
        self._paused_at_ms = None

    def stop(self) -> None:
        self.stopped = True
        self._paused_at_ms = None
        self._queue.clear()

    # --- the clock ---

    def _played_ms(self, now_ms: float) -> float:
        """The listener's position; before the first frame, where the queue begins."""
        if self._origin_ms is None:
            return float(self._queue[0].media_time_ms) if self._queue else 0.0
        now_ms = now_ms if self._paused_at_ms is None else self._paused_at_ms
        return now_ms - self._origin_ms

    def _due_ms(self, now_ms: float) -> float:
        ahead = self._queue[0].media_time_ms + FRAME_MS - self._played_ms(now_ms)
        return now_ms + ahead - self._allowance_ms

    def _settle(self, now_ms: float) -> None:
        """Start the clock, or start it anew where the listener has run dry: no catching up."""
        head_ms = self._queue[0].media_time_ms
        if self._origin_ms is None:
            self._origin_ms = now_ms - head_ms
        elif self._played_ms(now_ms) > head_ms:
            self._origin_ms = now_ms - head_ms
            self._allowance_ms = max(self.policy.lead_ms, FRAME_MS)

    def _reader_lags(self, now_ms: float) -> bool:
        if self.paused or not self._queue:
            return False
        return self._played_ms(now_ms) - self._queue[0].media_time_ms >= self.policy.queue_ms

    def _drop_oldest(self) -> None:
        lost = self._queue.popleft()
        self.dropped += 1
        if self._queue:
            head = self._queue[0]
            self._queue[0] = replace(head, words=lost.words + head.words)
        else:
            self._orphans += lost.words
