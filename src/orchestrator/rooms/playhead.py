"""What waits to be handed to a room's audio source, what it has, and what was heard of it. Pure.

The source plays 10 ms in every 10 ms, and silence when it has nothing: so its queue is empty at a
moment that is known from what it was given, and a sample has been heard once its time is over.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, replace

from src.audio.pcm import FRAME_BYTES, FRAME_MS, SAMPLE_RATE, from_bytes
from src.audio.ramps import fade_in, fade_out
from src.orchestrator.ports import SpeechFrame
from src.rpc.errors import InvalidArgument

MAX_WAITING_FRAMES = 100
FADE_SAMPLES = SAMPLE_RATE * 5 // 1000
TICK_MS = 10
"""How the source takes from its queue. A rest that is shorter stays there unheard."""
_TICK_BYTES = SAMPLE_RATE * TICK_MS // 1000 * 2
_REMEMBERED_UTTERANCES = 16
_REPORT_FRAMES = 2
# uvloop rounds its timers to whole milliseconds: one that fires a moment early is in time.
_EARLY_MS = 0.5


@dataclass(frozen=True, slots=True)
class _Pushed:
    """`end_ms`: when its last sample is heard."""

    frame: SpeechFrame
    end_ms: float

    @property
    def utterance_id(self) -> str:
        return self.frame.utterance_id


@dataclass(frozen=True, slots=True)
class Cut:
    """What a flush asks for: when `clear`, empty the source's queue and then push `fade`.

    `seq`: the last frame of the utterance that was heard to its end, -1 for none.
    """

    seq: int
    clear: bool = False
    fade: bytes = b""


class Playhead:
    """Times are milliseconds of one clock, and never go back.

    At most 100 frames (2 s) wait. Its overflow rule: the newest is dropped and counted, since what
    was taken has been promised in order; a session runs ahead by 160 ms.
    """

    def __init__(self, lead_ms: int) -> None:
        self.dropped = 0
        self._lead_ms = lead_ms
        self._open = ""
        self._resuming = False
        self._waiting: deque[SpeechFrame] = deque()
        self._pushed: deque[_Pushed] = deque()
        self._dry_ms = float("-inf")
        self._heard: OrderedDict[str, int] = OrderedDict()
        self._reported: dict[str, int] = {}

    # --- frames in ---

    def begin(self, utterance_id: str, seq: int) -> None:
        """Frames of this utterance are taken from now on, and of no other."""
        self._open = utterance_id
        self._resuming = seq > 0

    def put(self, frame: SpeechFrame) -> bool:
        """Queue a frame; False: its utterance was not begun or was flushed, or there is no room.

        Raises InvalidArgument for anything but 20 ms of s16le.
        """
        if len(frame.pcm) != FRAME_BYTES:
            raise InvalidArgument(
                f"a room plays pcm_s16le frames of {FRAME_BYTES} bytes, this one has"
                f" {len(frame.pcm)}: open its voice with that codec"
            )
        if frame.utterance_id != self._open:
            return False
        if len(self._waiting) >= MAX_WAITING_FRAMES:
            self.dropped += 1
            return False
        if self._resuming:
            self._resuming = False
            frame = _risen(frame)
        self._waiting.append(frame)
        return True

    def end(self, utterance_id: str) -> None:
        """No frame of it follows; what waits is played."""
        if self._open == utterance_id:
            self._open = ""

    # --- samples out ---

    def pop(self, now_ms: float) -> bytes | None:
        """The next frame for the source, if it is due.

        One is, as soon as no more than the lead is left to be heard. After a stall the next frame
        is heard from now on and the rest follows it: what is late never comes in a burst.
        """
        if not self._waiting or self._dry_ms - now_ms > self._lead_ms + _EARLY_MS:
            return None
        frame = self._waiting.popleft()
        self._dry_ms = max(self._dry_ms, now_ms) + FRAME_MS
        self._pushed.append(_Pushed(frame, self._dry_ms))
        return frame.pcm

    def next_ms(self) -> float | None:
        """When to look again; None: nothing is being played."""
        if self._waiting:
            return self._dry_ms - self._lead_ms
        return self._pushed[0].end_ms if self._pushed else None

    # --- what was heard ---

    def heard_seq(self, utterance_id: str, now_ms: float) -> int:
        """The last frame heard to its end; -1: none, or older than the last 16 utterances."""
        self._settle(now_ms)
        return self._heard.get(utterance_id, -1)

    def reports(self, now_ms: float) -> list[tuple[str, int]]:
        """(utterance, seq) for every 40 ms heard since the last report, and for every last frame
        after which nothing of the utterance is left here."""
        self._settle(now_ms)
        following = self._pushed[0].utterance_id if self._pushed else self._first_waiting
        out = []
        for utterance_id, seq in self._heard.items():
            new = seq - self._reported.get(utterance_id, -1)
            if new >= _REPORT_FRAMES or (new > 0 and utterance_id != following):
                out.append((utterance_id, seq))
        self._reported.update(out)
        return out

    # --- silence ---

    def flush(self, utterance_id: str, now_ms: float) -> Cut:
        """Forget what was not heard of this utterance, and take no more of it. Idempotent.

        It takes along what the source has of those before it; of later ones nothing is lost.
        """
        self._settle(now_ms)
        if self._open == utterance_id:
            self._open = ""
        seq = self._heard.get(utterance_id, -1)
        if seq >= 0:
            self._reported[utterance_id] = seq
        places = [i for i, one in enumerate(self._pushed) if one.utterance_id == utterance_id]
        fade = self._fade(now_ms) if places else b""
        self._waiting = deque(f for f in self._waiting if f.utterance_id != utterance_id)
        if not places:
            return Cut(seq)
        later = list(self._pushed)[places[-1] + 1 :]
        self._waiting.extendleft(one.frame for one in reversed(later))
        self._pushed.clear()
        self._dry_ms = now_ms + (TICK_MS if fade else 0)
        return Cut(seq, clear=True, fade=fade)

    def _fade(self, now_ms: float) -> bytes:
        """What would have been heard next, falling silent within its first 5 ms.

        Where in its 10 ms the source is, is not known: three times in four this goes on exactly
        where it was cut, else 10 ms away.
        """
        ticks = int((self._dry_ms - now_ms) / TICK_MS + 0.5)
        left = b"".join(one.frame.pcm for one in self._pushed)
        if ticks == 0 and self._waiting:
            left, ticks = self._waiting[0].pcm, FRAME_MS // TICK_MS
        place = len(left) - ticks * _TICK_BYTES
        if ticks == 0 or place < 0:
            return b""
        return fade_out(from_bytes(left[place : place + _TICK_BYTES]), FADE_SAMPLES).tobytes()

    # --- inside ---

    @property
    def _first_waiting(self) -> str:
        return self._waiting[0].utterance_id if self._waiting else ""

    def _settle(self, now_ms: float) -> None:
        while self._pushed and self._pushed[0].end_ms <= now_ms + _EARLY_MS:
            frame = self._pushed.popleft().frame
            self._note_heard(frame.utterance_id, frame.seq)

    def _note_heard(self, utterance_id: str, seq: int) -> None:
        if utterance_id not in self._heard and len(self._heard) >= _REMEMBERED_UTTERANCES:
            oldest, _ = self._heard.popitem(last=False)
            self._reported.pop(oldest, None)
        self._heard[utterance_id] = max(seq, self._heard.get(utterance_id, -1))


def _risen(frame: SpeechFrame) -> SpeechFrame:
    """Speech that goes on in mid-word begins without a click."""
    return replace(frame, pcm=fade_in(from_bytes(frame.pcm), FADE_SAMPLES).tobytes())
