"""Whole conversations of the duplex session on virtual time, with a fake at every port."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from src.audio.pcm import FRAME_SAMPLES
from src.orchestrator.asr import AsrSettings
from src.orchestrator.duplex_settings import DuplexSettings
from src.orchestrator.ports import ControlAction, VoiceRequest
from src.orchestrator.session import DuplexSession
from src.rpc.errors import DuplexError, Unavailable, UnknownName
from src.rpc.ws_events import (
    BargeIn,
    Error,
    Heard,
    ModelStatus,
    ReplyText,
    ServerEvent,
    SessionEnded,
    SessionStarted,
    State,
    TranscriptEvent,
)
from tests.fakes import (
    FakeBridge,
    FakeClient,
    FakeObserver,
    FakeRecognizer,
    FakeSpeechProvider,
    User,
    WorkerScript,
    make_vad,
)
from tests.virtual_time import LoopClock, run_virtual

E = TypeVar("E", bound=ServerEvent)

ANSWER = "one two three four five six seven eight nine ten."


class Conversation:
    """A session with everything around it. `async with` runs it and closes it."""

    def __init__(
        self,
        *,
        settings: DuplexSettings | None = None,
        script: WorkerScript | None = None,
        answer: Callable[[str], str] = lambda _: ANSWER,
        acks: bool = True,
        partials: bool = True,
        partial_interval_ms: int = 400,
    ) -> None:
        self.clock = LoopClock()
        self.user = User()
        self.client = FakeClient(self.clock, acks=acks)
        self.speech = FakeSpeechProvider(script)
        self.bridge = FakeBridge(answer)
        self.recognizer = FakeRecognizer(self.user.vocabulary)
        self.observer = FakeObserver()
        self.session = DuplexSession(
            session_id="s1",
            transport=self.client,
            speech=self.speech,
            request=VoiceRequest("s1"),
            recognizer=self.recognizer,
            asr=AsrSettings(partials=partials, partial_interval_ms=partial_interval_ms),
            bridge=self.bridge,
            vad=make_vad(),
            settings=settings or DuplexSettings(),
            clock=self.clock,
            observer=self.observer,
        )
        self.client.sink = self.session
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Conversation:
        self._tasks = [
            asyncio.create_task(work, name=name)
            for work, name in (
                (self.session.run(), "run"),
                (self.user.run(self.session), "user"),
                (self.client.run(), "client"),
            )
        ]
        await asyncio.sleep(0.3)
        return self

    async def __aexit__(self, *error: object) -> None:
        self.session.close("done")
        run, *others = self._tasks
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await run

    def seen(self, kind: type[E]) -> list[E]:
        return [event for event in self.client.events if isinstance(event, kind)]

    async def until(self, reached: Callable[[], object], within_ms: int = 20_000) -> None:
        deadline = self.clock.now_ms() + within_ms
        while not reached():
            if self.clock.now_ms() > deadline:
                raise AssertionError(f"not reached; events: {self.story()}")
            await asyncio.sleep(0.005)

    async def speaking(self, played_frames: int = 1) -> None:
        before = len(self.client.played)
        await self.until(lambda: len(self.client.played) >= before + played_frames)

    async def listening(self) -> None:
        await self.until(lambda: self.states()[-1] == "listening")

    async def ask(self, text: str = "what is this") -> None:
        self.user.say(text)
        await self.user.finished()

    def states(self) -> list[str]:
        return [event.state for event in self.seen(State)]

    def finals(self) -> list[str]:
        return [event.text for event in self.seen(TranscriptEvent) if event.final]

    def verdicts(self) -> list[tuple[str, str]]:
        return [(event.verdict, event.reason) for event in self.seen(BargeIn)]

    def last_answered(self) -> str:
        """The question whose answer was heard to its end, if that was the last thing said."""
        last = self.bridge.committed[-1:]
        return last[0].user_text if last and last[0].completed else ""

    def verdict(self) -> tuple[str, str]:
        return self.verdicts()[-1] if self.verdicts() else ("", "")

    def story(self) -> list[str]:
        return [event.type + str(getattr(event, "state", "")) for event in self.client.events]


def spoken(frames: int) -> bytes:
    """What the fake worker's first frames sound like."""
    return b"".join(
        np.full(FRAME_SAMPLES, 1000 + seq, dtype="<i2").tobytes() for seq in range(frames)
    )


def play(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    run_virtual(scenario())


def test_a_turn_is_heard_answered_and_remembered() -> None:
    async def scenario() -> None:
        async with Conversation() as talk:
            await talk.ask("what is this")
            await talk.speaking()
            await talk.listening()
            assert talk.states() == ["listening", "speaking", "listening"]
            assert talk.finals() == ["what is this"]
            assert "".join(event.text for event in talk.seen(ReplyText)) == ANSWER
            assert talk.client.heard_audio("u1") == spoken(100)
            [heard] = talk.seen(Heard)
            assert (heard.heard, heard.cut, heard.completed) == (ANSWER, "", True)
            [committed] = talk.bridge.committed
            assert committed.user_text == "what is this"
            assert committed.heard_text == ANSWER
            assert committed.completed
            assert ("end", "u1", 100) in talk.client.marks
        assert isinstance(talk.client.events[0], SessionStarted)
        assert isinstance(talk.client.events[-1], SessionEnded)
        assert talk.observer.closed == ["done"]
        assert talk.speech.opened[0].closed
        assert talk.bridge.closed

    play(scenario)


def test_thirty_seconds_of_turns_in_a_row() -> None:
    async def scenario() -> None:
        async with Conversation() as talk:
            for number in range(6):
                await talk.ask(f"question {number}")
                await talk.speaking()
                await talk.listening()
            assert talk.clock.now_ms() > 15_000
            assert [one.user_text for one in talk.bridge.committed] == [
                f"question {number}" for number in range(6)
            ]
            assert all(one.completed for one in talk.bridge.committed)
            assert talk.observer.verdicts == []

    play(scenario)


def test_the_end_of_speech_hides_recognition_and_the_first_words() -> None:
    async def scenario() -> None:
        async with Conversation() as talk:
            await talk.ask()
            await talk.speaking()
            [latency] = talk.observer.turns
            assert latency.speculative
            # Silence 80, recognition 60, first token 100, first audio 50; the endpoint is at 220.
            assert latency.transcript_ms < latency.endpoint_ms == 220
            assert latency.first_audio_ms <= 320
            assert [one.speculative for one in talk.bridge.asked] == [True]

    play(scenario)


def test_a_draft_that_is_ready_in_time_is_heard_at_the_endpoint() -> None:
    async def scenario() -> None:
        async with Conversation() as talk:
            talk.bridge.first_token_ms = 10
            await talk.ask()
            await talk.speaking()
            [latency] = talk.observer.turns
            assert latency.first_audio_ms == latency.endpoint_ms
            assert talk.client.heard_audio("u1") == spoken(1)

    play(scenario)


def test_without_speculation_everything_happens_after_the_endpoint() -> None:
    async def scenario() -> None:
        async with Conversation(settings=DuplexSettings(speculative_llm=False)) as talk:
            await talk.ask()
            await talk.speaking()
            [latency] = talk.observer.turns
            assert not latency.speculative
            assert latency.first_audio_ms >= 220 + 100 + 50
            assert [one.speculative for one in talk.bridge.asked] == [False]

    play(scenario)


@pytest.mark.parametrize(
    ("said", "endpoint_ms"),
    [("what is this?", 140), ("this is where.", 220), ("this is it...", 220), ("so what?", 220)],
)
def test_a_whole_sentence_ends_a_turn_sooner(said: str, endpoint_ms: int) -> None:
    async def scenario() -> None:
        async with Conversation() as talk:
            await talk.ask(said)
            await talk.speaking()
            [latency] = talk.observer.turns
            assert latency.endpoint_ms == endpoint_ms
            assert talk.finals() == [said]

    play(scenario)


def test_a_draft_is_thrown_away_when_the_user_goes_on() -> None:
    async def scenario() -> None:
        async with Conversation() as talk:
            talk.user.say("tell me")
            talk.user.pause(170)
            talk.user.say("about cats")
            await talk.speaking()
            await talk.listening()
            assert [(one.text, one.speculative) for one in talk.bridge.asked] == [
                ("tell me", True),
                ("tell me about cats", True),
            ]
            assert [one.user_text for one in talk.bridge.committed] == ["tell me about cats"]
            assert {sent.frame.utterance_id for sent in talk.client.sent} == {"u2"}
            assert talk.finals() == ["tell me about cats"]

    play(scenario)


def test_words_after_the_endpoint_and_before_the_answer_join_the_turn() -> None:
    async def scenario() -> None:
        async with Conversation(settings=DuplexSettings(speculative_llm=False)) as talk:
            talk.bridge.first_token_ms = 600
            talk.user.say("tell me")
            talk.user.pause(400)
            talk.user.say("about cats")
            await talk.speaking()
            await talk.listening()
            assert [one.text for one in talk.bridge.asked] == ["tell me", "tell me about cats"]
            [committed] = talk.bridge.committed
            assert committed.user_text == "tell me about cats"
            assert talk.finals()[-1] == "tell me about cats"
            assert len({event.turn_id for event in talk.seen(TranscriptEvent)}) == 1
            assert talk.observer.verdicts == []

    play(scenario)


def test_words_that_begin_before_the_last_ones_are_known_join_them() -> None:
    async def scenario() -> None:
        async with Conversation(settings=DuplexSettings(speculative_llm=False)) as talk:
            talk.recognizer.compute_ms = 400
            talk.user.say("tell me")
            talk.user.pause(280)
            talk.user.say("about cats")
            await talk.speaking()
            await talk.listening()
            assert [one.user_text for one in talk.bridge.committed] == ["tell me about cats"]

    play(scenario)


def test_a_cough_before_the_answer_does_not_lose_it() -> None:
    async def scenario() -> None:
        async with Conversation(settings=DuplexSettings(speculative_llm=False)) as talk:
            talk.bridge.first_token_ms = 300
            talk.user.say("tell me")
            talk.user.pause(300)
            talk.user.cough(100)
            await talk.speaking()
            await talk.listening()
            assert [one.text for one in talk.bridge.asked] == ["tell me"]
            assert talk.client.heard_audio("u1") == spoken(100)

    play(scenario)


def test_a_noise_is_not_a_turn() -> None:
    async def scenario() -> None:
        async with Conversation() as talk:
            talk.user.cough(100)
            await asyncio.sleep(2)
            assert talk.bridge.asked == []
            assert talk.states() == ["listening"]

    play(scenario)


def test_speech_without_words_is_not_a_turn() -> None:
    async def scenario() -> None:
        async with Conversation() as talk:
            talk.user.say("mumble", word_ms=80)
            await asyncio.sleep(2)
            assert talk.recognizer.passes > 0
            assert talk.bridge.asked == []
            assert talk.finals() == []

    play(scenario)


# --- barge-in ---


def test_a_real_interruption_cuts_at_the_heard_word_and_is_answered() -> None:
    async def scenario() -> None:
        async with Conversation() as talk:
            await talk.ask()
            await talk.speaking(played_frames=35)
            talk.user.say("stop now please")
            await talk.until(lambda: talk.client.flushed_at_ms)
            before = len(talk.client.sent)
            await talk.until(lambda: talk.verdict()[0] == "real")
            assert len(talk.client.sent) == before
            await talk.until(lambda: len(talk.bridge.asked) >= 2)
            cut = talk.bridge.committed[0]
            played = sum(1 for frame in talk.client.played if frame.utterance_id == "u1")
            words = ANSWER.split()[: played // 10]
            assert cut.heard_text == " ".join(words)
            assert not cut.completed
            heard = talk.seen(Heard)[0]
            assert f"{heard.heard} {heard.cut}" == ANSWER
            assert not heard.estimated
            orders = talk.speech.utterances[0].orders
            assert orders == [ControlAction.PAUSE, ControlAction.STOP]
            await talk.listening()
            await talk.speaking()
            await talk.listening()
            assert talk.bridge.committed[1].user_text == "stop now please"
            assert talk.states()[:4] == ["listening", "speaking", "barged_in", "listening"]
            assert talk.observer.to_last_frame_ms == [0.0]
            assert talk.observer.to_worker_paused_ms == pytest.approx([3.0])

    play(scenario)


def test_the_gate_closes_in_the_callback_of_the_edge() -> None:
    async def scenario() -> None:
        async with Conversation() as talk:
            await talk.ask()
            await talk.speaking(played_frames=20)
            talk.user.say("wait")
            await talk.until(lambda: "barged_in" in talk.states())
            [flushed_ms] = talk.client.flushed_at_ms
            assert all(sent.at_ms <= flushed_ms for sent in talk.client.sent)
            kinds = [event.type for event in talk.client.events]
            assert kinds.index("barge_in") == kinds.index("state", kinds.index("latency") + 2) + 1
            assert talk.verdicts() == [("pending", "")]

    play(scenario)


def test_a_cough_loses_and_repeats_nothing() -> None:
    async def scenario() -> None:
        async with Conversation() as talk:
            await talk.ask()
            await talk.speaking(played_frames=33)
            talk.user.cough(100)
            await talk.until(lambda: ("false", "not_speech") in talk.verdicts())
            await talk.listening()
            assert talk.client.heard_audio("u1") == spoken(100)
            [resumed] = [mark for mark in talk.client.marks if mark[0] == "resumed"]
            assert resumed[1] == "u1"
            orders = talk.speech.utterances[0].orders
            assert orders == [ControlAction.PAUSE, ControlAction.RESUME]
            assert talk.bridge.held == ["hold t1", "go t1"]
            assert talk.seen(Heard)[0].completed
            assert talk.bridge.committed[0].heard_text == ANSWER
            assert talk.states() == [
                "listening", "speaking", "barged_in", "speaking", "listening",
            ]  # fmt: skip

    play(scenario)


@pytest.mark.parametrize("words", ["mm-hmm", "yeah", "okay right"])
def test_a_back_channel_is_no_turn(words: str) -> None:
    async def scenario() -> None:
        async with Conversation() as talk:
            await talk.ask()
            await talk.speaking(played_frames=33)
            talk.user.say(words)
            await talk.until(lambda: talk.verdict()[0] == "false")
            assert talk.verdict()[1] == "back_channel"
            await talk.listening()
            assert talk.client.heard_audio("u1") == spoken(100)
            assert len(talk.bridge.asked) == 1
            assert talk.finals() == ["what is this"]

    play(scenario)


def test_three_coughs_in_one_reply() -> None:
    async def scenario() -> None:
        async with Conversation(answer=lambda _: " ".join(["word"] * 30)) as talk:
            await talk.ask()
            for _ in range(3):
                await talk.speaking(played_frames=60)
                talk.user.cough(100)
                await talk.until(lambda: talk.verdict()[0] == "false")
            await talk.listening()
            assert talk.client.heard_audio("u1") == spoken(300)
            assert talk.observer.verdicts == ["false"] * 3

    play(scenario)


def test_a_short_stop_is_an_interruption_even_when_its_words_come_late() -> None:
    async def scenario() -> None:
        async with Conversation(partials=False) as talk:
            await talk.ask()
            await talk.speaking(played_frames=30)
            talk.recognizer.compute_ms = 900
            talk.user.say("stop")
            await talk.until(lambda: talk.verdict()[0] == "false")
            await talk.until(lambda: talk.verdict() == ("real", "words"))
            await talk.until(lambda: len(talk.bridge.committed) == 1)
            assert not talk.bridge.committed[0].completed
            await talk.until(lambda: talk.bridge.asked[-1].text == "stop")

    play(scenario)


def test_nothing_heard_yet_means_one_question() -> None:
    async def scenario() -> None:
        async with Conversation() as talk:
            await talk.ask("what is")
            await talk.speaking(played_frames=1)
            talk.user.say("the time in london")
            await talk.until(lambda: talk.verdict()[0] == "real")
            await talk.speaking(played_frames=20)
            await talk.listening()
            [committed] = talk.bridge.committed
            assert committed.user_text == "what is the time in london"

    play(scenario)


def test_a_client_that_acknowledges_nothing_is_kept_in_bounds() -> None:
    async def scenario() -> None:
        async with Conversation(acks=False, answer=lambda _: " ".join(["word"] * 60)) as talk:
            await talk.ask()
            await talk.speaking(played_frames=300)
            talk.user.cough(100)
            await talk.until(lambda: talk.verdict()[0] == "false")
            assert talk.observer.kept[-1] <= 1000 // 20 + 160 // 20 + 2
            await talk.listening()
            assert talk.seen(Heard)[0].completed
            assert {f.seq for f in talk.client.played} == set(range(600))

    play(scenario)


def test_the_verdict_falls_when_the_microphone_falls_silent() -> None:
    async def scenario() -> None:
        async with Conversation(acks=False) as talk:
            await talk.ask()
            await talk.speaking(played_frames=20)
            talk.user.cough(40)
            await talk.until(lambda: talk.states()[-1] == "barged_in")
            talk.user.muted = True
            await talk.listening()
            assert talk.verdicts() == [("pending", ""), ("false", "short")]
            assert talk.seen(Heard)[0].completed

    play(scenario)


def test_a_word_after_a_back_channel_is_waited_for() -> None:
    async def scenario() -> None:
        async with Conversation(partial_interval_ms=250) as talk:
            await talk.ask()
            await talk.speaking(played_frames=35)
            talk.user.say("yeah", word_ms=240)
            talk.user.say("stop", word_ms=120)
            await talk.until(lambda: talk.verdict()[0] in ("real", "false"))
            assert talk.verdict() == ("real", "stop_word")

    play(scenario)


def test_no_frame_leaves_further_ahead_than_allowed() -> None:
    async def scenario() -> None:
        async with Conversation(script=WorkerScript(lead_ms=5000)) as talk:
            await talk.ask()
            await talk.speaking()
            await talk.listening()
            first, *rest = talk.client.sent
            assert len(rest) == 99
            for sent in rest:
                due_ms = first.at_ms + 20 * sent.frame.seq
                assert due_ms - 160.001 <= sent.at_ms <= due_ms
            assert max(talk.observer.late_ms) < 1

    play(scenario)


def test_closing_does_not_wait_for_a_slow_recogniser() -> None:
    async def scenario() -> None:
        async with Conversation() as talk:
            talk.recognizer.compute_ms = 300_000
            await talk.ask()
            await asyncio.sleep(1)
        assert talk.clock.now_ms() < 5_000

    play(scenario)


def test_an_early_stop_is_no_part_of_the_question() -> None:
    async def scenario() -> None:
        async with Conversation() as talk:
            await talk.ask()
            await talk.speaking(played_frames=1)
            talk.user.say("stop")
            await talk.until(lambda: talk.verdict() == ("real", "stop_word"))
            await talk.until(lambda: talk.bridge.asked[-1].text == "stop")
            assert talk.bridge.committed[0].heard_text == ""

    play(scenario)


def test_any_chunking_of_the_microphone_is_the_same() -> None:
    async def finals(chunk: int) -> list[str]:
        async with Conversation() as talk:
            talk.user.chunk_samples = chunk
            await talk.ask("what is this")
            await talk.speaking()
            return talk.finals()

    for chunk in (320, 37, 161, 1600):
        assert run_virtual(finals(chunk)) == ["what is this"]


# --- text ---


def test_typed_text_interrupts() -> None:
    async def scenario() -> None:
        async with Conversation() as talk:
            await talk.ask()
            await talk.speaking(played_frames=35)
            talk.session.on_text("something else", speak=False)
            assert talk.client.marks[-1][0] == "flush"
            await talk.until(lambda: len(talk.bridge.asked) == 2)
            await talk.until(lambda: talk.states()[-1] == "speaking")
            await talk.listening()
            first, second = talk.bridge.committed
            assert not first.completed
            assert first.heard_text.split() == ANSWER.split()[: len(first.heard_text.split())]
            assert (second.user_text, second.completed) == ("something else", True)

    play(scenario)


def test_a_new_answer_waits_for_the_old_one_to_let_go() -> None:
    async def scenario() -> None:
        async with Conversation(script=WorkerScript(control_ms=300)) as talk:
            talk.bridge.first_token_ms = 0
            await talk.ask()
            await talk.speaking(played_frames=35)
            talk.session.on_text("something else", speak=False)
            await talk.until(lambda: talk.last_answered() == "something else")

    play(scenario)


def test_texts_to_be_spoken_wait_for_each_other_and_are_verbatim() -> None:
    async def scenario() -> None:
        async with Conversation(settings=DuplexSettings(greeting="Hello there.")) as talk:
            talk.session.on_text("First text.", speak=True)
            talk.session.on_text("Second text.", speak=True)
            await talk.until(lambda: len(talk.seen(Heard)) == 3)
            assert [event.heard for event in talk.seen(Heard)] == [
                "Hello there.", "First text.", "Second text.",
            ]  # fmt: skip
            assert talk.bridge.asked == []
            assert [one.user_text for one in talk.bridge.committed] == ["", "", ""]

    play(scenario)


def test_more_texts_than_may_wait_are_refused() -> None:
    async def scenario() -> None:
        async with Conversation() as talk:
            for _ in range(12):
                talk.session.on_text("Some text to be spoken.", speak=True)
            talk.session.on_text("   ", speak=False)
            codes = [event.code for event in talk.seen(Error)]
            assert codes == ["exhausted"] * 3 + ["invalid_argument"]

    play(scenario)


# --- voices ---


def test_the_voice_changes_at_the_next_utterance() -> None:
    async def scenario() -> None:
        async with Conversation() as talk:
            talk.speech.open_ms = 500
            await talk.ask()
            await talk.speaking(played_frames=5)
            talk.session.on_model_switch("other", "bob")
            await talk.until(lambda: talk.seen(ModelStatus)[1:])
            assert talk.states()[-1] == "speaking"
            assert not talk.speech.opened[0].closed
            await talk.listening()
            await talk.ask("and now")
            await talk.speaking()
            await talk.listening()
            old, new = talk.speech.opened
            assert old.closed
            assert [u.utterance_id for u in old.utterances] == ["u1"]
            assert [u.utterance_id for u in new.utterances] == ["u2"]
            assert (new.request.model, new.request.voice) == ("other", "bob")
            assert new.request.session_id != old.request.session_id
            assert [event.state for event in talk.seen(ModelStatus)] == ["loading", "ready"]

    play(scenario)


def test_a_voice_that_cannot_be_had_leaves_the_old_one() -> None:
    async def scenario() -> None:
        async with Conversation() as talk:
            talk.speech.failure = UnknownName("unknown model 'x'")
            talk.session.on_model_switch("x", "")
            await talk.until(lambda: talk.seen(Error))
            assert [event.state for event in talk.seen(ModelStatus)] == ["loading", "failed"]
            assert not talk.seen(Error)[0].fatal
            await talk.ask()
            await talk.speaking()

    play(scenario)


# --- failures ---


def test_a_model_that_dies_in_mid_answer_leaves_what_it_said() -> None:
    async def scenario() -> None:
        async with Conversation() as talk:
            talk.bridge.die_after_words = 3
            talk.bridge.death = Unavailable("the model is gone")
            await talk.ask()
            await talk.speaking()
            await talk.listening()
            [error] = talk.seen(Error)
            assert (error.code, error.fatal) == ("unavailable", False)
            [committed] = talk.bridge.committed
            assert (committed.heard_text, committed.completed) == ("one two three", False)
            assert talk.client.heard_audio("u1") == spoken(30)
            talk.bridge.die_after_words = None
            await talk.ask("once more")
            await talk.speaking()
            await talk.listening()
            assert talk.bridge.committed[-1].completed

    play(scenario)


@pytest.mark.parametrize("speculative", [False, True])
def test_a_model_that_is_down_gets_one_error_and_the_session_lives(speculative: bool) -> None:
    async def scenario() -> None:
        async with Conversation(settings=DuplexSettings(speculative_llm=speculative)) as talk:
            talk.bridge.die_after_words = 0
            await talk.ask()
            await talk.until(lambda: talk.seen(Error))
            await asyncio.sleep(1)
            assert len(talk.seen(Error)) == 1
            assert talk.states() == ["listening"]
            assert talk.speech.utterances == []

    play(scenario)


def test_another_worker_goes_on_with_the_first_unheard_word() -> None:
    async def scenario() -> None:
        async with Conversation(script=WorkerScript(die_after_frames=35)) as talk:
            await talk.ask()
            await talk.speaking(played_frames=10)
            talk.speech.script = WorkerScript()
            await talk.listening()
            old, new = talk.speech.opened
            assert old.closed
            assert new.utterances[0].text.split() == ANSWER.split()[3:]
            assert talk.client.heard_audio("u1") == spoken(35)
            assert talk.client.heard_audio("u1.2") == spoken(70)
            [heard] = talk.seen(Heard)
            assert (heard.heard, heard.completed) == (ANSWER, True)
            assert talk.seen(Error) == []

    play(scenario)


def test_no_other_worker_is_an_error_and_the_session_lives() -> None:
    async def scenario() -> None:
        async with Conversation(script=WorkerScript(die_after_frames=35)) as talk:
            await talk.ask()
            await talk.speaking(played_frames=10)
            talk.speech.failure = Unavailable("no worker")
            await talk.listening()
            assert [event.code for event in talk.seen(Error)] == ["unavailable"]
            [committed] = talk.bridge.committed
            assert not committed.completed

    play(scenario)


def test_a_session_that_cannot_open_says_so_and_leaves_nothing() -> None:
    async def scenario() -> None:
        talk = Conversation()
        talk.bridge.failure = Unavailable("no model")
        with pytest.raises(DuplexError, match="no model"):
            await talk.session.run()
        assert talk.speech.opened[0].closed
        assert talk.observer.opened == 0

    play(scenario)


def test_a_recogniser_that_is_full_is_an_error_and_no_turn() -> None:
    async def scenario() -> None:
        async with Conversation() as talk:
            talk.recognizer.failure = Unavailable("full")
            await talk.ask()
            await talk.until(lambda: talk.seen(Error))
            assert talk.bridge.asked == []

    play(scenario)


@pytest.mark.parametrize("moment_ms", [0, 100, 500, 900, 1000, 1080, 1130, 1300, 2000, 2040, 2200])
def test_closing_at_any_moment_leaves_nothing_behind(moment_ms: int) -> None:
    async def scenario() -> None:
        async with Conversation(settings=DuplexSettings(greeting="Hi.")) as talk:
            talk.user.say("what is this")
            talk.user.pause(700)
            talk.user.say("hold on a moment")
            talk.session.on_model_switch("other", "")
            await asyncio.sleep(moment_ms / 1000)
        assert all(speech.closed for speech in talk.speech.opened)
        assert not any(asked.open for asked in talk.bridge.asked)
        assert talk.bridge.closed

    play(scenario)


def test_closing_while_it_opens() -> None:
    async def scenario() -> None:
        talk = Conversation()
        talk.speech.open_ms = 5000
        running = asyncio.create_task(talk.session.run())
        await asyncio.sleep(1)
        talk.session.close("gone")
        await running
        assert talk.observer.opened == 0

    play(scenario)


# --- anything at any time ---

_MOVES = st.one_of(
    st.tuples(st.just("say"), st.sampled_from(["stop", "yeah", "what about it", "mm-hmm"])),
    st.tuples(st.just("cough"), st.sampled_from(["40", "100", "300"])),
    st.tuples(st.just("type"), st.just("typed words")),
    st.tuples(st.just("speak"), st.just("Words to be spoken.")),
    st.tuples(st.just("switch"), st.sampled_from(["a", "b"])),
    st.tuples(st.just("break"), st.sampled_from(["bridge", "worker", "nothing"])),
)


def move(talk: Conversation, kind: str, what: str) -> None:
    match kind:
        case "say":
            talk.user.say(what)
        case "cough":
            talk.user.cough(int(what))
        case "type":
            talk.session.on_text(what, speak=False)
        case "speak":
            talk.session.on_text(what, speak=True)
        case "switch":
            talk.session.on_model_switch(what, "")
        case _:
            talk.bridge.die_after_words = 2 if what == "bridge" else None
            talk.speech.script.die_after_frames = 25 if what == "worker" else None


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    moves=st.lists(st.tuples(_MOVES, st.integers(0, 900)), max_size=12),
    acks=st.booleans(),
    speculative=st.booleans(),
)
@example(  # a pause that is ordered while the lost worker's utterance is being closed
    moves=[
        (("say", "stop"), 194),
        (("type", "typed words"), 0),
        (("break", "worker"), 227),
        (("say", "what about it"), 540),
        (("cough", "40"), 900),
        (("speak", "Words to be spoken."), 900),
        (("say", "stop"), 0),
    ],
    acks=False,
    speculative=False,
)
def test_any_conversation_keeps_its_promises(
    moves: list[tuple[tuple[str, str], int]], acks: bool, speculative: bool
) -> None:
    """The fakes refuse two utterances or two generations at once, unannounced frames, text after
    the end, and voices used after they were given back; `run_virtual` refuses tasks left behind."""

    async def scenario() -> None:
        settings = DuplexSettings(speculative_llm=speculative)
        async with Conversation(settings=settings, acks=acks) as talk:
            talk.speech.open_ms = 30
            for (kind, what), wait_ms in moves:
                move(talk, kind, what)
                await asyncio.sleep(wait_ms / 1000)
            talk.bridge.die_after_words = talk.speech.script.die_after_frames = None
            await talk.user.finished()
            await asyncio.sleep(12)
            assert talk.states()[-1] == "listening"
            await talk.ask("still there")
            await talk.until(lambda: talk.last_answered().endswith("still there"))
        check_frames(talk, exactly_once=acks)
        check_pauses(talk)

    play(scenario)


def check_frames(talk: Conversation, *, exactly_once: bool) -> None:
    """What the ear got of an utterance is its beginning, in order, without a gap."""
    heard: dict[str, list[int]] = {}
    for frame in talk.client.played:
        heard.setdefault(frame.utterance_id, []).append(frame.seq)
    for seqs in heard.values():
        assert sorted(set(seqs)) == list(range(len(set(seqs))))
        if exactly_once:
            assert seqs == sorted(set(seqs))


def check_pauses(talk: Conversation) -> None:
    for utterance in talk.speech.utterances:
        orders = utterance.orders
        assert orders.count(ControlAction.STOP) <= 1
        assert ControlAction.STOP not in orders[:-1]


def test_audio_time_counts_from_the_first_sample_also_while_the_voice_is_being_opened() -> None:
    async def scenario() -> None:
        talk = Conversation()
        talk.session.on_mic(np.zeros(1600, dtype=np.int16))
        async with talk:
            assert talk.seen(State)[0].at_ms >= 100

    play(scenario)


def test_the_spacing_of_a_long_reply_is_reported() -> None:
    async def scenario() -> None:
        async with Conversation(
            answer=lambda _: "one two three four five six seven eight."
        ) as talk:
            await talk.ask()
            await talk.until(talk.last_answered)
            assert talk.observer.jitter_ms
            assert max(talk.observer.jitter_ms) < 20

    play(scenario)
