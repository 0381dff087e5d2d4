"""The frames of one utterance from the worker's hand to the listener's ear. Pure."""

from __future__ import annotations

from collections import deque

from src.audio.pcm import FRAME_MS
from src.orchestrator.ports import SpeechFrame

_OPENING_FRAMES = 25
_RAN_DRY_MS = 100


class Outbox:
    """A ring of frames that were not heard yet: first those already sent, then those to be sent.

    Bounded by `capacity`. Its overflow rule is to stall: while `full`, the owner does not read the
    worker's stream, and the worker's own bounded queue holds it back.
    """

    def __init__(self, utterance_id: str, capacity: int) -> None:
        self.utterance_id = utterance_id
        self._capacity = capacity
        self._kept: deque[SpeechFrame] = deque()
        self._sent = 0
        self.produced = 0
        self.heard_frames = 0
        self.last_seq = -1
        self.heard_seq = -1
        self.heard_ms = 0
        self.sent_seq = -1

    def push(self, frame: SpeechFrame) -> bool:
        """Keep a frame of the worker's. A late frame of another utterance, or one that came
        before, is dropped: False. Raises OverflowError when full."""
        if frame.utterance_id != self.utterance_id or frame.seq <= self.last_seq:
            return False
        if self.full:
            raise OverflowError(
                f"{self._capacity} frames are kept; read no more until one is heard"
            )
        self._kept.append(frame)
        self.last_seq = frame.seq
        self.produced += 1
        return True

    @property
    def full(self) -> bool:
        return len(self._kept) >= self._capacity

    @property
    def kept(self) -> int:
        return len(self._kept)

    @property
    def unsent(self) -> int:
        return len(self._kept) - self._sent

    def peek(self) -> SpeechFrame | None:
        """The next frame to send, if there is one."""
        return self._kept[self._sent] if self._sent < len(self._kept) else None

    def sent(self) -> SpeechFrame:
        """`peek`, and count it as sent."""
        frame = self._kept[self._sent]
        self._sent += 1
        self.sent_seq = max(self.sent_seq, frame.seq)
        return frame

    def heard(self, seq: int) -> None:
        """Everything up to `seq` was heard: let go of it. What was never sent cannot be heard."""
        while self._kept and self._kept[0].seq <= min(seq, self.sent_seq):
            frame = self._kept.popleft()
            self._sent = max(0, self._sent - 1)
            self.heard_frames += 1
            self.heard_seq = frame.seq
            self.heard_ms = frame.media_time_ms + FRAME_MS

    def rewind(self) -> int:
        """Nothing unheard counts as under way any more. Returns how many frames that takes back.

        An acknowledgement that is still on its way counts nevertheless: those frames were sent.
        """
        taken_back, self._sent = self._sent, 0
        return taken_back

    @property
    def all_heard(self) -> bool:
        return not self._kept


class Grid:
    """When each frame is due at the listener: 20 ms apart from the moment playing began."""

    def __init__(self, seq: int, now_ms: float) -> None:
        self._seq = seq
        self._start_ms = now_ms

    def due_ms(self, seq: int) -> float:
        return self._start_ms + (seq - self._seq) * FRAME_MS

    def leave(self, seq: int, now_ms: float) -> float:
        """A frame leaves now: how late it is. So late that the listener ran dry, the rest of the
        grid moves with it."""
        late_ms = max(0.0, now_ms - self.due_ms(seq))
        if late_ms > _RAN_DRY_MS:
            self._start_ms += late_ms
        return late_ms

    def played_seq(self, now_ms: float) -> int:
        """The last frame whose end is due; less than the first one's seq if there is none."""
        return self._seq - 1 + int(max(0.0, now_ms - self._start_ms) // FRAME_MS)


class Spacing:
    """How evenly the frames of one run leave; the burst that opens it does not count."""

    def __init__(self) -> None:
        self._left = 0
        self._last_ms = 0.0

    def leave(self, now_ms: float) -> float | None:
        """The distance of this gap from 20 ms; None within the opening half second."""
        gap_ms, self._last_ms = now_ms - self._last_ms, now_ms
        self._left += 1
        return abs(gap_ms - FRAME_MS) if self._left > _OPENING_FRAMES else None
