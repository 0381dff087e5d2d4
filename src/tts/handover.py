"""What passes between the event loop and a synthesis thread: text one way, frames the other.

Both ways are bounded, and both ways closing wakes whoever waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence

from src.audio.pcm import FRAME_MS
from src.common.clock import Clock
from src.common.timers import Alarm
from src.tts.playout import Frame, Overflow, Playout
from src.tts.run_gate import Deadline, RunGate
from src.tts.tts_base import CancelToken, Segment, WordMark

FEED_SEGMENTS = 32
# The stream waits for this frame, and would else wait for the interpreter lock as well, which a
# thread that goes on computing keeps for up to 5 ms.
_LET_THE_LOOP_S = 0.000_5


class ComputeTurn:
    """One thread's turns at computing.

    Held while the engine works, never while it waits for text or for room, so that few slots serve
    many utterances. Without a `gate` there are no turns: everybody goes on at once.
    """

    def __init__(self, gate: RunGate | None, cancel: CancelToken) -> None:
        self._gate = gate
        self._cancel = cancel
        self._deadline = Deadline()
        self._holder: int | None = None
        self._held = contextlib.ExitStack()

    def take(self) -> None:
        """Wait for a slot; a cancelled utterance does not wait."""
        if self._gate is None:
            return
        self._held.enter_context(self._gate.turn(self._deadline, self._cancel))
        self._holder = threading.get_ident()

    def give(self) -> bool:
        """Give the slot back; False: this thread holds none."""
        if self._holder != threading.get_ident():
            return False
        self._holder = None
        self._held.close()
        return True

    def produced(self, seconds: float) -> None:
        """The next piece is due when this much audio has played."""
        self._deadline.played(seconds)


class SegmentFeed:
    """Segments for `Model.stream`, which blocks on it until more text is written.

    Bounded: when it is full, whoever reads the gRPC stream waits, and in the end its writer too.
    """

    def __init__(self, turn: ComputeTurn, clock: Clock, capacity: int = FEED_SEGMENTS) -> None:
        self.waited_ms = 0.0
        """How long the engine has waited for text."""
        self._turn = turn
        self._clock = clock
        self._capacity = capacity
        self._segments: deque[Segment] = deque()
        self._closed = False
        self._changed = threading.Condition()
        self._room = Alarm()
        self._loop = asyncio.get_running_loop()

    async def put(self, segment: Segment) -> None:
        while not self._try_put(segment):
            await self._room.wait()

    def close(self) -> None:
        """No more text: the iteration ends after what is queued."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def abandon(self) -> None:
        """End the iteration now."""
        with self._changed:
            self._closed = True
            self._segments.clear()
            self._changed.notify()
        self._room.ring()

    def __iter__(self) -> Iterator[Segment]:
        return self

    def __next__(self) -> Segment:
        if not self._ready():
            self._wait()
        with self._changed:
            if not self._segments:
                raise StopIteration
            full = len(self._segments) >= self._capacity
            segment = self._segments.popleft()
        if full:
            self._loop.call_soon_threadsafe(self._room.ring)
        return segment

    def _ready(self) -> bool:
        return bool(self._segments) or self._closed

    def _wait(self) -> None:
        started = self._clock.now_ms()
        gave = self._turn.give()
        with self._changed:
            self._changed.wait_for(self._ready)
        if gave:
            self._turn.take()
        self.waited_ms += self._clock.now_ms() - started

    def _try_put(self, segment: Segment) -> bool:
        with self._changed:
            if self._closed:
                return True
            if len(self._segments) >= self._capacity:
                return False
            self._segments.append(segment)
            self._changed.notify()
            return True


class FrameQueue:
    """A `Playout` that a thread fills and the event loop empties."""

    def __init__(self, playout: Playout, clock: Clock, filled: Alarm) -> None:
        self._playout = playout
        self._clock = clock
        self._filled = filled
        self._changed = threading.Condition()
        # Under `drop` room also comes with time, when the reader lags; `pull` tells of the rest.
        drops = playout.policy.overflow is Overflow.DROP
        self._poll_s = FRAME_MS / 1000.0 if drops else None
        self._error: BaseException | None = None
        self._loop = asyncio.get_running_loop()

    # --- the synthesis thread ---

    def put(self, frames: Sequence[Frame]) -> bool:
        """Queue the frames, waiting for room. False: nobody wants them any more."""
        for frame in frames:
            with self._changed:
                while not self._playout.room(self._clock.now_ms()):
                    self._changed.wait(timeout=self._poll_s)
                if self._playout.stopped:
                    return False
                was_empty = not len(self._playout)
                self._playout.push(frame)
            if was_empty:
                self._wake_loop()
                time.sleep(_LET_THE_LOOP_S)
        return True

    def finish(self, words: tuple[WordMark, ...] = (), error: BaseException | None = None) -> None:
        """No frame follows. `error` is raised to the stream after what is queued has left."""
        with self._changed:
            self._error = error
            self._playout.finish(words)
        self._wake_loop()

    # --- the event loop ---

    def pull(self) -> Frame | None:
        with self._changed:
            frame = self._playout.pull(self._clock.now_ms())
            # The thread is woken for half a queue at a time, not for every frame.
            if frame is not None and len(self._playout) * 2 <= self._playout.policy.capacity:
                self._changed.notify()
        return frame

    def delay_ms(self) -> float | None:
        """How long until `pull` may give something; None: until the alarm rings."""
        with self._changed:
            now_ms = self._clock.now_ms()
            due_ms = self._playout.next_due(now_ms)
        return None if due_ms is None else due_ms - now_ms

    def pause(self) -> None:
        with self._changed:
            self._playout.pause(self._clock.now_ms())

    def resume(self) -> None:
        with self._changed:
            self._playout.resume(self._clock.now_ms())
        self._filled.ring()

    def stop(self) -> None:
        with self._changed:
            self._playout.stop()
            self._changed.notify()
        self._filled.ring()

    @property
    def done(self) -> bool:
        return self._playout.done

    @property
    def error(self) -> BaseException | None:
        return self._error

    def _wake_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._filled.ring)
