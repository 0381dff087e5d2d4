"""A session in a room without the room: the pacer's real, the ear behind it counts samples."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from src.audio.pcm import FRAME_MS, FRAME_SAMPLES, Int16
from src.orchestrator.asr import AsrSettings
from src.orchestrator.duplex_settings import DuplexSettings
from src.orchestrator.ports import SpeechFrame, VoiceRequest
from src.orchestrator.rooms.intake import KEEP_MS, Intake
from src.orchestrator.rooms.transport import RoomTransport
from src.orchestrator.session import DuplexSession
from src.rpc.errors import Unavailable
from src.rpc.ws_events import BargeIn, Error, Flush, Heard, ServerEvent, SessionStarted
from tests.fakes import (
    FakeBridge,
    FakeObserver,
    FakeRecognizer,
    FakeSpeechProvider,
    User,
    make_vad,
)
from tests.virtual_time import LoopClock, run_virtual

ANSWER = "one two three four five six seven eight nine ten."


class Ear:
    """`SampleSink`: plays in real (virtual) time and keeps the level of every frame it played."""

    def __init__(self) -> None:
        self.played: list[int] = []
        self._queue: list[tuple[float, int]] = []
        self._until_ms = 0.0

    def push(self, pcm: bytes) -> None:
        self._settle()
        # What is shorter than a frame is the fade of one that was cut.
        whole = len(pcm) == 2 * FRAME_SAMPLES
        level = int(np.frombuffer(pcm, dtype="<i2")[0]) if whole else 0
        begin_ms = max(self._until_ms, LoopClock().now_ms())
        self._until_ms = begin_ms + len(pcm) / 96
        self._queue.append((begin_ms, level))

    def clear(self) -> None:
        self._settle()
        self._queue.clear()
        self._until_ms = 0.0

    def _settle(self) -> None:
        now_ms = LoopClock().now_ms()
        while self._queue and self._queue[0][0] <= now_ms:
            self.played.append(self._queue.pop(0)[1])

    def seqs(self) -> list[int]:
        """The fake voice says its frame's number in its level."""
        self._settle()
        return [level - 1000 for level in self.played if level >= 1000]


@dataclass
class Told:
    """`Announcements` that are kept, and the order in which calls came."""

    events: list[ServerEvent] = field(default_factory=list)
    heard_ms: dict[str, int] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)

    def send(self, event: ServerEvent) -> None:
        self.events.append(event)

    def on_words(self, frame: SpeechFrame) -> None:
        self.words += [word.text for word in frame.words]

    def on_heard(self, utterance_id: str, heard_ms: int) -> None:
        assert heard_ms >= self.heard_ms.get(utterance_id, 0), "unheard again"
        self.heard_ms[utterance_id] = heard_ms

    def on_chat(self, text: str) -> None:
        pass


class Room:
    """A session over a `RoomTransport`."""

    def __init__(self) -> None:
        clock = LoopClock()
        self.ear, self.told, self.user = Ear(), Told(), User()
        self.transport = RoomTransport(self.ear, self.told, clock, lead_ms=20)
        self.speech = FakeSpeechProvider()
        self.session = DuplexSession(
            session_id="s1",
            transport=self.transport,
            speech=self.speech,
            request=VoiceRequest("s1"),
            recognizer=FakeRecognizer(self.user.vocabulary),
            asr=AsrSettings(),
            bridge=FakeBridge(lambda _: ANSWER),
            vad=make_vad(),
            settings=DuplexSettings(),
            clock=clock,
            observer=FakeObserver(),
        )
        self.transport.attach(self.session)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Room:
        work = (self.session.run(), self.transport.speaker.run(), self.user.run(self.session))
        self._tasks = [asyncio.create_task(part) for part in work]
        await self.transport.opened.wait()
        return self

    async def __aexit__(self, *error: object) -> None:
        self.session.close("done")
        run, *others = self._tasks
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await run

    async def until(self, reached: Callable[[], object]) -> None:
        for _ in range(4000):
            if reached():
                return
            await asyncio.sleep(0.005)
        raise AssertionError(f"not reached; told: {[event.type for event in self.told.events]}")

    async def hears(self, frames: int) -> None:
        await self.until(lambda: len(self.ear.seqs()) >= frames)

    def last(self, kind: type[ServerEvent]) -> ServerEvent | None:
        return next((e for e in reversed(self.told.events) if isinstance(e, kind)), None)

    async def whole_answer(self) -> Heard:
        await self.until(lambda: self.last(Heard))
        heard = self.last(Heard)
        assert isinstance(heard, Heard)
        return heard


def test_a_reply_is_heard_once_and_to_its_end() -> None:
    async def scenario() -> None:
        async with Room() as room:
            room.session.on_text("hi", speak=False)
            heard = await room.whole_answer()
            assert (heard.heard, heard.completed) == (ANSWER, True)
            assert room.ear.seqs() == list(range(100))
            assert room.told.words == ANSWER.split()
            assert room.told.heard_ms == {"u1": 2_000}

    run_virtual(scenario())


def test_a_false_alarm_repeats_nothing_and_loses_nothing() -> None:
    async def scenario() -> None:
        async with Room() as room:
            room.session.on_text("hi", speak=False)
            await room.hears(30)
            room.user.cough()
            await room.until(lambda: room.last(Flush))
            stopped = len(room.ear.seqs())
            await room.until(lambda: getattr(room.last(BargeIn), "verdict", "") == "false")
            assert len(room.ear.seqs()) <= stopped + 1
            assert (await room.whole_answer()).completed
            # A frame cut in its middle is spoken again from its beginning.
            seqs = room.ear.seqs()
            assert sorted(set(seqs)) == list(range(100))
            assert len(seqs) <= 101

    run_virtual(scenario())


def test_the_answer_to_a_flush_comes_after_the_step_that_asked_for_it() -> None:
    async def scenario() -> None:
        order: list[str] = []

        class Session:
            def on_playback(self, utterance_id: str, seq: int, *, flushed: bool) -> None:
                order.append(f"playback {utterance_id} {seq} {flushed}")

        transport = RoomTransport(Ear(), Told(), LoopClock(), lead_ms=20)
        transport.attach(Session())  # type: ignore[arg-type]
        transport.begin_audio("u1", 0, resumed=False)
        transport.send_frame(SpeechFrame("u1", 0, 0, bytes(FRAME_SAMPLES * 2)))
        await asyncio.sleep(FRAME_MS / 1000)
        transport.flush("u1", 0)
        order.append("flushed")
        await asyncio.sleep(0)
        assert order == ["flushed", "playback u1 0 True"]

    run_virtual(scenario())


def test_to_somebody_who_is_away_nothing_is_said_and_nothing_lost() -> None:
    async def scenario() -> None:
        async with Room() as room:
            room.session.on_text("hi", speak=False)
            await room.hears(30)
            room.session.on_presence(here=False)
            before = room.ear.seqs()
            await asyncio.sleep(10)
            assert len(room.ear.seqs()) <= len(before) + 1
            room.session.on_presence(here=True)
            assert (await room.whole_answer()).completed
            seqs = room.ear.seqs()
            assert sorted(set(seqs)) == list(range(100))
            assert len(seqs) <= 101

    run_virtual(scenario())


def test_one_who_goes_before_the_first_word_hears_it_when_they_are_back() -> None:
    async def scenario() -> None:
        async with Room() as room:
            room.session.on_presence(here=False)
            room.session.on_text("hi", speak=False)
            await asyncio.sleep(20)
            assert room.ear.seqs() == []
            room.session.on_presence(here=True)
            assert (await room.whole_answer()).completed
            assert room.ear.seqs() == list(range(100))

    run_virtual(scenario())


def test_started_and_errors() -> None:
    async def scenario() -> None:
        told = Told()
        transport = RoomTransport(Ear(), told, LoopClock(), lead_ms=20)
        assert not transport.started
        transport.send_event(SessionStarted(session_id="s", model="m", voice="v"))
        transport.send_error(Unavailable("soon", retry_after_ms=5), fatal=True)
        assert transport.started
        error = told.events[-1]
        assert isinstance(error, Error)
        assert (error.code, error.fatal, error.retry_after_ms) == ("unavailable", True, 5)

    run_virtual(scenario())


# --- what comes in ---


class Listener:
    def __init__(self) -> None:
        self.heard: list[int] = []

    def on_mic(self, samples: Int16) -> None:
        self.heard += samples[::160].tolist()


def steps(*numbers: int) -> list[Int16]:
    return [np.full(160, number, dtype=np.int16) for number in numbers]


def test_audio_waits_for_the_session_and_stays_in_order() -> None:
    async def scenario() -> None:
        intake, listener = Intake(lambda _: None), Listener()
        for step in steps(1, 2, 3):
            intake.on_mic(step)
        opening = asyncio.create_task(intake.open(listener))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        for step in steps(4, 5):
            intake.on_mic(step)
        await opening
        intake.on_mic(steps(6)[0])
        assert listener.heard == [1, 2, 3, 4, 5, 6]

    run_virtual(scenario())


def test_of_too_much_that_waits_the_oldest_is_dropped() -> None:
    async def scenario() -> None:
        intake, listener = Intake(lambda _: None), Listener()
        for step in steps(*range(KEEP_MS // 10 + 7)):
            intake.on_mic(step)
        await intake.open(listener)  # type: ignore[arg-type]
        assert (listener.heard[0], len(listener.heard)) == (7, KEEP_MS // 10)

    run_virtual(scenario())


def test_what_was_recorded_before_we_came_goes_first_and_is_waited_for() -> None:
    async def scenario() -> None:
        intake, listener = Intake(lambda _: None), Listener()
        intake.expect_recording()
        intake.on_mic(steps(3)[0])
        opening = asyncio.create_task(intake.open(listener))  # type: ignore[arg-type]
        await asyncio.sleep(1)
        assert listener.heard == []
        intake.on_preconnect(np.concatenate(steps(1, 2)))
        await opening
        intake.on_preconnect(np.concatenate(steps(8, 9)))
        assert listener.heard == [1, 2, 3]

    run_virtual(scenario())


def test_a_recording_that_does_not_come_is_not_waited_for_long() -> None:
    async def scenario() -> None:
        intake, listener = Intake(lambda _: None), Listener()
        intake.expect_recording()
        intake.on_mic(steps(1)[0])
        await asyncio.wait_for(intake.open(listener), 4)  # type: ignore[arg-type]
        assert listener.heard == [1]

    run_virtual(scenario())
