"""The family through its adapter: real loading, frames and recordings; the weights are random."""

from __future__ import annotations

import gc
import logging
import resource
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from src.audio.pcm import Float32
from src.rpc.errors import (
    CorruptModel,
    FailedPrecondition,
    InvalidArgument,
    Unavailable,
    UnknownName,
)
from src.tts.adapters import adapter_for
from src.tts.adapters.adapter_sesame import SesameAdapter
from src.tts.catalog import ROOT, ModelMeta, load_catalog
from src.tts.families.csm.speech import SesameModel
from src.tts.loader import ModelLoader
from src.tts.sources import SourceResolver
from src.tts.tts_base import CancelToken, Segment, VoiceSpec

SHIPPED = ROOT / "configs" / "model_catalog.yaml"
SPEC = VoiceSpec("", "")


def files_of(folder: Path) -> dict[str, Path]:
    return {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}


def load(files: dict[str, Path], device: str = "cpu", **settings: str) -> SesameModel:
    meta = ModelMeta(model_id="sesame-tiny", family="sesame", settings=settings)
    return SesameAdapter().load(meta, files, device, lambda _: None)


def said(
    model: SesameModel, text: str, frames: int | None = None, spec: VoiceSpec = SPEC
) -> Float32:
    """The first `frames` frames of a text; then it is cut off."""
    cancel = CancelToken()
    stream = model.stream([Segment(text, 0)], spec, cancel)
    sound = [chunk.samples for chunk in islice(stream, frames)]
    cancel.cancel()
    stream.close()  # type: ignore[attr-defined]
    return np.concatenate(sound) if sound else np.empty(0, dtype=np.float32)


@pytest.fixture(scope="module")
def tiny_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smaller than the one of all tests: here nobody looks at what is computed."""
    from src.tts.families.csm.tiny import make_tiny_pack

    folder = tmp_path_factory.mktemp("csm") / "small"
    return make_tiny_pack(folder, hidden=32, layers=1, depth_layers=1)


@pytest.fixture(scope="module")
def model(tiny_pack: Path) -> Iterator[SesameModel]:
    model = load(files_of(tiny_pack), max_slots="4", positions="512")
    yield model
    model.unload()


# --- speaking ---


def test_a_text_is_24_khz_sound_in_range(model: SesameModel) -> None:
    sound = said(model, "Hello there.", 6)
    assert sound.size == 6 * 1920
    assert sound.dtype == np.float32
    assert model.native_sample_rate == 24_000
    assert np.abs(sound).max() <= 1.0
    assert float(np.std(sound)) > 0.0


def test_the_same_seed_says_the_same_and_another_does_not(model: SesameModel) -> None:
    one, again = said(model, "Hello.", 4), said(model, "Hello.", 4)
    other = said(model, "Hello.", 4, VoiceSpec("", "", {"seed": "8"}))
    assert np.array_equal(one, again)
    assert not np.allclose(one, other)


def test_sessions_that_speak_at_once_say_what_they_say_alone(model: SesameModel) -> None:
    specs = [VoiceSpec("", "", {"seed": str(seed)}) for seed in range(4)]
    alone = [said(model, f"Number {i}.", 6, spec) for i, spec in enumerate(specs)]
    with ThreadPoolExecutor(4) as threads:
        futures = [
            threads.submit(said, model, f"Number {i}.", 6, spec) for i, spec in enumerate(specs)
        ]
        together = [future.result(60) for future in futures]
    for one, same in zip(alone, together, strict=True):
        assert float(np.abs(one - same).max()) < 1e-4


@pytest.mark.parametrize("text", ["", " ", "…", "?!", "\u200b"])
def test_nothing_to_say_is_no_sound(model: SesameModel, text: str) -> None:
    assert not said(model, text).size


@pytest.mark.parametrize("text", ["x", "字", "word " * 1000], ids=["one", "han", "5000"])
def test_a_text_of_any_length_begins_at_once(model: SesameModel, text: str) -> None:
    assert said(model, text, 3).size == 3 * 1920


def test_a_text_that_does_not_end_is_cut(model: SesameModel) -> None:
    """These weights never say that they are done."""
    assert 10 < said(model, "x").size / 1920 < 80


# --- recordings ---


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("refs") / "ref"
    folder.mkdir()
    noise = np.random.default_rng(1)
    for voice in ("seed", "anna"):
        sound = noise.normal(0, 0.1, 24_000).astype(np.float32)
        soundfile.write(folder / f"{voice}.wav", sound, 24_000)
        (folder / f"{voice}.txt").write_text(f"This is {voice}.")
    return {f"ref/{path.name}": path for path in folder.iterdir()}


def pack_with(tiny_pack: Path, folder: Path, extra: dict[str, Path]) -> dict[str, Path]:
    """A pack of its own: links to the weights, and the recordings beside them."""
    for name, path in {**files_of(tiny_pack), **extra}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(path)
    return files_of(folder)


def test_every_recording_is_a_voice_that_sounds_of_it(
    tiny_pack: Path, recordings: dict[str, Path], tmp_path: Path, model: SesameModel
) -> None:
    spoken = load(pack_with(tiny_pack, tmp_path, recordings), max_slots="2", positions="512")
    assert spoken.voices == ("default", "anna")
    default, anna = said(spoken, "Hello.", 3), said(spoken, "Hello.", 3, VoiceSpec("anna", ""))
    none = said(model, "Hello.", 3)
    assert not np.allclose(default, anna)
    assert not np.allclose(default, none)
    assert np.array_equal(anna, said(spoken, "Hello.", 3, VoiceSpec("anna", "")))
    spoken.unload()


def test_a_pack_with_a_bad_recording_is_refused_and_leaves_nothing(
    tiny_pack: Path, tmp_path: Path
) -> None:
    soundfile.write(tmp_path / "x.wav", np.zeros((24_000, 2), dtype=np.float32), 24_000)
    files = pack_with(tiny_pack, tmp_path / "pack", {"ref/seed.wav": tmp_path / "x.wav"})
    before = live_models()
    with pytest.raises(InvalidArgument, match="mono"):
        load(files)
    assert live_models() == before


# --- loading ---


def live_models() -> int:
    from transformers import CsmForConditionalGeneration

    gc.collect()
    return sum(type(each) is CsmForConditionalGeneration for each in gc.get_objects())


@pytest.mark.parametrize("device", ["cuda:97", "tpu"])
def test_a_device_that_does_not_exist_is_refused(tiny_pack: Path, device: str) -> None:
    with pytest.raises(InvalidArgument, match=device):
        load(files_of(tiny_pack), device)


def test_settings_that_nobody_knows_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(UnknownName, match="did you mean 'max_slots'"):
        load({}, max_slot="2")


def test_one_folder_is_not_loaded_twice_on_other_terms(tiny_pack: Path, model: SesameModel) -> None:
    with pytest.raises(FailedPrecondition, match=r"max_slots 4 \(this one: 2\)"):
        load(files_of(tiny_pack), max_slots="2", positions="512")


def test_a_pack_without_weights_is_refused() -> None:
    with pytest.raises(CorruptModel, match="hf download sesame/csm-1b"):
        load({})


@pytest.mark.parametrize("where", ["weights.CsmWeights", "device_model.DeviceModel"])
def test_a_model_that_does_not_fit_says_what_to_lower(
    where: str, tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("full")

    files, before = pack_with(tiny_pack, tmp_path, {}), live_models()
    monkeypatch.setattr(f"src.tts.families.csm.{where}", full)
    with pytest.raises(Unavailable, match="memory of cpu; lower max_slots or positions"):
        load(files)
    monkeypatch.undo()
    assert live_models() == before
    load(files, max_slots="1", positions="256").unload()


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.fixture
def only_what_is_new() -> Iterator[None]:
    """Looking through all that pytest and torch have made takes longer than a load."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("only_what_is_new")
def test_fifty_loads_and_unloads_leave_nothing(tiny_pack: Path, tmp_path: Path) -> None:
    """The first few fill what torch and the allocator keep for themselves."""
    files, models = pack_with(tiny_pack, tmp_path, {}), live_models()
    tensors, resident = [], []
    for _ in range(50):
        model = load(files, max_slots="2", positions="256")
        assert said(model, "Hello.", 1).size
        dead = weakref.ref(model._lease.engine)
        model.unload()
        del model
        tensors.append(live_tensors())
        resident.append(resident_bytes())
        assert dead() is None
    assert live_models() == models
    assert len(set(tensors[1:])) == 1
    held = sum(path.stat().st_size for path in files.values())
    assert min(resident[-10:]) - min(resident[5:15]) < held, "a model's weights in 35 loads"


def test_two_hundred_utterances_leave_nothing(model: SesameModel) -> None:
    engine = model._lease.engine

    def utter(number: int) -> int:
        return said(model, f"{number}", 1).size

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(utter, range(20)))
        before = engine.run(lambda _: live_tensors())
        assert all(threads.map(utter, range(200)))
    assert engine.run(lambda _: live_tensors()) < before + 200, "less than one for an utterance"
    assert engine.stats.active == 0


# --- random weights ---


def shipped(model_id: str) -> ModelMeta:
    return load_catalog(SHIPPED).get(model_id)


def test_the_tiny_model_of_the_catalog_loads_by_name_and_says_what_it_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loader: Any = ModelLoader(adapter_for, SourceResolver())
    with caplog.at_level(logging.WARNING):
        loaded = loader._load(shipped("tiny-csm-random"), lambda _: None)
    assert "RANDOM WEIGHTS: tiny-csm-random" in caplog.text
    assert loaded.capabilities.own_engine
    assert said(loaded.model, "Hello.", 2).size
    loaded.model.unload()
    loader.close()


def test_random_weights_are_not_loaded_without_the_tag_that_says_so() -> None:
    meta = shipped("tiny-csm-random").model_copy(update={"tags": []})
    with pytest.raises(InvalidArgument, match="random-weights"):
        SesameAdapter().load(meta, {}, "cpu", lambda _: None)
