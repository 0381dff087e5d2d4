"""The whole installation with a voice behind an HTTP speech server: `backend: http`, end to end.

The server is this process's, on real sockets; it speaks with eSpeak as fast as it is played, so
that in mid-speech a request is always under way. One that SPEECH_SERVER_URL names
(with SPEECH_SERVER_MODEL, SPEECH_SERVER_VOICE and SPEECH_SERVER_FORMAT, where it needs them) has
the same conversations.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import pytest_asyncio
import yaml

from src.audio.pcm import SAMPLE_RATE, from_bytes, to_float32, to_int16
from src.audio.resample import StreamResampler
from src.demo.wer import word_errors
from src.orchestrator.asr import AsrSettings, make_recognizer
from src.orchestrator.ports import MIC_RATE
from tests.audio_fixtures import at_level, espeak_speech, has_piper, pink, user_speech
from tests.families.stack import until
from tests.integration.live import (
    Frame,
    Installation,
    Talker,
    has_whisper,
    installation,
    talker,
)
from tests.speech_server import PATIENCE_S, Asked, FakeSpeechServer, Reply, hangs, told, wav

pytestmark = [pytest.mark.asyncio(loop_scope="module")]
needs_models = pytest.mark.skipif(
    not (has_piper() and has_whisper()), reason="the local-models group is not installed"
)

MODEL, FAMILY = "behind-http", "far"
STORY = (
    "Once upon a time there was a lighthouse keeper who counted the ships every evening. "
    "He wrote their names into a blue book, and the book grew heavier with every year. "
    "One night a ship came that had no name at all."
)
TALE = "Once upon a time there was a lighthouse keeper. He counted the ships."
SHORT = "Once upon a time."
PIECE = MIC_RATE // 50


@dataclass(frozen=True)
class Speech:
    """What a catalog entry says of a server, and its other side where it is ours."""

    settings: dict[str, str]
    voices: tuple[str, ...]
    ours: FakeSpeechServer | None = None


async def speaks_the_text(reply: Reply) -> None:
    """All but its first 200 ms no faster than it is played."""
    sound = await asyncio.to_thread(espeak_speech, str(reply.asked.body["input"]))
    data = wav(to_int16(sound).tobytes(), rate=MIC_RATE, size=0)
    await reply.begin("audio/wav")
    for number, start in enumerate(range(0, len(data), 2 * PIECE)):
        await reply.send(data[start : start + 2 * PIECE])
        if number > 10:
            await asyncio.sleep(0.02)


async def speaks_and_hangs(reply: Reply) -> None:
    """The story's beginning, and then nothing and no end."""
    sound = await asyncio.to_thread(espeak_speech, STORY)
    await reply.begin("audio/wav")
    await reply.send(wav(to_int16(sound[: MIC_RATE * 3 // 2]).tobytes(), rate=MIC_RATE, size=0))
    await hangs(reply)


@contextmanager
def ours() -> Iterator[Speech]:
    server = FakeSpeechServer()
    server.script = speaks_the_text
    with server.running() as running:
        # Silence is not what ends a request here: only who is interrupted does.
        settings = {"url": running.url, "response_format": "wav", "chunk_ms": "120000"}
        yield Speech(settings, ("anna",), running)


@contextmanager
def named() -> Iterator[Speech]:
    url = os.environ.get("SPEECH_SERVER_URL", "")
    if not url:
        pytest.skip("optional: SPEECH_SERVER_URL names no speech server")
    settings = {"url": url, "response_format": os.environ.get("SPEECH_SERVER_FORMAT") or "pcm"}
    if model := os.environ.get("SPEECH_SERVER_MODEL"):
        settings["model"] = model
    voice = os.environ.get("SPEECH_SERVER_VOICE")
    yield Speech(settings, (voice,) if voice else ())


@pytest.fixture(scope="module", params=[ours, named], ids=["ours", "named"])
def speech(request: pytest.FixtureRequest) -> Iterator[Speech]:
    with request.param() as speech:
        yield speech


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(
    speech: Speech, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Installation]:
    folder = tmp_path_factory.mktemp("http")
    shelve(speech, folder / "voicepacks")
    args = ["--voicepacks_dir", str(folder / "voicepacks"), "--preload_models", "espeak-en"]
    async with installation(folder, model=MODEL, worker_args=[*args, "--no-allow_fallback"]) as one:
        yield one


def shelve(speech: Speech, shelf: Path) -> None:
    """A voice pack that is a server's name and nothing else."""
    pack = shelf / FAMILY / "one"
    pack.mkdir(parents=True)
    entry = {
        "model_id": MODEL,
        "backend": "http",
        "languages": ["en"],
        "voices": list(speech.voices),
        "settings": speech.settings,
    }
    (pack / "metadata.yaml").write_text(yaml.safe_dump(entry), encoding="utf-8")


def under_way(running: Installation, speech: Speech) -> set[int]:
    """The worker's connections to the server, by their own ports."""
    host, _, port = speech.settings["url"].split("/")[2].rpartition(":")
    assert host, "the address of the server has no port"
    return {
        connection.laddr.port
        for connection in psutil.Process(running.worker_pid).net_connections("tcp")
        if connection.raddr
        and connection.raddr.port == int(port)
        and connection.status == psutil.CONN_ESTABLISHED
    }


async def until_closed(running: Installation, speech: Speech, ports: set[int]) -> None:
    async def closed() -> bool:
        return not under_way(running, speech) & ports

    await until(closed, "the request to be closed")


def requests(speech: Speech) -> list[Asked]:
    return list(speech.ours.asked) if speech.ours else []


async def in_mid_story(client: Talker, text: str = STORY) -> None:
    await client.say(text)
    await client.until(lambda: client.played.get("u1", -1) >= 15, "the story to be under way")


async def understood(frames: list[Frame]) -> str:
    """What a recogniser makes of what the client got."""
    samples = to_float32(from_bytes(b"".join(frame.data for frame in frames)))
    recogniser = await asyncio.to_thread(make_recognizer, AsrSettings())
    try:
        sound = StreamResampler(SAMPLE_RATE, MIC_RATE).push(samples, last=True)
        return (await recogniser.transcribe(sound, session_id="listener", language="en")).text
    finally:
        await recogniser.aclose()


@needs_models
@pytest.mark.models
async def test_a_spoken_question_is_answered_in_words_that_can_be_understood(
    running: Installation,
) -> None:
    question = at_level(user_speech("What is the name of that ship?"), -22.0)
    async with talker(running, model=MODEL) as client:
        (started,) = client.events("session.started")
        assert (started["model"], started["fallback"]) == (MODEL, False)
        client.talk(question)
        final = await client.until_event("transcript", final=True)
        assert "name" in final["text"].lower()
        heard = await client.until_event("heard", completed=True)
        assert "name" in heard["heard"].lower()
        said = await understood(client.frames(heard["utterance_id"]))
    assert word_errors(heard["heard"], said).rate <= 0.25, said


async def test_an_interruption_closes_the_request(running: Installation, speech: Speech) -> None:
    interruption = at_level(espeak_speech("Stop please, I have heard enough of that."), -22.0)
    if speech.ours:
        speech.ours.scripts = [speaks_and_hangs]
    async with talker(running, model=MODEL) as client:
        before = len(requests(speech))
        await in_mid_story(client)
        ports = under_way(running, speech)
        assert ports
        client.talk(interruption)
        flush = await client.until_event("flush", utterance_id="u1")
        await client.until_event("barge_in", verdict="real")
        heard = await client.until_event("heard", utterance_id="u1")
        await until_closed(running, speech, ports)
        if speech.ours:
            asked = requests(speech)[before]
            assert await asyncio.to_thread(asked.over.wait, PATIENCE_S)
            assert asked.lost, "the server was told"
        assert not [f for f in client.log[client.position(flush) :] if is_of(f, "u1")]
        assert (heard["completed"], heard["estimated"]) == (False, True)
        assert heard["heard"]
        assert STORY.startswith(heard["heard"])


def is_of(item: object, utterance_id: str) -> bool:
    return isinstance(item, Frame) and item.utterance_id == utterance_id


async def test_a_noise_only_pauses_it_and_the_server_is_not_asked_again(
    running: Installation, speech: Speech
) -> None:
    async with talker(running, model=MODEL) as client:
        before = len(requests(speech))
        await in_mid_story(client, SHORT)
        client.talk(at_level(pink(80, np.random.default_rng(3)), -20.0))
        await client.until_event("flush", utterance_id="u1")
        await client.until_event("barge_in", verdict="false")
        resumed = await client.until_event("audio.begin", resumed=True)
        end = await client.until_event("audio.end", utterance_id="u1")
        heard = await client.until_event("heard", utterance_id="u1")
        assert resumed["seq"] == client.flushed_at["u1"] + 1, "the first that was not heard"
        by_seq: dict[int, set[bytes]] = {}
        for frame in client.frames("u1"):
            by_seq.setdefault(frame.seq, set()).add(frame.data)
        assert sorted(by_seq) == list(range(end["frames"])), "every frame came"
        assert {len(copies) for copies in by_seq.values()} == {1}, "a repeated one is the same"
        assert (heard["heard"], heard["completed"]) == (SHORT, True)
        texts = [asked.body["input"] for asked in requests(speech)[before:]]
        assert not texts or " ".join(texts) == SHORT


async def test_a_session_switches_to_it_and_back(running: Installation, speech: Speech) -> None:
    async with talker(running, model="espeak-en") as client:
        for model, estimated in ((MODEL, True), ("espeak-en", False), (MODEL, True)):
            await client.socket.send_json({"type": "model.switch", "model": model, "voice": ""})
            await client.until_event("model", model=model, state="ready")
            before = len(requests(speech))
            utterance = await spoken(client)
            if speech.ours:
                assert (len(requests(speech)) > before) is estimated
            await client.say("Go on.", speak=False)
            heard = await client.until_event("heard", utterance_id=utterance)
            assert (heard["completed"], heard["estimated"]) == (False, estimated)
            await client.until(lambda: client.events("audio.end"), "the answer's end")
            client.log.clear()


async def spoken(client: Talker) -> str:
    """The utterance that tells the story, once some of it is there."""
    wanted = len(client.frames()) + 15
    await client.say(STORY)
    await client.until(lambda: len(client.frames()) > wanted, "the voice")
    return client.frames()[-1].utterance_id


async def test_a_server_that_dies_in_mid_answer_ends_neither_the_answer_nor_the_session(
    running: Installation, speech: Speech
) -> None:
    if speech.ours is None:
        pytest.skip("optional: only a server of ours is killed")
    over = threading.Event()

    async def dies(reply: Reply) -> None:
        speaking = asyncio.create_task(speaks_the_text(reply))
        await told(over)
        reply.die()
        await asyncio.gather(speaking, return_exceptions=True)

    speech.ours.scripts = [dies]
    before = len(requests(speech))
    async with talker(running, model=MODEL) as client:
        await in_mid_story(client, TALE)
        over.set()
        heard = await client.until_event("heard", completed=True)
        assert heard["heard"] == TALE
        assert not client.events("error")
    again = " ".join(asked.body["input"] for asked in requests(speech)[before + 1 :])
    assert TALE.endswith(again), "it went on"
    assert again != TALE, "with what had not been heard"
