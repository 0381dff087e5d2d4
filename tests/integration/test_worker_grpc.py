"""The real worker as a process: eSpeak speaks over real gRPC, with a real registry beside it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from redis.asyncio import Redis

from src.audio.opus import OpusDecoder, opus_available
from src.audio.pcm import FRAME_BYTES, FRAME_SAMPLES, from_bytes, level_dbfs
from src.common.embedded_redis import EmbeddedRedis
from src.rpc import errors
from src.rpc.announcement import CHANNEL, KEY_PREFIX, Announcement
from src.rpc.errors import from_rpc_error
from src.rpc.generated import tts_pb2 as pb
from tests.integration.conftest import ROOT, RunningWorker, StartWorker

TEXT = "The quick brown fox jumps over the lazy dog. Then it sleeps."
LONG = "One sentence follows another, and nobody interrupts. " * 8
NOT_SERVING = 2


async def started(worker: RunningWorker, session_id: str = "s1", **asked: Any) -> str:
    response = await worker.stub.StartSession(pb.StartSessionReq(session_id=session_id, **asked))
    return str(response.session_id)


def speak(worker: RunningWorker, text: str, utterance_id: str = "u1", session: str = "s1") -> Any:
    first = pb.TextChunk(text=text, is_final=True, session_id=session, utterance_id=utterance_id)
    return worker.stub.Synthesize(iter([first]))


async def heard(call: Any) -> list[pb.AudioFrame]:
    return [frame async for frame in call]


async def control(worker: RunningWorker, action: pb.ControlAction) -> pb.ControlResp:
    answer: pb.ControlResp = await worker.stub.Control(
        pb.ControlReq(session_id="s1", action=action)
    )
    return answer


async def until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    for _ in range(int(seconds / 0.05)):
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        await asyncio.sleep(0.05)
    raise AssertionError("it never came to that")


# --- speech ---


async def test_speech_is_48_khz_frames_with_every_word_in_its_place(
    start_worker: StartWorker,
) -> None:
    worker = await start_worker()
    await started(worker)
    *audio, end = await heard(speak(worker, TEXT))
    assert [frame.seq for frame in audio] == list(range(len(audio)))
    assert {len(frame.pcm) for frame in audio} == {FRAME_BYTES}
    assert (end.last, end.seq) == (True, len(audio))
    words = [(frame, word) for frame in [*audio, end] for word in frame.words]
    assert [TEXT[w.char_start : w.char_end] for _, w in words] == TEXT.split()
    for frame, word in words:
        assert frame.media_time_ms <= word.start_ms < frame.media_time_ms + 20
    samples = np.concatenate([from_bytes(frame.pcm) for frame in audio])
    assert -30.0 < level_dbfs(samples) < -14.0
    assert 2.0 < samples.size / 48_000 < 8.0


async def test_pause_resume_and_stop_reach_a_real_engine(start_worker: StartWorker) -> None:
    worker = await start_worker()
    await started(worker)
    call = speak(worker, LONG)
    seqs = [(await call.read()).seq for _ in range(10)]
    paused = await control(worker, pb.PAUSE)
    while seqs[-1] < paused.last_seq:
        seqs.append((await call.read()).seq)
    following = asyncio.ensure_future(call.read())
    await asyncio.sleep(0.3)
    assert not following.done()
    assert (await control(worker, pb.RESUME)).last_seq == paused.last_seq
    seqs.append((await following).seq)
    assert seqs == list(range(paused.last_seq + 2))
    stopped = await control(worker, pb.STOP)
    rest = []
    while (frame := await call.read()) is not grpc.aio.EOF:
        rest.append(frame)
    assert rest[-1].last
    assert rest[-1].seq == stopped.last_seq + 1
    assert (await heard(speak(worker, "On we go.", "u2")))[-1].last


@pytest.mark.skipif(not opus_available(), reason="the package av is not installed")
async def test_opus_is_one_packet_a_frame(start_worker: StartWorker) -> None:
    worker = await start_worker()
    await started(worker, codec=pb.CODEC_OPUS)
    *audio, _ = await heard(speak(worker, "Hello there."))
    decoder = OpusDecoder()
    decoded = [decoder.decode(frame.pcm) for frame in audio]
    assert {frame.size for frame in decoded} == {FRAME_SAMPLES}
    assert {frame.codec for frame in audio} == {pb.CODEC_OPUS}
    assert level_dbfs(np.concatenate(decoded)) > -30.0


async def test_ten_sessions_at_once_and_clients_that_vanish(start_worker: StartWorker) -> None:
    worker = await start_worker()
    for number in range(10):
        await started(worker, f"s{number}")
    vanishing = [speak(worker, LONG, session=f"s{number}") for number in range(5)]
    staying = [speak(worker, TEXT, session=f"s{number}") for number in range(5, 10)]
    for call in vanishing:
        await call.read()
        call.cancel()
    lengths = {len(frames) for frames in await asyncio.gather(*map(heard, staying))}
    assert min(lengths) > 100
    again = [speak(worker, "Back again.", "u2", f"s{number}") for number in range(5)]
    assert all(frames[-1].last for frames in await asyncio.gather(*map(heard, again)))


async def test_text_of_any_kind_is_spoken_or_refused_and_the_worker_lives(
    start_worker: StartWorker,
) -> None:
    worker = await start_worker()
    await started(worker)
    texts = ["", "🙂🎉", "\x00\x07\x1b[31m", "Grüße 世界 привет שלום", "<speak>&amp;</speak>"]
    texts.append("a" * 3_000)
    for number, text in enumerate(texts):
        call = speak(worker, text, f"u{number}")
        first = await call.read()
        assert first.last or len(first.pcm) == FRAME_BYTES
        await control(worker, pb.STOP)
        while (await call.read()) is not grpc.aio.EOF:
            pass
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await heard(speak(worker, "x" * 1_000_000, "big"))
    assert isinstance(from_rpc_error(caught.value), errors.InvalidArgument)
    assert (await heard(speak(worker, "Still here.", "after")))[-1].seq > 20
    log = worker.log.read_text()
    assert "Still here" not in log
    assert "Traceback" not in log


# --- what it says about itself ---


async def test_reflection_names_the_service(start_worker: StartWorker) -> None:
    worker = await start_worker()
    stub = reflection_pb2_grpc.ServerReflectionStub(worker.channel)
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    answer = await stub.ServerReflectionInfo(iter([asked])).read()
    names = {service.name for service in answer.list_services_response.service}
    assert {"duplex.tts.v1.TTS", "grpc.health.v1.Health"} <= names


async def test_announced_while_alive_and_gone_afterwards(
    start_worker: StartWorker, redis_url: str
) -> None:
    worker = await start_worker("--redis_url", redis_url, "--name", "w1")
    async with Redis.from_url(redis_url) as redis:
        raw = await until(lambda: redis.get(KEY_PREFIX + "w1"))
        record = Announcement.model_validate_json(raw)
        assert record.target == worker.target
        assert record.default_model == "espeak-en"
        assert record.resident_models == ["espeak-en"]
        assert "espeak-en" in {model.model_id for model in record.models}
        assert 0 < await redis.pttl(KEY_PREFIX + "w1") <= 3_000
        async with redis.pubsub() as channel:
            await channel.subscribe(CHANNEL)
            worker.terminate()
            last = await _last_published(channel)
        assert last.draining
        assert await worker.wait() == 0
        assert await redis.get(KEY_PREFIX + "w1") is None


async def _last_published(channel: Any) -> Announcement:
    async for message in channel.listen():
        if message["type"] == "message":
            record = Announcement.model_validate_json(message["data"])
            if record.draining:
                return record
    raise AssertionError("nothing was published")


async def test_a_registry_that_is_away_is_found_when_it_comes(
    start_worker: StartWorker, free_port: Callable[[], int]
) -> None:
    port = free_port()
    worker = await start_worker("--redis_url", f"redis://127.0.0.1:{port}", "--name", "w2")
    await started(worker)
    assert (await heard(speak(worker, "Hello.")))[-1].last
    server = await EmbeddedRedis.start(port)
    try:
        async with Redis.from_url(server.url) as redis:
            await until(lambda: redis.get(KEY_PREFIX + "w2"))
    finally:
        await server.close()
    assert (await heard(speak(worker, "Still here.", "u2")))[-1].last
    events = [json.loads(line)["event"] for line in worker.log.read_text().splitlines()]
    assert events.count("the registry is not reachable; serving on and trying again") <= 2


# --- beginning and end ---


async def test_a_signal_drains(start_worker: StartWorker) -> None:
    worker = await start_worker()
    await started(worker)
    await started(worker, "s2")
    call = speak(worker, TEXT)
    await call.read()
    worker.terminate()
    await until(lambda: _is_draining(worker))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await started(worker, "s3")
    assert isinstance(from_rpc_error(caught.value), errors.Unavailable)
    assert await worker.health() == NOT_SERVING
    frames = []
    while (frame := await call.read()) is not grpc.aio.EOF:
        frames.append(frame)
    assert frames[-1].last
    assert frames[-1].seq > 100
    assert await worker.wait() == 0


async def _is_draining(worker: RunningWorker) -> bool:
    return bool((await worker.stub.GetCapabilities(pb.GetCapReq())).draining)


async def test_a_taken_port_is_said_in_one_line(
    start_worker: StartWorker,
) -> None:
    first = await start_worker()
    second = await start_worker("--port", str(first.port), ready=False)
    assert await second.wait() == 2
    (line,) = [text for text in second.log.read_text().splitlines() if "taken" in text]
    assert f"port {first.port} is taken" in line
    assert "Traceback" not in second.log.read_text()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--adapter", "espaek"], "espeak"),
        (["--adapter", "espeak", "--default_model", "espeak-em"], "espeak-en"),
        (["--adapter", "espeak", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_configuration_that_cannot_be_used_names_the_reason(flags: list[str], says: str) -> None:
    command = [sys.executable, "-m", "src.tts.worker", "--port", "0", "--redis_url", "", *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr


async def test_reload_takes_over_what_the_file_says_now(
    start_worker: StartWorker, tmp_path: Path
) -> None:
    config = tmp_path / "worker.yaml"
    config.write_text("worker: {adapter: espeak, lead_ms: 120}\n")
    worker = await start_worker("--config", str(config))
    config.write_text("worker: {adapter: espeak, lead_ms: 80, device: cuda:9}\n")
    changes = list((await control_reload(worker)).changes)
    assert any("lead_ms: 120 → 80" in change for change in changes)
    assert any("device" in change and "restart" in change for change in changes)
    config.write_text("worker: {adapter: espeak, laed_ms: 80}\n")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await control_reload(worker)
    assert "lead_ms" in from_rpc_error(caught.value).message


async def control_reload(worker: RunningWorker) -> pb.ControlResp:
    answer: pb.ControlResp = await worker.stub.Control(pb.ControlReq(action=pb.RELOAD))
    return answer


async def test_metrics_count_and_never_quote(
    start_worker: StartWorker, free_port: Callable[[], int]
) -> None:
    port = free_port()
    worker = await start_worker("--metrics_port", str(port))
    await started(worker)
    await heard(speak(worker, "Hippopotamus."))
    text = await asyncio.to_thread(_get, port)
    assert 'tts_first_audio_ms_count{model="espeak-en"} 1.0' in text
    assert 'tts_loads_total{model="espeak-en",outcome="ok"} 1.0' in text
    assert 'tts_utterances_total{outcome="done"} 1.0' in text
    assert "ippopotam" not in text


def _get(port: int) -> str:
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        return str(response.read().decode())
