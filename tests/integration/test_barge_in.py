"""Interrupting a voice over real sockets: silence first, the verdict after, and nothing lost."""

from __future__ import annotations

from collections.abc import AsyncIterator

import numpy as np
import pytest
import pytest_asyncio

from src.audio.pcm import FRAME_SAMPLES, Float32
from tests.audio_fixtures import at_level, cough, espeak_speech, has_piper, pink, user_speech
from tests.integration.live import (
    Event,
    Frame,
    Installation,
    Talker,
    has_whisper,
    installation,
    talker,
)

pytestmark = [pytest.mark.asyncio(loop_scope="module")]

STORY = (
    "Once upon a time there was a lighthouse keeper who counted the ships every evening. "
    "He wrote their names into a blue book, and the book grew heavier with every year. "
    "One night a ship came that had no name at all."
)
needs_models = pytest.mark.skipif(
    not (has_piper() and has_whisper()), reason="the local-models group is not installed"
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Installation]:
    async with installation(tmp_path_factory.mktemp("barge_in")) as one:
        yield one


def burst() -> Float32:
    """Loud, sudden and no voice at all: 80 ms of noise."""
    return at_level(pink(80, np.random.default_rng(3)), -20.0)


async def in_mid_story(client: Talker, frames: int = 60) -> None:
    await client.say(STORY)
    await client.until(lambda: client.played.get("u1", -1) >= frames, "the story to be under way")


def after(client: Talker, event: Event) -> list[Event | Frame]:
    return client.log[client.position(event) + 1 :]


def until_next_begin(client: Talker, flush: Event) -> list[Event | Frame]:
    following = after(client, flush)
    begins = [
        i
        for i, item in enumerate(following)
        if isinstance(item, dict) and item["type"] == "audio.begin"
    ]
    return following[: begins[0]] if begins else following


def assert_no_seam(frames: list[bytes]) -> None:
    """Between two frames the wave never jumps further than it does inside them."""
    steps = np.abs(np.diff(np.frombuffer(b"".join(frames), "<i2").astype(int)))
    between = np.arange(FRAME_SAMPLES - 1, steps.size, FRAME_SAMPLES)
    assert steps[between].max() <= np.delete(steps, between).max()


async def test_speech_silences_the_voice_at_once_and_cuts_it_at_the_heard_word(
    running: Installation,
) -> None:
    paused = await running.metric("duplex_edge_to_worker_paused_seconds_count")
    speech = at_level(espeak_speech("Stop please, I have heard enough of that."), -22.0)
    async with talker(running) as client:
        await in_mid_story(client)
        client.talk(speech)
        flush = await client.until_event("flush", utterance_id="u1")
        played_at_flush = client.played["u1"]
        await client.until_event("barge_in", verdict="real")
        heard = await client.until_event("heard", utterance_id="u1")
        await client.until(lambda: client.events("state")[-1]["state"] != "barged_in", "a state")

        silent = until_next_begin(client, flush)
        assert not [item for item in silent if isinstance(item, Frame)], "no frame after a flush"
        order = [item["type"] for item in silent if isinstance(item, dict)]
        assert order.index("barge_in") < order.index("heard")
        assert client.events("barge_in")[0]["verdict"] == "pending"
        assert not client.events("audio.end", utterance_id="u1")

        assert heard["completed"] is False
        assert STORY.startswith(heard["heard"])
        assert heard["cut"].split()[0] == STORY[len(heard["heard"]) :].split()[0]
        assert heard["estimated"] is False, "eSpeak knows when each word ends"
        spoken_per_second = len(STORY.split()) / (len(STORY) / 15.0)
        about = spoken_per_second * (played_at_flush + 1) * 0.02
        assert 0.4 * about < len(heard["heard"].split()) < 2.5 * about
    assert await running.metric("duplex_edge_to_worker_paused_seconds_count") == paused + 1
    assert await running.metric('duplex_barge_ins_total{verdict="real"}') >= 1


@pytest.mark.parametrize("sound", ["burst", "cough"])
async def test_a_noise_only_pauses_the_voice_and_not_a_frame_is_lost(
    running: Installation, sound: str
) -> None:
    noise = burst() if sound == "burst" else at_level(cough(np.random.default_rng(5)), -20.0)
    async with talker(running) as client:
        await in_mid_story(client)
        client.talk(noise)
        flush = await client.until_event("flush", utterance_id="u1")
        verdict = await client.until_event("barge_in", verdict="false")
        await client.until_event("audio.begin", resumed=True)
        end = await client.until_event("audio.end", utterance_id="u1")
        heard = await client.until_event("heard", utterance_id="u1")

        assert client.position(flush) < client.position(verdict)
        assert not [i for i in until_next_begin(client, flush) if isinstance(i, Frame)]
        resumed = client.events("audio.begin", resumed=True)[-1]
        assert resumed["seq"] == client.flushed_at["u1"] + 1, "the first frame that was not heard"

        by_seq: dict[int, set[bytes]] = {}
        for frame in client.frames("u1"):
            by_seq.setdefault(frame.seq, set()).add(frame.data)
        assert sorted(by_seq) == list(range(end["frames"])), "every frame came"
        assert {len(copies) for copies in by_seq.values()} == {1}, "a repeated frame is the same"
        assert len(client.frames("u1")) > end["frames"], "what was flushed was sent again"
        assert_no_seam([by_seq[seq].pop() for seq in sorted(by_seq)])
        assert heard["heard"] == STORY
        assert heard["completed"] is True
        await client.until(lambda: client.events("state")[-1]["state"] == "listening", "the end")


@needs_models
@pytest.mark.models
async def test_the_conversation_goes_on_with_what_interrupted_it(running: Installation) -> None:
    speech = at_level(user_speech("What is the name of that ship?"), -22.0)
    async with talker(running) as client:
        await in_mid_story(client)
        client.talk(speech)
        await client.until_event("barge_in", verdict="real")
        final = await client.until_event("transcript", final=True)
        assert "name" in final["text"].lower()
        await client.until(
            lambda: [f for f in client.frames() if f.utterance_id not in ("", "u1")], "an answer"
        )
        answer = client.frames()[-1].utterance_id
        heard = await client.until_event("heard", utterance_id=answer)
        assert "name" in heard["heard"].lower()


async def test_typing_interrupts_too(running: Installation) -> None:
    async with talker(running) as client:
        await in_mid_story(client)
        await client.say("Something else, please.", speak=False)
        await client.until_event("flush", utterance_id="u1")
        heard = await client.until_event("heard", utterance_id="u1")
        assert heard["completed"] is False
        await client.until(lambda: client.frames("u2"), "the answer")


async def test_the_voice_can_be_interrupted_from_its_first_frame(running: Installation) -> None:
    """No warm-up in which barge-in is deaf."""
    speech = at_level(espeak_speech("No no, wait a moment please."), -22.0)
    async with talker(running) as client:
        await client.say(STORY)
        await client.until(lambda: client.frames(), "the first frame")
        client.talk(speech)
        await client.until_event("barge_in", verdict="real")
        heard = await client.until_event("heard", utterance_id="u1")
        assert len(heard["heard"]) < len(STORY) // 3
