"""Captions, states, events, chat and control between our end of a room and a stock client's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
from livekit import api, rtc

from src.audio.pcm import Int16
from src.common.livekit_server import LiveKitServer
from src.common.tasks import TaskGroup, timeout
from src.demo.room_user import RoomUser, room_user
from src.orchestrator.ports import SpeechFrame, Word
from src.orchestrator.rooms.room_events import RoomEvents
from src.orchestrator.rooms.room_input import CHAT_TOPIC, RECORDING_TOPIC, RoomInput
from src.orchestrator.rooms.room_writer import EVENTS_TOPIC, MAX_PACKET_BYTES
from src.rpc.errors import DuplexError
from src.rpc.ws_events import (
    Heard,
    ReplyText,
    ServerEvent,
    SessionEnded,
    SessionStarted,
    Speech,
    State,
    StateName,
    TranscriptEvent,
    parse_server,
)

PATIENCE_S = 30.0
MIC, VOICE = "TR_microphone", "TR_voice"
TEXT = "Well, hello there! Fine, you?"
WORD_MS = 300


def token_for(server: LiveKitServer, identity: str, *, agent: bool = False) -> str:
    grants = api.VideoGrants(room_join=True, room="talk", agent=agent, can_update_own_metadata=True)
    token = api.AccessToken(server.api_key, server.api_secret).with_identity(identity)
    token = token.with_grants(grants)
    return (token.with_kind("agent") if agent else token).to_jwt()


@dataclass
class Agent:
    """Our end: what a visit does around its session, without audio."""

    server: LiveKitServer
    room: rtc.Room
    calls: list[tuple[str, object]] = field(default_factory=list)
    errors: list[DuplexError] = field(default_factory=list)
    recorded: list[Int16] = field(default_factory=list)
    events: RoomEvents = field(init=False)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def on_text(self, text: str, *, speak: bool) -> None:
        self.calls.append(("say" if speak else "text", text))
        self.news.set()

    def on_model_switch(self, model: str, voice: str) -> None:
        self.calls.append(("switch", model))
        self.news.set()

    def on_preconnect(self, samples: Int16) -> None:
        self.recorded.append(samples)
        self.news.set()

    def on_end(self, reason: str) -> None:
        self.calls.append(("end", reason))
        self.news.set()

    def report(self, error: DuplexError) -> None:
        self.errors.append(error)
        self.news.set()

    async def until(self, true: Callable[[], object]) -> None:
        async with timeout(PATIENCE_S):
            while not true():
                self.news.clear()
                await self.news.wait()

    @asynccontextmanager
    async def user(self, identity: str = "user") -> AsyncIterator[RoomUser]:
        """Seen by us: packets of somebody the SDK does not know yet come without a sender."""
        token = token_for(self.server, identity)
        async with room_user(self.server.url, token, microphone=None) as user:
            await self.until(lambda: identity in self.room.remote_participants)
            yield user

    def start_events(self, *, events: bool = True, max_waiting: int = 500) -> None:
        self.events = RoomEvents(
            self.room,
            "user",
            events=events,
            mic_track_sid=lambda: MIC,
            agent_track_sid=lambda: VOICE,
            max_waiting=max_waiting,
        )

    def send(self, *events: ServerEvent) -> None:
        for event in events:
            self.events.send(event)

    def speak(self, utterance_id: str = "u1", text: str = TEXT) -> None:
        """Its words go to the speaker, one every 300 ms."""
        place = 0
        for index, token in enumerate(text.split()):
            start = text.index(token, place)
            place = start + len(token)
            begin = index * WORD_MS
            word = Word(token, begin, begin + WORD_MS, start, place, False)
            self.events.on_words(SpeechFrame(utterance_id, begin // 20, begin, b"", (word,)))


@asynccontextmanager
async def agent_in(server: LiveKitServer) -> AsyncIterator[Agent]:
    """In the room, reading what `user` sends; telling begins with `talking`."""
    room = rtc.Room()
    agent = Agent(server, room)
    room_input = RoomInput(room, lambda: "user", agent, agent.report)
    await room.connect(server.url, token_for(server, "agent", agent=True))
    room.on("participant_connected", lambda _: agent.news.set())
    try:
        async with TaskGroup() as tasks:
            reading = tasks.create_task(room_input.run())
            yield agent
            room_input.close()
            await reading
    finally:
        room_input.close()
        await room.disconnect()


@asynccontextmanager
async def talking(
    server: LiveKitServer, *, events: bool = True
) -> AsyncIterator[tuple[Agent, RoomUser]]:
    async with AsyncExitStack() as stack:
        agent = await stack.enter_async_context(agent_in(server))
        user = await stack.enter_async_context(agent.user())
        agent.start_events(events=events)
        async with TaskGroup() as tasks:
            writing = tasks.create_task(agent.events.run())
            yield agent, user
            agent.events.finish()
            await asyncio.wait_for(writing, PATIENCE_S)


def state(name: StateName) -> State:
    return State(state=name, turn_id="t1", at_ms=0)


def said(text: str, *, final: bool) -> TranscriptEvent:
    return TranscriptEvent(turn_id="t1", text=text, final=final, stable_chars=0, at_ms=0)


def reply(text: str, utterance_id: str = "u1") -> ReplyText:
    return ReplyText(turn_id="t1", utterance_id=utterance_id, text=text, final=True)


def heard(text: str, cut: str = "") -> Heard:
    return Heard(turn_id="t1", utterance_id="u1", heard=text, cut=cut, completed=not cut)


# --- out ---


async def test_a_front_end_sees_states_and_whose_words_are_whose(livekit: LiveKitServer) -> None:
    async with talking(livekit, events=False) as (agent, user):
        await user.until(lambda: user.agent_state == "initializing", "the first state")
        agent.send(state("listening"), said("turn the", final=False))
        await user.until(lambda: user.captions_of("user"), "a partial")
        agent.send(said("Turn the light on.", final=True))
        await user.until(lambda: user.agent_state == "thinking", "thinking")
        agent.send(reply(TEXT), state("speaking"))
        agent.speak()
        agent.events.on_heard("u1", 920)
        await user.until(lambda: user.captions_of("agent"), "the agent's words")
        (words,) = user.captions_of("agent")
        await user.until(lambda: words.text == "Well, hello there!", "three words")
        assert not words.closed
        agent.send(heard("Well, hello there! Fine,", "you?"), state("listening"))
        await user.until(lambda: words.closed and user.agent_state == "listening", "the cut")
        assert (words.text, words.final) == ("Well, hello there! Fine,", True)
        assert len({chunk.stream_id for chunk in words.chunks}) == 1, "it is told as it is heard"
        (question,) = user.captions_of("user")
        await user.until(lambda: question.final, "the final")
        assert question.text == "Turn the light on."
        assert (question.track_sid, words.track_sid) == (MIC, VOICE)
        assert question.segment_id != words.segment_id
        assert not user.events, "it did not ask for them"


async def test_events_come_in_order_and_to_the_linked_user_only(livekit: LiveKitServer) -> None:
    stranger, strange = rtc.Room(), list[rtc.DataPacket]()
    stranger.on("data_received", strange.append)
    async with talking(livekit) as (agent, user):
        await stranger.connect(livekit.url, token_for(livekit, "stranger"))
        sent: list[ServerEvent] = [Speech(phase="edge", at_ms=number) for number in range(200)]
        agent.send(SessionStarted(session_id="s-1", model="m", voice="v"), *sent)
        await user.until(lambda: len(user.events) == 201, "every event")
        assert [timed.event for timed in user.events[1:]] == sent
        assert agent.events.dropped == 0
        await stranger.disconnect()
    assert not strange


async def test_an_event_too_long_for_a_packet_comes_as_a_stream(livekit: LiveKitServer) -> None:
    async with AsyncExitStack() as stack:
        agent = await stack.enter_async_context(agent_in(livekit))
        page, got = rtc.Room(), asyncio.Queue[str]()
        stack.push_async_callback(page.disconnect)

        async def read(reader: rtc.TextStreamReader) -> None:
            got.put_nowait(await reader.read_all())

        tasks = await stack.enter_async_context(TaskGroup())
        page.register_text_stream_handler(
            EVENTS_TOPIC, lambda reader, _: tasks.create_task(read(reader))
        )
        await page.connect(livekit.url, token_for(livekit, "user"))
        await agent.until(lambda: "user" in agent.room.remote_participants)
        agent.start_events()
        writing = tasks.create_task(agent.events.run())
        long = heard("schön und gut " * 3000)
        agent.send(long)
        payload = await asyncio.wait_for(got.get(), PATIENCE_S)
        assert len(payload.encode()) > MAX_PACKET_BYTES
        assert parse_server(payload) == long
        agent.events.finish()
        await asyncio.wait_for(writing, PATIENCE_S)


async def test_what_waits_is_still_told_at_the_end(livekit: LiveKitServer) -> None:
    async with talking(livekit) as (agent, user):
        agent.send(reply(TEXT), state("speaking"))
        agent.speak()
        agent.events.on_heard("u1", 320)
        agent.send(SessionEnded(reason="client_ended"))
        agent.events.finish()
        await user.until_event(SessionEnded)
        (words,) = user.captions_of("agent")
        await user.until(lambda: words.closed, "the end of the caption")
        assert (words.text, words.final) == ("Well,", True)


async def test_a_user_who_does_not_take_what_they_are_sent_ends_the_visit(
    livekit: LiveKitServer,
) -> None:
    async with agent_in(livekit) as agent, agent.user():
        agent.start_events(max_waiting=5)
        for number in range(10):
            agent.send(Speech(phase="edge", at_ms=number))
        assert agent.events.failed.result() == "client_stalled"


async def test_two_rooms_in_one_process_do_not_mix(livekit: LiveKitServer) -> None:
    other = await LiveKitServer.start(livekit.log.with_name("other.log"))
    try:
        async with talking(livekit) as (one, user), talking(other) as (two, second):
            one.send(said("one", final=True))
            two.send(said("two", final=True))
            await user.chat("for one")
            await second.chat("for two")
            await one.until(lambda: one.calls)
            await two.until(lambda: two.calls)
            await user.until(lambda: user.captions and user.events)
            await second.until(lambda: second.captions and second.events)
            assert (one.calls, two.calls) == ([("text", "for one")], [("text", "for two")])
            assert [caption.text for caption in user.captions] == ["one"]
            assert [caption.text for caption in second.captions] == ["two"]
    finally:
        await other.close()


async def test_a_restart_of_the_server_costs_neither_words_nor_events(
    livekit: LiveKitServer,
) -> None:
    async with talking(livekit) as (agent, user):
        agent.send(state("listening"), reply(TEXT), state("speaking"))
        agent.speak()
        agent.events.on_heard("u1", 320)
        await user.until(lambda: [c.text for c in user.captions_of("agent")] == ["Well,"])
        lost = asyncio.Event()
        agent.room.on("reconnecting", lost.set)
        await livekit.kill()
        await asyncio.wait_for(lost.wait(), PATIENCE_S)
        agent.events.on_heard("u1", 620)
        agent.send(state("barged_in"))
        agent.send(*(Speech(phase="edge", at_ms=number) for number in range(30)))
        await livekit.restart()
        await user.until(lambda: len(user.got(Speech)) >= 30, "the events of meanwhile")
        assert [event.at_ms for event in user.got(Speech)] == list(range(30))
        await user.until(lambda: user.agent_state == "listening", "the state of meanwhile")
        agent.send(heard("Well, hello there!", "Fine, you?"))
        (words,) = user.captions_of("agent")
        await user.until(lambda: words.final, "the rest of the caption")
        assert words.text == "Well, hello there!"


# --- in ---


async def test_chat_of_any_sensible_length_is_a_turn(livekit: LiveKitServer) -> None:
    async with agent_in(livekit) as agent, agent.user() as user:
        await user.chat("Hello there. ")
        await user.chat("word " * 1000)
        await agent.until(lambda: len(agent.calls) == 2)
        assert agent.calls == [("text", "Hello there."), ("text", ("word " * 1000).strip())]
        assert not agent.errors


@pytest.mark.parametrize("text", ["", "  \n", "x" * 20_001, "x" * 200_000])
async def test_chat_without_words_or_with_too_many_is_an_error(
    livekit: LiveKitServer, text: str
) -> None:
    async with agent_in(livekit) as agent, agent.user() as user:
        await user.chat(text)
        await agent.until(lambda: agent.errors)
        assert [error.code for error in agent.errors] == ["invalid_argument"]
        await user.chat("better")
        await agent.until(lambda: agent.calls)
        assert agent.calls == [("text", "better")]


async def test_nobody_else_is_listened_to(livekit: LiveKitServer) -> None:
    async with agent_in(livekit) as agent, agent.user() as user, agent.user("other") as other:
        await other.chat("Do as I say!")
        await other.send_control('{"type": "session.end"}')
        await other.send_control("nonsense")
        await _send_recording(other, bytes(320), sampleRate="16000", channels="1")
        await user.chat("What time is it?")
        await agent.until(lambda: agent.calls)
        assert agent.calls == [("text", "What time is it?")]
        assert not agent.errors
        assert not agent.recorded


async def test_control_events_are_obeyed_and_nonsense_is_an_error_event(
    livekit: LiveKitServer,
) -> None:
    async with agent_in(livekit) as agent, agent.user() as user:
        await user.send_control('{"type": "text", "text": "hi", "speak": true}')
        await user.send_control("{malformed")
        await user.send_control('{"type": "model.switch", "model": "piper-en"}')
        await user.send_control('{"type": "session.end"}')
        await agent.until(lambda: len(agent.calls) == 3)
        assert agent.calls == [("say", "hi"), ("switch", "piper-en"), ("end", "client_ended")]
        assert [error.code for error in agent.errors] == ["invalid_argument"]


async def test_a_message_that_breaks_off_disturbs_nobody(livekit: LiveKitServer) -> None:
    async with agent_in(livekit) as agent:
        async with agent.user() as user:
            stream = await user.room.local_participant.stream_text(topic=CHAT_TOPIC)
            await stream.write("I was about to ")
        async with agent.user() as user:
            await user.chat("Here I am again.")
            await agent.until(lambda: agent.calls)
        assert agent.calls == [("text", "Here I am again.")]
        assert not agent.errors


async def test_what_was_recorded_before_the_agent_came_reaches_it(livekit: LiveKitServer) -> None:
    time = np.arange(48_000) / 48_000
    tone = (9_000 * np.sin(2 * np.pi * 440 * time)).astype("<i2")
    async with agent_in(livekit) as agent, agent.user() as user:
        await _send_recording(
            user, np.repeat(tone, 2).tobytes(), trackId="TR_1", sampleRate="48000", channels="2"
        )
        await agent.until(lambda: agent.recorded)
        (samples,) = agent.recorded
        assert abs(samples.size - 16_000) <= 1
        spectrum = np.abs(np.fft.rfft(samples.astype(np.float32)))
        assert abs(int(np.argmax(spectrum)) - 440) <= 1


async def test_a_recording_that_cannot_be_read_is_not_waited_for(livekit: LiveKitServer) -> None:
    async with agent_in(livekit) as agent, agent.user() as user:
        await _send_recording(user, bytes(100), trackId="TR_1")
        await agent.until(lambda: agent.recorded)
        assert [samples.size for samples in agent.recorded] == [0]
        assert not agent.errors


async def _send_recording(user: RoomUser, data: bytes, **attributes: str) -> None:
    stream = await user.room.local_participant.stream_bytes(
        "preconnect", topic=RECORDING_TOPIC, attributes=attributes
    )
    await stream.write(data)
    await stream.aclose()
