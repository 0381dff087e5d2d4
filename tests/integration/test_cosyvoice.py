"""CosyVoice 2's real sources in a real worker process, over real gRPC, on small random weights."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from src.rpc.errors import Internal, from_rpc_error
from src.rpc.generated import tts_pb2 as pb
from src.tts.families.cosyvoice2.package import check_sources
from src.tts.tts_base import MissingPackage
from tests.integration import conftest
from tests.integration.conftest import RunningWorker, StartWorker

try:
    check_sources()
except MissingPackage:
    pytest.skip(
        "optional: CosyVoice 2's sources (COSYVOICE_HOME) and its extra are not here",
        allow_module_level=True,
    )

pytestmark = pytest.mark.timeout(600)
MODEL = "cosyvoice2-tiny"
TEXT = "Hello there, my friend. How are you?"


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.families.cosyvoice.tiny import make_tiny_pack

    folder = tmp_path_factory.mktemp("voicepacks") / "cosyvoice2" / "tiny"
    folder.parent.mkdir()
    make_tiny_pack(folder, mean_tokens=40)
    _break_at(folder / "llm.pt", ord("Q"))
    (folder / "metadata.yaml").write_text("languages: [en, zh]\nnative_sr: 24000\n")
    return folder.parents[1]


def _break_at(path: Path, text_id: int) -> None:
    """A text with this in it makes numbers that are no numbers, of which nothing can be drawn."""
    import torch

    weights = torch.load(path, weights_only=True)
    for name in ("llm.model.model.embed_tokens.weight", "llm.model.lm_head.weight"):
        weights[name][text_id] = float("nan")
    torch.save(weights, path)


@pytest.fixture
async def worker(
    packs: Path, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> RunningWorker:
    monkeypatch.setattr(conftest, "READY_S", 300.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = ("--default_model", MODEL, "--voicepacks_dir", str(packs), "--device", "cpu")
    return await start_worker("--adapter", "cosyvoice2", *flags)


async def session(worker: RunningWorker, name: str, **settings: str) -> None:
    asked = pb.StartSessionReq(session_id=name, settings={"seed": "7", **settings}, lead_ms=10_000)
    await worker.stub.StartSession(asked)


def speak(worker: RunningWorker, name: str, text: str = TEXT, utterance: str = "u1") -> Any:
    chunk = pb.TextChunk(text=text, is_final=True, session_id=name, utterance_id=utterance)
    return worker.stub.Synthesize(iter([chunk]))


async def rest_of(call: Any) -> list[pb.AudioFrame]:
    frames = []
    while (frame := await call.read()) is not grpc.aio.EOF:
        frames.append(frame)
    return frames


async def test_a_worker_speaks_pauses_stops_and_speaks_again(worker: RunningWorker) -> None:
    can = await worker.stub.GetCapabilities(pb.GetCapReq())
    assert (can.adapter, can.default_model_id, can.fallback) == ("cosyvoice2", MODEL, False)
    await _a_turn_in_both_ways_of_taking_text(worker)
    await _a_pause_a_resume_and_a_stop(worker)
    await _two_at_once_are_each_as_long_as_alone(worker)
    await _what_is_not_there_is_refused(worker)


async def _a_turn_in_both_ways_of_taking_text(worker: RunningWorker) -> None:
    for text in ("clauses", "flowing"):
        await session(worker, text, text=text, emotion="happy", speed="1.2")
        *audio, end = await rest_of(speak(worker, text))
        assert end.last
        assert [frame.seq for frame in audio] == list(range(len(audio)))
        words = [word for frame in [*audio, end] for word in frame.words]
        assert [TEXT[w.char_start : w.char_end] for w in words] == TEXT.split()
        assert any(any(frame.pcm) for frame in audio), "it is no silence"


async def _a_pause_a_resume_and_a_stop(worker: RunningWorker) -> None:
    await session(worker, "pausing")
    call = speak(worker, "pausing", TEXT * 3)
    seqs = [(await call.read()).seq for _ in range(5)]
    asked = {"session_id": "pausing"}
    paused = await worker.stub.Control(pb.ControlReq(action=pb.PAUSE, **asked))
    while seqs[-1] < paused.last_seq:
        seqs.append((await call.read()).seq)
    following = asyncio.ensure_future(call.read())
    await asyncio.sleep(0.3)
    assert not following.done()
    await worker.stub.Control(pb.ControlReq(action=pb.RESUME, **asked))
    seqs.append((await following).seq)
    assert seqs == list(range(len(seqs)))
    await worker.stub.Control(pb.ControlReq(action=pb.STOP, **asked))
    assert (await rest_of(call))[-1].last
    assert (await rest_of(speak(worker, "pausing", "Again.", "u2")))[-1].seq > 0


async def _two_at_once_are_each_as_long_as_alone(worker: RunningWorker) -> None:
    names = ["one", "two"]
    for name in names:
        await session(worker, name)
    alone = len(await rest_of(speak(worker, "one", "Hello there.", "u0")))
    calls = [rest_of(speak(worker, name, "Hello there.")) for name in names]
    assert [len(frames) for frames in await asyncio.gather(*calls)] == [alone, alone]


async def _what_is_not_there_is_refused(worker: RunningWorker) -> None:
    for settings, said in (({"emotion": "hapy"}, "happy"), ({"speed": "9"}, "0.5 to 2")):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await session(worker, "wrong", **settings)
        assert said in from_rpc_error(caught.value).message


async def test_an_error_of_the_language_model_reaches_the_client_and_the_worker_lives(
    worker: RunningWorker,
) -> None:
    await session(worker, "s1")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(rest_of(speak(worker, "s1", "Hi, Q.")), 60)
    assert isinstance(from_rpc_error(caught.value), Internal)
    assert (await rest_of(speak(worker, "s1", "Hi.", "u2")))[-1].seq > 0
