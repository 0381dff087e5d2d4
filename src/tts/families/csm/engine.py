"""The one thread that owns a model, and the slots through which everybody else speaks.

A consumer's thread waits for the engine, never the engine for a consumer: what is not taken is not
drawn. The model's methods are called on the engine's thread and nowhere else.
"""

from __future__ import annotations

import copy
import logging
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from src.audio.pcm import Float32
from src.common.clock import Clock, MonotonicClock
from src.rpc.errors import DuplexError, FailedPrecondition, Internal, InvalidArgument, Unavailable
from src.tts.families.csm.admission import Admission
from src.tts.families.csm.context import MIN_ROOM, Context, Pace, pieces_of
from src.tts.families.csm.outlet import Outlet
from src.tts.families.csm.ports import CsmModel, Voice
from src.tts.families.csm.scheduler import low_water
from src.tts.families.csm.speaker import Speaker
from src.tts.families.csm.ticker import Counters, Seats, Ticker
from src.tts.tts_base import CancelToken

log = logging.getLogger(__name__)

T = TypeVar("T")

CLOSE_PATIENCE_S = 60.0
"""A hundred times what the slowest tick takes."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    active: int
    """Slots that are taken."""
    waiting: int
    """Callers of `slot` that wait for one."""
    ticks: int
    frames: int
    """Drawn in all ticks, end marks among them."""
    positions_read: int
    """Of texts, and of what a re-base reads again."""
    cut: int
    """Segments that the runaway guard ended."""
    failed: int
    """Slots that failed."""
    mean_batch: float
    mean_tick_ms: float


class Slot:
    """A place in the engine, for one thread, inside the `with` that gave it."""

    def __init__(self, outlet: Outlet, room: int, pace: Pace) -> None:
        self._outlet = outlet
        self._room = room
        self._pace = pace

    def say(self, text: str) -> Iterator[Float32]:
        """The text as frames, [frame_samples] float32 in [-1, 1] at the model's rate.

        Ends early when cancelled. What was said before in this slot is its context, and no seam is
        heard. Nothing comes for a text without anything to pronounce. Closing the iterator gives up
        the rest. Raises FailedPrecondition while another `say` is not at its end, Internal when the
        model failed, Unavailable when the engine is closed.
        """
        pieces = pieces_of(text, self._room, self._pace)
        if not pieces:
            return
        turn = self._outlet.ask(pieces)
        try:
            while (frame := self._outlet.take()) is not None:
                yield frame
        finally:
            self._outlet.drop(turn)


class Engine:
    """`model` is the engine's from now on; it is closed by the engine's thread at its end."""

    def __init__(
        self,
        model: CsmModel,
        *,
        name: str,
        clock: Clock | None = None,
        max_waiting: int = 16,
        max_wait_ms: int = 5000,
        credit_frames: int = 3,
        prefill_per_tick: int = 256,
        pace: Pace | None = None,
    ) -> None:
        """At most `max_waiting` callers wait for a slot, `max_wait_ms` each. A slot with
        `credit_frames` frames that nobody took draws no more. At most `prefill_per_tick` positions
        are read between two ticks. Raises ValueError for a bound below one."""
        if min(credit_frames, prefill_per_tick, model.max_prefill, model.slots) < 1:
            raise ValueError("an engine needs a slot, a frame of credit and a position to read")
        self.name = name
        self.slots = model.slots
        self.positions = model.positions
        self.frame_samples = model.frame_samples
        self.sample_rate = model.sample_rate
        self._codebooks = model.codebooks
        self._pace = pace or Pace()
        self._low_water = low_water(credit_frames)
        self._lock = threading.RLock()
        self._wanted = threading.Condition(self._lock)
        self._work_came = False
        self._jobs: deque[_Job[object]] = deque()
        self._admission = Admission(
            model.slots, self._lock, max_waiting=max_waiting, max_wait_ms=max_wait_ms
        )
        self._seats = Seats(model.slots)
        self._counters = Counters()
        self._over: DuplexError | None = None
        ticker = Ticker(
            model,
            self._seats,
            self._lock,
            self._counters,
            clock or MonotonicClock(),
            name=name,
            credit=credit_frames,
            prefill_per_tick=prefill_per_tick,
            pace=self._pace,
        )
        # The thread's arguments hold the model and nothing else of ours does: it ends with it.
        self._thread = threading.Thread(
            target=self._run, args=(model, ticker), name=f"csm-{name}", daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends after the tick that is running. Open slots raise Unavailable; the model is closed.
        Again is no harm. Raises Internal for a tick that does not end, as on a GPU that hangs: its
        memory is lost until the process ends, but nobody waits for it for ever."""
        with self._lock:
            never_ran = self._thread.ident is None
            self._end(Unavailable(f"the engine {self.name} is closed"))
        if never_ran:
            self._thread.start()
        self._thread.join(CLOSE_PATIENCE_S)
        if self._thread.is_alive():
            raise Internal(
                f"the engine {self.name} hangs in a tick, and its memory is not given back; "
                "restart the worker"
            )

    def run(self, work: Callable[[CsmModel], T]) -> T:
        """What `work` returns or raises, called with the model between two ticks; blocks for it.

        From any thread but the engine's own. Raises Unavailable when the engine is closed.
        """
        if threading.current_thread() is self._thread:
            raise FailedPrecondition("the engine cannot wait for itself")
        job = _Job(work)
        with self._lock:
            self._check_open()
            self._jobs.append(job)  # type: ignore[arg-type]
            self._wake()
        return job.future.result()

    @contextmanager
    def slot(self, voice: Voice, *, seed: int, cancel: CancelToken) -> Iterator[Slot]:
        """A slot with the voice prompt in place; blocks while all are taken, first come first
        served. Cancelled meanwhile, it is one that says nothing.

        Raises InvalidArgument for a voice prompt that leaves no room, Exhausted with the place in
        the queue, Unavailable when the engine is closed.
        """
        self._check_open()
        room = self._room(voice)
        outlet = Outlet(self._lock, self._wake, self._low_water)
        number = self._admission.enter(cancel)
        if number is None:
            outlet.close()
            yield Slot(outlet, room, self._pace)
            return
        context = Context(self.positions, _prompt_size(voice), self._codebooks)
        speaker = Speaker(number, voice, seed, outlet, context)
        with self._seated(speaker), cancel.calling(outlet.close):
            yield Slot(outlet, room, self._pace)

    @property
    def stats(self) -> EngineStats:
        with self._lock:
            counters = self._counters
            ticks = max(1, counters.ticks)
            return EngineStats(
                active=len(self._seats.all()),
                waiting=self._admission.waiting,
                ticks=counters.ticks,
                frames=counters.frames,
                positions_read=counters.positions_read,
                cut=counters.cut,
                failed=counters.failed,
                mean_batch=counters.frames / ticks,
                mean_tick_ms=counters.tick_ms / ticks,
            )

    # --- consumers' threads ---

    def _check_open(self) -> None:
        if self._over is not None:
            raise copy.copy(self._over)
        if self._thread.ident is None:
            raise Unavailable(f"the engine {self.name} was not started")

    def _room(self, voice: Voice) -> int:
        prompt = _prompt_size(voice)
        room = self.positions - prompt
        if room < MIN_ROOM:
            raise InvalidArgument(
                f"the voice prompt takes {prompt} of the model's {self.positions} positions; "
                f"{MIN_ROOM} must be left to speak in"
            )
        return room

    @contextmanager
    def _seated(self, speaker: Speaker) -> Iterator[None]:
        with self._lock:
            if self._over is not None:
                speaker.outlet.fail(self._over)
            self._seats.sit(speaker)
            self._wake()
        try:
            yield
        finally:
            speaker.outlet.close()
            with self._lock:
                self._seats.leave(speaker)
                self._admission.leave(speaker.slot)

    def _wake(self) -> None:
        """Holds the lock."""
        self._work_came = True
        self._wanted.notify()

    # --- the engine's thread ---

    def _run(self, model: CsmModel, ticker: Ticker) -> None:
        try:
            self._serve(model, ticker)
        except BaseException as error:
            self._died(error)
        try:
            model.close()
        except Exception as error:
            log.error("the model did not close", extra=self._described(error))

    def _serve(self, model: CsmModel, ticker: Ticker) -> None:
        busy = True
        while True:
            with self._lock:
                if not busy and not self._work_came:
                    self._wanted.wait_for(lambda: self._work_came)
                self._work_came = False
                if self._over is not None:
                    return
                job = self._jobs.popleft() if self._jobs else None
            if job is not None:
                job.do(model)
            busy = ticker.step() or job is not None

    def _died(self, error: BaseException) -> None:
        log.critical("the engine has died", extra=self._described(error))
        self._end(Unavailable(f"the engine {self.name} has died ({type(error).__name__})"))

    def _end(self, reason: DuplexError) -> None:
        with self._lock:
            if self._over is not None:
                return
            self._over = reason
            self._admission.refuse(reason)
            for speaker in self._seats.all():
                speaker.outlet.fail(reason)
            jobs, self._jobs = self._jobs, deque()
            self._wake()
        for job in jobs:
            job.future.set_exception(copy.copy(reason))

    def _described(self, error: BaseException) -> dict[str, str]:
        where = "".join(traceback.format_tb(error.__traceback__))
        return {"engine": self.name, "error": type(error).__name__, "where": where}


def _prompt_size(voice: Voice) -> int:
    return voice.prefix.positions if voice.prefix is not None else 0


class _Job(Generic[T]):
    def __init__(self, work: Callable[[CsmModel], T]) -> None:
        self.future: Future[T] = Future()
        self._work = work

    def do(self, model: CsmModel) -> None:
        try:
            self.future.set_result(self._work(model))
        except BaseException as error:
            self.future.set_exception(error)
            if not isinstance(error, Exception):
                raise
