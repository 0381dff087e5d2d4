"""One step of the engine: begin texts, read a share of them, draw a frame for all who need one.

Knows no thread: the engine calls `step` in a loop, tests call it by hand.
"""

from __future__ import annotations

import copy
import logging
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from src.common.clock import Clock
from src.rpc.errors import DuplexError, Internal
from src.tts.families.csm.context import Pace
from src.tts.families.csm.ports import CsmModel, TickResult
from src.tts.families.csm.scheduler import Drawing, Reading, choose_rows, share_reads
from src.tts.families.csm.speaker import Speaker, State

log = logging.getLogger(__name__)

# After a tick that only went through in parts, larger ones are tried again after so many.
_TICKS_TO_RECOVER = 512


@dataclass
class Counters:
    """Written by the engine's thread under its lock."""

    ticks: int = 0
    frames: int = 0
    """Rows of all ticks."""
    positions_read: int = 0
    cut: int = 0
    """Segments that the runaway guard ended."""
    failed: int = 0
    """Slots that failed."""
    tick_ms: float = 0.0
    """Spent in ticks, all together."""


class Seats:
    """Who has which slot. Of fixed length; read and written under the engine's lock."""

    def __init__(self, slots: int) -> None:
        self._speakers: list[Speaker | None] = [None] * slots

    def sit(self, speaker: Speaker) -> None:
        self._speakers[speaker.slot] = speaker

    def leave(self, speaker: Speaker) -> None:
        if self._speakers[speaker.slot] is speaker:
            self._speakers[speaker.slot] = None

    def all(self) -> list[Speaker]:
        return [speaker for speaker in self._speakers if speaker is not None]


class Ticker:
    def __init__(
        self,
        model: CsmModel,
        seats: Seats,
        lock: threading.RLock,
        counters: Counters,
        clock: Clock,
        *,
        name: str,
        credit: int,
        prefill_per_tick: int,
        pace: Pace,
    ) -> None:
        self._model = model
        self._seats = seats
        self._lock = lock
        self._counters = counters
        self._clock = clock
        self._name = name
        self._credit = credit
        self._prefill_per_tick = prefill_per_tick
        self._pace = pace
        self._begun = 0
        self._most_rows = model.slots
        self._good_ticks = 0

    def step(self) -> bool:
        """False: there was nothing to do, and will not be until an outlet says so."""
        began = self._begin()
        read = self._read()
        drew = self._draw()
        return began or read or drew

    # --- texts ---

    def _begin(self) -> bool:
        with self._lock:
            present = [speaker for speaker in self._seats.all() if not speaker.gone]
            for speaker in present:
                if speaker.stale:
                    speaker.take(speaker.outlet.collect(), speaker.outlet.turn)
        done = [self._guarded(speaker, self._begin_one, speaker) for speaker in present]
        return any(done)

    def _begin_one(self, speaker: Speaker) -> bool:
        assigned = speaker.assign(self._model)
        if speaker.over or speaker.state is not State.IDLE:
            return assigned
        self._begun += 1
        if not speaker.begin(self._model, self._pace, self._begun):
            with self._lock:
                speaker.outlet.finish(speaker.turn)
        return True

    def _read(self) -> bool:
        reading = sorted(self._present(State.READING), key=lambda speaker: speaker.began)
        by_slot = {speaker.slot: speaker for speaker in reading}
        needs = [Reading(speaker.slot, speaker.left) for speaker in reading]
        for slot, positions in share_reads(needs, self._prefill_per_tick):
            self._guarded(by_slot[slot], self._read_one, by_slot[slot], positions)
        return bool(reading)

    def _read_one(self, speaker: Speaker, positions: int) -> bool:
        speaker.read(self._model, positions)
        with self._lock:
            self._counters.positions_read += positions
        return True

    # --- frames ---

    def _draw(self) -> bool:
        speakers = self._present(State.DRAWING)
        by_slot = {speaker.slot: speaker for speaker in speakers}
        drawing = [
            Drawing(speaker.slot, speaker.outlet.undelivered, speaker.drew_at)
            for speaker in speakers
        ]
        slots = choose_rows(drawing, self._credit, self._most_rows)
        if not slots:
            return False
        self._tick([by_slot[slot] for slot in slots], may_split=True)
        self._recover()
        return True

    def _tick(self, speakers: Sequence[Speaker], *, may_split: bool) -> None:
        started_ms = self._clock.now_ms()
        try:
            result = self._model.tick([speaker.row() for speaker in speakers])
        except Exception as error:
            if may_split and len(speakers) > 1:
                self._tick_in_halves(speakers, error)
            else:
                self._fail(speakers, error)
            return
        self._counters.tick_ms += self._clock.now_ms() - started_ms
        self._deliver(speakers, result)

    def _tick_in_halves(self, speakers: Sequence[Speaker], error: Exception) -> None:
        half = (len(speakers) + 1) // 2
        self._most_rows, self._good_ticks = half, 0
        log.warning(
            "a tick failed, smaller ones follow",
            extra={"engine": self._name, "rows": len(speakers), "error": type(error).__name__},
        )
        for part in (speakers[:half], speakers[half:]):
            self._tick(part, may_split=False)

    def _recover(self) -> None:
        self._good_ticks += 1
        if self._good_ticks % _TICKS_TO_RECOVER == 0:
            self._most_rows = min(self._model.slots, self._most_rows * 2)

    def _deliver(self, speakers: Sequence[Speaker], result: TickResult) -> None:
        # Copies, as the model may give the same buffers again.
        codes = [result.codes[row : row + 1].copy() for row in range(len(speakers))]
        pcm = [samples.copy() for samples in result.pcm]
        cut: list[Speaker] = []
        with self._lock:
            self._counters.ticks += 1
            for row, speaker in enumerate(speakers):
                self._counters.frames += 1
                if not result.healthy[row]:
                    self._lost(speaker, Internal("the model's output is not a number"))
                elif result.ended[row]:
                    speaker.ended(self._counters.frames)
                else:
                    speaker.outlet.put(speaker.turn, pcm[row])
                    if speaker.drew(codes[row], self._counters.frames):
                        cut.append(speaker)
                if speaker.over:
                    speaker.outlet.finish(speaker.turn)
            self._counters.cut += len(cut)
        for speaker in cut:
            log.warning(
                "a segment was cut: the model found no end",
                extra={"engine": self._name, "slot": speaker.slot},
            )

    # --- failures ---

    def _guarded(self, speaker: Speaker, work: Callable[..., bool], *args: Speaker | int) -> bool:
        """What one slot's part in a step raises is that slot's end, and nobody else's."""
        if speaker.gone or speaker.stale:
            return False
        try:
            return work(*args)
        except Exception as error:
            self._fail([speaker], error)
            return True

    def _fail(self, speakers: Sequence[Speaker], error: Exception) -> None:
        kind, where = type(error).__name__, "".join(traceback.format_tb(error.__traceback__))
        # The message of a foreign exception may quote the text, so it is neither logged nor sent.
        log.error(
            "slots failed",
            extra={
                "engine": self._name,
                "slots": [speaker.slot for speaker in speakers],
                "error": kind,
                "where": where,
            },
        )
        # A copy: the traceback holds the frames, and those the model.
        told = (
            copy.copy(error)
            if isinstance(error, DuplexError)
            else Internal(f"the engine failed ({kind})")
        )
        with self._lock:
            for speaker in speakers:
                self._lost(speaker, told)

    def _lost(self, speaker: Speaker, error: DuplexError) -> None:
        self._counters.failed += 1
        speaker.outlet.fail(error)

    def _present(self, state: State) -> list[Speaker]:
        with self._lock:
            return [
                speaker
                for speaker in self._seats.all()
                if speaker.state is state and not speaker.gone and not speaker.stale
            ]
