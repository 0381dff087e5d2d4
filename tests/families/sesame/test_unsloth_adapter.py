"""LoRA voices as models of a worker: one base, one engine, coming and going while others speak."""

from __future__ import annotations

import asyncio
import gc
import logging
import shutil
import threading
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import soundfile
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from src.audio.pcm import Float32, from_bytes, to_float32
from src.common.processes import free_port
from src.orchestrator.ports import VoiceRequest
from src.orchestrator.routing import WorkerView, decide
from src.orchestrator.routing_policy import load_policy
from src.rpc.errors import CorruptModel, Exhausted, FailedPrecondition, InvalidArgument, UnknownName
from src.rpc.generated import tts_pb2 as pb
from src.rpc.generated import tts_pb2_grpc
from src.tts.adapters import adapter_for
from src.tts.catalog import ModelMeta, load_catalog
from src.tts.config import worker_config
from src.tts.families.csm import engines, weights
from src.tts.families.csm.speech import SesameModel
from src.tts.families.csm.tiny import make_tiny_pack
from src.tts.tts_base import CancelToken, Segment, VoiceSpec
from src.tts.worker import Worker
from tests.families.sesame.lora_packs import make_adapter

ROOT = Path(__file__).parents[3]
BASE, ADA, BOB = "sesame-tiny", "unsloth_sesame-ada", "unsloth_sesame-bob"
ENGINE = {"max_slots": "4", "positions": "256", "max_adapters": "2", "max_rank": "8"}
TEXT = "Hello there."
WAIT_S = 60
_ASK, _SERVING = health_pb2.HealthCheckRequest(), health_pb2.HealthCheckResponse.SERVING


@pytest.fixture(scope="module")
def packs(tiny_ending_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of voice packs: a base, and two LoRA voices of it that name it by its model id."""
    root = tmp_path_factory.mktemp("voicepacks")
    shutil.copytree(tiny_ending_pack, root / "sesame" / "tiny")
    describe(root / "sesame" / "tiny", settings=ENGINE)
    for seed, name in enumerate(("ada", "bob"), start=1):
        folder = root / "unsloth_sesame" / name
        make_adapter(tiny_ending_pack, folder, seed=seed)
        describe(folder, supports_lora=True, settings={"base": BASE, **ENGINE})
    return root


def describe(folder: Path, **fields: Any) -> None:
    pack = {"languages": ["en"], "native_sr": 24_000, **fields}
    (folder / "metadata.yaml").write_text(yaml.safe_dump(pack))


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert len(engines._PROCESS) == 0


class Shelf:
    """Loads the models of a folder of voice packs and unloads what a test leaves behind."""

    def __init__(self, packs: Path) -> None:
        empty = packs / "catalog.yaml"
        empty.write_text("models: []")
        self.catalog = load_catalog(empty, packs)
        self._loaded: list[SesameModel] = []

    def load(self, model_id: str, settings: Mapping[str, str] | None = None) -> SesameModel:
        meta = self.catalog.get(model_id)
        if settings is not None:
            meta = meta.model_copy(update={"settings": {**meta.settings, **settings}})
        return self.load_meta(meta)

    def load_meta(self, meta: ModelMeta) -> SesameModel:
        files = {n: Path(f.sources[0].removeprefix("path:")) for n, f in meta.files.items()}
        model = adapter_for(meta.family).load(meta, files, "cpu", lambda _: None)
        assert isinstance(model, SesameModel)
        self._loaded.append(model)
        return model

    def unload(self, model: SesameModel) -> None:
        self._loaded.remove(model)
        model.unload()

    def close(self) -> None:
        while self._loaded:
            self._loaded.pop().unload()


@pytest.fixture
def shelf(packs: Path) -> Iterator[Shelf]:
    shelf = Shelf(packs)
    yield shelf
    shelf.close()


def speak(model: SesameModel, text: str = TEXT, seed: int = 0) -> Float32:
    spec = VoiceSpec("", "", {"seed": str(seed)})
    chunks = model.stream([Segment(text, 0)], spec, CancelToken())
    return np.concatenate([chunk.samples for chunk in chunks])


def alike(one: Float32, other: Float32) -> bool:
    """The codec's rounding depends on the batch, the codes do not."""
    return one.shape == other.shape and bool(np.abs(one - other).max() < 1e-4)


# --- sharing


def test_a_base_and_its_voices_share_weights_and_engine(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, real = list[Path](), weights.load_weights

    def counted(folder: Path, **options: Any) -> Any:
        loads.append(folder)
        return real(folder, **options)

    monkeypatch.setattr(weights, "load_weights", counted)
    models = [shelf.load(name) for name in (ADA, BASE, BOB)]
    assert len({id(model._lease.engine) for model in models}) == 1
    assert len(loads) == 1


def test_two_voices_and_the_base_at_once_are_each_as_alone(shelf: Shelf) -> None:
    models = [shelf.load(name) for name in (BASE, ADA, BOB)]
    alone = [speak(model) for model in models]
    start = threading.Barrier(3)

    def together(model: SesameModel) -> Float32:
        start.wait(WAIT_S)
        return speak(model)

    before = models[0]._lease.engine.stats
    with ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(together, model) for model in models]
        heard = [future.result(WAIT_S) for future in asked]
    after = models[0]._lease.engine.stats
    assert after.frames - before.frames > after.ticks - before.ticks, "nobody shared a tick"
    assert all(alike(*pair) for pair in zip(heard, alone, strict=True))
    assert not any(alike(alone[i], alone[j]) for i, j in ((0, 1), (1, 2), (0, 2)))


def test_a_voice_comes_and_goes_while_others_speak(shelf: Shelf) -> None:
    base, ada = shelf.load(BASE), shelf.load(ADA)
    alone = [speak(base), speak(ada)]
    spec = VoiceSpec("", "", {"seed": "0"})
    streams = [m.stream([Segment(TEXT, 0)], spec, CancelToken()) for m in (base, ada)]
    heard = [[next(stream).samples] for stream in streams]
    bob = shelf.load(BOB)
    for stream, frames in zip(streams, heard, strict=True):
        frames.append(next(stream).samples)
    assert speak(bob).size
    shelf.unload(bob)
    for stream, frames in zip(streams, heard, strict=True):
        frames.extend(chunk.samples for chunk in stream)
    assert all(alike(np.concatenate(h), a) for h, a in zip(heard, alone, strict=True))


def test_the_base_may_go_first(shelf: Shelf) -> None:
    base, ada = shelf.load(BASE), shelf.load(ADA)
    said = speak(ada)
    shelf.unload(base)
    assert alike(speak(ada), said)


def test_the_last_to_go_frees_the_weights(shelf: Shelf) -> None:
    ada, bob = shelf.load(ADA), shelf.load(BOB)
    ref = ada._lease.engine.run(lambda model: weakref.ref(model._weights.model))  # type: ignore[attr-defined]
    shelf.unload(ada)
    assert ref() is not None
    shelf.unload(bob)
    del ada, bob
    gc.collect()
    assert ref() is None


def test_a_voice_prompt_is_read_with_the_voices_own_adapter(packs: Path, tmp_path: Path) -> None:
    shutil.copytree(packs, tmp_path / "packs")
    noise = np.random.default_rng(1).normal(0, 0.1, 24_000).astype(np.float32)
    for folder in ("sesame/tiny", "unsloth_sesame/ada"):
        (tmp_path / "packs" / folder / "ref").mkdir()
        soundfile.write(tmp_path / "packs" / folder / "ref" / "seed.wav", noise, 24_000)
    shelf = Shelf(tmp_path / "packs")
    try:
        base, ada = (shelf.load(name)._voices["default"].prefix for name in (BASE, ADA))
        assert base is not None
        assert ada is not None
        assert base.positions == ada.positions
        assert not np.array_equal(base.keys.numpy(), ada.keys.numpy())  # type: ignore[attr-defined]
    finally:
        shelf.close()


# --- refusals; each leaves no engine behind (see nothing_is_left)


def test_a_base_that_is_not_there_is_named_with_the_places(shelf: Shelf, packs: Path) -> None:
    with pytest.raises(InvalidArgument, match="sesame/gone") as refused:
        shelf.load(ADA, {"base": "sesame-gone"})
    assert str(packs / "sesame" / "gone") in str(refused.value)


@pytest.mark.parametrize(
    "written", ["{packs}/sesame/tiny", "../../sesame/tiny", "$PACKS/sesame/tiny"]
)
def test_a_base_may_be_a_folder(
    shelf: Shelf, packs: Path, written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACKS", str(packs))
    base = shelf.load(BASE)
    ada = shelf.load(ADA, {"base": written.format(packs=packs)})
    assert ada._lease.engine is base._lease.engine


def test_a_voice_without_a_base(shelf: Shelf) -> None:
    with pytest.raises(InvalidArgument, match="needs the setting 'base'"):
        shelf.load(ADA, {"base": ""})


def test_a_voice_is_never_tiny(shelf: Shelf) -> None:
    with pytest.raises(InvalidArgument, match="never 'tiny'"):
        shelf.load(ADA, {"tiny": "1"})


def test_an_unknown_setting_is_named(shelf: Shelf) -> None:
    with pytest.raises(UnknownName, match="max_slot"):
        shelf.load(ADA, {"max_slot": "1"})


def test_other_settings_than_the_bases_are_refused_with_the_difference(shelf: Shelf) -> None:
    shelf.load(BASE)
    with pytest.raises(FailedPrecondition, match=r"max_slots 4 \(this one: 8\)"):
        shelf.load(ADA, {"max_slots": "8"})


def test_a_base_without_settings_for_lora_shares_the_engine_of_its_voices(shelf: Shelf) -> None:
    ada = shelf.load(ADA)
    base = shelf.load(BASE, {"max_adapters": "0"})
    assert base._lease.engine is ada._lease.engine


def test_a_base_that_was_made_without_places_says_so(shelf: Shelf) -> None:
    shelf.load(BASE, {"max_adapters": "0"})
    with pytest.raises(FailedPrecondition, match=r"max_adapters 0 \(this one: 2\)"):
        shelf.load(ADA)


def test_files_without_an_adapter(shelf: Shelf) -> None:
    meta = shelf.catalog.get(ADA)
    with pytest.raises(CorruptModel, match=r"no 'adapter_config\.json'"):
        shelf.load_meta(meta.model_copy(update={"files": {}}))


def test_an_adapter_of_another_base_is_refused_before_any_weights_are_loaded(
    packs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(packs, tmp_path / "packs")
    other = make_tiny_pack(tmp_path / "other", hidden=96)
    shutil.rmtree(tmp_path / "packs" / "unsloth_sesame" / "ada")
    folder = make_adapter(other, tmp_path / "packs" / "unsloth_sesame" / "ada", seed=1)
    describe(folder, settings={"base": BASE})
    monkeypatch.delattr(weights, "load_weights")
    with pytest.raises(CorruptModel, match="of another base"):
        Shelf(tmp_path / "packs").load(ADA)


def test_more_voices_than_places_are_refused_and_leave_the_others(shelf: Shelf) -> None:
    few = {"max_adapters": "1"}
    ada = shelf.load(ADA, few)
    said = speak(ada)
    with pytest.raises(Exhausted, match="all 1 places"):
        shelf.load(BOB, few)
    assert alike(speak(ada), said)
    shelf.unload(ada)
    shelf.load(BOB, few)


def test_a_rank_above_the_engines_is_refused(shelf: Shelf) -> None:
    with pytest.raises(InvalidArgument, match="rank 8; this engine takes up to 4"):
        shelf.load(ADA, {"max_rank": "4"})


def test_a_pack_that_forgets_supports_lora_is_told(
    shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    meta = shelf.catalog.get(ADA).model_copy(update={"supports_lora": False})
    with caplog.at_level(logging.WARNING):
        shelf.load_meta(meta)
    assert "supports_lora: true" in caplog.text


# --- a whole worker


class Client:
    """Speaks to a worker in this process as the orchestrator would."""

    def __init__(self, worker: Worker, channel: grpc.aio.Channel) -> None:
        self.worker = worker
        self.stub = tts_pb2_grpc.TTSStub(channel)  # type: ignore[no-untyped-call]
        self.log: list[str] = []
        """The session of every frame, in the order in which they came."""

    async def say(self, session: str, model_id: str) -> Float32:
        """At 48 kHz."""
        await self.stub.StartSession(
            pb.StartSessionReq(session_id=session, model_id=model_id, lead_ms=10_000)
        )
        text = pb.TextChunk(text=TEXT, is_final=True, session_id=session, utterance_id="u")
        sound = []
        async for frame in self.stub.Synthesize(iter([text])):
            self.log.append(session)
            sound.append(to_float32(from_bytes(frame.pcm)))
        await self.stub.EndSession(pb.EndSessionReq(session_id=session))
        return np.concatenate(sound)


@asynccontextmanager
async def working(packs: Path) -> AsyncIterator[Client]:
    """Ada by default, Bob beside her; their base is only in memory because they are."""
    config = worker_config(
        ROOT / "configs" / "worker.yaml",
        {
            "worker.catalog": str(packs / "catalog.yaml"),
            "worker.voicepacks_dir": str(packs),
            "worker.port": free_port(),
            "worker.metrics_port": "off",
            "worker.loudness_dbfs": "off",
            "model_manager.default_model_id": ADA,
            "model_manager.preload_model_ids": [BOB],
            "redis.url": "",
        },
        environ={},
    )
    worker, stop = Worker(config, lambda: config), asyncio.Event()
    life = asyncio.create_task(worker.run(stop))
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{config.worker.port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            while (await health.Check(_ASK, wait_for_ready=True)).status != _SERVING:
                assert not life.done(), life.result()
                await asyncio.sleep(0.05)
            yield Client(worker, channel)
    finally:
        stop.set()
        await life
        gc.unfreeze()


async def test_two_lora_voices_speak_at_once_through_a_worker(packs: Path, shelf: Shelf) -> None:
    async with working(packs) as client:
        alone = [await client.say(f"alone {model}", model) for model in (ADA, BOB)]
        client.log.clear()
        heard = await asyncio.gather(client.say("a", ADA), client.say("b", BOB))
        assert max(client.log.index("a"), client.log.index("b")) < min(
            len(client.log) - 1 - client.log[::-1].index(session) for session in "ab"
        ), "one after the other"
    assert all(alike(*pair) for pair in zip(heard, alone, strict=True))
    assert not alike(*alone)


async def test_mode_lora_sends_sessions_to_a_lora_voice(packs: Path, shelf: Shelf) -> None:
    policy = load_policy(ROOT / "configs" / "routing.yaml")
    async with working(packs) as client:
        view = WorkerView(client.worker._describe())
        told = await client.stub.GetCapabilities(pb.GetCapReq())
        listed = (await client.stub.ListModels(pb.ListModelsReq())).models
    assert told.lora
    assert {m.model_id: m.supports_lora for m in listed} == {ADA: True, BOB: True, BASE: False}
    chosen = decide(VoiceRequest("s", mode="lora"), [view], policy, 0.0)
    assert chosen.model_id in (ADA, BOB)
    assert decide(VoiceRequest("s", mode="lora", model=BOB), [view], policy, 0.0).model_id == BOB
    with pytest.raises(InvalidArgument, match="is not lora"):
        decide(VoiceRequest("s", mode="lora", model=BASE), [view], policy, 0.0)
