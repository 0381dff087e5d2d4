"""Cancelling, closing and pausing reach the speech server, whatever is going on."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from src.audio.pcm import Float32
from src.rpc.errors import (
    Unavailable,
)
from src.tts.families.http_speech import server as http_server
from src.tts.families.http_speech.line import Cut, Lines
from src.tts.tts_base import CancelToken, PcmChunk
from tests.speech_server import (
    PATIENCE_S,
    RATE,
    FakeSpeechServer,
    Reply,
    Script,
    hangs,
    pcm,
    speaks,
    told,
)
from tests.unit.http_models import (
    after,
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


# --- cancelling and pausing ---


@pytest.mark.parametrize("script", [hangs, begins_and_hangs, speaks_and_hangs])
def test_cancelling_closes_the_request_even_in_a_blocked_read(
    server: FakeSpeechServer, script: Script
) -> None:
    with loaded(server, retries="3") as model:
        server.script = script
        cancel, chunks = CancelToken(), list[PcmChunk]()
        thread = threading.Thread(target=lambda: chunks.extend(stream(model, cancel=cancel)))
        thread.start()
        asked = server.wait_for_request()
        time.sleep(0.1)
        assert not asked.over.is_set()
        cancel.cancel()
        assert asked.over.wait(PATIENCE_S)
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert asked.lost
    assert len(server.asked) == 1


def test_cancelling_in_a_pause_closes_the_request_before_anybody_reads_on(
    server: FakeSpeechServer,
) -> None:
    with loaded(server) as model:
        server.script = speaks_and_hangs
        cancel = CancelToken()
        chunks = stream(model, "One.", "Two.", cancel=cancel)
        next(chunks)
        cancel.cancel()
        assert server.asked[0].over.wait(PATIENCE_S)
        assert list(chunks) == []
    assert server.asked[0].lost
    assert len(server.asked) == 1


def test_closing_the_stream_closes_the_request(server: FakeSpeechServer) -> None:
    with loaded(server) as model:
        server.script = speaks_and_hangs
        with closing(stream(model)) as chunks:
            next(chunks)
        assert server.asked[0].over.wait(PATIENCE_S)
        assert server.asked[0].lost


def test_what_is_cancelled_before_it_begins_asks_nothing(server: FakeSpeechServer) -> None:
    with loaded(server) as model:
        cancel = CancelToken()
        cancel.cancel()
        assert list(stream(model, cancel=cancel)) == []
    assert server.asked == []


def test_what_is_cancelled_before_it_is_connected_is_not_sent(server: FakeSpeechServer) -> None:
    lines = Lines({}, 0)
    with lines.lend() as line:
        line.cut(Cut.CANCELLED)
        with pytest.raises(httpx.TransportError):
            line.send(server.url, {"input": "Hello."}, 5.0)
    assert server.asked == []


def test_cancelling_between_two_tries_ends_the_waiting(
    server: FakeSpeechServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "_MOST_WAIT_S", 1000.0)
    with loaded(server, retries="10", first_byte_ms="600000") as model:
        server.script = refusing(503, Retry_After="500")
        cancel = CancelToken()
        timer = after(200, cancel.cancel)
        assert list(stream(model, cancel=cancel)) == []
        timer.join()
    assert len(server.asked) == 1


def test_a_cancelled_request_takes_no_other_with_it(server: FakeSpeechServer) -> None:
    with loaded(server) as model:
        server.scripts = [speaks_and_hangs, speaks_and_hangs]
        one, two = CancelToken(), CancelToken()
        first, second = stream(model, cancel=one), stream(model, cancel=two)
        next(first)
        next(second)
        one.cancel()
        assert server.asked[0].over.wait(PATIENCE_S)
        assert not server.asked[1].over.is_set()
        assert list(first) == []
        two.cancel()
        assert list(second) == []


def test_a_pause_stops_the_server_by_flow_control(server: FakeSpeechServer) -> None:
    seconds = 100

    async def script(reply: Reply) -> None:
        for _ in range(seconds):
            await reply.send(pcm(1000))

    with loaded(server) as model:
        server.script = script
        chunks = stream(model, "A long story. " * 10)
        # So much has gone well that the system would by now open its window wide.
        heard = 0
        while heard < 40 * RATE:
            heard += next(chunks).samples.size
        asked, before = server.asked[0], -1
        while before != asked.sent:
            before = asked.sent
            time.sleep(0.5)
        assert asked.sent < (heard + 10 * RATE) * 2
        assert not asked.over.is_set()
        assert heard + sound_of(list(chunks)).size == seconds * RATE


def test_a_pause_is_no_time_out(server: FakeSpeechServer) -> None:
    resumed = threading.Event()

    async def script(reply: Reply) -> None:
        await reply.send(pcm(100))
        await told(resumed)
        await asyncio.sleep(0.1)
        await reply.send(pcm(100))

    with loaded(server, chunk_ms="500") as model:
        server.script = script
        chunks = stream(model)
        next(chunks)
        time.sleep(0.7)
        resumed.set()
        assert sound_of(list(chunks)).size == RATE // 10


def test_a_connection_that_the_server_ends_is_not_kept_open_from_here(
    server: FakeSpeechServer,
) -> None:
    async def last(reply: Reply) -> None:
        reply.closes = True
        await speaks(reply)

    with loaded(server) as model:
        server.script = last
        list(stream(model))
        port = int(server.url.split(":")[2].split("/")[0])
        for _ in range(100):
            ends = [c for c in psutil.Process().net_connections() if c.raddr and c.raddr[1] == port]
            # Another state than these has no owner any more.
            if not {end.status for end in ends} & {psutil.CONN_ESTABLISHED, psutil.CONN_CLOSE_WAIT}:
                break
            time.sleep(0.05)
        else:
            raise AssertionError("the connection is still open")


def test_many_streams_at_once_do_not_mix(server: FakeSpeechServer) -> None:
    async def script(reply: Reply) -> None:
        number = int(reply.asked.body["input"])
        level = np.full(RATE // 10, number * 100, dtype="<i2").tobytes()
        for start in range(0, len(level), 777):
            await reply.send(level[start : start + 777])
            await asyncio.sleep(0)

    with loaded(server) as model:
        server.script = script
        heard: dict[int, Float32] = {}

        def speak(number: int) -> None:
            heard[number] = sound_of(list(stream(model, *[str(number)] * 5)))

        threads = [threading.Thread(target=speak, args=(number,)) for number in range(1, 21)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, samples in heard.items():
        assert samples.size == RATE // 2
        assert np.allclose(samples, number * 100 / 32768.0)
    assert len(heard) == 20
    assert server.connections() <= 20


# --- behind TLS ---


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A key and a certificate for 127.0.0.1, in one file."""
    path = tmp_path / "server.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
        "-subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1 -keyout - -out -"
    )
    try:
        made = subprocess.run(command.split(), capture_output=True, check=True)
    except FileNotFoundError:
        pytest.skip("no openssl here")
    path.write_bytes(made.stdout)
    return path


def test_behind_tls_it_speaks_and_is_cancelled_alike(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    with FakeSpeechServer().running(context) as server, loaded(server) as model:
        assert sound_of(list(stream(model, "One.", "Two."))).size == RATE // 5
        assert server.connections() == 1
        server.script = hangs
        cancel = CancelToken()
        thread = threading.Thread(target=lambda: list(stream(model, cancel=cancel)))
        thread.start()
        asked = server.wait_for_request(3)
        cancel.cancel()
        assert asked.over.wait(PATIENCE_S)
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        assert asked.lost


def test_a_certificate_that_nobody_vouches_for_is_refused(certificate: Path) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    with (
        FakeSpeechServer().running(context) as server,
        pytest.raises(Unavailable, match=r"cannot be reached.*certificate"),
        loaded(server),
    ):
        pass
