"""Conversations in real rooms: a real LiveKit server, real WebRTC, a real speech detector."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from livekit import api, rtc

from src.audio.pcm import Float32, to_int16
from src.common.livekit_server import LiveKitServer
from src.demo.room_user import RoomUser, fetch_token, room_user
from src.rpc.errors import UnknownName
from src.rpc.ws_events import (
    BargeIn,
    Error,
    Heard,
    SessionEnded,
    SessionStarted,
    TextInput,
    TranscriptEvent,
)
from tests.audio_fixtures import RATE, cough, espeak_speech, gain
from tests.integration.live import Installation, installation
from tests.integration.rooms import ANSWER, Host, host

ROOM = "a-room"
CAMERA = rtc.TrackSource.SOURCE_CAMERA
FILM = rtc.TrackSource.SOURCE_SCREENSHARE_AUDIO


@pytest.fixture
def orchestrator(livekit: LiveKitServer) -> Host:
    return host(livekit, user_gone_ms=1_000, reconnect_grace_ms=5_000)


def question() -> Float32:
    return espeak_speech("what is this")


async def answering(user: RoomUser) -> float:
    """Asks, and returns when the answer is first heard."""
    spoken = await user.said(question())
    return await user.first_sound_ms(spoken.end_ms)


async def test_a_spoken_question_is_answered_heard_and_captioned(orchestrator: Host) -> None:
    orchestrator.answer = "one two three four."
    async with orchestrator.talking(ROOM) as (user, _):
        await answering(user)
        heard = await user.until_event(Heard, completed=True)
        assert heard.heard == "one two three four."
        await user.until(lambda: len([c for c in user.captions if c.final]) == 2, "both captions")
        assert {c.text for c in user.captions} == {"what is this", "one two three four."}
        await user.until(lambda: user.agent_state == "listening", "the floor")
        states = [noted.what for noted in user.states]
    assert states[0] == "initializing"
    assert "speaking" in states
    assert [speech.closed for speech in orchestrator.speech.opened] == [True]
    assert orchestrator.observer.opened == len(orchestrator.observer.closed) == 1


async def test_an_interruption_silences_the_agent_and_cuts_what_was_not_heard(
    orchestrator: Host,
) -> None:
    async with orchestrator.talking(ROOM) as (user, _):
        await answering(user)
        orchestrator.recognizer.words = "stop please"
        onset = user.talk(espeak_speech("stop please, stop"))
        barge_in = await user.until_event(BargeIn, verdict="real")
        assert await user.silence_ms(onset.onset_ms) is not None
        heard = await user.until_event(Heard, utterance_id=barge_in.utterance_id)
    assert not heard.completed
    assert heard.heard
    assert ANSWER.startswith(f"{heard.heard} {heard.cut}".strip())
    assert orchestrator.bridge.committed[0].heard_text == heard.heard


async def test_after_a_false_alarm_nothing_is_lost_and_nothing_said_twice(
    orchestrator: Host,
) -> None:
    orchestrator.answer = " ".join(f"word{n}" for n in range(15))
    async with orchestrator.talking(ROOM) as (user, _):
        await answering(user)
        orchestrator.recognizer.words = ""
        user.talk(gain(cough(np.random.default_rng(3)), 6))
        await user.until_event(BargeIn, verdict="false")
        heard = await user.until_event(Heard, completed=True)
        await user.until(lambda: user.ear.quiet_ms() > 300, "its end")
        caption = user.captions_of(user.agents[0].identity)[0]
    assert heard.heard == orchestrator.answer == caption.text


@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (44_100, 1), (48_000, 2)])
async def test_any_microphone_will_do(orchestrator: Host, rate: int, channels: int) -> None:
    async with orchestrator.talking(ROOM, microphone=rate, channels=channels) as (user, _):
        await answering(user)
    given = max(orchestrator.recognizer.given, key=len)
    assert 0.8 * question().size < given.size < 3 * question().size + RATE
    assert float(np.abs(given).max()) > 0.01


async def test_what_is_said_while_the_session_opens_is_understood(orchestrator: Host) -> None:
    orchestrator.speech.open_ms = 2_000
    token = orchestrator.token(ROOM)
    async with (
        orchestrator.hosted(ROOM),
        room_user(orchestrator.server.url, token) as user,
    ):
        await user.until(lambda: user.agent_track, "the agent")
        await user.said(question())
        assert not user.got(SessionStarted)
        await user.until_event(TranscriptEvent, final=True)
    assert max(given.size for given in orchestrator.recognizer.given) > 0.8 * question().size


async def test_a_second_user_is_not_heard_and_not_waited_for(orchestrator: Host) -> None:
    async with orchestrator.talking(ROOM) as (user, visit):
        other_token = orchestrator.token(ROOM, "other")
        async with room_user(orchestrator.server.url, other_token) as other:
            await other.until(lambda: other.agent_track, "the agent")
            await other.said(question())
            await other.chat("hello?")
            await asyncio.sleep(1)
            assert not user.got(TranscriptEvent)
            await answering(user)
        assert not visit.done()
    assert {asked.turn_id for asked in orchestrator.bridge.asked} == {"t1"}


async def test_the_one_who_is_named_is_the_one_who_is_heard(orchestrator: Host) -> None:
    url = orchestrator.server.url
    async with (
        orchestrator.hosted(ROOM, "bob"),
        room_user(url, orchestrator.token(ROOM, "alice")) as alice,
        room_user(url, orchestrator.token(ROOM, "bob")) as bob,
    ):
        await bob.until_event(SessionStarted)
        assert not alice.events
        await answering(bob)


async def test_one_who_only_reads_and_writes_has_a_session_too(orchestrator: Host) -> None:
    orchestrator.answer = "one two three."
    silent = rtc.RoomOptions(auto_subscribe=False)
    token = orchestrator.token(ROOM)
    async with (
        orchestrator.hosted(ROOM),
        room_user(orchestrator.server.url, token, microphone=None, options=silent) as user,
    ):
        await user.until_event(SessionStarted)
        await user.chat("what is this")
        assert (await user.until_event(Heard, completed=True)).heard == "one two three."
        assert user.agent_track is None


async def test_a_muted_microphone_is_not_an_absence(orchestrator: Host) -> None:
    orchestrator.answer = " ".join(f"word{n}" for n in range(25))
    async with orchestrator.talking(ROOM) as (user, _):
        await answering(user)
        user.mute()
        heard = await user.until_event(Heard, completed=True)
        assert heard.heard == orchestrator.answer
        user.unmute()
        await asyncio.sleep(2)
        await answering(user)


async def test_only_the_microphone_is_listened_to(orchestrator: Host) -> None:
    server = orchestrator.server
    # A token of somebody else's making: ours allow no other source.
    grants = api.VideoGrants(room_join=True, room=ROOM)
    token = api.AccessToken(server.api_key, server.api_secret).with_identity("user")
    async with (
        orchestrator.hosted(ROOM),
        room_user(server.url, token.with_grants(grants).to_jwt(), microphone=None) as user,
    ):
        camera = rtc.VideoSource(320, 240)
        await publish(user, rtc.LocalVideoTrack.create_video_track("camera", camera), CAMERA)
        camera.capture_frame(rtc.VideoFrame(320, 240, rtc.VideoBufferType.RGBA, bytes(307_200)))
        music = rtc.AudioSource(16_000, 1)
        await publish(user, rtc.LocalAudioTrack.create_audio_track("film", music), FILM)
        for step in np.split(to_int16(question()[: question().size // 160 * 160]), 10):
            await music.capture_frame(rtc.AudioFrame(step.tobytes(), 16_000, 1, step.size))
        await asyncio.sleep(1)
        await user.open_microphone(48_000, 1)
        await answering(user)
    assert {asked.turn_id for asked in orchestrator.bridge.asked} == {"t1"}


async def publish(user: RoomUser, track: rtc.LocalTrack, source: rtc.TrackSource.ValueType) -> None:
    options = rtc.TrackPublishOptions(source=source)
    await user.room.local_participant.publish_track(track, options)


async def test_attributes_choose_the_voice(orchestrator: Host) -> None:
    chosen = {"mode": "low_latency", "model": "m1", "voice": "v1", "language": "de"}
    async with orchestrator.talking(ROOM, chosen) as (user, _):
        assert (await user.until_event(SessionStarted)).model == "m1"
    start = orchestrator.requests[0]
    assert (start.mode, start.model, start.voice, start.language) == tuple(chosen.values())


async def test_a_model_nobody_knows_is_said_and_the_room_left(orchestrator: Host) -> None:
    orchestrator.speech.failure = UnknownName.among("model", "pipper", ["piper-en-joe"])
    token = orchestrator.token(ROOM, model="pipper")
    async with (
        orchestrator.hosted(ROOM) as visit,
        room_user(orchestrator.server.url, token) as user,
    ):
        error = await user.until_event(Error)
        assert (error.code, error.fatal) == ("unknown_name", True)
        assert "pipper" in error.message
        assert await visit == "unknown_name"
        await user.until(lambda: not user.agents, "the agent to leave")


# --- ends ---


async def test_who_hangs_up_in_mid_word_is_let_go_of_at_once(orchestrator: Host) -> None:
    async with orchestrator.talking(ROOM) as (user, visit):
        await answering(user)
        await user.room.disconnect()
        assert await asyncio.wait_for(visit, 3) == "user_left"
    assert orchestrator.speech.utterances[-1].closed
    assert orchestrator.bridge.closed
    assert orchestrator.observer.closed == ["user_left"]


async def test_a_deleted_room_ends_the_visit(orchestrator: Host) -> None:
    server = orchestrator.server
    async with orchestrator.talking(ROOM) as (_, visit):
        http = server.url.replace("ws", "http", 1)
        async with api.LiveKitAPI(http, server.api_key, server.api_secret) as admin:
            await admin.room.delete_room(api.DeleteRoomRequest(room=ROOM))
        assert await asyncio.wait_for(visit, 5) == "room_deleted"


async def test_a_client_may_end_its_session(orchestrator: Host) -> None:
    async with orchestrator.talking(ROOM) as (user, visit):
        await user.send_control('{"type": "session.end"}')
        assert (await user.until_event(SessionEnded)).reason == "client_ended"
        assert await visit == "client_ended"


async def test_nobody_came(livekit: LiveKitServer) -> None:
    orchestrator = host(livekit, join_timeout_ms=1_000)
    assert await orchestrator.visit(ROOM).run() == "nobody_came"


async def test_of_two_agents_in_one_room_the_later_one_leaves(orchestrator: Host) -> None:
    async with orchestrator.talking(ROOM) as (user, first):
        assert await asyncio.wait_for(orchestrator.visit(ROOM).run(), 5) == "another_agent"
        await answering(user)
        assert not first.done()
    assert len(orchestrator.sessions) == 1


# --- the whole installation ---


async def test_a_token_of_ours_leads_to_an_agent_that_speaks_and_is_interrupted(
    livekit: LiveKitServer, tmp_path: Path
) -> None:
    async with installation(tmp_path, livekit=livekit) as running:
        granted = await fetch_token(running.url, room=ROOM, events="1")
        async with room_user(granted["server_url"], granted["participant_token"]) as user:
            started = await user.until_event(SessionStarted)
            assert started.model == "espeak-en"
            await user.send_control(TextInput(text="I can count. " * 10, speak=True))
            await user.first_sound_ms(0)
            onset = user.talk(espeak_speech("stop please, stop talking"))
            await user.until_event(BargeIn)
            assert await user.silence_ms(onset.onset_ms) is not None
            assert await running.metric("duplex_sessions") == 1
        await until_metric(running, "duplex_sessions", 0)
        assert await running.metric('duplex_sessions_ended_total{reason="user_left"}') == 1


async def until_metric(running: Installation, name: str, value: float) -> None:
    for _ in range(100):
        if await running.metric(name) == value:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"{name} did not become {value}")
