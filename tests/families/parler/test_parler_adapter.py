"""The family through its adapter: packs, descriptions, endings; the weights are random."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import tracemalloc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from src.audio.pcm import Float32
from src.rpc.errors import CorruptModel, Internal, InvalidArgument, Unavailable
from src.tts.adapters.adapter_parler_tts import ParlerTtsModel
from src.tts.families.parler.engine import MAX_DESCRIPTIONS
from src.tts.families.parler.frames import Ids
from src.tts.tts_base import CancelToken, Segment, VoiceSpec
from tests.families.parler.packs import (
    GREEDY,
    copy_of,
    edit_json,
    listening,
    load,
    said,
    torch_model,
)
from tests.families.parler.tiny import HOP, RATE, make_tiny_pack, make_tokenizer

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def model(brief_pack: Path) -> ParlerTtsModel:
    return load(brief_pack)


# --- speaking ---


def test_a_text_is_44_khz_sound_in_chunks_that_grow(model: ParlerTtsModel) -> None:
    chunks = [c.samples for c in model.stream([Segment("Hello.", 0)], GREEDY, CancelToken())]
    assert model.native_sample_rate == RATE
    assert [chunk.size // HOP for chunk in chunks[:4]] == [10, 20, 40, 21]
    sound = np.concatenate(chunks)
    assert sound.dtype == np.float32
    assert float(np.std(sound)) > 0.01
    assert np.abs(sound).max() <= 1.0


def test_the_first_chunk_comes_after_few_steps(
    model: ParlerTtsModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten frames, the eight steps of the codebooks' staircase, ten frames that it hears ahead."""
    with listening(model) as steps:
        stream = model.stream([Segment("Hello.", 0)], GREEDY, CancelToken())
        heard: list[int] = []
        decode = model._engine.decode

        def counting(ids: Ids) -> Float32:
            heard.append(len(steps))
            return decode(ids)

        monkeypatch.setattr(model._engine, "decode", counting)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
    assert heard[0] == 10 + 8 + 10


def test_another_description_is_another_sound(model: ParlerTtsModel) -> None:
    other = VoiceSpec("", "", {"description": "A loud old man.", "temperature": "0"})
    assert not np.array_equal(said(model, "Hello."), said(model, "Hello.", other))


def test_temperature_varies_and_none_repeats(model: ParlerTtsModel) -> None:
    warm = VoiceSpec("", "", {"temperature": "1"})
    assert not np.array_equal(said(model, "Hi.", warm), said(model, "Hi.", warm))
    assert np.array_equal(said(model, "Hi."), said(model, "Hi."))


def test_speech_that_ends_at_once_is_no_sound_and_no_error(tmp_path: Path) -> None:
    """Every frame holds a mark; the package's codec would raise on the none that are left."""
    model = load(make_tiny_pack(tmp_path / "mute", end_gain=1e4))
    assert not said(model, "Hello.").size
    assert [
        w.text for c in model.stream([Segment("Hi.", 0)], GREEDY, CancelToken()) for w in c.words
    ]


def test_speech_ends_at_its_mark_without_the_rest_of_the_staircase(tmp_path: Path) -> None:
    model = load(make_tiny_pack(tmp_path / "ending", end_gain=4.0, min_steps=40))
    torch.manual_seed(1)
    with listening(model) as steps:
        sound = said(model, "Hello.", VoiceSpec("", "", {"temperature": "1"}))
    assert 0 < sound.size // HOP < model._engine.frames(4_000)
    # A frame takes 9 steps; the one with the mark is the last.
    assert len(steps) == sound.size // HOP + 9


def test_a_model_with_few_positions_is_cut_there_and_a_long_text_refused(tmp_path: Path) -> None:
    """Beyond its last position the package raises an index error from the middle of a word."""
    model = load(make_tiny_pack(tmp_path / "short", positions=100))
    assert said(model, "Hi.").size // HOP <= 100
    with pytest.raises(InvalidArgument, match="too long"):
        said(model, "This text takes about ninety places of its own, so that nothing is left.")


# --- descriptions ---


def test_descriptions_are_encoded_once_and_not_all_kept(brief_pack: Path) -> None:
    model = load(brief_pack)
    engine, encoded = model._engine, []
    torch_model(model).text_encoder.register_forward_hook(lambda *_: encoded.append(1))
    first = engine.describe("Voice 0.")
    for i in range(MAX_DESCRIPTIONS):
        engine.describe(f"Voice {i}.")
    assert engine.describe("Voice 0.") is first
    assert len(encoded) == MAX_DESCRIPTIONS
    engine.describe("One more.")
    assert engine.described == MAX_DESCRIPTIONS
    # The one that was longest not asked for went.
    engine.describe("Voice 0.")
    assert len(encoded) == MAX_DESCRIPTIONS + 1
    engine.describe("Voice 1.")
    assert len(encoded) == MAX_DESCRIPTIONS + 2


def test_a_packs_voices_are_encoded_while_it_loads(brief_pack: Path, tmp_path: Path) -> None:
    pack = copy_of(brief_pack, tmp_path / "voices")
    (pack / "descriptions.yaml").write_text("jon: Jon mumbles.\nlea: Lea sings.\n")
    model = load(pack)
    encoded: list[int] = []
    torch_model(model).text_encoder.register_forward_hook(lambda *_: encoded.append(1))
    assert model.voices == ("jon", "lea")
    lea = VoiceSpec("lea", "", GREEDY.settings)
    assert not np.array_equal(said(model, "Hi."), said(model, "Hi.", lea))
    assert not encoded


def test_descriptions_have_their_own_tokenizer_where_the_pack_has_one(
    brief_pack: Path, tmp_path: Path
) -> None:
    pack = copy_of(brief_pack, tmp_path / "multilingual")
    make_tokenizer(pack, extra=20)
    vocabulary = {"vocab_size": 279}
    edit_json(pack / "config.json", **vocabulary)
    _widen(pack / "model.safetensors", "embed_prompts.weight", 279)
    with pytest.raises(CorruptModel, match="description_tokenizer/"):
        load(pack)
    make_tokenizer(pack / "description_tokenizer")
    engine = load(pack)._engine
    assert len(engine._prompts) == 279
    assert len(engine._descriptions) == 259
    assert said(load(pack), "Hi.").size > RATE


def _widen(path: Path, name: str, rows: int) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    more = torch.randn(rows - weights[name].shape[0], weights[name].shape[1])
    weights[name] = torch.cat([weights[name], more])
    save_file(weights, path, metadata={"format": "pt"})


# --- ends ---


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "parler_tts"]


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_interrupted_it_stops_within_a_step_and_leaves_nothing(tiny_pack: Path, how: str) -> None:
    model, cancel = load(tiny_pack), CancelToken()
    with listening(model) as steps:
        stream = model.stream([Segment("Hello. " * 9, 0)], GREEDY, cancel)
        next(stream)
        if how == "cancel":
            cancel.cancel()
            assert not list(stream)
        else:
            stream.close()  # type: ignore[attr-defined]
        assert not threads()
        # Of 1292: it was no further than the chunks that may wait.
        assert len(steps) < 30 + 200


def test_an_error_in_the_models_thread_reaches_the_listener(
    brief_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package's own streamer would block for ever here."""
    model = load(brief_pack)
    inner, steps = torch_model(model).decoder, []
    forward = inner.forward

    def breaking(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        if len(steps) == 50:
            raise RuntimeError("no sound for Hello.")
        return forward(*args, **kwargs)

    monkeypatch.setattr(inner, "forward", breaking)
    stream = model.stream([Segment("Hello.", 0)], GREEDY, CancelToken())
    next(stream)
    with pytest.raises(Internal, match=r"parler-tiny.*RuntimeError") as failed:
        list(stream)
    assert "Hello" not in failed.value.message
    assert not threads()
    monkeypatch.setattr(inner, "forward", forward)
    assert said(model, "Hello.").size


def full(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("part", ["text_encoder", "decoder", "audio_encoder"])
def test_memory_that_is_short_while_speaking_is_said_so(
    brief_pack: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    model = load(brief_pack)
    for name in ("forward", "decode"):
        monkeypatch.setattr(getattr(torch_model(model), part), name, full, raising=False)
    with pytest.raises(Unavailable, match="max_streams"):
        said(model, "Hello.", VoiceSpec("", "", {"description": "A calm voice."}))
    assert not threads()


def test_memory_that_is_short_for_the_last_window_is_said_so(
    brief_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is decoded when the model has ended, and so outside of its call."""
    engine = load(brief_pack)._engine
    monkeypatch.setattr(engine._model.audio_encoder, "decode", full)
    with pytest.raises(Unavailable, match="max_streams"):
        engine.decode(np.zeros((engine.codebooks, 3), dtype=np.int64))


def test_memory_that_is_short_while_loading_is_said_so(
    brief_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(Unavailable, match="does not fit into the memory of cpu"):
        load(brief_pack)


def test_twenty_utterances_leave_nothing_behind(model: ParlerTtsModel) -> None:
    def speak(number: int) -> None:
        spec = VoiceSpec("", "", {"temperature": "1", "description": f"Voice {number % 2}."})
        stream = model.stream([Segment("Hi.", 0)], spec, CancelToken())
        next(stream)
        if not number % 5:
            list(stream)
        stream.close()  # type: ignore[attr-defined]

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    for number in range(4):
        speak(number)
    before = tensors()
    tracemalloc.start()
    try:
        taken = tracemalloc.get_traced_memory()[0]
        for number in range(20):
            speak(number)
        assert tensors() <= before
        # The whole ones alone are 740 kB of samples; half of it may be caches of the interpreter.
        assert tracemalloc.get_traced_memory()[0] - taken < 350_000
    finally:
        tracemalloc.stop()


def test_unloaded_the_weights_are_gone(brief_pack: Path) -> None:
    model = load(brief_pack)
    said(model, "Hi.")
    gone = [weakref.ref(torch_model(model)), weakref.ref(torch_model(model).audio_encoder)]
    model.unload()
    assert [ref() for ref in gone] == [None, None]


# --- packs ---


def test_shards_are_read(tmp_path: Path) -> None:
    pack = make_tiny_pack(tmp_path / "shards", shard="300KB", max_length=100)
    assert not (pack / "model.safetensors").exists()
    assert len(list(pack.glob("model-*.safetensors"))) > 2
    assert said(load(pack), "Hi.").size > RATE


def test_a_pack_is_only_read(brief_pack: Path) -> None:
    def state() -> dict[str, int]:
        return {str(p): p.stat().st_mtime_ns for p in sorted(brief_pack.rglob("*"))}

    before = state()
    load(brief_pack)
    assert state() == before


def test_a_missing_tensor_is_not_made_up(brief_pack: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    pack = copy_of(brief_pack, tmp_path / "holes")
    weights = load_file(pack / "model.safetensors")
    del weights["decoder.lm_heads.3.weight"]
    save_file(weights, pack / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptModel, match=r"decoder\.lm_heads\.3\.weight"):
        load(pack)


def test_a_truncated_file_is_refused(brief_pack: Path, tmp_path: Path) -> None:
    pack = copy_of(brief_pack, tmp_path / "cut")
    whole = (pack / "model.safetensors").read_bytes()
    (pack / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptModel, match="cannot be read"):
        load(pack)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "{}"),
        ("config.json", "{"),
        ("config.json", '{"model_type": "bert"}'),
        ("tokenizer.json", "{}"),
        ("generation_config.json", "{"),
    ],
)
def test_a_file_that_is_something_else_is_refused(
    brief_pack: Path, tmp_path: Path, name: str, content: str
) -> None:
    pack = copy_of(brief_pack, tmp_path / "else")
    (pack / name).write_text(content)
    with pytest.raises(CorruptModel, match="parler-tiny"):
        load(pack)


def test_a_tokenizer_of_another_model_is_refused(brief_pack: Path, tmp_path: Path) -> None:
    pack = copy_of(brief_pack, tmp_path / "tokens")
    make_tokenizer(pack, extra=5)
    with pytest.raises(CorruptModel, match="not of one model"):
        load(pack)


@pytest.mark.skipif(torch.cuda.is_available(), reason="optional: a machine without a GPU")
@pytest.mark.parametrize(("device", "error"), [("cuda:0", "this machine"), ("gpu", "no device")])
def test_a_device_that_is_not_there_is_refused(brief_pack: Path, device: str, error: str) -> None:
    with pytest.raises(InvalidArgument, match=error):
        load(brief_pack, device)


def test_precision_is_the_weights_and_not_the_codecs(brief_pack: Path) -> None:
    model = load(brief_pack, precision="bfloat16")
    inner = torch_model(model)
    assert inner.decoder.dtype == inner.text_encoder.dtype == torch.bfloat16
    assert inner.audio_encoder.dtype == torch.float32
    assert said(model, "Hi.").size > RATE


def test_loading_and_speaking_are_quiet_and_change_nothing_global(brief_pack: Path) -> None:
    """A process of its own: what a package does at its first import it does once."""
    program = f"""
import logging, random
import numpy as np
import torch
from pathlib import Path
root = logging.getLogger()
before = root.level, list(root.handlers), torch.initial_seed(), random.getstate()
drawn = np.random.get_state()[1].copy()
from tests.families.parler.packs import load, said
model = load(Path({str(brief_pack)!r}))
assert (root.level, list(root.handlers)) == before[:2]
assert torch.initial_seed() == before[2]
assert random.getstate() == before[3]
assert (np.random.get_state()[1] == drawn).all()
loaded = torch.get_rng_state()
assert said(model, "Hi.").size
assert torch.equal(torch.get_rng_state(), loaded)
"""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=100
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    assert ran.stdout == ""
