"""The client's jitter buffer: network frames in, an unbroken stream of samples out.

Pure: whoever owns the audio clock calls `pull`. A frame counts as heard once its last sample was
pulled.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from src.audio.pcm import FRAME_MS, SAMPLE_RATE, Int16
from src.audio.ramps import fade_in, fade_out

PREBUFFER_MS = 40
MAX_WAIT_MS = 60
FADE_SAMPLES = SAMPLE_RATE * 5 // 1000
# The server is about 200 ms ahead; more than this means that it does not pace: the oldest go.
MAX_FRAMES = 10_000 // FRAME_MS


@dataclass(frozen=True, slots=True)
class Position:
    """Every frame of the utterance up to `seq` was heard (-1: none)."""

    utterance_id: str
    seq: int


@dataclass(slots=True)
class _Frame:
    utterance_id: str
    seq: int
    samples: Int16


class Player:
    """Starts after 40 ms of audio (or 60 ms of waiting), obeys `flush` within 5 ms of sound."""

    def __init__(self, prebuffer_ms: int = PREBUFFER_MS) -> None:
        self._prebuffer = prebuffer_ms // FRAME_MS
        self._frames: deque[_Frame] = deque()
        self._taken = 0  # samples already pulled from the first frame
        self._receiving: tuple[str, int] | None = None
        self._ended = False
        self._running = False
        self._waited = 0
        self._rise = False
        self._tail: Int16 = np.empty(0, dtype=np.int16)
        self._broken_off: tuple[str, int, int] | None = None
        self.position = Position("", -1)
        self.underruns = 0
        self.dropped = 0

    # --- what the network brings ---

    def begin(self, utterance_id: str, seq: int) -> None:
        """`audio.begin`: the next pushed frame is `seq` of this utterance."""
        self._receiving = (utterance_id, seq)
        self._ended = False
        if self.position.utterance_id != utterance_id and not self._frames:
            self.position = Position(utterance_id, seq - 1)

    def push(self, samples: Int16) -> None:
        """One frame of 960 samples. Dropped without a `begin` before it, and if we have it."""
        if self._receiving is None:
            self.dropped += 1
            return
        utterance_id, seq = self._receiving
        self._receiving = (utterance_id, seq + 1)
        if seq <= self._newest(utterance_id):
            self.dropped += 1
            return
        if len(self._frames) >= MAX_FRAMES:
            self._frames.popleft()
            self._taken = 0
            self.dropped += 1
        self._frames.append(_Frame(utterance_id, seq, samples))

    def _newest(self, utterance_id: str) -> int:
        """The last frame of the utterance that was heard or waits to be; below any seq if none."""
        if self._frames and self._frames[-1].utterance_id == utterance_id:
            return self._frames[-1].seq
        return self.position.seq if self.position.utterance_id == utterance_id else -1

    def end(self) -> None:
        """`audio.end`: nothing follows, so what is buffered need not wait for more."""
        self._ended = True

    def flush(self) -> Position:
        """Fade out and fall silent; returns what was heard. Audio is dropped until `begin`."""
        if self._frames and self._running:
            head = self._frames[0]
            rest = head.samples[self._taken :]
            self._tail = fade_out(rest[:FADE_SAMPLES], FADE_SAMPLES)
            self._broken_off = (head.utterance_id, head.seq, self._taken)
        self._frames.clear()
        self._taken = 0
        self._receiving = None
        self._running = False
        self._waited = 0
        return self.position

    # --- what the audio clock takes ---

    def pull(self, count: int) -> Int16:
        """The next `count` samples for the speaker; silence where there is nothing to say."""
        out: Int16 = np.zeros(count, dtype=np.int16)
        filled = self._pull_tail(out)
        if not self._running and not self._start(count):
            return out
        while filled < count and self._frames:
            filled += self._pull_head(out[filled:])
        if filled < count and self._running:
            self._run_dry()
        return out

    @property
    def playing(self) -> bool:
        return self._running or bool(self._frames)

    def _pull_tail(self, out: Int16) -> int:
        size = min(out.size, self._tail.size)
        out[:size] = self._tail[:size]
        self._tail = self._tail[size:]
        return size

    def _start(self, count: int) -> bool:
        if not self._frames:
            return False
        enough = len(self._frames) >= self._prebuffer or self._ended
        if not enough and self._waited < MAX_WAIT_MS * SAMPLE_RATE // 1000:
            self._waited += count
            return False
        self._running, self._waited = True, 0
        self._skip_what_was_heard()
        return True

    def _skip_what_was_heard(self) -> None:
        """A resumed frame that was broken off goes on at the sample where the fade began."""
        head = self._frames[0]
        if self._broken_off is not None and self._broken_off[:2] == (head.utterance_id, head.seq):
            self._taken = self._broken_off[2]
            self._rise = True
        self._broken_off = None

    def _pull_head(self, out: Int16) -> int:
        head = self._frames[0]
        samples = head.samples[self._taken : self._taken + out.size]
        if self._rise:
            samples = fade_in(samples, FADE_SAMPLES)
            self._rise = False
        out[: samples.size] = samples
        self._taken += samples.size
        if self._taken >= head.samples.size:
            self.position = Position(head.utterance_id, head.seq)
            self._frames.popleft()
            self._taken = 0
        return int(samples.size)

    def _run_dry(self) -> None:
        self._running = False
        if not self._ended:
            self.underruns += 1
