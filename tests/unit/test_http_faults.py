"""A speech server that refuses, breaks off, stalls or sends something else than sound."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from email.utils import formatdate

import pytest

from src.rpc.errors import (
    DuplexError,
    Exhausted,
    Internal,
    InvalidArgument,
    Unavailable,
)
from src.tts.families.http_speech.answers import retry_after_ms
from tests.speech_server import (
    PATIENCE_S,
    RATE,
    FakeSpeechServer,
    Reply,
    Script,
    hangs,
    pcm,
    speaks,
    wav,
)
from tests.unit.http_models import (
    SECRET,
    begins_and_hangs,
    loaded,
    refusing,
    sound_of,
    speaks_and_hangs,
    stream,
)


@pytest.fixture
def server() -> Iterator[FakeSpeechServer]:
    with FakeSpeechServer().running() as running:
        yield running


# --- answers that are no sound ---


OPENAI_ERROR = json.dumps(
    {"error": {"message": f"cannot say: {SECRET}", "type": "invalid_request_error", "code": "nope"}}
)


@pytest.mark.parametrize(
    ("script", "kind", "said"),
    [
        (refusing(401, OPENAI_ERROR), Unavailable, r"HTTP 401 \(nope\).*api_key_env"),
        (refusing(403), Unavailable, "HTTP 403.*api_key_env"),
        (refusing(404, "not found", "text/plain"), Unavailable, "no such model or voice"),
        (refusing(400, OPENAI_ERROR), InvalidArgument, r"HTTP 400 \(nope\)"),
        (refusing(422, '{"detail": [{"msg": "bad"}]}'), InvalidArgument, "HTTP 422"),
        (refusing(429, Retry_After="7"), Exhausted, "too much to do"),
        (refusing(500, "<html>", "text/html"), Unavailable, "HTTP 500"),
        (refusing(503, "[[[[", ""), Unavailable, "HTTP 503"),
        (refusing(302, Location="/elsewhere"), Unavailable, "HTTP 302.*setting url"),
        (refusing(200, OPENAI_ERROR), Unavailable, r"JSON instead of sound \(nope\)"),
        (refusing(200, "<html>log in</html>", "text/html"), Unavailable, "a web page instead"),
        (refusing(200, "event: x", "text/event-stream"), Unavailable, "'text/event-stream'"),
        (refusing(200, "ID3", "audio/mpeg"), Unavailable, "audio/mpeg.*response_format"),
    ],
)
def test_an_answer_that_is_no_sound_is_a_typed_error_in_words(
    server: FakeSpeechServer, script: Script, kind: type[DuplexError], said: str
) -> None:
    with loaded(server) as model:
        server.script = script
        with pytest.raises(kind, match=said) as raised:
            list(stream(model, SECRET))
        assert type(raised.value) is kind
        assert server.url in raised.value.message
        assert SECRET not in raised.value.message
        if kind is Exhausted:
            assert raised.value.retry_after_ms == 7_000
        server.script = speaks
        assert sound_of(list(stream(model))).size == RATE // 10


def test_an_error_body_without_end_is_read_in_part(server: FakeSpeechServer) -> None:
    async def script(reply: Reply) -> None:
        await reply.begin("text/html")
        while True:
            await reply.send(b"x" * 1000)

    with loaded(server) as model:
        server.script = script
        with pytest.raises(Unavailable, match="web page"):
            list(stream(model))
        assert server.asked[0].over.wait(PATIENCE_S)
        assert server.asked[0].lost


def test_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after_ms("2") == 2_000
    assert 8_000 < (retry_after_ms(formatdate(time.time() + 10, usegmt=True)) or 0) <= 10_000
    assert retry_after_ms(formatdate(time.time() - 10, usegmt=True)) == 0
    for nonsense in ("", "soon", "nan", "inf"):
        assert retry_after_ms(nonsense) is None


# --- trying again ---


def test_what_passes_is_tried_again_before_the_first_sound(server: FakeSpeechServer) -> None:
    async def dies(reply: Reply) -> None:
        reply.die()

    async def begins_and_dies(reply: Reply) -> None:
        await reply.begin()
        reply.die()

    with loaded(server, retries="4") as model:
        server.scripts = [refusing(503), dies, begins_and_dies, refusing(429, Retry_After="0")]
        assert sound_of(list(stream(model))).size == RATE // 10
    assert len(server.asked) == 5


def test_tries_are_counted(server: FakeSpeechServer) -> None:
    with loaded(server, retries="2") as model:
        server.script = refusing(503)
        with pytest.raises(Unavailable, match="HTTP 503"):
            list(stream(model))
    assert len(server.asked) == 3


@pytest.mark.parametrize("script", [refusing(400), refusing(401), refusing(429, Retry_After="3")])
def test_what_does_not_pass_soon_is_not_tried_again(
    server: FakeSpeechServer, script: Script
) -> None:
    with loaded(server, retries="3") as model:
        server.script = script
        with pytest.raises(DuplexError):
            list(stream(model))
    assert len(server.asked) == 1


def test_nothing_is_tried_again_once_there_was_sound(server: FakeSpeechServer) -> None:
    async def script(reply: Reply) -> None:
        await reply.send(pcm(100))
        reply.die()

    with loaded(server, retries="3") as model:
        server.script = script
        chunks = stream(model)
        assert next(chunks).samples.size
        with pytest.raises(Internal, match="broke off in mid-speech"):
            list(chunks)
    assert len(server.asked) == 1


# --- sound that breaks off, or does not stop ---


async def short_of_its_length(reply: Reply) -> None:
    await reply.begin(length=len(pcm(200)))
    await reply.send(pcm(100))
    reply.die()


async def short_of_its_header(reply: Reply) -> None:
    await reply.begin("audio/wav")
    await reply.send(wav(pcm(100), size=len(pcm(200))))


@pytest.mark.parametrize("script", [short_of_its_length, short_of_its_header])
def test_a_sound_that_is_shorter_than_promised_is_an_error(
    server: FakeSpeechServer, script: Script
) -> None:
    with loaded(server) as model:
        server.script = script
        with pytest.raises(Internal, match="broke off"):
            list(stream(model))


def test_a_server_that_does_not_stop_is_stopped(server: FakeSpeechServer) -> None:
    async def script(reply: Reply) -> None:
        while True:
            await reply.send(pcm(1000))

    with loaded(server) as model:
        server.script = script
        with pytest.raises(Internal, match="does not stop"):
            list(stream(model, "Ha."))
        assert server.asked[0].over.wait(PATIENCE_S)


# --- time-outs ---


@pytest.mark.parametrize("script", [hangs, begins_and_hangs])
def test_a_first_sound_that_does_not_come_is_not_waited_for(
    server: FakeSpeechServer, script: Script
) -> None:
    with loaded(server, first_byte_ms="150", chunk_ms="60000", retries="3") as model:
        server.script = script
        with pytest.raises(Unavailable, match="no sound within 150 ms"):
            list(stream(model))
        assert server.asked[0].over.wait(PATIENCE_S)
        assert server.asked[0].lost
    assert len(server.asked) == 1


async def speaks_until_it_closes_and_hangs(reply: Reply) -> None:
    """The answer's end is that of its connection, as in HTTP/1.0."""
    reply.write_as_it_is(b"HTTP/1.1 200 OK\r\nContent-Type: audio/pcm\r\n\r\n" + pcm(100))
    await hangs(reply)


@pytest.mark.parametrize("script", [speaks_and_hangs, speaks_until_it_closes_and_hangs])
def test_a_sound_that_stalls_is_not_waited_for(server: FakeSpeechServer, script: Script) -> None:
    with loaded(server, chunk_ms="150") as model:
        server.script = script
        chunks = stream(model)
        assert next(chunks).samples.size
        with pytest.raises(Unavailable, match="fell silent for 150 ms"):
            list(chunks)
        assert server.asked[0].over.wait(PATIENCE_S)


def test_a_slow_server_that_keeps_on_is_heard_out(server: FakeSpeechServer) -> None:
    async def script(reply: Reply) -> None:
        await asyncio.sleep(0.3)
        for _ in range(4):
            await reply.send(pcm(50))
            await asyncio.sleep(0.1)

    with loaded(server, chunk_ms="2000") as model:
        server.script = script
        assert sound_of(list(stream(model))).size == RATE // 5
