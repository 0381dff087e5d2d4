"""A voice pack is taken whole or refused in words; a recording is encoded once or refused."""

from __future__ import annotations

import gc
import logging
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from src.rpc.errors import CorruptModel, InvalidArgument, Unavailable, UnknownName
from src.tts.families.spark.speech import CONTROLLABLE
from tests.families.spark.talk import (
    files_of,
    linked,
    load,
    own,
    record,
    sound,
    without_memory,
)
from tests.families.spark.tiny import ENCODER, edit_json

CODEC = "BiCodec/model.safetensors"


@pytest.fixture
def pack(tiny_pack: Path, tmp_path: Path) -> Path:
    """A pack to be broken."""
    return linked(tiny_pack, tmp_path / "pack")


def refused(pack: Path, *words: str) -> None:
    with pytest.raises(CorruptModel) as caught:
        load(files_of(pack))
    for word in ("spark-tts-tiny", *words):
        assert word in caught.value.message


def edit_tensors(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_yaml(path: Path, **changes: Any) -> None:
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


# --- weights


def test_a_tensor_that_bicodec_lacks_is_named(
    pack: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The package prints its name and speaks noise."""
    key = "prenet.linear.weight"
    edit_tensors(own(pack, CODEC), lambda tensors: tensors.pop(key))
    refused(pack, CODEC, f"lacks 1 tensors: {key}")
    assert "Missing" not in capsys.readouterr().out


def test_a_tensor_too_many_is_named(pack: Path) -> None:
    edit_tensors(own(pack, CODEC), lambda tensors: tensors.update(other=torch.zeros(2)))
    refused(pack, CODEC, "has besides 1 tensors: other")


def test_a_tensor_of_another_shape_is_refused(pack: Path) -> None:
    key = "prenet.linear.weight"
    edit_tensors(own(pack, CODEC), lambda tensors: tensors.update({key: torch.zeros(2, 2)}))
    refused(pack, "BiCodec", key)


def test_what_is_computed_may_be_missing_or_there(pack: Path, tiny_pack: Path) -> None:
    """The released file lacks two tensors, which the package computes from its configuration."""
    names = ("mel_transformer.spectrogram.window", "mel_transformer.mel_scale.fb")
    assert not set(names) & set(load_file(tiny_pack / CODEC))
    shapes = ((640,), (513, 128))
    edit_tensors(
        own(pack, CODEC),
        lambda t: t.update({n: torch.zeros(s) for n, s in zip(names, shapes, strict=True)}),
    )
    load(files_of(pack)).unload()


def test_a_tensor_that_the_language_model_lacks_is_named(pack: Path) -> None:
    key = "model.layers.1.self_attn.q_proj.weight"
    edit_tensors(own(pack, "LLM/model.safetensors"), lambda tensors: tensors.pop(key))
    refused(pack, "LLM/model.safetensors lacks 1 tensors", key)


@pytest.mark.parametrize(
    "name",
    ["config.yaml", CODEC, "BiCodec/config.yaml", "LLM/model.safetensors", "LLM/tokenizer.json"],
)
def test_a_missing_file_is_named(pack: Path, name: str) -> None:
    (pack / name).unlink()
    refused(pack, "hf download SparkAudio" if name == "config.yaml" else f"lacks {name}")


@pytest.mark.parametrize("name", ["config.yaml", CODEC, "BiCodec/config.yaml", "LLM/config.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "{a: 1}"])
def test_a_file_of_something_else_is_refused(pack: Path, name: str, content: str) -> None:
    own(pack, name).write_text(content)
    refused(pack)


def test_a_language_model_in_a_pickle_is_not_read(pack: Path) -> None:
    (pack / "LLM/model.safetensors").rename(pack / "LLM/pytorch_model.bin")
    refused(pack, "LLM/pytorch_model.bin --i-trust-it")


def test_a_configuration_may_not_bring_in_another_file(pack: Path, tmp_path: Path) -> None:
    for name in ("config.yaml", "BiCodec/config.yaml"):
        broken = linked(pack, tmp_path / name.replace("/", "-"))
        edit_yaml(own(broken, name), base_config="/etc/passwd")
        refused(broken, name, "base_config")


def test_another_rate_of_codes_is_refused(pack: Path) -> None:
    edit_yaml(own(pack, "config.yaml"), latent_hop_length=640)
    refused(pack, "latent_hop_length 640", "50 codes a second")


def test_another_models_tokenizer_is_refused(pack: Path) -> None:
    path = own(pack, "LLM/tokenizer.json")
    whole = path.read_text()
    path.write_text(whole.replace("<|end_global_token|>", "<|end_of_it|>"))
    refused(pack, "lacks <|end_global_token|>")
    path.write_text(whole.replace("<|bicodec_semantic_17|>", "<|semantic|>"))
    refused(pack, "lacks <|bicodec_semantic_17|>")
    path.write_text(whole.replace("<|bicodec_global_15|>", "<|global|>"))
    refused(pack, "15 global tokens", "BiCodec 16")


def test_a_vocabulary_beyond_the_weights_is_refused(pack: Path) -> None:
    def cut(tensors: dict[str, Any]) -> None:
        for key in ("lm_head.weight", "model.embed_tokens.weight"):
            tensors[key] = tensors[key][:300].contiguous()

    edit_tensors(own(pack, "LLM/model.safetensors"), cut)
    edit_json(own(pack, "LLM/config.json"), vocab_size=300, pad_token_id=0)
    refused(pack, "has 300 rows")


def test_files_in_several_folders_are_refused(pack: Path, tmp_path: Path) -> None:
    elsewhere = shutil.copy(pack / CODEC, tmp_path / "elsewhere")
    with pytest.raises(CorruptModel, match="read from one folder"):
        load({**files_of(pack), CODEC: Path(elsewhere)})


def test_a_pack_without_weights_says_what_to_download() -> None:
    with pytest.raises(CorruptModel, match=r"hf download SparkAudio/Spark-TTS-0\.5B .*CC BY-NC"):
        load({})


@pytest.mark.parametrize("device", ["cuda:97", "tpu"])
def test_a_device_that_does_not_exist_is_refused(tiny_pack: Path, device: str) -> None:
    with pytest.raises(InvalidArgument, match=device):
        load(files_of(tiny_pack), device)


@pytest.mark.parametrize(
    "where",
    [
        "transformers.AutoModelForCausalLM.from_pretrained",
        "transformers.Wav2Vec2Model.from_pretrained",
        "sparktts.models.bicodec.BiCodec.load_from_checkpoint",
        "sparktts.models.bicodec.BiCodec.tokenize",
        "sparktts.models.bicodec.BiCodec.detokenize",
    ],
)
def test_no_memory_is_not_a_broken_pack(
    voiced_pack: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Nor while a recording is encoded, or the first words are said to nobody."""
    monkeypatch.setattr(where, without_memory)
    with pytest.raises(Unavailable, match=r"spark-tts-tiny.*(does not fit|out of memory)"):
        load(files_of(voiced_pack))


def test_a_read_only_pack_is_enough_and_loading_leaves_the_process_as_it_was(
    pack: Path, tiny_pack: Path
) -> None:
    before = random.getstate(), logging.getLogger().level
    verbosity = transformers.logging.get_verbosity()
    content = {name: path.stat().st_mtime_ns for name, path in files_of(tiny_pack).items()}
    for path in (pack, *pack.iterdir()):
        path.chmod(0o555)
    try:
        model = load(files_of(pack))
        assert model._parts
        # Saved in bfloat16, as the released one.
        assert model._parts[0]._model.dtype is torch.float32
        model.unload()
    finally:
        for path in (pack, *pack.iterdir()):
            path.chmod(0o755)
    assert content == {name: path.stat().st_mtime_ns for name, path in files_of(tiny_pack).items()}
    assert set(files_of(pack)) == set(content), "nothing was written beside it"
    assert before == (random.getstate(), logging.getLogger().level)
    assert transformers.logging.get_verbosity() == verbosity
    assert os.environ["HF_HUB_OFFLINE"] == "1"


# --- recordings


def encoders() -> int:
    gc.collect()
    return sum(type(each) is transformers.Wav2Vec2Model for each in gc.get_objects())


def test_the_encoder_is_there_only_while_recordings_are_read(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[int] = []
    read = transformers.Wav2Vec2Model.from_pretrained

    def spy(*arguments: Any, **options: Any) -> Any:
        loaded.append(1)
        return read(*arguments, **options)

    monkeypatch.setattr(transformers.Wav2Vec2Model, "from_pretrained", spy)
    shutil.rmtree(pack / ENCODER)
    model = load(files_of(pack))
    assert (model.voices, loaded) == ((CONTROLLABLE,), [])
    model.unload()

    record(pack / "ref" / "bob.wav")
    refused(pack, f"lacks {ENCODER}/config.json")
    assert not loaded


def test_the_encoder_is_gone_afterwards(voiced_pack: Path) -> None:
    before = encoders()
    model = load(files_of(voiced_pack))
    assert encoders() == before
    model.unload()


def test_the_encoder_as_it_is_released_says_the_same(pack: Path, tmp_path: Path) -> None:
    """A .bin file: with names of before parametrizations, and a prefix."""
    record(pack / "ref" / "bob.wav")
    tensors = load_file(pack / ENCODER / "model.safetensors")
    old = {
        "wav2vec2."
        + key.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): value
        for key, value in tensors.items()
    }
    old["quantizer.codevectors"] = torch.zeros(3)
    other = linked(pack, tmp_path / "other")
    (other / ENCODER / "model.safetensors").unlink()
    torch.save(old, other / ENCODER / "pytorch_model.bin")
    models = [load(files_of(each)) for each in (pack, other)]
    assert models[0]._voices["bob"] == models[1]._voices["bob"]
    for model in models:
        model.unload()

    old.pop("wav2vec2.encoder.layers.3.attention.q_proj.weight")
    torch.save(old, other / ENCODER / "pytorch_model.bin")
    refused(other, "pytorch_model.bin lacks 1 tensors: encoder.layers.3.attention.q_proj.weight")


def test_pickled_objects_are_refused_with_the_way_out(pack: Path) -> None:
    record(pack / "ref" / "bob.wav")
    (pack / ENCODER / "model.safetensors").unlink()
    path = pack / ENCODER / "pytorch_model.bin"
    touched = pack / "touched"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (touched,))

    torch.save({"weight": Evil()}, path, pickle_module=pickle)
    refused(pack, "pickled objects", "voicepack-convert")
    assert not touched.exists()


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (np.zeros((32_000, 2)), "mono"),
        (np.zeros(32_000), "silent"),
        (np.full(4_000, 0.1), "lasts 0.2 s"),
        (np.full(16_000 * 31, 0.1), "lasts 31.0 s"),
    ],
)
def test_what_makes_no_voice_is_refused_before_anything_is_encoded(
    pack: Path, samples: np.ndarray, words: str
) -> None:
    (pack / "ref").mkdir()
    soundfile.write(pack / "ref/bob.wav", samples, 16_000)
    before = encoders()
    with pytest.raises(InvalidArgument, match=rf"bob\.wav.*{words}"):
        load(files_of(pack))
    assert encoders() == before


@pytest.mark.parametrize("seconds", [0.5, 30.0])
def test_the_shortest_and_the_longest_recording_speak(pack: Path, seconds: float) -> None:
    record(pack / "ref" / "bob.wav", seconds=seconds)
    (pack / "ref" / "bob.txt").write_text("What is said.")
    model = load(files_of(pack))
    voice = model._voices["bob"]
    assert voice
    assert len(voice.semantic_codes) == pytest.approx(seconds * 50, abs=2)
    assert sound(model, "Oh.", "bob", temperature="0").size
    model.unload()


@pytest.mark.parametrize(
    "voices",
    [("anna",), (CONTROLLABLE,), (CONTROLLABLE, "anna"), ("anna", "default", CONTROLLABLE)],
)
def test_the_entry_picks_and_orders_the_voices(voiced_pack: Path, voices: tuple[str, ...]) -> None:
    model = load(files_of(voiced_pack), voices=voices)
    assert model.voices == voices
    assert [name for name in voices if model._voices[name] is None] == [
        name for name in voices if name == CONTROLLABLE
    ]
    model.unload()


def test_a_voice_without_a_recording_is_named(voiced_pack: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean 'anna'"):
        load(files_of(voiced_pack), voices=("ana", CONTROLLABLE))
