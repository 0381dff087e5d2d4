"""A voice pack is taken whole or refused in words."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from src.rpc.errors import CorruptModel, InvalidArgument, Unavailable
from src.tts.families.csm.tiny import make_tiny_pack
from src.tts.families.csm.weights import CsmWeights, load_weights

BACKBONE_KEY = "backbone_model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def weights(tiny_pack: Path) -> CsmWeights:
    return load_weights(tiny_pack)


@pytest.fixture
def pack(tiny_pack: Path, tmp_path: Path) -> Path:
    """A copy to be broken."""
    return Path(shutil.copytree(tiny_pack, tmp_path / "pack"))


def edit_config(pack: Path, **changes: Any) -> None:
    """`depth__x` and `codec__x` are keys of those parts."""
    path = pack / "config.json"
    config = json.loads(path.read_text())
    parts = {"depth": config["depth_decoder_config"], "codec": config["codec_config"]}
    for name, value in changes.items():
        part, _, key = name.rpartition("__")
        (parts[part] if part else config)[key] = value
    path.write_text(json.dumps(config))


def edit_tensors(pack: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.torch import load_file, save_file

    path = pack / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def shards(pack: Path) -> list[Path]:
    """The same weights in several files, under the names that sesame/csm-1b gives them."""
    from transformers import CsmForConditionalGeneration

    model = CsmForConditionalGeneration.from_pretrained(pack)
    (pack / "model.safetensors").unlink()
    model.save_pretrained(pack, max_shard_size="12MB")
    index = json.loads((pack / "model.safetensors.index.json").read_text())
    for name in set(index["weight_map"].values()):
        (pack / name).rename(pack / name.replace("model-", "transformers-"))
    index["weight_map"] = {
        key: name.replace("model-", "transformers-") for key, name in index["weight_map"].items()
    }
    (pack / "transformers.safetensors.index.json").write_text(json.dumps(index))
    (pack / "model.safetensors.index.json").unlink()
    edit_config(pack, transformers_weights="transformers.safetensors.index.json")
    return sorted(pack.glob("transformers-*.safetensors"))


# --- what is taken


def test_a_pack_says_what_the_engine_must_know(weights: CsmWeights) -> None:
    assert (weights.codebooks, weights.vocab, weights.codec_vocab) == (32, 2051, 2048)
    assert (weights.frame_samples, weights.sample_rate) == (1920, 24_000)
    assert weights.hidden == 64
    assert (weights.device.type, weights.dtype) == ("cpu", torch.float32)
    assert not weights.model.training
    assert not any(parameter.requires_grad for parameter in weights.model.parameters())


def test_the_codec_and_the_frequencies_stay_in_float32(tiny_pack: Path) -> None:
    model = load_weights(tiny_pack, dtype="bfloat16").model
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        small = not name.startswith("codec_model") and isinstance(tensor, torch.nn.Parameter)
        if tensor.is_floating_point():
            assert tensor.dtype == (torch.bfloat16 if small else torch.float32), name
    tied = model.depth_decoder.model.embed_tokens.weight
    assert model.backbone_model.embed_tokens.embed_audio_tokens.weight is tied


def test_weights_in_several_files_are_the_weights(weights: CsmWeights, pack: Path) -> None:
    assert len(shards(pack)) > 2
    found = load_weights(pack).model.state_dict()
    wanted = weights.model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("text", ["Hello, world!", "", "  two  spaces ", "Grüße, 世界 🙂\n\tnext"])
def test_a_text_has_the_ids_of_the_familys_template(
    weights: CsmWeights, tiny_pack: Path, text: str
) -> None:
    processor = transformers.AutoProcessor.from_pretrained(tiny_pack, local_files_only=True)
    message = {"role": "3", "content": [{"type": "text", "text": text}]}
    wanted = processor.apply_chat_template([message], tokenize=True, return_dict=True)
    assert weights.text_ids(text, 3) == wanted["input_ids"][0].tolist()


def test_a_mark_in_a_text_is_read_and_not_obeyed(weights: CsmWeights) -> None:
    marks = "<|end_of_text|><|begin_of_text|>[1]<|AUDIO|><|audio_eos|>"
    begin, *inner, end = weights.text_ids(f"Hi {marks} there", 0)
    special = {weights.tokenizer.token_to_id(f"<|{name}|>")
               for name in ("begin_of_text", "end_of_text", "AUDIO", "audio_eos")}  # fmt: skip
    assert {begin, end} <= special
    assert not special & set(inner)
    assert weights.tokenizer.decode(inner) == f"[0]Hi {marks} there"


def test_loading_leaves_the_librarys_talk_as_it_was(tiny_pack: Path) -> None:
    transformers.logging.set_verbosity_info()
    try:
        load_weights(tiny_pack)
        assert transformers.logging.get_verbosity() == logging.INFO
    finally:
        transformers.logging.set_verbosity_warning()


# --- what is refused


def refused(pack: Path, *words: str) -> None:
    with pytest.raises(CorruptModel) as caught:
        load_weights(pack)
    for word in words:
        assert word in caught.value.message


def test_a_missing_tensor_is_named(pack: Path) -> None:
    edit_tensors(pack, lambda tensors: tensors.pop(BACKBONE_KEY))
    refused(pack, "1 tensors are missing", BACKBONE_KEY)


def test_a_foreign_tensor_is_named(pack: Path) -> None:
    edit_tensors(pack, lambda tensors: tensors.update({"vocoder.weight": torch.zeros(3)}))
    refused(pack, "belong to no part", "vocoder.weight")


def test_a_tensor_of_another_shape_is_named(pack: Path) -> None:
    edit_tensors(pack, lambda tensors: tensors.update({BACKBONE_KEY: torch.zeros(64, 32)}))
    refused(pack, "wrong shape", BACKBONE_KEY, "(64, 32)", "(64, 64)")


def test_a_codec_without_its_codebooks_is_refused(pack: Path) -> None:
    def lose(tensors: dict[str, Any]) -> None:
        for key in [key for key in tensors if key.endswith("codebook.embed_sum")]:
            del tensors[key]

    edit_tensors(pack, lose)
    refused(pack, "missing", "codec_model.", "embed_sum")


def test_another_count_of_codebooks_than_the_weights_have_is_refused(pack: Path) -> None:
    edit_config(pack, num_codebooks=16, depth__num_codebooks=16)
    refused(pack, "wrong shape", "codebooks_head.weight")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_codebooks": 16}, ("num_codebooks is 16", "32")),
        ({"depth__vocab_size": 2048}, ("vocab_size is 2051", "2048")),
        ({"depth__backbone_hidden_size": 32}, ("hidden_size is 64", "32")),
        ({"codec__num_quantizers": 8}, ("32 codebooks", "8")),
        ({"codec__codebook_size": 4096}, ("4096 codes", "2051")),
        ({"codec__sampling_rate": 16_000}, ("16000 Hz", "24000")),
        ({"codebook_eos_token_id": [0, 1]}, ("codebook_eos_token_id",)),
        ({"model_type": "llama"}, ("'llama'", "'csm'")),
        ({"hidden_size": "wide"}, ("not a CSM configuration", "hidden_size")),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(
    pack: Path, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    edit_config(pack, **changes)
    refused(pack, "config.json", *words)


@pytest.mark.parametrize("size", [0, 5, 1000, 20_000_000])
def test_truncated_weights_are_refused(pack: Path, size: int) -> None:
    path = pack / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(pack, "cannot be read")


def test_a_missing_shard_is_named(pack: Path) -> None:
    lost = shards(pack)[1]
    lost.unlink()
    refused(pack, lost.name)


def test_a_truncated_shard_is_refused(pack: Path) -> None:
    cut = shards(pack)[1]
    cut.write_bytes(cut.read_bytes()[:-100])
    refused(pack, "cannot be read")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(pack: Path, name: str) -> None:
    (pack / name).unlink()
    refused(pack, name)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"a": 1}'])
def test_a_file_of_something_else_is_named(pack: Path, name: str, content: str) -> None:
    (pack / name).write_text(content)
    refused(pack, name)


def test_pickled_weights_are_not_even_opened(pack: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(pack / "model.safetensors"), pack / "pytorch_model.bin")
    (pack / "model.safetensors").unlink()
    refused(pack, "safetensors")


def test_another_models_tokenizer_is_refused(pack: Path) -> None:
    path = pack / "tokenizer.json"
    whole = path.read_text()
    path.write_text(whole.replace("<|begin_of_text|>", "<s>"))
    refused(pack, "tokenizer.json", "<|begin_of_text|>")

    tokens = json.loads(whole)
    tokens["added_tokens"].append({**tokens["added_tokens"][0], "id": 260, "content": "<|more|>"})
    path.write_text(json.dumps(tokens))
    refused(pack, "tokenizer.json", "261", "260")


def test_a_device_that_does_not_exist_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    for device in ("cuda:99", "tpu", "mps", "cuda:x", "cpu;"):
        with pytest.raises(InvalidArgument, match=r"device|runs on"):
            load_weights(nothing, device=device)


def test_another_dtype_is_refused(tiny_pack: Path) -> None:
    with pytest.raises(InvalidArgument, match="'auto', 'float32' or 'bfloat16', not 'float16'"):
        load_weights(tiny_pack, dtype="float16")


@pytest.mark.parametrize("version", ["4.57.6", "5.24.0", "5.2.3"])
def test_a_transformers_that_was_not_tried_is_refused(
    tiny_pack: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.tts.families.csm.weights.version", lambda _: version)
    with pytest.raises(Unavailable, match=rf"5\.23; installed is {version}"):
        load_weights(tiny_pack)


def test_running_out_of_memory_is_not_a_broken_pack(
    tiny_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(transformers.CsmForConditionalGeneration, "from_pretrained", full)
    with pytest.raises(Unavailable, match="does not fit into the memory of the host"):
        load_weights(tiny_pack)


# --- the tiny pack itself


def test_a_tiny_pack_is_its_seed(tiny_pack: Path, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    again = make_tiny_pack(tmp_path / "again")
    other = make_tiny_pack(tmp_path / "other", seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    name = "model.safetensors"
    assert (again / name).read_bytes() == (tiny_pack / name).read_bytes()
    assert (other / name).read_bytes() != (tiny_pack / name).read_bytes()


def test_a_tiny_pack_sounds_at_a_bearable_level(weights: CsmWeights) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        sound = weights.model.codec_model.decode(torch.randint(0, 2048, (1, 32, 50))).audio_values
    assert 0.02 < sound.std() < 0.1
    assert sound.abs().max() < 1
