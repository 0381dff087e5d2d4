"""The user that the room tests and benchmarks are built on, against a hand-made agent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest
from aiohttp import web
from livekit import api, rtc
from pydantic import ValidationError

from src.audio.pcm import SAMPLE_RATE, Float32, Int16
from src.common.livekit_server import LiveKitServer
from src.common.tasks import cancel_and_wait, timeout
from src.demo.actor import DidNotHappen
from src.demo.room_audio import AUDIBLE_DBFS, Ear
from src.demo.room_user import CAPTIONS_TOPIC, EVENTS_TOPIC, TokenRefused, fetch_token, room_user
from src.rpc.ws_events import Flush, SessionEnd

STEP = SAMPLE_RATE // 100


def token_for(
    server: LiveKitServer, identity: str, *, agent: bool = False, secret: str = ""
) -> str:
    grants = api.VideoGrants(room_join=True, room="lab", agent=agent, can_update_own_metadata=True)
    made = api.AccessToken(server.api_key, secret or server.api_secret)
    made = made.with_identity(identity).with_grants(grants)
    return (made.with_kind("agent") if agent else made).to_jwt()


def tone(ms: int, rate: int, hz: float = 220.0) -> Float32:
    time = np.arange(rate * ms // 1000) / rate
    return (0.3 * np.sin(2 * np.pi * hz * time)).astype(np.float32)


class HandMadeAgent:
    """Sounds while `sounding`, and hears the user."""

    def __init__(self, room: rtc.Room) -> None:
        self.room = room
        self.sounding = False
        self.ear = Ear()
        self.source = rtc.AudioSource(SAMPLE_RATE, 1, queue_size_ms=200)
        self._parts: list[asyncio.Task[None]] = []
        room.on("track_subscribed", lambda track, *_: self._start(self._listen(track)))

    def _start(self, work: object) -> None:
        self._parts.append(asyncio.create_task(work))  # type: ignore[arg-type]

    async def publish(self) -> None:
        track = rtc.LocalAudioTrack.create_audio_track("agent", self.source)
        await self.room.local_participant.publish_track(track)
        self._start(self._play())

    async def _play(self) -> None:
        loud = (tone(10, SAMPLE_RATE, 200.0) * 32767).astype(np.int16)
        while True:
            step: Int16 = loud if self.sounding else np.zeros(STEP, dtype=np.int16)
            await self.source.capture_frame(rtc.AudioFrame(step.tobytes(), SAMPLE_RATE, 1, STEP))
            await asyncio.sleep(0.01)

    async def _listen(self, track: rtc.Track) -> None:
        loop = asyncio.get_running_loop()
        stream = rtc.AudioStream.from_track(track=track, sample_rate=SAMPLE_RATE, num_channels=1)
        async for event in stream:
            self.ear.hear(loop.time() * 1000, np.frombuffer(event.frame.data, dtype=np.int16))

    async def close(self) -> None:
        await self.room.disconnect()
        for part in self._parts:
            await cancel_and_wait(part)


@asynccontextmanager
async def agent_in(server: LiveKitServer) -> AsyncIterator[HandMadeAgent]:
    room = rtc.Room()
    agent = HandMadeAgent(room)
    await room.connect(server.url, token_for(server, "agent", agent=True))
    try:
        await agent.publish()
        yield agent
    finally:
        await agent.close()


async def soon(true: Callable[[], object]) -> None:
    async with timeout(20):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_they_hear_each_other_and_the_times_are_in_order(livekit: LiveKitServer) -> None:
    async with (
        agent_in(livekit) as agent,
        room_user(livekit.url, token_for(livekit, "user")) as user,
    ):
        began_ms = user.clock.now_ms()
        agent.sounding = True
        first_ms = await user.first_sound_ms(began_ms)
        spoken = await user.said(tone(600, 16_000))
        agent.sounding = False
        last_ms = await user.silence_ms(spoken.onset_ms)
        await soon(lambda: agent.ear.first_loud_ms(spoken.onset_ms) is not None)

        assert began_ms < first_ms
        assert last_ms is not None
        assert spoken.offset_ms - 20 < last_ms
        heard_ms = agent.ear.first_loud_ms(began_ms)
        assert heard_ms is not None
        assert heard_ms > spoken.onset_ms
        assert user.ear.last_loud_ms(last_ms + 1, AUDIBLE_DBFS) is None


async def test_captions_states_and_events_are_kept_as_a_front_end_sees_them(
    livekit: LiveKitServer,
) -> None:
    async with (
        agent_in(livekit) as agent,
        room_user(livekit.url, token_for(livekit, "user"), microphone=None) as user,
    ):
        me = agent.room.local_participant
        await me.set_attributes({"lk.agent.state": "speaking"})
        for text, final in (("what", "false"), ("what time", "true")):
            attributes = {"lk.segment_id": "s1", "lk.transcription_final": final}
            writer = await me.stream_text(
                topic=CAPTIONS_TOPIC, attributes=attributes, sender_identity="user"
            )
            await writer.write(text)
            await writer.aclose()
            await user.until(lambda: any(c.text == text for c in user.captions))  # noqa: B023
        await me.set_attributes({"lk.agent.state": "listening"})
        await me.publish_data(
            Flush(utterance_id="u1", at_ms=7).model_dump_json(), topic=EVENTS_TOPIC
        )
        flush = await user.until_event(Flush, utterance_id="u1")
        await user.until(lambda: user.agent_state == "listening")
        await user.until(lambda: user.captions[0].final)

        assert flush.at_ms == 7
        assert [noted.what for noted in user.states] == ["speaking", "listening"]
        assert [(c.identity, c.segment_id, c.text) for c in user.captions] == [
            ("user", "s1", "what time")
        ]
        assert [chunk.text for chunk in user.captions[0].chunks] == ["what", "what time"]
        assert user.captions[0].closed


async def test_chat_and_control_go_where_the_agent_listens(livekit: LiveKitServer) -> None:
    async with (
        agent_in(livekit) as agent,
        room_user(livekit.url, token_for(livekit, "user"), microphone=None) as user,
    ):
        packets: list[rtc.DataPacket] = []
        chats: list[rtc.TextStreamReader] = []
        agent.room.on("data_received", packets.append)
        agent.room.register_text_stream_handler("lk.chat", lambda reader, _: chats.append(reader))
        await user.chat("good day")
        await user.send_control(SessionEnd())
        await soon(lambda: packets and chats)

        assert await chats[0].read_all() == "good day"
        assert (packets[0].topic, json.loads(packets[0].data)) == (
            "duplex.control",
            {"type": "session.end"},
        )


async def test_an_event_that_nobody_can_read_fails_the_wait(livekit: LiveKitServer) -> None:
    async with (
        agent_in(livekit) as agent,
        room_user(livekit.url, token_for(livekit, "user"), microphone=None) as user,
    ):
        await agent.room.local_participant.publish_data("{}", topic=EVENTS_TOPIC)
        with pytest.raises(ValidationError):
            await user.until_event(Flush)


async def test_waiting_in_vain_says_for_what(livekit: LiveKitServer) -> None:
    async with room_user(livekit.url, token_for(livekit, "user"), microphone=None) as user:
        with pytest.raises(DidNotHappen, match="an agent"):
            await user.until(lambda: user.agent, "an agent", patience_s=0.1)


async def test_a_refused_token_is_not_in_the_error(livekit: LiveKitServer) -> None:
    forged = token_for(livekit, "user", secret="x" * 32)
    with pytest.raises(rtc.ConnectError) as caught:
        async with room_user(livekit.url, forged):
            pass
    assert forged not in str(caught.value.message)
    assert "401" in caught.value.message


async def test_a_refusal_of_the_token_endpoint_keeps_what_it_said() -> None:
    async def full(_: web.Request) -> web.Response:
        return web.json_response(
            {"error": {"code": "exhausted"}}, status=429, headers={"Retry-After": "5"}
        )

    app = web.Application()
    app.router.add_get("/v1/livekit/token", full)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        with pytest.raises(TokenRefused) as caught:
            await fetch_token(f"http://127.0.0.1:{runner.addresses[0][1]}", room="lab")
    finally:
        await runner.cleanup()
    assert (caught.value.status, caught.value.retry_after_s) == (429, 5)
    assert caught.value.body["error"]["code"] == "exhausted"
