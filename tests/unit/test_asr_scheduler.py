"""Finals before partials, sessions in turn, nothing unbounded."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.audio.pcm import Float32
from src.common.tasks import timeout
from src.orchestrator.asr_scheduler import FairQueue, FairRecognizer, PassAbandoned
from src.orchestrator.ports import Transcript
from src.rpc.errors import Exhausted, Internal, Unavailable, UnknownName

AUDIO = np.zeros(1600, dtype=np.float32)


def drain(queue: FairQueue[str]) -> list[str]:
    taken = []
    while (item := queue.take()) is not None:
        taken.append(item)
    return taken


def test_finals_go_first_and_sessions_take_turns() -> None:
    queue: FairQueue[str] = FairQueue(10)
    queue.put("a", "a partial", urgent=False)
    for item in ("a1", "a2", "a3"):
        queue.put("a", item, urgent=True)
    queue.put("b", "b1", urgent=True)
    assert drain(queue) == ["a1", "b1", "a2", "a3", "a partial"]


def test_a_newer_partial_takes_the_place_of_the_older() -> None:
    queue: FairQueue[str] = FairQueue(10)
    assert queue.put("a", "old", urgent=False) is None
    queue.put("b", "other", urgent=False)
    assert queue.put("a", "new", urgent=False) == "old"
    assert drain(queue) == ["new", "other"]


def test_a_full_queue_refuses_but_a_final_displaces_a_partial() -> None:
    queue: FairQueue[str] = FairQueue(2)
    queue.put("a", "first", urgent=False)
    queue.put("b", "second", urgent=False)
    with pytest.raises(Exhausted) as refused:
        queue.put("c", "third", urgent=False)
    assert refused.value.queue_position == 2
    assert queue.put("c", "final", urgent=True) == "first"
    queue.put("d", "final too", urgent=True)
    with pytest.raises(Exhausted):
        queue.put("e", "no room", urgent=True)


def test_a_discarded_pass_is_never_taken() -> None:
    queue: FairQueue[str] = FairQueue(10)
    queue.put("a", "final", urgent=True)
    queue.put("a", "partial", urgent=False)
    assert queue.discard("a", "final")
    assert queue.discard("a", "partial")
    assert not queue.discard("a", "final")
    assert drain(queue) == []


_puts = st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=40)


@given(_puts, st.integers(1, 8))
def test_what_goes_in_comes_out_once_or_is_handed_back(
    puts: list[tuple[str, bool]], limit: int
) -> None:
    queue: FairQueue[str] = FairQueue(limit)
    accepted, displaced = [], []
    for number, (session, urgent) in enumerate(puts):
        item = f"{session}{number}"
        with suppress(Exhausted):
            out = queue.put(session, item, urgent=urgent)
            accepted.append(item)
            displaced += [out] if out else []
        assert len(queue) <= limit
    taken = drain(queue)
    assert sorted(taken + displaced) == sorted(accepted)
    assert len(queue) == 0


class GatedBackend:
    """Every pass waits to be let go; says what it was asked in which order."""

    name = "gated"

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.go = threading.Semaphore(0)
        self.started = threading.Semaphore(0)
        self.error: Exception | None = None

    def check_language(self, language: str) -> str:
        if language not in ("", "en"):
            raise UnknownName.among("language", language, ["en"])
        return "en"

    def transcribe(
        self, samples: Float32, language: str, *, draft: bool, abandoned: Callable[[], bool]
    ) -> Transcript:
        label = f"{samples.size}{' draft' if draft else ''}"
        self.begun.append(label)
        self.started.release()
        assert self.go.acquire(timeout=10)
        if self.error is not None:
            raise self.error
        if abandoned():
            self.begun.append(f"{label} abandoned")
            raise PassAbandoned
        return Transcript(label, 0, 0)

    async def begins(self) -> None:
        assert await asyncio.to_thread(self.started.acquire, timeout=10)


def audio(size: int) -> Float32:
    return np.zeros(size, dtype=np.float32)


class Rig:
    def __init__(self, queue_limit: int = 8) -> None:
        self.backend = GatedBackend()
        self.recognizer = FairRecognizer(self.backend, parallel=1, queue_limit=queue_limit)

    def ask(self, session: str, size: int, *, urgent: bool = True) -> asyncio.Task[Transcript]:
        return asyncio.create_task(
            self.recognizer.transcribe(audio(size), session_id=session, urgent=urgent)
        )

    async def busy(self) -> asyncio.Task[Transcript]:
        task = self.ask("busy", 1)
        await self.backend.begins()
        return task

    async def close(self) -> None:
        for _ in range(50):
            self.backend.go.release()
        async with timeout(10):
            await self.recognizer.aclose()


async def test_a_pass_runs_off_the_loop_and_answers() -> None:
    rig = Rig()
    task = await rig.busy()
    rig.backend.go.release()
    assert (await task).text == "1"
    await rig.close()


async def test_waiting_finals_overtake_waiting_partials() -> None:
    rig = Rig()
    tasks = [await rig.busy(), rig.ask("a", 2, urgent=False), rig.ask("b", 3)]
    await asyncio.sleep(0)
    for _ in tasks:
        rig.backend.go.release()
    await asyncio.gather(*tasks)
    assert rig.backend.begun == ["1", "3", "2 draft"]
    await rig.close()


async def test_a_running_partial_makes_way_for_a_final_and_is_done_after_it() -> None:
    rig = Rig()
    partial = rig.ask("a", 2, urgent=False)
    await rig.backend.begins()
    final = rig.ask("b", 3)
    await asyncio.sleep(0)
    for _ in range(3):
        rig.backend.go.release()
    assert (await final).text == "3"
    assert (await partial).text == "2 draft"
    assert rig.backend.begun == ["2 draft", "2 draft abandoned", "3", "2 draft"]
    await rig.close()


async def test_a_cancelled_waiting_pass_never_begins() -> None:
    rig = Rig()
    busy, dropped = await rig.busy(), rig.ask("a", 2)
    await asyncio.sleep(0)
    dropped.cancel()
    with pytest.raises(asyncio.CancelledError):
        await dropped
    rig.backend.go.release()
    await busy
    await rig.close()
    assert rig.backend.begun == ["1"]


async def test_a_cancelled_running_pass_is_told_so() -> None:
    rig = Rig()
    task = await rig.busy()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await rig.close()
    assert rig.backend.begun == ["1", "1 abandoned"]


async def test_a_replaced_partial_fails_and_a_refused_one_too() -> None:
    rig = Rig(queue_limit=1)
    busy = await rig.busy()
    older, newer = rig.ask("a", 2, urgent=False), rig.ask("a", 3, urgent=False)
    refused = rig.ask("b", 4, urgent=False)
    with pytest.raises(Exhausted, match="newer"):
        await older
    with pytest.raises(Exhausted, match="more waiting"):
        await refused
    rig.backend.go.release(2)
    await busy
    assert (await newer).text == "3 draft"
    await rig.close()


async def test_an_unknown_language_is_refused_before_it_waits() -> None:
    rig = Rig()
    with pytest.raises(UnknownName, match="klingon"):
        await rig.recognizer.transcribe(AUDIO, session_id="a", language="klingon")
    await rig.close()
    assert rig.backend.begun == []


async def test_a_crash_in_the_engine_fails_one_pass_not_the_recogniser() -> None:
    rig = Rig()
    rig.backend.error = ValueError("bad weights")
    task = await rig.busy()
    rig.backend.go.release()
    with pytest.raises(Internal, match="ValueError"):
        await task
    rig.backend.error = None
    rig.backend.go.release()
    assert (await rig.ask("a", 2)).text == "2"
    await rig.close()


async def test_closing_fails_what_waits_and_refuses_what_comes() -> None:
    rig = Rig()
    running, waiting = await rig.busy(), rig.ask("a", 2)
    await asyncio.sleep(0)
    await rig.close()
    assert (await running).text == "1"
    for task in (waiting, rig.ask("b", 3)):
        with pytest.raises(Unavailable):
            await task
