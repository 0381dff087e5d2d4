"""The page's sound in a real Chromium: heard, answered, interrupted, lost and found again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import pytest_asyncio
import soundfile
from playwright.async_api import Browser

from src.audio.pcm import SAMPLE_RATE, Float32
from src.common.livekit_server import LiveKitServer, LiveKitUnavailable
from src.demo.wer import letter_error_rate, spell
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
    "He wrote their names into a blue book."
)


# The microphone is open before the session is: on a busy machine a room takes some seconds.
LEAD_MS = 8_000
ESTIMATE_FRAMES = 5


def reply(messages: list[dict[str, str]]) -> Answer:
    asked = messages[-1]["content"].lower()
    return words("It is the town of Paris." if "capital" in asked else "Okay.")


@dataclass
class Place:
    """Where the page goes, and how it travels."""

    running: Installation
    transport: str
    livekit: LiveKitServer | None = None

    @property
    def hosts(self) -> set[str]:
        """All that the page may talk to."""
        ours = {f"127.0.0.1:{self.running.port}"}
        return ours | ({urlsplit(self.livekit.url).netloc} if self.livekit else set())


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["ws", "livekit"])
async def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Place]:
    logs = tmp_path_factory.mktemp("page")
    async with AsyncExitStack() as cleanup:
        livekit = await _livekit(cleanup, logs) if request.param == "livekit" else None
        llm = await cleanup.enter_async_context(ScriptedLlm(reply).serving())
        env = {"LLM_BASE_URL": llm.base_url}
        running = await cleanup.enter_async_context(installation(logs, env=env, livekit=livekit))
        yield Place(running, request.param, livekit)


async def _livekit(cleanup: AsyncExitStack, logs: Path) -> LiveKitServer:
    try:
        server = await LiveKitServer.start(logs / "livekit-server.log")
    except LiveKitUnavailable as error:
        pytest.skip(str(error))
    cleanup.push_async_callback(server.close)
    return server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Browser]:
    """With a microphone into which nobody talks."""
    async with chromium(wav(tmp_path_factory.mktemp("mic") / "silence.wav", silence(1000))) as one:
        yield one


@pytest_asyncio.fixture(loop_scope="module")
async def page(browser: Browser, place: Place) -> AsyncIterator[TalkingPage]:
    async with talking_page(browser, place.running.url, place.transport) as one:
        yield one
        assert one.hosts <= place.hosts, "no request leaves the installation"
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
    place: Place, tmp_path: Path
) -> None:
    question = at_level(user_speech("What is the capital of France?"), -22.0)
    microphone = wav(tmp_path / "question.wav", np.concatenate([silence(LEAD_MS), question]))
    async with (
        chromium(microphone) as browser,
        talking_page(browser, place.running.url, place.transport) as page,
    ):
        await page.live()
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
    await page.live()
    await page.say("One, two, three.")
    end = await page.event("audio.end")
    await page.until_told("played", seq=end["frames"] - 1)
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
    await page.live()
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
    await page.live()
    story = await in_mid_story(page)
    await page.inject(sound)
    await page.event("flush", utterance_id=story)
    await page.event("barge_in", verdict="false")
    resumed = await page.event("audio.begin", utterance_id=story, resumed=True)
    before = [told["seq"] for told in await page.told("played") if told["seq"] < resumed["seq"]]
    # In a room only the server knows exactly; the page goes by the clock.
    unsure = ESTIMATE_FRAMES if page.transport == "livekit" else 0
    assert abs(resumed["seq"] - max(before) - 1) <= unsure, "the first frame that was not heard"
    heard = await page.event("heard", utterance_id=story)
    assert heard["heard"] == STORY
    assert heard["completed"] is True


@pytest.mark.parametrize("echo_db", [-20, -30])
async def test_the_agents_own_voice_does_not_interrupt_it(page: TalkingPage, echo_db: int) -> None:
    """An echo that no canceller sees: the playback gate alone must know it."""
    await page.live(echoDb=echo_db)
    await page.say(STORY)
    heard = await page.event("heard")
    assert heard["completed"] is True
    assert not await page.told("event", type="flush")
    loudest = await page.run(
        "Math.max(...log.filter(({ type }) => type === 'level').map(({ detail }) => detail.mic))"
    )
    assert loudest > -60, "the echo was there"


async def test_at_another_sample_rate_the_voice_is_the_same(page: TalkingPage) -> None:
    await page.live(rate=44100)
    await page.say("One, two, three.")
    end = await page.event("audio.end")
    await page.until_told("played", seq=end["frames"] - 1)
    heard = await page.event("heard")
    assert heard["completed"] is True


async def test_stopping_gives_microphone_and_place_back(page: TalkingPage) -> None:
    await page.live()
    await page.run("session.stop()")
    assert (await page.told("status"))[-1] == {"phase": "ended", "reason": "stopped"}
    states = await page.run("streams.flatMap(s => s.getTracks()).map(t => t.readyState)")
    assert states == ["ended"]
    await page.live()


async def test_an_unplugged_microphone_gives_way_to_the_default_one(page: TalkingPage) -> None:
    await page.live()
    await page.run("streams[0].getTracks()[0].dispatchEvent(new Event('ended'))")
    shown = await page.until_told("trouble")
    assert (shown["code"], shown["fatal"]) == ("mic_lost", False)
    assert await page.run("streams.at(-1).getTracks()[0].readyState") == "live"
    assert await page.run("session.phase") == "live"


async def test_muted_nothing_of_the_room_is_heard(place: Place) -> None:
    """Chromium's own microphone beeps once a second."""
    async with (
        chromium() as browser,
        talking_page(browser, place.running.url, place.transport) as page,
    ):
        await page.live()
        await page.until("level().mic > -60", "a beep")
        await page.run("session.setMuted(true)")
        await page.until("level().mic === -100", "silence")
        await page.run("log.length = 0")
        await page.until("log.filter(({ type }) => type === 'level').length > 50", "two seconds")
        assert await page.run("told('level').every(({ mic }) => mic === -100)")
        await page.run("session.setMuted(false)")
        await page.until("level().mic > -60", "a beep")


async def test_the_microphone_is_changed_in_mid_call(page: TalkingPage) -> None:
    await page.live()
    mics = await page.run("listDevices().then(({ mics }) => mics)")
    assert len(mics) > 1, "Chromium pretends to have several"
    assert all(mic["id"] and mic["label"] for mic in mics)
    await page.page.evaluate("id => session.setMic(id)", mics[-1]["id"])
    states = await page.run("streams.map(s => s.getTracks()[0].readyState)")
    assert states == ["ended", "live"]
    settings = await page.run("streams[1].getTracks()[0].getSettings()")
    assert settings["deviceId"] == mics[-1]["id"]
    assert settings["echoCancellation"] is True


async def test_a_browser_that_waits_for_a_click_is_asked_once(page: TalkingPage) -> None:
    await page.run(
        """window.AudioContext = class extends AudioContext {
          constructor(wanted) { super(wanted); this.suspend(); }
          resume() { return window.clicked ? super.resume() : new Promise(() => {}); }
        }, 0"""
    )
    await page.live(mic=False)
    assert [shown["code"] for shown in await page.told("trouble")] == ["autoplay"]
    await page.run("clicked = true, session.resume()")
    await page.say("One, two, three.")
    await page.event("heard", completed=True)
    assert len(await page.told("trouble")) == 1


async def test_a_click_that_changed_nothing_is_asked_for_again(page: TalkingPage) -> None:
    await page.run(
        """window.AudioContext = class extends AudioContext {
          constructor(wanted) { super(wanted); this.suspend(); }
          resume() { return new Promise(() => {}); }
        }, 0"""
    )
    await page.live(mic=False)
    await page.run("log.length = 0, session.resume()")
    shown = await page.until_told("trouble")
    assert (shown["code"], shown["fatal"]) == ("autoplay", False)


@pytest.mark.parametrize("place", ["ws"], indirect=True)
async def test_the_microphone_is_sent_whole_and_once(page: TalkingPage) -> None:
    """As much sound as the sound card's clock went on; what is sent arrives, or the socket ends."""
    await page.live()
    await page.talk(at_level(user_speech("Good morning."), -22.0))
    await page.until("sent.at(-1).at - sent[0].at > 6", "six seconds of microphone")
    sent: list[dict[str, float]] = await page.run("sent")
    assert {one["bytes"] for one in sent} == {2 * SAMPLE_RATE // 50}
    passed_s = sent[-1]["at"] - sent[0]["at"]
    assert (len(sent) - 1) * 0.02 == pytest.approx(passed_s, abs=0.25)


async def test_another_voice_takes_over_at_the_next_utterance(page: TalkingPage) -> None:
    await page.live()
    await page.run("session.switchModel('no-such-model')")
    failed = await page.event("model", state="failed")
    assert failed["model"] == "no-such-model"
    await page.run("session.switchModel('espeak-en')")
    await page.event("model", state="ready", model="espeak-en")
    await page.say("One, two, three.")
    await page.event("heard", completed=True)


async def test_a_network_that_stalls_is_said_so(page: TalkingPage) -> None:
    if page.transport == "livekit":
        pytest.skip("optional: WebRTC throws late packets away by itself")
    await page.live()
    stalled = "Object.defineProperty(WebSocket.prototype, 'bufferedAmount', { get: () => 1e6 })"
    await page.run(f"{stalled}, 0")
    shown = await page.until_told("trouble")
    assert (shown["code"], shown["fatal"]) == ("slow", False)
    await page.run("log.length = 0")
    await page.until("log.filter(({ type }) => type === 'level').length > 25", "a second")
    assert not await page.told("trouble"), "said once"


async def test_a_refused_microphone_is_explained_and_typing_goes_on(
    place: Place,
) -> None:
    async with (
        chromium(refuse=True) as browser,
        talking_page(browser, place.running.url, place.transport) as page,
    ):
        await page.start()
        shown = await page.until_told("trouble")
        assert (shown["code"], shown["fatal"]) == ("mic_refused", True)
        assert (await page.told("status"))[-1] == {"phase": "ended", "reason": "mic_refused"}
        await page.live(mic=False)
        await page.say("One, two, three.")
        heard = await page.event("heard")
        assert heard["completed"] is True


@needs_models
@pytest.mark.models
@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_fifteen_utterances_in_a_row_are_all_understood(page: TalkingPage) -> None:
    said = [f"Number {spell(number)}." for number in range(1, 45, 3)]
    spoken = [at_level(user_speech(text), -22.0) for text in said]
    await page.live()
    for turn, speech in enumerate(spoken):
        await page.talk(speech)
        await page.event("heard", more_than=turn)
        await page.until("told('event', {type: 'state'}).at(-1).state === 'listening'", "the end")
    finals = [event["text"] for event in await page.told("event", type="transcript", final=True)]
    assert len(finals) == len(said)
    assert letter_error_rate(" ".join(said), " ".join(finals)) < 0.15, finals
    assert not await page.told("trouble")
