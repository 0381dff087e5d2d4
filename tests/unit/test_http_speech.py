"""A speech server as a model: what it says, and what a catalog entry may say of it."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
import psutil
import pytest

from src.rpc.errors import (
    DuplexError,
    InvalidArgument,
    Unavailable,
    UnknownName,
)
from src.tts.adapters import adapter_for
from src.tts.catalog import ModelMeta
from src.tts.families.http_speech.settings import read_http_settings
from src.tts.loader import ModelLoader
from src.tts.sources import SourceResolver
from src.tts.tts_base import VoiceSpec
from tests.speech_server import (
    RATE,
    FakeSpeechServer,
    Reply,
    hangs,
    pcm,
    speaks,
    told,
    tone,
    wav,
)
from tests.unit.http_models import (
    SECRET,
    TEXT,
    entry,
    loaded,
    loaded_as,
    refusing,
    sound_of,
    speaks_and_hangs,
    stream,
)


@pytest.fixture
def server() -> Iterator[FakeSpeechServer]:
    with FakeSpeechServer().running() as running:
        yield running


# --- what it says ---


def test_sound_comes_out_while_the_server_still_makes_it(server: FakeSpeechServer) -> None:
    heard_first = threading.Event()

    async def script(reply: Reply) -> None:
        await reply.send(pcm(100))
        await told(heard_first)
        await reply.send(pcm(100))

    with loaded(server) as model:
        server.script = script
        chunks = stream(model)
        first = next(chunks)
        heard_first.set()
        rest = list(chunks)
    assert first.samples.size == RATE // 10
    assert np.allclose(sound_of([first, *rest]), np.tile(tone(100), 2), atol=1e-4)


def test_samples_that_the_network_cuts_in_two_stay_whole(server: FakeSpeechServer) -> None:
    async def script(reply: Reply) -> None:
        data = pcm(200)
        for start in range(0, len(data), 333):
            await reply.send(data[start : start + 333])

    with loaded(server) as model:
        server.script = script
        assert np.allclose(sound_of(list(stream(model))), tone(200), atol=1e-4)


def test_a_request_is_what_the_server_s_api_asks_for(
    server: FakeSpeechServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPEECH_KEY", "sk-1")
    settings = {
        "model": "tts-9",
        "voice.amber": "af_heart",
        "voice": "amber",
        "api_key_env": "SPEECH_KEY",
        "body": json.dumps({"stream": True, "lang_code": "a"}),
    }
    with loaded(server, **settings) as model:
        list(stream(model, "Hello,  you.", spec=VoiceSpec("amber", "", {"speed": "1.5"})))
    asked = server.asked[0]
    assert asked.body == {
        "model": "tts-9",
        "input": "Hello, you.",
        "voice": "af_heart",
        "response_format": "pcm",
        "speed": 1.5,
        "stream": True,
        "lang_code": "a",
    }
    assert asked.headers["Authorization"] == "Bearer sk-1"


def test_what_is_not_set_is_not_sent(server: FakeSpeechServer) -> None:
    with loaded(server) as model:
        list(stream(model, "Hello."))
    assert server.asked[0].body == {"input": "Hello.", "response_format": "pcm"}
    assert "Authorization" not in server.asked[0].headers


def test_segments_are_asked_for_one_after_the_other_on_one_connection(
    server: FakeSpeechServer,
) -> None:
    with loaded(server) as model:
        list(stream(model, "One.", "Two.", "Three."))
    assert [asked.body["input"] for asked in server.asked] == ["One.", "Two.", "Three."]
    assert server.connections() == 1


def test_a_connection_that_the_server_has_closed_meanwhile_is_made_anew(
    server: FakeSpeechServer,
) -> None:
    async def speaks_and_closes(reply: Reply) -> None:
        await speaks(reply)
        asyncio.get_running_loop().call_later(0.05, reply.die)

    with loaded(server) as model:
        server.scripts = [speaks_and_closes]
        list(stream(model))
        time.sleep(0.2)
        assert sound_of(list(stream(model))).size == RATE // 10
    assert server.connections() == 2


def test_all_words_are_told_estimated_and_in_the_order_of_their_times(
    server: FakeSpeechServer,
) -> None:
    async def script(reply: Reply) -> None:
        for _ in range(10):
            await reply.send(pcm(150))

    with loaded(server) as model:
        server.script = script
        chunks = list(stream(model, "One two three,", "four five six."))
    ends = itertools.accumulate(chunk.samples.size * 1000 // RATE for chunk in chunks)
    words = [
        (word, at + word.start_ms)
        for chunk, at in zip(chunks, [0, *ends], strict=False)
        for word in chunk.words
    ]
    text = "One two three, four five six."
    assert [text[w.char_start : w.char_end] for w, _ in words] == text.split()
    assert all(word.estimated for word, _ in words)
    times = [start for _, start in words]
    assert times == sorted(times)
    # The fourth word is the first of the second answer.
    assert times[0] < 100
    assert 1500 <= times[3] < 1700


def test_words_for_which_there_was_no_time_are_told_at_the_end(server: FakeSpeechServer) -> None:
    with loaded(server) as model:
        words = [word.text for chunk in stream(model, TEXT) for word in chunk.words]
    assert words == TEXT.split()


def test_a_text_that_gets_no_sound_is_passed_over_and_told_without_the_text(
    server: FakeSpeechServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def silent(reply: Reply) -> None:
        await reply.begin()

    with loaded(server) as model:
        server.scripts = [silent, speaks]
        assert sound_of(list(stream(model, SECRET, "Two."))).size == RATE // 10
    assert "no sound" in caplog.text
    assert SECRET not in caplog.text


# --- WAV and rates ---


@pytest.mark.parametrize("size", [None, 0, 0xFFFFFFFF])
def test_the_rate_of_a_wav_is_the_model_s(server: FakeSpeechServer, size: int | None) -> None:
    async def script(reply: Reply) -> None:
        await reply.begin("audio/wav")
        data = wav(pcm(200, 16_000), rate=16_000, size=size)
        for start in range(0, len(data), 101):
            await reply.send(data[start : start + 101])

    server.script = script
    with loaded(server, response_format="wav", sample_rate="24000") as model:
        assert model.native_sample_rate == 16_000
        assert np.allclose(sound_of(list(stream(model))), tone(200, 16_000), atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "said", "rate"),
    [
        ("audio/pcm; rate=44100", "", 44_100),
        ("audio/pcm_s16le", "44100", 44_100),
        ("audio/pcm; rate=44100", "22050", 44_100),
        ("audio/pcm", "44.1", RATE),
        ("audio/pcm", "44", RATE),
        ("audio/pcm", "99999", 99_999),
        ("audio/pcm", "999999", RATE),
        ("audio/pcm", "٤٤100", RATE),
    ],
)
def test_the_rate_that_the_answer_s_head_tells_is_obeyed(
    server: FakeSpeechServer, kind: str, said: str, rate: int
) -> None:
    async def script(reply: Reply) -> None:
        await reply.begin(kind, headers={"X-Sample-Rate": said} if said else {})
        await reply.send(pcm(100, 44_100))

    server.script = script
    with loaded(server) as model:
        assert model.native_sample_rate == rate


def test_a_server_that_changes_its_rate_later_keeps_its_pitch(server: FakeSpeechServer) -> None:
    async def script(reply: Reply) -> None:
        await reply.send(wav(pcm(500, 48_000), rate=48_000))

    with loaded(server) as model:
        assert model.native_sample_rate == RATE
        server.script = script
        samples = sound_of(list(stream(model)))
    assert abs(samples.size - RATE // 2) <= 2
    middle = slice(RATE // 10, RATE // 10 * 4)
    assert np.allclose(samples[middle], tone(500)[middle], atol=0.02)


def test_stereo_is_mixed(server: FakeSpeechServer) -> None:
    async def script(reply: Reply) -> None:
        both = np.repeat(np.frombuffer(pcm(100), "<i2"), 2)
        await reply.send(wav(both.tobytes(), channels=2))

    with loaded(server) as model:
        server.script = script
        assert np.allclose(sound_of(list(stream(model))), tone(100), atol=1e-4)


# --- loading ---


def test_a_server_that_is_not_there_is_named_at_the_load() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1/audio/speech"
        meta = ModelMeta(model_id="m", family="f", backend="http", settings={"url": url})
        with pytest.raises(Unavailable, match="cannot be reached") as raised, loaded_as(meta):
            pass
    assert url in raised.value.message


def test_a_server_that_accepts_and_says_nothing_is_given_up(server: FakeSpeechServer) -> None:
    server.script = hangs
    with (
        pytest.raises(Unavailable, match="no sound within 100 ms"),
        loaded(server, first_byte_ms="100"),
    ):
        pass


def test_at_the_load_the_server_s_own_words_are_told(server: FakeSpeechServer) -> None:
    server.script = refusing(404, json.dumps({"error": {"message": "model 'tts-9' not found"}}))
    with pytest.raises(Unavailable, match="model 'tts-9' not found"), loaded(server):
        pass


def test_a_server_without_sound_is_refused_at_the_load(server: FakeSpeechServer) -> None:
    async def silent(reply: Reply) -> None:
        await reply.begin()

    server.script = silent
    with pytest.raises(Unavailable, match="without any sound"), loaded(server):
        pass


def test_unloading_leaves_no_thread_and_no_connection(server: FakeSpeechServer) -> None:
    process = psutil.Process()
    threads, handles = threading.active_count(), process.num_fds()
    for _ in range(3):
        with loaded(server) as model:
            server.scripts = [speaks, speaks_and_hangs]
            list(stream(model))
            unfinished = stream(model)
            next(unfinished)
            unfinished.close()
    assert threading.active_count() == threads
    # The server's ends of the connections are in this process too, and close a little later.
    for _ in range(100):
        if process.num_fds() <= handles:
            return
        time.sleep(0.05)
    raise AssertionError(f"{process.num_fds() - handles} descriptors are still open")


@pytest.mark.parametrize(
    ("settings", "kind", "said"),
    [
        ({"url": ""}, InvalidArgument, "needs the setting 'url'"),
        ({"url": "ftp://host/x"}, InvalidArgument, "needs the setting 'url'"),
        ({"url": "http://me:pw@host/v1"}, InvalidArgument, "holds a password"),
        ({"api_key": "sk-1"}, UnknownName, "did you mean 'api_key_env'"),
        ({"api_key_env": "NO_SUCH_KEY"}, InvalidArgument, "'NO_SUCH_KEY'.*is not set"),
        ({"response_format": "mp3"}, InvalidArgument, "pcm or wav, got 'mp3'"),
        ({"first_byte": "1"}, UnknownName, "did you mean 'first_byte_ms'"),
        ({"first_byte_ms": "0"}, InvalidArgument, "from 1 to"),
        ({"retries": "-1"}, InvalidArgument, "from 0 to 10"),
        ({"sample_rate": "nan"}, InvalidArgument, "sample_rate"),
        ({"speed": "9"}, InvalidArgument, "speed"),
        ({"body": "{"}, InvalidArgument, "not JSON"),
        ({"body": "[]"}, InvalidArgument, "JSON object"),
        ({"body": '{"input": "x"}'}, InvalidArgument, "'input'"),
        ({"voice.amber": "a", "voice": "ambre"}, UnknownName, "did you mean 'amber'"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_in_words(
    settings: dict[str, str], kind: type[DuplexError], said: str
) -> None:
    meta = ModelMeta(
        model_id="m",
        family="f",
        backend="http",
        settings={"url": "http://127.0.0.1:1/v1/audio/speech", **settings},
    )
    with pytest.raises(kind, match=said):
        read_http_settings(meta, {"PATH": ""})


@pytest.mark.parametrize(
    ("url", "posted"),
    [
        ("http://h:1/v1", "http://h:1/v1/audio/speech"),
        ("http://h:1/v1/", "http://h:1/v1/audio/speech"),
        ("https://h/api/v1/audio/speech", "https://h/api/v1/audio/speech"),
        ("http://h/tts?x=1", "http://h/tts?x=1"),
    ],
)
def test_an_address_is_the_endpoint_or_its_base(url: str, posted: str) -> None:
    meta = ModelMeta(model_id="m", family="f", settings={"url": url})
    assert read_http_settings(meta).url == posted


def test_a_query_is_not_shown() -> None:
    meta = ModelMeta(model_id="m", family="f", settings={"url": "http://h/tts?key=sk-1"})
    assert read_http_settings(meta).where == "http://h/tts"


def test_voices_are_the_entry_s_and_may_have_other_names_there(server: FakeSpeechServer) -> None:
    meta = entry(server, **{"voice.amber": "af_heart"}).model_copy(
        update={"voices": ["tara", "amber"], "languages": ["en-US", "de"]}
    )
    with loaded_as(meta) as model:
        assert model.voices == ("tara", "amber")
        assert model.check_voice(VoiceSpec("", "")) == VoiceSpec("tara", "en-US", {})
        assert model.check_voice(VoiceSpec("amber", "en")).language == "en-US"
        with pytest.raises(UnknownName, match="did you mean 'tara'"):
            model.check_voice(VoiceSpec("tarra", ""))
        with pytest.raises(UnknownName, match="language"):
            model.check_voice(VoiceSpec("", "fr"))
        with pytest.raises(UnknownName, match="setting"):
            model.check_voice(VoiceSpec("", "", {"pitch": "1"}))
        with pytest.raises(InvalidArgument, match="speed"):
            model.check_voice(VoiceSpec("", "", {"speed": "fast"}))


def test_an_entry_that_names_no_voice_leaves_it_to_the_server(server: FakeSpeechServer) -> None:
    with loaded(server) as model:
        assert model.voices == ("default",)
        assert model.check_voice(VoiceSpec("", "tlh")).language == "tlh"


async def test_the_loader_takes_the_backend_before_the_family(server: FakeSpeechServer) -> None:
    loader = ModelLoader(adapter_for, SourceResolver())
    meta = entry(server).model_copy(update={"needs_gpu": True})
    loaded = await loader.load(meta, lambda _: None)
    assert (loaded.family, loaded.fallback_reason) == ("orpheus", "")
    assert loaded.model.native_sample_rate == RATE
    await loader.unload(loaded.model)
    loader.close()
