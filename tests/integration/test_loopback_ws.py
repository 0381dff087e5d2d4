"""The whole loop over real sockets: speech comes as 20 ms frames, in order, and is heard."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import numpy as np
import pytest
import pytest_asyncio

from src.audio.opus import OpusDecoder, opus_available
from src.audio.pcm import FRAME_BYTES, FRAME_SAMPLES, Float32
from src.audio.resample import StreamResampler
from tests.audio_fixtures import at_level, has_piper, silence, user_speech
from tests.integration.live import Frame, Installation, has_whisper, installation, talker

pytestmark = [pytest.mark.asyncio(loop_scope="module")]

SENTENCE = "The harbour is quiet tonight, and the last ferry has left."
needs_models = pytest.mark.skipif(
    not (has_piper() and has_whisper()), reason="the local-models group is not installed"
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Installation]:
    async with installation(tmp_path_factory.mktemp("loopback")) as one:
        yield one


def at_rate(speech: Float32, rate: int) -> Float32:
    return StreamResampler(16_000, rate).push(speech, last=True)


async def test_an_utterance_is_frames_of_20_ms_numbered_without_a_gap(
    running: Installation,
) -> None:
    async with talker(running) as client:
        await client.say(SENTENCE)
        end = await client.until_event("audio.end")
        frames = client.frames()
        assert {len(frame.data) for frame in frames} == {FRAME_BYTES}
        assert [frame.seq for frame in frames] == list(range(end["frames"]))
        assert any(any(frame.data) for frame in frames), "not a second of silence"
        assert 2_000 < len(frames) * 20 < 8_000, "about as long as the sentence is"
        heard = await client.until_event("heard")
        assert heard["heard"] == SENTENCE
        assert heard["completed"] is True


async def test_events_tell_the_story_in_order(running: Installation) -> None:
    async with talker(running) as client:
        await client.say("One, two, three.")
        await client.until_event("heard")
        await client.until(lambda: client.events("state")[-1]["state"] == "listening", "the end")
        story = [
            "audio" if isinstance(item, Frame) else item.get("state", item["type"])
            for item in client.log
        ]
        told = [name for i, name in enumerate(story) if i == 0 or story[i - 1] != name]
        wanted = ["session.started", "listening", "reply.text", "audio.begin", "speaking"]
        assert [name for name in told if name != "audio"][:5] == wanted
        assert told[-3:] == ["audio.end", "heard", "listening"]
        assert client.events("session.started")[0]["model"] == "espeak-en"


async def test_audio_leads_its_playing_by_little(running: Installation) -> None:
    """What has been sent and not played is what a flush must throw away: it stays small."""
    async with talker(running) as client:
        await client.say(SENTENCE)
        lead: list[int] = []

        def measure() -> bool:
            frames = client.frames()
            if frames:
                lead.append(frames[-1].seq - client.played.get("u1", -1))
            return bool(client.events("audio.end"))

        await client.until(measure, "audio.end")
        assert max(lead) <= 25, "never more than half a second ahead"


async def test_the_server_waits_for_a_listener_that_is_behind(running: Installation) -> None:
    """Frames that were not acknowledged are not taken for heard."""
    async with talker(running) as client:
        await client.say(SENTENCE)
        end = await client.until_event("audio.end")
        heard = await client.until_event("heard")
        assert client.played["u1"] == end["frames"] - 1, "heard only once it had been played"
        assert heard["cut"] == ""


@needs_models
@pytest.mark.models
@pytest.mark.parametrize("rate", [16_000, 48_000, 8_000])
async def test_a_spoken_question_is_understood_and_answered_aloud(
    running: Installation, rate: int
) -> None:
    turns = await running.metric("duplex_turns_total")
    speech = at_level(user_speech("What time is it in London?"), -23.0)
    async with talker(running, sample_rate=rate) as client:
        client.talk(at_rate(np.concatenate((silence(600), speech)), rate))
        final = await client.until_event("transcript", final=True)
        assert "time" in final["text"].lower()
        assert "london" in final["text"].lower()
        latency = await client.until_event("latency")
        stages = ("endpoint", "transcript", "first_clause", "first_audio")
        figures = [latency[f"{stage}_ms"] for stage in stages]
        assert figures[0] > 0
        assert figures[-1] == max(figures), "audio is the last thing to come"
        heard = await client.until_event("heard")
        assert heard["heard"].lower().startswith("you said")
        phases = [event["phase"] for event in client.events("speech")]
        assert phases[:2] == ["edge", "confirmed"]
        assert "ended" in phases
    assert await running.metric("duplex_turns_total") == turns + 1


async def test_a_language_model_host_that_connects_in_is_spoken_and_told_what_was_heard(
    running: Installation,
) -> None:
    async with aiohttp.ClientSession() as http, http.ws_connect(f"{running.url}/v1/llm") as host:
        await host.send_json({"type": "hello", "name": "scripted"})
        assert (await host.receive_json(timeout=10))["type"] == "welcome"
        async with talker(running) as client:
            assert client.events("session.started")[0]["llm"] == "host"
            await client.say("Who are you?", speak=False)
            turn = await host.receive_json(timeout=10)
            assert (turn["type"], turn["text"]) == ("turn", "Who are you?")
            reply = {key: turn[key] for key in ("session_id", "turn_id")}
            await host.send_json({"type": "reply", **reply, "text": "I am a script. "})
            await client.until(lambda: client.frames(), "audio before the text has ended")
            await host.send_json({"type": "reply", **reply, "text": "Bye.", "is_final": True})
            assert (await client.until_event("heard"))["heard"] == "I am a script. Bye."
            cut = await host.receive_json(timeout=10)
            assert (cut["type"], cut["completed"]) == ("cut", True)
            assert cut["heard_text"] == "I am a script. Bye."
        assert (await host.receive_json(timeout=10))["type"] == "closed"


async def test_a_client_that_vanishes_in_mid_word_leaves_nothing_behind(
    running: Installation,
) -> None:
    async with talker(running) as client:
        await client.say(SENTENCE)
        await client.until(lambda: len(client.frames()) > 10, "the sentence to be under way")
        response = client.socket._response
        assert response.connection is not None
        assert response.connection.transport is not None
        response.connection.transport.abort()
    for _ in range(100):
        if await running.metric("duplex_sessions") == 0:
            break
        await asyncio.sleep(0.05)
    assert await running.metric("duplex_sessions") == 0
    assert await running.metric("duplex_frames_kept") == 0
    assert await running.metric('duplex_sessions_ended_total{reason="client_gone"}') >= 1


async def test_sessions_do_not_hear_each_other(running: Installation) -> None:
    async with talker(running) as one, talker(running) as other:
        await asyncio.gather(one.say("One two three four five six."), other.say("Yes."))
        long = await one.until_event("audio.end")
        short = await other.until_event("audio.end")
        assert len(one.frames()) == long["frames"] > len(other.frames()) == short["frames"]
        assert (await other.until_event("heard"))["heard"] == "Yes."


@pytest.mark.skipif(not opus_available(), reason="PyAV is not installed")
async def test_opus_in_both_directions(running: Installation) -> None:
    async with talker(running) as plain, aiohttp.ClientSession() as http:
        await plain.say(SENTENCE)
        frames = (await plain.until_event("audio.end"))["frames"]
        async with http.ws_connect(f"{running.url}/v1/session") as socket:
            await socket.send_json({"type": "session.start", "codec": "opus"})
            assert (await socket.receive_json(timeout=20))["codec"] == "opus"
            await socket.send_json({"type": "text", "text": SENTENCE, "speak": True})
            packets: list[bytes] = []
            while True:
                message = await socket.receive(timeout=20)
                if message.type is aiohttp.WSMsgType.BINARY:
                    packets.append(message.data)
                elif '"audio.end"' in message.data:
                    break
    decoder = OpusDecoder()
    assert {decoder.decode(packet).size for packet in packets} == {FRAME_SAMPLES}
    assert abs(len(packets) - frames) <= 3
    assert max(map(len, packets)) < FRAME_BYTES // 4


@pytest.mark.parametrize(
    ("start", "code", "hint"),
    [
        ({"model": "espeak-em"}, 4404, "'espeak-en'"),
        ({"model": "espeak-en", "voice": "nobody-at-all"}, 4404, "voice"),
        ({"mode": "fastest"}, 4404, "mode"),
        ({"language": "tlh"}, 4404, "language"),
        ({"settings": {"sped": "2"}}, 4404, "'speed'"),
    ],
)
async def test_names_that_nobody_knows_are_refused_with_the_nearest(
    running: Installation, start: dict[str, str], code: int, hint: str
) -> None:
    async with aiohttp.ClientSession() as http:
        socket = await http.ws_connect(f"{running.url}/v1/session")
        await socket.send_json({"type": "session.start", **start})
        error = await socket.receive_json(timeout=10)
        assert (error["type"], error["fatal"]) == ("error", True)
        assert hint in error["message"]
        assert (await socket.receive(timeout=10)).data == code


@pytest.mark.parametrize("text", ["🙂🙂🙂", "Привет, 你好, hello!", "…", "a" * 19_000])
async def test_strange_text_does_no_harm(running: Installation, text: str) -> None:
    async with talker(running) as client:
        await client.say(text)
        if len(text) > 1_000:
            await client.until(lambda: len(client.frames()) > 20, "the beginning of a long text")
            return
        await client.until(lambda: client.events("state"), "a state")
        await client.say("Still here.")
        await client.until(
            lambda: [e for e in client.events("heard") if e["heard"] == "Still here."], "a reply"
        )


async def test_white_space_is_refused_and_a_megabyte_too(running: Installation) -> None:
    async with talker(running) as client:
        await client.say("   ")
        assert (await client.until_event("error"))["code"] == "invalid_argument"
        await client.socket.send_str('{"type":"text","text":"' + "x" * 200_000 + '"}')
        await client.until(lambda: len(client.events("error")) == 2, "a second error")
        assert client.events("error")[1]["fatal"] is False
        await client.say("Fine.")
        await client.until_event("heard", heard="Fine.")
