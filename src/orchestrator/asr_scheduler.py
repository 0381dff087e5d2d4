"""One recogniser for all sessions: finals before partials, sessions in turn, nothing unbounded."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, Protocol, TypeVar

from src.audio.pcm import Float32
from src.common.nvtx import nvtx_range
from src.orchestrator.ports import Transcript
from src.rpc.errors import Exhausted, Internal, Unavailable

log = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")


class FairQueue(Generic[ItemT]):
    """Who is next. Pure.

    Full: a partial is refused; a final pushes out the longest waiting partial, or is refused.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._urgent: dict[str, deque[ItemT]] = {}
        self._partial: dict[str, ItemT] = {}

    def __len__(self) -> int:
        return sum(map(len, self._urgent.values())) + len(self._partial)

    @property
    def has_urgent(self) -> bool:
        return bool(self._urgent)

    def put(self, session_id: str, item: ItemT, *, urgent: bool) -> ItemT | None:
        """Returns the partial that had to go: an older one of this session, or to make room.

        Raises Exhausted when there is no room.
        """
        if urgent:
            displaced = self._make_room() if len(self) >= self._limit else None
            self._urgent.setdefault(session_id, deque()).append(item)
            return displaced
        if session_id in self._partial:
            older = self._partial[session_id]
            self._partial[session_id] = item
            return older
        if len(self) >= self._limit:
            raise _full(len(self))
        self._partial[session_id] = item
        return None

    def take(self) -> ItemT | None:
        if self._urgent:
            session_id, waiting = next(iter(self._urgent.items()))
            del self._urgent[session_id]
            item = waiting.popleft()
            if waiting:
                self._urgent[session_id] = waiting
            return item
        if self._partial:
            return self._partial.pop(next(iter(self._partial)))
        return None

    def discard(self, session_id: str, item: ItemT) -> bool:
        """True if it was still waiting."""
        if self._partial.get(session_id) is item:
            del self._partial[session_id]
            return True
        waiting = self._urgent.get(session_id, deque())
        if item not in waiting:
            return False
        waiting.remove(item)
        if not waiting:
            del self._urgent[session_id]
        return True

    def _make_room(self) -> ItemT:
        if not self._partial:
            raise _full(len(self))
        return self._partial.pop(next(iter(self._partial)))


def _full(waiting: int) -> Exhausted:
    return Exhausted(
        "the recogniser has more waiting than it can take; try again in a moment",
        retry_after_ms=1000,
        queue_position=waiting,
    )


class PassAbandoned(Exception):
    """A backend noticed that nobody waits for this pass any more, or that a final does."""


class Backend(Protocol):
    """A loaded model. Called from a worker thread, from `parallel` of them at once."""

    name: str

    def check_language(self, language: str) -> str:
        """The code the model knows it by; '' is the default. Raises UnknownName."""
        ...

    def transcribe(
        self, samples: Float32, language: str, *, draft: bool, abandoned: Callable[[], bool]
    ) -> Transcript:
        """Blocking. A draft is one quick pass. Raises PassAbandoned if `abandoned()` turns true."""
        ...


@dataclass(eq=False, slots=True)
class _Job:
    session_id: str
    samples: Float32
    language: str
    urgent: bool
    result: asyncio.Future[Transcript]
    dropped: threading.Event = field(default_factory=threading.Event)


class FairRecognizer:
    """Implements `ports.Recognizer`. Belongs to one event loop; the model runs on its threads."""

    def __init__(self, backend: Backend, *, parallel: int, queue_limit: int) -> None:
        self.name = backend.name
        self._backend = backend
        self._parallel = parallel
        self._queue: FairQueue[_Job] = FairQueue(queue_limit)
        self._running = 0
        self._closed = False
        self._final_waits = threading.Event()
        self._threads = ThreadPoolExecutor(parallel, thread_name_prefix="asr")

    async def transcribe(
        self, samples: Float32, *, session_id: str, language: str = "", urgent: bool = True
    ) -> Transcript:
        if self._closed:
            raise Unavailable("the recogniser is shut down")
        code = self._backend.check_language(language)
        result: asyncio.Future[Transcript] = asyncio.get_running_loop().create_future()
        job = _Job(session_id, samples, code, urgent, result)
        self._enqueue(job)
        try:
            return await result
        finally:
            job.dropped.set()
            self._queue.discard(session_id, job)

    async def aclose(self) -> None:
        """Waiting passes fail with Unavailable; the running ones are waited for."""
        self._closed = True
        while (job := self._queue.take()) is not None:
            _fail(job, Unavailable("the recogniser is shutting down"))
        await asyncio.to_thread(self._threads.shutdown)

    def _enqueue(self, job: _Job) -> None:
        displaced = self._queue.put(job.session_id, job, urgent=job.urgent)
        if displaced is not None:
            _fail(displaced, Exhausted("a newer pass took the place of this one"))
        self._start_waiting()

    def _start_waiting(self) -> None:
        while self._running < self._parallel and (job := self._queue.take()) is not None:
            self._running += 1
            loop = job.result.get_loop()
            done = loop.run_in_executor(self._threads, self._work, job)
            done.add_done_callback(partial(self._finished, job))
        if self._queue.has_urgent:
            self._final_waits.set()
        else:
            self._final_waits.clear()

    def _work(self, job: _Job) -> Transcript:
        def abandoned() -> bool:
            return job.dropped.is_set() or (not job.urgent and self._final_waits.is_set())

        with nvtx_range("asr.final" if job.urgent else "asr.partial"):
            return self._backend.transcribe(
                job.samples, job.language, draft=not job.urgent, abandoned=abandoned
            )

    def _finished(self, job: _Job, done: asyncio.Future[Transcript]) -> None:
        self._running -= 1
        error = done.exception()
        if isinstance(error, PassAbandoned):
            self._try_again(job)
        elif error is not None:
            log.error("a recognition pass failed", exc_info=error)
            _fail(job, Internal(f"recognition failed: {type(error).__name__}"))
        elif not job.result.done():
            job.result.set_result(done.result())
        self._start_waiting()

    def _try_again(self, job: _Job) -> None:
        """A partial that made way for a final goes back, unless a newer one is there by now."""
        if job.result.done() or self._closed:
            _fail(job, Unavailable("the recogniser is shutting down"))
            return
        try:
            newer = self._queue.put(job.session_id, job, urgent=False)
        except Exhausted as error:
            _fail(job, error)
            return
        if newer is not None:
            self._queue.put(newer.session_id, newer, urgent=False)
            _fail(job, Exhausted("a newer pass took the place of this one"))


def _fail(job: _Job, error: Exception) -> None:
    if not job.result.done():
        job.result.set_exception(error)
