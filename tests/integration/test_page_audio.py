"""The page's sound in a real Chromium: heard, answered, interrupted, lost and found again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import soundfile
from playwright.async_api import Browser

from src.audio.pcm import Float32
from tests.audio_fixtures import RATE, at_level, has_piper, silence, user_speech
from tests.integration.browser import chromium, needs_chromium
from tests.integration.live import Installation, has_whisper, installation
from tests.integration.page import TalkingPage, talking_page
from tests.scripted_llm import Answer, ScriptedLlm, words

pytestmark = [pytest.mark.asyncio(loop_scope="module"), needs_chromium]
needs_models = pytest.mark.skipif(
    not (has_piper() and has_whisper()), reason="the local-models group is not installed"
)

STORY = (
    "Once upon a time there was a lighthouse keeper who counted the ships every evening. "
    "He wrote their names into a blue book, and the book grew heavier with every year. "
    "One night a ship came that had no name at all."
)


def reply(messages: list[dict[str, str]]) -> Answer:
    asked = messages[-1]["content"].lower()
    return words("It is the town of Paris." if "capital" in asked else "Okay.")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Installation]:
    async with ScriptedLlm(reply).serving() as llm:
        env = {"LLM_BASE_URL": llm.base_url}
        async with installation(tmp_path_factory.mktemp("page"), env=env) as one:
            yield one


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Browser]:
    """With a microphone into which nobody talks."""
    async with chromium(wav(tmp_path_factory.mktemp("mic") / "silence.wav", silence(1000))) as one:
        yield one


@pytest_asyncio.fixture(loop_scope="module")
async def page(browser: Browser, running: Installation) -> AsyncIterator[TalkingPage]:
    async with talking_page(browser, running.url) as one:
        yield one
        assert one.hosts == {f"127.0.0.1:{running.port}"}, "no request leaves the installation"
        assert not [line for line in one.complaints if "Uncaught" in line]


def wav(path: Path, samples: Float32) -> Path:
    soundfile.write(path, samples, RATE, subtype="PCM_16")
    return path


async def in_mid_story(page: TalkingPage) -> str:
    """The story is being told; returns the utterance's id."""
    await page.say(STORY)
    await page.until("told('played').some(({ seq }) => seq >= 60)", "the story to be under way")
    return str((await page.told("played"))[-1]["utterance_id"])


@needs_models
@pytest.mark.models
async def test_a_question_into_the_microphone_is_recognised_and_answered(
    running: Installation, tmp_path: Path
) -> None:
    question = at_level(user_speech("What is the capital of France?"), -22.0)
    microphone = wav(tmp_path / "question.wav", np.concatenate([silence(1500), question]))
    async with chromium(microphone) as browser, talking_page(browser, running.url) as page:
        await page.live(transport="ws")
        final = await page.event("transcript", final=True)
        assert "capital of france" in final["text"].lower()
        heard = await page.event("heard", completed=True)
        assert heard["heard"] == "It is the town of Paris."
        assert await page.run(
            "log.some(({ type, detail }) => type === 'level' && detail.mic > -35)"
        )
        assert await page.run(
            "log.some(({ type, detail }) => type === 'level' && detail.agent > -35)"
        )


async def test_what_is_played_is_told_frame_by_frame_to_the_last(page: TalkingPage) -> None:
    await page.live(transport="ws")
    await page.say("One, two, three.")
    end = await page.event("audio.end")
    await page.event("heard", completed=True)
    played = await page.told("played")
    seqs = [told["seq"] for told in played]
    assert seqs == sorted(seqs)
    assert seqs[-1] == end["frames"] - 1
    assert len(seqs) > end["frames"] / 5, "every 40 to 100 ms"
    times = [told["at"] for told in played]
    assert times == sorted(times)


@needs_models
@pytest.mark.models
async def test_stop_silences_the_voice_and_is_measured_in_the_page(page: TalkingPage) -> None:
    await page.live(transport="ws")
    story = await in_mid_story(page)
    await page.inject("stop")
    await page.event("flush", utterance_id=story)
    verdict = await page.event("barge_in", verdict="real")
    assert verdict["utterance_id"] == story
    heard = await page.event("heard", utterance_id=story)
    assert heard["completed"] is False
    assert STORY.startswith(heard["heard"])
    silenced = await page.until_told("silence")
    assert 0 < silenced["onset_to_silence_ms"] < 2000
    await page.until("level().agent < -60", "silence")


@needs_models
@pytest.mark.models
@pytest.mark.parametrize("sound", ["cough", "mm-hmm"])
async def test_a_false_alarm_loses_and_repeats_nothing(page: TalkingPage, sound: str) -> None:
    await page.live(transport="ws")
    story = await in_mid_story(page)
    await page.inject(sound)
    await page.event("flush", utterance_id=story)
    await page.event("barge_in", verdict="false")
    resumed = await page.event("audio.begin", utterance_id=story, resumed=True)
    before = [told["seq"] for told in await page.told("played") if told["seq"] < resumed["seq"]]
    assert resumed["seq"] == max(before) + 1, "the first frame that was not heard"
    heard = await page.event("heard", utterance_id=story)
    assert heard["heard"] == STORY
    assert heard["completed"] is True


@pytest.mark.parametrize("echo_db", [-20, -30])
async def test_the_agents_own_voice_does_not_interrupt_it(page: TalkingPage, echo_db: int) -> None:
    """An echo that no canceller sees: the playback gate alone must know it."""
    await page.live(transport="ws", echoDb=echo_db)
    await page.say(STORY)
    heard = await page.event("heard")
    assert heard["completed"] is True
    assert not await page.told("event", type="flush")
    loudest = await page.run(
        "Math.max(...log.filter(({ type }) => type === 'level').map(({ detail }) => detail.mic))"
    )
    assert loudest > -60, "the echo was there"


async def test_at_another_sample_rate_the_voice_is_the_same(page: TalkingPage) -> None:
    await page.live(transport="ws", rate=44100)
    await page.say("One, two, three.")
    end = await page.event("audio.end")
    heard = await page.event("heard")
    assert heard["completed"] is True
    assert (await page.told("played"))[-1]["seq"] == end["frames"] - 1


async def test_stopping_gives_microphone_and_place_back(page: TalkingPage) -> None:
    await page.live(transport="ws")
    await page.run("session.stop()")
    assert (await page.told("status"))[-1] == {"phase": "ended", "reason": "stopped"}
    states = await page.run("streams.flatMap(s => s.getTracks()).map(t => t.readyState)")
    assert states == ["ended"]
    await page.live(transport="ws")


async def test_an_unplugged_microphone_gives_way_to_the_default_one(page: TalkingPage) -> None:
    await page.live(transport="ws")
    await page.run("streams[0].getTracks()[0].dispatchEvent(new Event('ended'))")
    shown = await page.until_told("trouble")
    assert (shown["code"], shown["fatal"]) == ("mic_lost", False)
    assert await page.run("streams.at(-1).getTracks()[0].readyState") == "live"
    assert await page.run("session.phase") == "live"


async def test_a_refused_microphone_is_explained_and_typing_goes_on(
    running: Installation,
) -> None:
    async with chromium(refuse=True) as browser, talking_page(browser, running.url) as page:
        await page.start(transport="ws")
        shown = await page.until_told("trouble")
        assert (shown["code"], shown["fatal"]) == ("mic_refused", True)
        assert (await page.told("status"))[-1] == {"phase": "ended", "reason": "mic_refused"}
        await page.live(transport="ws", mic=False)
        await page.say("One, two, three.")
        heard = await page.event("heard")
        assert heard["completed"] is True


async def test_a_server_that_is_gone_is_said_so(browser: Browser, running: Installation) -> None:
    async with talking_page(browser, running.url) as page:
        await page.page.route("**/v1/**", lambda route: route.abort())
        await page.run(
            "(window.WebSocket = class extends WebSocket {"
            "constructor(url, ...more) { super('ws://127.0.0.1:9/', ...more); } }, 0)"
        )
        await page.start(transport="ws")
        shown = await page.until_told("trouble")
        assert (shown["code"], shown["fatal"]) == ("no_server", True)


async def test_a_wrong_key_is_refused_and_a_full_server_says_when_to_come_back(
    browser: Browser, tmp_path: Path
) -> None:
    config = "limits: {max_sessions: 1}\n"
    env = {"DUPLEX_API_KEY": "the-right-one"}
    async with (
        installation(tmp_path, config=config, env=env) as running,
        talking_page(browser, running.url) as page,
        talking_page(browser, running.url) as second,
    ):
        for wrong in ("the-wrong-one", "no such key", ""):
            await page.start(transport="ws", apiKey=wrong)
            shown = (await page.told("trouble"))[-1]
            assert (shown["code"], shown["fatal"]) == ("unauthorized", True)
        await page.live(transport="ws", apiKey="the-right-one")
        await second.start(transport="ws", apiKey="the-right-one")
        shown = await second.until_told("trouble")
        assert (shown["code"], shown["fatal"]) == ("full", True)
        assert shown["retry_after_ms"] > 0
