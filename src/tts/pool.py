"""Threads for synthesis, and turns on a model that serves only so many streams at once."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from src.common.tasks import timeout
from src.rpc.errors import Exhausted
from src.tts.run_gate import RunGate

MAX_WAITING = 16
MAX_WAIT_MS = 5_000


class StreamGate:
    """First come, first served, for one model. `limit` 0: everybody may enter.

    At most MAX_WAITING wait, at most MAX_WAIT_MS each; who does not get in learns where they stood.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.active = 0
        self._turns: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._turns)

    async def enter(self) -> None:
        """Raises Exhausted with the place in the queue."""
        if self._free():
            self.active += 1
            return
        if self.waiting >= MAX_WAITING:
            raise self._full(self.waiting + 1)
        await self._wait()

    def leave(self) -> None:
        self.active -= 1
        while self._turns and self._free():
            turn = self._turns.popleft()
            if not turn.done():
                self.active += 1
                turn.set_result(None)

    def _free(self) -> bool:
        return not self.limit or self.active < self.limit

    async def _wait(self) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._turns.append(turn)
        try:
            async with timeout(MAX_WAIT_MS / 1000.0):
                await turn
        except BaseException as error:
            place = self._give_up(turn)
            if isinstance(error, asyncio.TimeoutError):
                raise self._full(place) from None
            raise

    def _give_up(self, turn: asyncio.Future[None]) -> int:
        """Leave the queue, or hand on the turn that came too late; the place in the queue."""
        if turn in self._turns:
            place = self._turns.index(turn) + 1
            self._turns.remove(turn)
            return place
        self.leave()
        return 1

    def _full(self, place: int) -> Exhausted:
        return Exhausted(
            f"this model speaks at most {self.limit} utterances at once and others wait; "
            "try again later or on another worker",
            retry_after_ms=MAX_WAIT_MS,
            queue_position=place,
        )


class SynthesisPool:
    """One thread for each live utterance, of which `threads` compute at any moment."""

    def __init__(self, threads: int, max_utterances: int) -> None:
        self.compute = RunGate(threads)
        # Twice, because an interrupted one finishes its step while its successor starts.
        self._executor = ThreadPoolExecutor(2 * max_utterances, thread_name_prefix="synthesis")
        self._gates: dict[str, StreamGate] = {}
        self.running = 0

    @property
    def waiting(self) -> int:
        """Utterances that wait for their turn on a model."""
        return sum(gate.waiting for gate in self._gates.values())

    def gate(self, model_id: str, limit: int) -> StreamGate:
        gate = self._gates.setdefault(model_id, StreamGate(limit))
        gate.limit = limit
        return gate

    def start(self, work: Callable[[], None]) -> asyncio.Future[None]:
        """Run `work` on a thread; it must not raise. Cancelling the future does not stop it."""
        self.running += 1
        future = asyncio.get_running_loop().run_in_executor(self._executor, work)
        future.add_done_callback(self._ended)
        return future

    def close(self) -> None:
        self._executor.shutdown(wait=True)

    def _ended(self, _: asyncio.Future[None]) -> None:
        self.running -= 1
