"""A real worker whose model lives behind an HTTP speech server, in a family that it lacks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml

from src.audio.pcm import FRAME_MS, from_bytes, level_dbfs
from src.rpc.errors import Internal, from_rpc_error
from src.rpc.generated import tts_pb2 as pb
from tests.integration.conftest import RunningWorker, StartWorker
from tests.speech_server import PATIENCE_S, FakeSpeechServer, Reply, hangs, pcm, wav

TEXT = "The quick brown fox jumps over the lazy dog. Then it sleeps."


@pytest.fixture
def server() -> Iterator[FakeSpeechServer]:
    with FakeSpeechServer().running() as running:
        yield running


async def speaks_at_16_khz(reply: Reply) -> None:
    await reply.begin("audio/wav")
    data = wav(pcm(1500, 16_000), rate=16_000, size=0)
    for start in range(0, len(data), 999):
        await reply.send(data[start : start + 999])


async def speaks_and_hangs(reply: Reply) -> None:
    await reply.send(pcm(500))
    await hangs(reply)


def catalog(tmp_path: Path, url: str) -> tuple[str, ...]:
    """Flags for a worker that knows the one model."""
    model = {
        "model_id": "orpheus-en",
        "family": "orpheus",
        "backend": "http",
        "languages": ["en"],
        "voices": ["tara", "leo"],
        "settings": {"url": url, "retries": "0", "first_byte_ms": "20000"},
    }
    path = tmp_path / "catalog.yaml"
    path.write_text(yaml.safe_dump({"models": [model]}), encoding="utf-8")
    packs = str(tmp_path / "none")
    return ("--adapter", "orpheus", "--catalog", str(path), "--voicepacks_dir", packs)


async def started(worker: RunningWorker, session_id: str, **asked: Any) -> pb.StartSessionResp:
    request = pb.StartSessionReq(session_id=session_id, **asked)
    response: pb.StartSessionResp = await worker.stub.StartSession(request)
    return response


def speak(worker: RunningWorker, session_id: str, text: str = TEXT) -> Any:
    chunk = pb.TextChunk(text=text, is_final=True, session_id=session_id, utterance_id="u1")
    return worker.stub.Synthesize(iter([chunk]))


async def heard(call: Any) -> list[pb.AudioFrame]:
    frames = []
    while (frame := await call.read()) is not grpc.aio.EOF:
        frames.append(frame)
    return frames


async def test_a_worker_speaks_through_it_with_words_and_the_server_s_rate(
    start_worker: StartWorker, server: FakeSpeechServer, tmp_path: Path
) -> None:
    server.script = speaks_at_16_khz
    worker = await start_worker(*catalog(tmp_path, server.url))
    session = await started(worker, "s1", voice="leo")
    assert (session.family, session.voice, session.words_estimated) == ("orpheus", "leo", True)
    assert session.native_sample_rate == 16_000
    *audio, end = await heard(speak(worker, "s1"))
    words = [word for frame in [*audio, end] for word in frame.words]
    assert [TEXT[w.char_start : w.char_end] for w in words] == TEXT.split()
    assert all(word.estimated for word in words)
    asked = [a.body for a in server.asked if a.body.get("voice") == "leo"]
    assert " ".join(body["input"] for body in asked) == TEXT
    assert abs(len(audio) * FRAME_MS - 1500 * len(asked)) <= FRAME_MS
    assert level_dbfs(np.concatenate([from_bytes(frame.pcm) for frame in audio])) > -30.0
    capabilities = await worker.stub.GetCapabilities(pb.GetCapReq())
    assert capabilities.adapter == "orpheus"
    models = (await worker.stub.ListModels(pb.ListModelsReq())).models
    assert [(m.model_id, m.family, list(m.voices)) for m in models] == [
        ("orpheus-en", "orpheus", ["tara", "leo"])
    ]


async def test_stop_closes_the_request_and_who_waits_for_the_server_keeps_nobody_waiting(
    start_worker: StartWorker, server: FakeSpeechServer, tmp_path: Path
) -> None:
    flags = ("--synthesis_threads", "1", *catalog(tmp_path, server.url))
    worker = await start_worker(*flags)
    server.asked.clear()
    server.scripts = [speaks_and_hangs, speaks_and_hangs]
    calls = []
    for name in ("s1", "s2"):
        await started(worker, name)
        calls.append(speak(worker, name, "Hello there."))
        # The second one speaks while the first waits for its server.
        assert len((await calls[-1].read()).pcm) > 0
    stopped = await worker.stub.Control(pb.ControlReq(session_id="s1", action=pb.STOP))
    assert stopped.state == pb.IDLE
    assert await asyncio.to_thread(server.asked[0].over.wait, PATIENCE_S)
    assert server.asked[0].lost
    assert not server.asked[1].over.is_set()
    assert (await heard(calls[0]))[-1].last
    calls[1].cancel()
    assert await asyncio.to_thread(server.asked[1].over.wait, PATIENCE_S)


async def test_a_server_that_dies_in_mid_speech_fails_the_utterance_and_not_the_worker(
    start_worker: StartWorker, server: FakeSpeechServer, tmp_path: Path
) -> None:
    async def dies(reply: Reply) -> None:
        await reply.send(pcm(500))
        reply.die()

    worker = await start_worker(*catalog(tmp_path, server.url))
    await started(worker, "s1")
    server.scripts = [dies]
    call = speak(worker, "s1", "Hello there.")
    for _ in range(24):
        assert len((await call.read()).pcm) > 0
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await heard(call)
    error = from_rpc_error(failed.value)
    assert isinstance(error, Internal)
    assert "broke off in mid-speech" in error.message
    assert (await heard(speak(worker, "s1", "Hello there.")))[-1].last
    assert "Hello there" not in worker.log.read_text()


async def test_a_worker_whose_default_server_is_away_says_which_and_exits(
    start_worker: StartWorker, tmp_path: Path
) -> None:
    url = "http://127.0.0.1:9/v1/audio/speech"
    worker = await start_worker(*catalog(tmp_path, url), ready=False)
    assert await worker.wait() == 1
    assert f"{url} cannot be reached" in worker.log.read_text()
