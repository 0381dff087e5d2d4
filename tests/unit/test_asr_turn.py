"""A turn's life: partials while it lasts, a guess at the first silence, the text at its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from src.audio.pcm import Float32, Int16
from src.common.clock import ManualClock
from src.orchestrator.asr import AsrSettings
from src.orchestrator.asr_turn import Partial, TurnRecognizer
from src.orchestrator.ports import Transcript
from src.rpc.errors import Exhausted

STEP = np.ones(160, dtype=np.int16)


class HandRecognizer:
    """Answers when told to, with the number of milliseconds it was given."""

    name = "by hand"

    def __init__(self) -> None:
        self.asked: list[tuple[int, bool]] = []
        self.dropped: list[int] = []
        self._waiting: list[tuple[int, asyncio.Future[str]]] = []
        self.words: str | None = None

    async def transcribe(
        self, samples: Float32, *, session_id: str, language: str = "", urgent: bool = True
    ) -> Transcript:
        ms = samples.size // 16
        self.asked.append((ms, urgent))
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting.append((ms, answer))
        try:
            return Transcript(await answer, ms, 0)
        except asyncio.CancelledError:
            self.dropped.append(ms)
            raise

    async def aclose(self) -> None: ...

    async def answer(self, text: str | None = None, error: Exception | None = None) -> None:
        await settle()
        ms, answer = self._waiting.pop(0)
        while answer.done():
            ms, answer = self._waiting.pop(0)
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(f"{ms} ms" if text is None else text)
        await settle()


async def settle() -> None:
    for _ in range(8):
        await asyncio.sleep(0)


class Rig:
    def __init__(self, **changes: object) -> None:
        self.recognizer = HandRecognizer()
        self.partials: list[Partial] = []
        self.clock = ManualClock()
        self.turn = TurnRecognizer(
            self.recognizer,
            session_id="s",
            language="en",
            settings=AsrSettings.model_validate(changes),
            on_partial=self.partials.append,
            clock=self.clock,
        )

    async def speak(self, ms: int) -> None:
        for _ in range(ms // 10):
            self.turn.feed(STEP)
            await asyncio.sleep(0)
        await settle()


@asynccontextmanager
async def running(**changes: object) -> AsyncIterator[Rig]:
    rig = Rig(**changes)
    task = asyncio.create_task(rig.turn.run())
    await settle()
    try:
        yield rig
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


def silence(ms: int) -> Int16:
    return np.zeros(ms * 16, dtype=np.int16)


async def finish(rig: Rig) -> Transcript:
    task = asyncio.create_task(rig.turn.finish())
    await rig.recognizer.answer()
    return await task


async def test_the_text_is_over_preroll_and_speech() -> None:
    async with running(partials=False) as rig:
        rig.turn.begin(silence(300))
        await rig.speak(500)
        assert rig.turn.audio_ms == 800
        result = await finish(rig)
        assert (result.text, result.speculative) == ("800 ms", False)


async def test_audio_outside_a_turn_is_not_kept() -> None:
    async with running() as rig:
        await rig.speak(500)
        rig.turn.begin(silence(100))
        assert rig.turn.audio_ms == 100


async def test_a_right_guess_is_the_final_text() -> None:
    async with running(partials=False) as rig:
        rig.turn.begin(silence(300))
        await rig.speak(500)
        rig.turn.speculate()
        rig.turn.speculate()
        await rig.speak(140)
        await rig.recognizer.answer()
        guess = rig.turn.speculative()
        assert guess is not None
        assert guess.result().text == "800 ms"
        result = await rig.turn.finish()
        assert (result.text, result.speculative) == ("800 ms", True)
        assert rig.recognizer.asked == [(800, True)]


async def test_finish_waits_for_a_guess_that_is_on_its_way() -> None:
    async with running(partials=False) as rig:
        rig.turn.begin(silence(300))
        rig.turn.speculate()
        assert (await finish(rig)).speculative
        assert rig.recognizer.asked == [(300, True)]


async def test_a_wrong_guess_is_thrown_away() -> None:
    async with running(partials=False) as rig:
        rig.turn.begin(silence(300))
        rig.turn.speculate()
        await settle()
        guess = rig.turn.speculative()
        rig.turn.invalidate()
        await rig.speak(200)
        assert rig.turn.speculative() is None
        assert guess is not None
        assert guess.cancelled()
        assert rig.recognizer.dropped == [300]
        assert (await finish(rig)).text == "500 ms"


async def test_after_a_wrong_guess_one_can_guess_again() -> None:
    async with running(partials=False) as rig:
        rig.turn.begin(silence(300))
        rig.turn.speculate()
        await settle()
        rig.turn.invalidate()
        await rig.speak(200)
        rig.turn.speculate()
        result = await finish(rig)
        assert (result.text, result.speculative) == ("500 ms", True)


async def test_a_guess_that_fails_is_made_good_at_the_end() -> None:
    async with running(partials=False) as rig:
        rig.turn.begin(silence(300))
        rig.turn.speculate()
        await rig.recognizer.answer(error=Exhausted("full"))
        result = await finish(rig)
        assert (result.text, result.speculative) == ("300 ms", False)


async def test_a_final_pass_that_fails_says_so() -> None:
    async with running(partials=False) as rig:
        rig.turn.begin(silence(300))
        task = asyncio.create_task(rig.turn.finish())
        await rig.recognizer.answer(error=Exhausted("full"))
        with pytest.raises(Exhausted):
            await task


async def test_a_new_turn_begins_while_the_last_one_is_still_being_read() -> None:
    async with running(partials=False) as rig:
        rig.turn.begin(silence(300))
        rig.turn.speculate()
        first = asyncio.create_task(rig.turn.finish())
        await settle()
        rig.turn.begin(silence(100))
        await rig.recognizer.answer()
        assert (await first).text == "300 ms"
        assert (await finish(rig)).text == "100 ms"


async def test_a_turn_that_was_not_over_goes_on_with_its_audio() -> None:
    async with running(partials=False) as rig:
        rig.turn.begin(silence(300))
        await rig.speak(200)
        await finish(rig)
        rig.turn.extend()
        rig.turn.begin(silence(100))
        assert (await finish(rig)).text == "600 ms"
        rig.turn.begin(silence(100))
        assert (await finish(rig)).text == "100 ms"


async def test_audio_that_the_preroll_brings_again_is_taken_once() -> None:
    voice = np.arange(1, 16 * 1000 + 1, dtype=np.int16)
    async with running(partials=False) as rig:
        rig.turn.begin(voice[: 16 * 300])
        for start in range(16 * 300, 16 * 700, 160):
            rig.turn.feed(voice[start : start + 160])
        await finish(rig)
        rig.turn.extend()
        rig.turn.begin(voice[16 * 500 : 16 * 800])
        assert (await finish(rig)).text == "800 ms"


async def test_a_false_alarm_leaves_nothing() -> None:
    async with running(partials=False) as rig:
        rig.turn.begin(silence(300))
        rig.turn.speculate()
        await settle()
        rig.turn.cancel()
        await rig.speak(100)
        assert rig.turn.audio_ms == 0
        assert rig.turn.speculative() is None
        assert rig.recognizer.dropped == [300]


async def test_of_a_very_long_turn_the_end_is_kept() -> None:
    async with running(partials=False, max_turn_s=5) as rig:
        rig.turn.begin(silence(10))
        rig.turn.feed(np.ones(6 * 16_000, dtype=np.int16))
        for _ in range(600):
            rig.turn.feed(STEP)
        assert 5000 <= rig.turn.audio_ms <= 6000 + 5000


async def test_partials_come_every_interval_of_speech() -> None:
    async with running(partial_interval_ms=400) as rig:
        rig.turn.begin(silence(100))
        await rig.speak(200)
        assert rig.recognizer.asked == []
        await rig.speak(100)
        await rig.recognizer.answer("What is")
        await rig.speak(390)
        assert rig.recognizer.asked == [(400, False)]
        await rig.speak(10)
        await rig.recognizer.answer("What is the")
        assert rig.partials == [Partial("What is", 0, 400), Partial("What is the", 7, 800)]


async def test_a_slow_recogniser_gets_pauses_as_long_as_its_work() -> None:
    async with running(partial_interval_ms=400) as rig:
        rig.turn.begin(silence(400))
        await rig.speak(10)
        rig.clock.advance(700)
        await rig.recognizer.answer("a")
        await rig.speak(1380)
        assert len(rig.recognizer.asked) == 1
        await rig.speak(20)
        assert len(rig.recognizer.asked) == 2


async def test_the_guess_stops_the_partial() -> None:
    async with running(partial_interval_ms=400) as rig:
        rig.turn.begin(silence(400))
        await rig.speak(10)
        rig.turn.speculate()
        await settle()
        assert rig.recognizer.dropped == [410]
        await rig.speak(1000)
        assert rig.recognizer.asked == [(410, False), (410, True)]
        await rig.recognizer.answer()
        assert (await rig.turn.finish()).text == "410 ms"
        assert rig.partials == []


async def test_partials_go_on_after_a_wrong_guess_and_in_the_next_turn() -> None:
    async with running(partial_interval_ms=400) as rig:
        rig.turn.begin(silence(300))
        rig.turn.speculate()
        await settle()
        rig.turn.invalidate()
        await rig.speak(100)
        await rig.recognizer.answer("one")
        rig.turn.cancel()
        rig.turn.begin(silence(400))
        await rig.recognizer.answer("two")
        assert [p.text for p in rig.partials] == ["one", "two"]


async def test_a_partial_that_is_refused_is_only_missing() -> None:
    async with running(partial_interval_ms=400) as rig:
        rig.turn.begin(silence(400))
        await rig.recognizer.answer(error=Exhausted("full"))
        await rig.speak(400)
        await rig.recognizer.answer("here")
        assert [p.text for p in rig.partials] == ["here"]


async def test_a_late_partial_of_an_earlier_turn_is_dropped() -> None:
    async with running(partial_interval_ms=400) as rig:
        rig.turn.begin(silence(400))
        await settle()
        rig.turn.begin(silence(100))
        await rig.recognizer.answer("old")
        assert rig.partials == []
        await rig.speak(300)
        await rig.recognizer.answer("new")
        assert [p.text for p in rig.partials] == ["new"]


async def test_guessing_needs_the_loop_to_run() -> None:
    rig = Rig()
    rig.turn.begin(silence(300))
    with pytest.raises(RuntimeError, match="run"):
        rig.turn.speculate()
