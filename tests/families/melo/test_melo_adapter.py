"""MeloTTS's real network through its adapter, on small random weights."""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import shutil
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from src.audio.pcm import Float32
from src.rpc.errors import CorruptModel, Internal, InvalidArgument, Unavailable, UnknownName
from src.tts.adapters import adapter_melo
from src.tts.adapters.adapter_melo import MeloAdapter, MeloModel
from src.tts.catalog import ModelMeta
from src.tts.families.melo.sources import SOURCE, package_folder
from src.tts.segmenter import Segmenter
from src.tts.tts_base import CancelToken, PcmChunk, Segment, VoiceSpec
from tests.families.melo.tiny import VOICES, files_of, make_tiny_pack
from tests.families.oracles import assert_frames_hold_all

STILL = {"noise": "0", "noise_w": "0"}
TEXT = "Hello world, this is a test. The second sentence is number two!"


def load(
    files: dict[str, Path],
    device: str = "cpu",
    settings: dict[str, str] | None = None,
    **changes: Any,
) -> MeloModel:
    meta = ModelMeta(model_id="melo-tiny", family="melo", settings=settings or {}, **changes)
    return MeloAdapter().load(meta, files, device, lambda _: None)


def segments(text: str) -> list[Segment]:
    segmenter = Segmenter()
    return segmenter.push(text) + segmenter.flush()


def chunks(model: MeloModel, text: str, voice: str = "", **settings: str) -> list[PcmChunk]:
    spec = VoiceSpec(voice, "", {**STILL, **settings})
    return list(model.stream(segments(text), spec, CancelToken()))


def speak(model: MeloModel, text: str, voice: str = "", **settings: str) -> Float32:
    said = [chunk.samples for chunk in chunks(model, text, voice, **settings)]
    return np.concatenate(said) if said else np.empty(0, dtype=np.float32)


@pytest.fixture(scope="module")
def model(tiny_pack: Path) -> Iterator[MeloModel]:
    loaded = load(files_of(tiny_pack))
    yield loaded
    loaded.unload()


@pytest.fixture
def pack(tiny_pack: Path, tmp_path: Path) -> dict[str, Path]:
    """A copy to spoil."""
    return files_of(Path(shutil.copytree(tiny_pack, tmp_path / "pack")))


def edit(pack: dict[str, Path], change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads(pack["config.json"].read_text())
    change(config)
    pack["config.json"].write_text(json.dumps(config))


# --- speaking ---


def test_one_chunk_a_segment_with_its_words(model: MeloModel) -> None:
    said = chunks(model, TEXT)
    assert len(said) == len(segments(TEXT))
    marks = [mark for chunk in said for mark in chunk.words]
    assert [mark.text for mark in marks] == TEXT.split()
    assert all(TEXT[mark.char_start : mark.char_end] == mark.text for mark in marks)
    assert all(mark.estimated for mark in marks)
    for chunk in said:
        assert chunk.samples.dtype == np.float32
        assert 0.01 < float(np.abs(chunk.samples).max()) <= 1.0
        assert chunk.words[-1].end_ms <= chunk.samples.size * 1000 / 44_100
    assert model.native_sample_rate == 44_100


def test_segments_are_pulled_as_they_are_spoken(model: MeloModel) -> None:
    pulled: list[str] = []

    def written() -> Iterator[Segment]:
        for text in ("This is one.", "This is two.", "This is three."):
            pulled.append(text)
            yield Segment(text, 0)

    stream = model.stream(written(), VoiceSpec("", "", STILL), CancelToken())
    next(stream)
    assert len(pulled) == 1
    next(stream)
    assert len(pulled) == 2
    stream.close()  # type: ignore[attr-defined]
    assert len(pulled) == 2


def test_all_that_is_said_becomes_frames(model: MeloModel) -> None:
    assert_frames_hold_all(chunks(model, TEXT), 44_100)


def test_voices_speeds_and_noise_are_heard(model: MeloModel) -> None:
    usual = speak(model, "This is a test.")
    assert np.array_equal(usual, speak(model, "This is a test.", "EN-US"))
    other = speak(model, "This is a test.", "EN-BR")
    assert usual.size != other.size or not np.allclose(usual, other, atol=1e-3)
    assert speak(model, "This is a test.", speed="2").size < 0.7 * usual.size
    assert speak(model, "This is a test.", speed="0.5").size > 1.5 * usual.size
    noisy = speak(model, "This is a test.", noise="0.6")
    assert noisy.size != usual.size or not np.allclose(usual, noisy, atol=1e-3)


def test_streams_at_once_say_what_they_say_alone(model: MeloModel) -> None:
    texts = [f"This is number {i}, and the test {i * 7} of a qzxv{i}." for i in range(8)]
    voices = [*VOICES, *VOICES]
    alone = [speak(model, text, voice) for text, voice in zip(texts, voices, strict=False)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda i: speak(model, texts[i], voices[i]), range(8)))
    for one, same in zip(alone, together, strict=True):
        np.testing.assert_allclose(one, same, atol=1e-5)


def test_streams_may_take_turns(model: MeloModel) -> None:
    alone = chunks(model, TEXT, "EN-AU")
    spec = VoiceSpec("EN-AU", "", STILL)
    mine = model.stream(segments(TEXT), spec, CancelToken())
    other = model.stream(segments(TEXT), VoiceSpec("EN-BR", "", STILL), CancelToken())
    for expected in alone:
        next(other)
        np.testing.assert_allclose(next(mine).samples, expected.samples, atol=1e-5)


def test_two_models_do_not_share_their_bert(
    model: MeloModel, tmp_path: Path, tiny_pack: Path
) -> None:
    """The package keeps one in a global, whoever loaded it."""
    before = speak(model, TEXT)
    other = load(files_of(make_tiny_pack(tmp_path / "other", seed=5)))
    theirs = speak(other, TEXT)
    assert np.array_equal(before, speak(model, TEXT))
    assert theirs.size != before.size or not np.allclose(theirs, before, atol=1e-3)
    other.unload()
    assert np.array_equal(before, speak(model, TEXT))


def test_bert_is_heard(pack: dict[str, Path], model: MeloModel) -> None:
    edit(pack, lambda config: config["data"].update(disable_bert=True))
    deaf = load(pack)
    sound, usual = speak(deaf, "This is a test."), speak(model, "This is a test.")
    assert sound.size
    assert sound.size != usual.size or not np.allclose(sound, usual, atol=1e-3)


@pytest.mark.parametrize("text", ["", " ", "…", "?!", "\u200b", "#", "😀", "(...)", "'"])
def test_nothing_to_say_is_no_sound(model: MeloModel, text: str) -> None:
    stream = model.stream([Segment(text, 0)], VoiceSpec("", "", STILL), CancelToken())
    assert sum(chunk.samples.size for chunk in stream) == 0


@pytest.mark.parametrize(
    "text",
    ["a", "# hello", "9" * 90, "1-2-3", "qzxvk" * 30, "字 and word", "x" * 110, "$..5 ¥¥ 1:99"],
)
def test_odd_texts_are_spoken(model: MeloModel, text: str) -> None:
    (chunk,) = model.stream([Segment(text, 0)], VoiceSpec("", "", STILL), CancelToken())
    assert chunk.samples.size
    assert np.isfinite(chunk.samples).all()


def test_a_long_segment_is_spoken_in_runs_that_bert_takes(model: MeloModel) -> None:
    calls = []
    hook = model._network._bert.register_forward_pre_hook(
        lambda _, __, options: calls.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    text = "Hello this is a test of the world. " * 25
    (chunk,) = model.stream([Segment(text, 0)], VoiceSpec("", "", STILL), CancelToken())
    hook.remove()
    assert len(calls) > 2
    assert max(calls) <= 102
    assert len(chunk.words) == 25 * 8


# --- cancelling, faults ---


def test_after_cancel_no_segment_is_taken_and_nothing_is_said(model: MeloModel) -> None:
    cancel = CancelToken()
    taken = []

    def written() -> Iterator[Segment]:
        for number in range(5):
            taken.append(number)
            yield Segment(f"This is number {number}.", 0)

    stream = model.stream(written(), VoiceSpec("", "", STILL), cancel)
    next(stream)
    cancel.cancel()
    assert list(stream) == []
    assert len(taken) <= 2
    assert threading.active_count() == len(threading.enumerate())
    assert getattr(model._network._running, "cancel", None) is None


def test_a_stream_cancelled_before_it_begins_runs_nothing(model: MeloModel) -> None:
    cancel = CancelToken()
    cancel.cancel()
    runs = []
    hook = model._network._net.enc_p.register_forward_hook(lambda *_: runs.append(1))
    assert list(model.stream(segments(TEXT), VoiceSpec("", "", STILL), cancel)) == []
    hook.remove()
    assert runs == []


def test_a_cancel_after_the_last_layer_still_keeps_the_segment_back(model: MeloModel) -> None:
    cancel = CancelToken()
    hook = model._network._net.dec.register_forward_hook(lambda *_: cancel.cancel())
    try:
        stream = model.stream([Segment("Hello.", 0)], VoiceSpec("", "", STILL), cancel)
        assert list(stream) == []
    finally:
        hook.remove()


def test_one_streams_cancel_ends_no_other(model: MeloModel) -> None:
    """Both run on hooks of one network, and the other one is in the middle of its run."""
    expected, cancel, spec = speak(model, TEXT), CancelToken(), VoiceSpec("", "", STILL)
    begun, cancelled, ended = (threading.Event() for _ in range(3))

    def hold(*_: object) -> None:
        if not begun.is_set():
            begun.set()
            cancelled.wait(60)
        elif not cancelled.is_set():
            cancel.cancel()
            cancelled.set()
            ended.wait(60)

    hook = model._network._net.enc_p.register_forward_pre_hook(hold)
    try:
        with ThreadPoolExecutor(2) as threads:
            other = threads.submit(speak, model, TEXT)
            begun.wait(60)
            one = threads.submit(lambda: list(model.stream(segments(TEXT), spec, cancel)))
            np.testing.assert_allclose(other.result(60), expected, atol=1e-5)
            ended.set()
            assert one.result(60) == []
    finally:
        ended.set()
        hook.remove()


def test_an_error_in_the_network_reaches_the_caller_and_harms_nobody_else(
    model: MeloModel,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("planned")

    hook = model._network._net.flow.register_forward_hook(fail)
    with pytest.raises(Internal, match=r"while speaking \(RuntimeError\)$"):
        speak(model, TEXT)
    hook.remove()
    assert speak(model, TEXT).size


def test_what_the_rules_raise_is_told_without_the_text(
    model: MeloModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(text: str) -> str:
        raise ValueError(text)

    monkeypatch.setattr(model._english, "_rules", fail)
    with pytest.raises(Internal, match=r"^melo-tiny failed while speaking \(ValueError\)$"):
        speak(model, "private")


def test_memory_that_runs_out_while_speaking_is_told(model: MeloModel) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("planned")

    hook = model._network._net.flow.register_forward_hook(fail)
    try:
        with pytest.raises(Unavailable, match="melo-tiny: its device ran out of memory"):
            speak(model, TEXT)
    finally:
        hook.remove()
    assert speak(model, TEXT).size


@pytest.mark.parametrize(
    ("owner", "says"),
    [
        ("melo.models:SynthesizerTrn.load_state_dict", "melo-tiny does not fit into the memory"),
        ("transformers:BertModel.from_pretrained", "bert-base-uncased does not fit into"),
    ],
)
def test_memory_that_runs_out_while_loading_is_told_and_leaves_no_engine(
    tiny_pack: Path, monkeypatch: pytest.MonkeyPatch, owner: str, says: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("planned")

    SOURCE.offer()
    closed: list[object] = []
    monkeypatch.setattr(adapter_melo, "_close", closed.append)
    module, _, path = owner.partition(":")
    holder, _, name = path.partition(".")
    monkeypatch.setattr(getattr(importlib.import_module(module), holder), name, fail)
    with pytest.raises(Unavailable, match=says):
        load(files_of(tiny_pack))
    assert len(closed) == 1


def test_weights_that_never_end_a_sound_are_held_to_the_texts_length(
    pack: dict[str, Path],
) -> None:
    checkpoint = torch.load(pack["checkpoint.pth"], weights_only=True)
    checkpoint["model"]["dp.proj.bias"].fill_(30.0)
    torch.save(checkpoint, pack["checkpoint.pth"])
    endless = load(pack)
    short, longer = speak(endless, "Hello."), speak(endless, "This is a test of the world.")
    assert 1 < short.size / 44_100 < 8
    assert short.size < longer.size < 20 * 44_100


def test_what_is_no_number_is_an_error_and_no_sound(pack: dict[str, Path]) -> None:
    checkpoint = torch.load(pack["checkpoint.pth"], weights_only=True)
    checkpoint["model"]["dec.conv_pre.bias"].fill_(float("nan"))
    torch.save(checkpoint, pack["checkpoint.pth"])
    with pytest.raises(Internal, match="NaN"):
        speak(load(pack), "Hello.")


# --- voices, languages, settings ---


def test_voices_are_the_packs_or_those_that_the_entry_lists(
    model: MeloModel, tiny_pack: Path
) -> None:
    assert model.voices == tuple(VOICES)
    assert model.languages == ("en",)
    assert model.max_streams == 0
    some = load(files_of(tiny_pack), voices=["EN-BR", "EN-US"], languages=["en-GB", "en-US"])
    assert some.voices == ("EN-BR", "EN-US")
    assert some.check_voice(VoiceSpec("", "")).language == "en-GB"
    with pytest.raises(UnknownName, match="EN-BR"):
        load(files_of(tiny_pack), voices=["EN-BT"])


def test_what_a_session_may_ask_for(model: MeloModel) -> None:
    assert model.check_voice(VoiceSpec("", "")) == VoiceSpec("EN-US", "en", {})
    with pytest.raises(UnknownName, match="did you mean 'EN-BR'"):
        model.check_voice(VoiceSpec("en-bt", ""))
    with pytest.raises(UnknownName, match="language 'de'"):
        model.check_voice(VoiceSpec("", "de"))
    with pytest.raises(UnknownName, match="did you mean 'speed'"):
        model.check_voice(VoiceSpec("", "", {"sped": "1"}))
    for name, value in {"speed": "3", "noise": "-1", "noise_w": "nan", "sdp_ratio": "2"}.items():
        with pytest.raises(InvalidArgument, match=name):
            next(iter(model.stream([], VoiceSpec("", "", {name: value}), CancelToken())))


def test_an_entrys_settings_are_a_sessions_defaults(tiny_pack: Path, model: MeloModel) -> None:
    quick = load(files_of(tiny_pack), settings={"speed": "2", **STILL})
    assert quick.check_voice(VoiceSpec("", "")).settings["speed"] == "2"
    assert np.array_equal(speak(quick, "Hello."), speak(model, "Hello.", speed="2"))
    with pytest.raises(UnknownName, match="did you mean 'speed'"):
        load(files_of(tiny_pack), settings={"sped": "2"})


def test_another_language_is_refused_with_what_it_needs(pack: dict[str, Path]) -> None:
    with pytest.raises(InvalidArgument, match="bert-base-japanese-v3 and MeCab"):
        load(pack, languages=["en", "ja"])
    edit(pack, lambda config: config["data"].update(spk2id={"ZH": 0}))
    with pytest.raises(InvalidArgument, match="jieba"):
        load(pack)


# --- loading ---


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "checkpoint.pth",
        "bert-base-uncased/config.json",
        "bert-base-uncased/vocab.txt",
        "bert-base-uncased/model.safetensors",
    ],
)
def test_a_missing_or_broken_file_is_named(pack: dict[str, Path], name: str) -> None:
    with pytest.raises(CorruptModel, match=name.rpartition("/")[2]):
        load({key: path for key, path in pack.items() if key != name})
    pack[name].write_bytes(b"\x00{")
    with pytest.raises(CorruptModel, match=name.partition("/")[0]):
        load(pack)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda c: c.pop("symbols"), "symbols"),
        (lambda c: c["data"].update(spk2id={}), "no voices"),
        (lambda c: c["data"].update(spk2id={"EN-US": 256}), "too high"),
        (lambda c: c["data"].update(sampling_rate="fast"), "describes no"),
        (lambda c: c["model"].update(n_layers_trans_flow=2), "do not fit each other: Assertion"),
        (lambda c: c["model"].pop("inter_channels"), "inter_channels"),
        (lambda c: c.update(num_tones=7), "too few tones"),
        (lambda c: c["model"].update(hidden_channels=32, filter_channels=64), "size mismatch"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    pack: dict[str, Path], change: Callable[[dict[str, Any]], object], complaint: str
) -> None:
    edit(pack, change)
    with pytest.raises(CorruptModel, match=complaint):
        load(pack)


def test_weights_too_many_or_too_few_are_refused(pack: dict[str, Path]) -> None:
    whole = torch.load(pack["checkpoint.pth"], weights_only=True)["model"]
    first = next(iter(whole))
    for weights in ({**whole, "extra": whole[first]}, {k: whole[k] for k in whole if k != first}):
        torch.save({"model": weights}, pack["checkpoint.pth"])
        with pytest.raises(CorruptModel, match="do not fit each other"):
            load(pack)
    torch.save(whole, pack["checkpoint.pth"])
    with pytest.raises(CorruptModel, match="no entry 'model'"):
        load(pack)


def test_a_pickled_checkpoint_is_refused_and_runs_nothing(
    pack: dict[str, Path], tmp_path: Path
) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"model": Trap()}, pack["checkpoint.pth"])
    with pytest.raises(CorruptModel, match="voicepack-convert"):
        load(pack)
    assert not (tmp_path / "ran").exists()


def test_a_bert_that_does_not_fit_is_refused(pack: dict[str, Path]) -> None:
    from safetensors.torch import load_file, save_file

    weights_at = pack["bert-base-uncased/model.safetensors"]
    weights = load_file(weights_at)
    name = "bert.encoder.layer.0.output.dense.weight"
    save_file({key: value for key, value in weights.items() if key != name}, weights_at)
    with pytest.raises(CorruptModel, match="lacks 1 weights: encoder"):
        load(pack)
    save_file(weights, weights_at, {"format": "pt"})
    vocabulary = pack["bert-base-uncased/vocab.txt"]
    vocabulary.write_text(vocabulary.read_text() + "more\n")
    with pytest.raises(CorruptModel, match=r"vocab\.txt has"):
        load(pack)
    vocabulary.write_text("hello\n")
    with pytest.raises(CorruptModel, match=r"\[UNK\]"):
        load(pack)


def test_files_of_bert_in_two_places_are_refused(pack: dict[str, Path], tmp_path: Path) -> None:
    elsewhere = shutil.copy(pack["bert-base-uncased/vocab.txt"], tmp_path / "vocab.txt")
    with pytest.raises(CorruptModel, match="one folder"):
        load({**pack, "bert-base-uncased/vocab.txt": Path(elsewhere)})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tiny_pack: Path) -> None:
    with pytest.raises(InvalidArgument, match="cuda:0"):
        load(files_of(tiny_pack), "cuda:0")


def test_a_pack_that_nobody_may_write_to_loads(pack: dict[str, Path]) -> None:
    folder = pack["config.json"].parent
    for path in (*pack.values(), folder / "bert-base-uncased", folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted(files_of(folder))
    try:
        assert speak(load(pack), "Hello.").size
        assert sorted(files_of(folder)) == before
    finally:
        for path in (folder, folder / "bert-base-uncased"):
            path.chmod(0o755)


def test_loading_leaves_the_process_as_it_was(tiny_pack: Path) -> None:
    def written() -> dict[Path, int]:
        """Beside what Python itself writes of what it has imported."""
        paths = [path for path in package_folder().rglob("*") if path.suffix != ".pyc"]
        return {path: path.stat().st_mtime_ns for path in paths if path.is_file()}

    files, root, paths = written(), logging.getLogger(), list(sys.path)
    level, handlers = root.level, list(root.handlers)
    loaded = load(files_of(tiny_pack))
    speak(loaded, "Hello.")
    loaded.unload()
    assert files == written()
    assert sys.path == paths
    assert (root.level, list(root.handlers)) == (level, handlers)
    assert not {"g2p_en", "melo.api", "melo.utils", "melo.text.english", "melo.text.japanese"} & (
        sys.modules.keys()
    )


def test_unloading_leaves_nothing(tiny_pack: Path) -> None:
    loaded = load(files_of(tiny_pack))
    speak(loaded, "Hello.")
    parts = [weakref.ref(loaded._network._net), weakref.ref(loaded._network._bert)]
    loaded.unload()
    gc.collect()
    assert [part() for part in parts] == [None, None]


def test_twenty_utterances_leave_no_tensor(model: MeloModel) -> None:
    def tensors() -> int:
        gc.collect()
        return sum(type(each) is torch.Tensor for each in gc.get_objects())

    speak(model, "Hello.")
    before = tensors()
    for number in range(20):
        speak(model, f"Test {number}.", noise="0.5")
    assert tensors() <= before + 2
