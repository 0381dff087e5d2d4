"""LoRA: what peft and Unsloth save is read or refused by name; voices share a base, not numbers."""

from __future__ import annotations

import gc
import logging
import shutil
import socket
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from src.rpc.errors import CorruptModel, Exhausted, InvalidArgument
from src.tts.families.csm.frame_loop import FrameLoop, StepBatch
from src.tts.families.csm.lora import AdapterWeights, LoraBank, read_adapter
from src.tts.families.csm.tiny import make_tiny_pack
from src.tts.families.csm.weights import CsmWeights, load_weights
from tests.families.sesame.lora_packs import edit_config, keys, load_base, make_adapter, rewrite

RANK = 8
TEXT = torch.tensor([[3, 10, 40, 7, 91, 5]])
Q_PROJ = "base_model.model.backbone_model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tiny_pack: Path) -> CsmWeights:
    """Nobody leaves a bank on it."""
    return load_weights(tiny_pack)


@pytest.fixture(scope="module")
def folder_a(tiny_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_pack, tmp_path_factory.mktemp("lora") / "a", seed=1, alpha=16)


@pytest.fixture(scope="module")
def folder_b(tiny_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_pack, tmp_path_factory.mktemp("lora") / "b", seed=2, rank=4)


@pytest.fixture(scope="module")
def voice_a(folder_a: Path, tiny_pack: Path) -> AdapterWeights:
    return read_adapter(folder_a, tiny_pack)


@pytest.fixture(scope="module")
def voice_b(folder_b: Path, tiny_pack: Path) -> AdapterWeights:
    return read_adapter(folder_b, tiny_pack)


@pytest.fixture
def copied(folder_a: Path, tmp_path: Path) -> Path:
    """Adapter a, to be spoilt."""
    return Path(shutil.copytree(folder_a, tmp_path / "adapter"))


@pytest.fixture
def bank(base: CsmWeights) -> Any:
    bank = LoraBank(base, capacity=3, max_rank=RANK)
    yield bank
    bank.detach()


def backbone(model: Any, rows: int = 1) -> torch.Tensor:
    """[rows, n, hidden]"""
    with torch.inference_mode():
        embeds = model.embed_text_tokens(TEXT.expand(rows, -1))
        return model.backbone_model(inputs_embeds=embeds).last_hidden_state


def depth(model: Any, rows: int = 1) -> torch.Tensor:
    """[rows, n, depth hidden]"""
    with torch.inference_mode():
        embeds = torch.linspace(-1, 1, 5 * model.config.hidden_size).view(1, 5, -1)
        position_ids = torch.arange(5)[None]
        decoder = model.depth_decoder.model
        embeds = embeds.expand(rows, -1, -1).contiguous()
        return decoder(inputs_embeds=embeds, position_ids=position_ids).last_hidden_state


# --- reading


def test_the_layers_are_those_of_the_backbone_and_the_depth_decoder(
    voice_a: AdapterWeights, base: CsmWeights
) -> None:
    config = base.model.config
    layers = config.num_hidden_layers + config.depth_decoder_config.num_hidden_layers
    assert len(voice_a.layers) == 7 * layers
    assert not [name for name in voice_a.layers if "codec" in name]
    assert voice_a.rank == RANK


@pytest.mark.parametrize("part", [backbone, depth])
def test_a_voice_speaks_as_peft_itself_would(
    part: Callable[[Any], torch.Tensor],
    tiny_pack: Path,
    folder_a: Path,
    voice_a: AdapterWeights,
    base: CsmWeights,
    bank: LoraBank,
) -> None:
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(load_base(tiny_pack), folder_a).base_model.model
    wanted, plain = part(theirs), part(base.model)
    bank.select(torch.tensor([bank.add(voice_a)]))
    got = part(base.model)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
    assert (got - plain).abs().max() > 0.5


def test_names_of_the_codec_from_before_they_changed_are_let_pass(folder_a: Path) -> None:
    """The fixture's are, as the notebook's are; else the tests above would say nothing."""
    assert [key for key in keys(folder_a) if ".codec_model.encoder_transformer." in key]


def test_an_adapter_without_the_codec_is_as_good(
    copied: Path, tiny_pack: Path, voice_a: AdapterWeights
) -> None:
    rewrite(copied, {key: key for key in keys(copied) if "codec_model" not in key})
    assert read_adapter(copied, tiny_pack).layers.keys() == voice_a.layers.keys()


def test_rank_stabilised_scaling_is_pefts(copied: Path, tiny_pack: Path, folder_a: Path) -> None:
    edit_config(copied, use_rslora=True)
    name = "backbone_model.layers.0.self_attn.q_proj"
    plain, stable = (read_adapter(f, tiny_pack).layers[name].b for f in (folder_a, copied))
    torch.testing.assert_close(stable, plain * RANK**0.5)


def test_nothing_is_asked_of_the_network(
    folder_a: Path, tiny_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter names a base on the hub, as Unsloth's do."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("somebody went out")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    read_adapter(folder_a, tiny_pack)


# --- refusals, each by its name


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_is_missing_is_named(copied: Path, tiny_pack: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(CorruptModel, match=name):
        read_adapter(copied, tiny_pack)


def test_a_folder_that_is_missing(tmp_path: Path, tiny_pack: Path) -> None:
    with pytest.raises(CorruptModel, match="here is none"):
        read_adapter(tmp_path / "nowhere", tiny_pack)


def test_a_base_that_is_missing(folder_a: Path, tmp_path: Path) -> None:
    with pytest.raises(CorruptModel, match=r"nowhere/config\.json: cannot be read"):
        read_adapter(folder_a, tmp_path / "nowhere")


def test_a_truncated_file(copied: Path, tiny_pack: Path) -> None:
    path = copied / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CorruptModel, match="cannot be read as safetensors"):
        read_adapter(copied, tiny_pack)


def test_a_configuration_that_is_no_json(copied: Path, tiny_pack: Path) -> None:
    (copied / "adapter_config.json").write_text("{")
    with pytest.raises(CorruptModel, match="peft cannot read this adapter"):
        read_adapter(copied, tiny_pack)


@pytest.mark.parametrize(
    "key",
    [
        f"{Q_PROJ}.lora_magnitude_vector",
        "base_model.model.lm_head.weight",
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.backbone_model.layers.0.self_attn.new_proj.lora_A.weight",
        "something.else",
    ],
)
def test_a_foreign_key_is_named(copied: Path, tiny_pack: Path, key: str) -> None:
    rewrite(copied, {old: old for old in keys(copied)}, **{key: torch.zeros(RANK, 64)})
    with pytest.raises(CorruptModel, match=key):
        read_adapter(copied, tiny_pack)


@pytest.mark.parametrize("part", ["A", "B"])
def test_a_missing_key_is_named(copied: Path, tiny_pack: Path, part: str) -> None:
    gone = f"{Q_PROJ}.lora_{part}.weight"
    rewrite(copied, {key: key for key in keys(copied) if key != gone})
    with pytest.raises(CorruptModel, match=gone):
        read_adapter(copied, tiny_pack)


def test_a_key_that_the_configuration_does_not_adapt_is_named(
    copied: Path, tiny_pack: Path
) -> None:
    edit_config(copied, target_modules=["k_proj", "v_proj", "o_proj"])
    with pytest.raises(CorruptModel, match=r"has a key too many.*(gate|up|down|q)_proj"):
        read_adapter(copied, tiny_pack)


def test_an_adapter_of_a_wider_base_is_refused(tmp_path: Path, tiny_pack: Path) -> None:
    other = make_tiny_pack(tmp_path / "other", hidden=96)
    adapter = make_adapter(other, tmp_path / "adapter", seed=1)
    with pytest.raises(CorruptModel, match=r"of another base.*is \[8, 192\], and ours has 128"):
        read_adapter(adapter, tiny_pack)


def test_an_adapter_of_a_deeper_base_is_refused(tmp_path: Path, tiny_pack: Path) -> None:
    other = make_tiny_pack(tmp_path / "other", layers=4)
    adapter = make_adapter(other, tmp_path / "adapter", seed=1)
    with pytest.raises(CorruptModel, match=r"of another base.*layers\.3\."):
        read_adapter(adapter, tiny_pack)


def test_an_adapter_of_a_shallower_base_is_refused_too(tmp_path: Path, tiny_pack: Path) -> None:
    other = make_tiny_pack(tmp_path / "other", layers=2)
    adapter = make_adapter(other, tmp_path / "adapter", seed=1)
    with pytest.raises(CorruptModel, match=r"has no key .*layers\.2\."):
        read_adapter(adapter, tiny_pack)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("use_dora", True), ("modules_to_save", ["lm_head"]), ("bias", "all"), ("lora_bias", True)],
)
def test_more_than_plain_lora_is_refused_by_its_name(
    copied: Path, tiny_pack: Path, setting: str, value: object
) -> None:
    edit_config(copied, **{setting: value})
    with pytest.raises(CorruptModel, match=setting):
        read_adapter(copied, tiny_pack)


def test_another_kind_of_adapter_is_refused(copied: Path, tiny_pack: Path) -> None:
    edit_config(copied, peft_type="IA3")
    with pytest.raises(CorruptModel, match="IA3"):
        read_adapter(copied, tiny_pack)


def test_a_number_that_is_none_is_refused(copied: Path, tiny_pack: Path) -> None:
    key = f"{Q_PROJ}.lora_A.weight"
    rewrite(
        copied,
        {old: old for old in keys(copied) if old != key},
        **{key: torch.full((RANK, 64), torch.nan)},
    )
    with pytest.raises(CorruptModel, match=rf"{key}.*not finite"):
        read_adapter(copied, tiny_pack)


def test_a_trained_codec_is_left_out_and_said(
    copied: Path, tiny_pack: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        read_adapter(copied, tiny_pack)
        assert "codec" not in caplog.text
        key = next(key for key in keys(copied) if "codec_model" in key and "lora_B" in key)
        rewrite(
            copied, {old: old for old in keys(copied) if old != key}, **{key: torch.ones(32, RANK)}
        )
        read_adapter(copied, tiny_pack)
    assert "adapts the codec too" in caplog.text


# --- several on one base


@pytest.mark.parametrize("part", [backbone, depth])
def test_voices_and_base_in_one_batch_are_apart_bit_for_bit(
    part: Callable[..., torch.Tensor],
    base: CsmWeights,
    bank: LoraBank,
    voice_a: AdapterWeights,
    voice_b: AdapterWeights,
) -> None:
    plain = part(base.model, 3)
    a = bank.add(voice_a)
    bank.select(torch.tensor([a, a, a]))
    only_a = part(base.model, 3)
    b = bank.add(voice_b)
    bank.select(torch.tensor([b, b, b]))
    only_b = part(base.model, 3)
    bank.select(torch.tensor([a, 0, b]))
    mixed = part(base.model, 3)
    assert torch.equal(mixed, torch.stack([only_a[0], plain[1], only_b[2]]))
    assert not torch.equal(only_a, only_b)


def test_an_overflow_in_one_voice_stays_there(
    base: CsmWeights, bank: LoraBank, voice_a: AdapterWeights, voice_b: AdapterWeights
) -> None:
    a, b = bank.add(voice_a), bank.add(voice_b)
    bank.select(torch.tensor([a, a]))
    alone = backbone(base.model, 2)
    layer = base.model.get_submodule("backbone_model.layers.0.mlp.up_proj")
    with torch.inference_mode():
        layer.a[RANK : 2 * RANK] = torch.inf
    bank.select(torch.tensor([a, b]))
    mixed = backbone(base.model, 2)
    assert torch.equal(mixed[0], alone[0])
    assert not bool(torch.isfinite(mixed[1]).any())


def test_a_voice_added_and_removed_leaves_the_others_as_they_were(
    base: CsmWeights, bank: LoraBank, voice_a: AdapterWeights, voice_b: AdapterWeights
) -> None:
    plain = backbone(base.model)
    a = bank.add(voice_a)
    bank.select(torch.tensor([a]))
    before = backbone(base.model)
    b = bank.add(voice_b)
    assert torch.equal(backbone(base.model), before)
    bank.remove(b)
    assert torch.equal(backbone(base.model), before)
    bank.select(torch.tensor([b]))
    assert torch.equal(backbone(base.model), plain)
    assert bank.voices == 1


def test_a_place_is_used_again_and_nothing_of_its_last_voice_is_left(
    base: CsmWeights, bank: LoraBank, voice_a: AdapterWeights, voice_b: AdapterWeights
) -> None:
    """The second is of half the rank and of fewer layers."""
    name = "backbone_model.layers.0.self_attn.v_proj"
    small = AdapterWeights({name: voice_b.layers[name]}, rank=4)
    bank.select(torch.tensor([bank.add(small)]))
    fresh = backbone(base.model)
    bank.remove(1)
    assert bank.add(voice_a) == 1
    bank.remove(1)
    assert bank.add(small) == 1
    assert torch.equal(backbone(base.model), fresh)


def test_without_a_voice_there_is_no_layer_of_ours(
    base: CsmWeights, bank: LoraBank, voice_a: AdapterWeights
) -> None:
    modules = list(base.model.modules())
    plain = backbone(base.model)
    bank.add(voice_a)
    assert len(list(base.model.modules())) > len(modules)
    bank.detach()
    assert all(a is b for a, b in zip(base.model.modules(), modules, strict=True))
    assert torch.equal(backbone(base.model), plain)


def test_base_rows_alone_cost_nothing_when_the_caller_says_so(
    base: CsmWeights, bank: LoraBank, voice_a: AdapterWeights
) -> None:
    plain = backbone(base.model)
    bank.select(torch.tensor([bank.add(voice_a)]))
    assert not torch.equal(backbone(base.model), plain)
    bank.active = False
    with torch.profiler.profile() as profile:
        assert torch.equal(backbone(base.model), plain)
    assert "aten::where" not in {event.key for event in profile.key_averages()}


def test_the_generation_rises_only_with_the_layers(
    base: CsmWeights, bank: LoraBank, voice_a: AdapterWeights, voice_b: AdapterWeights
) -> None:
    """What was captured reads the same memory for whatever voice comes and goes."""
    seen = [bank.generation]
    bank.add(voice_a)
    seen.append(bank.generation)
    bank.add(voice_b)
    bank.remove(1)
    bank.add(voice_b)
    seen.append(bank.generation)
    bank.detach()
    seen.append(bank.generation)
    assert seen == [0, 1, 1, 2]


def test_a_prepared_bank_needs_no_capture_for_its_first_voice(
    base: CsmWeights, bank: LoraBank, voice_a: AdapterWeights
) -> None:
    bank.prepare()
    before = bank.generation
    bank.add(voice_a)
    assert bank.generation == before


def test_more_voices_than_places(base: CsmWeights, bank: LoraBank, voice_b: AdapterWeights) -> None:
    assert [bank.add(voice_b) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(Exhausted, match="all 3 places"):
        bank.add(voice_b)
    bank.remove(2)
    assert bank.add(voice_b) == 2


def test_a_rank_above_the_banks(base: CsmWeights, bank: LoraBank, voice_b: AdapterWeights) -> None:
    with pytest.raises(InvalidArgument, match="rank 9; this engine takes up to 8"):
        bank.add(AdapterWeights(voice_b.layers, rank=9))
    assert bank.voices == 0


def test_the_last_reference_frees_base_and_bank(tiny_pack: Path, voice_a: AdapterWeights) -> None:
    """Without waiting for the garbage collector: the weights are gigabytes."""
    weights = load_weights(tiny_pack)
    bank = LoraBank(weights, capacity=2, max_rank=RANK)
    bank.add(voice_a)
    stacked = weights.model.get_submodule("backbone_model.layers.0.self_attn.q_proj")
    refs = [weakref.ref(stacked), weakref.ref(bank)]
    gc.disable()
    try:
        bank.detach()
        del bank, stacked
        assert [ref() for ref in refs] == [None, None]
    finally:
        gc.enable()


# --- in the frame loop


def test_frames_of_two_voices_and_the_base_in_one_batch_are_each_as_alone(
    tiny_pack: Path, voice_a: AdapterWeights, voice_b: AdapterWeights
) -> None:
    weights = load_weights(tiny_pack)
    loop = FrameLoop(weights, slots=3, positions=64)
    base_codes = _frames(loop, [0])[0]
    loop.bank = LoraBank(weights, capacity=3, max_rank=RANK)
    a, b = loop.bank.add(voice_a), loop.bank.add(voice_b)
    together = _frames(loop, [a, 0, b])
    assert torch.equal(together[1], base_codes)
    assert torch.equal(together[0], _frames(loop, [a])[0])
    assert torch.equal(together[2], _frames(loop, [b])[0])
    assert len({tuple(codes.flatten().tolist()) for codes in together}) == 3


def test_a_row_of_the_base_is_bit_for_bit_the_same_with_voices_beside_it(
    tiny_pack: Path, voice_a: AdapterWeights, voice_b: AdapterWeights
) -> None:
    """All that a step computes ends in its keys and values: nothing may be rounded otherwise."""
    weights = load_weights(tiny_pack)
    loop = FrameLoop(weights, slots=3, positions=64)
    loop.bank = LoraBank(weights, capacity=3, max_rank=RANK)
    a, b = loop.bank.add(voice_a), loop.bank.add(voice_b)
    loop.bank.active = False
    _frames(loop, [0, 0, 0])
    alone = loop.save_prefix(1, 8)
    loop.bank.active = True
    _frames(loop, [a, 0, b])
    beside = loop.save_prefix(1, 8)
    assert torch.equal(beside.keys, alone.keys)
    assert torch.equal(beside.values, alone.values)


def _frames(loop: FrameLoop, adapters: list[int], count: int = 3) -> torch.Tensor:
    """Codes [rows, count, codebooks] of one text said by each of the adapters, greedily."""
    with torch.inference_mode():
        embeds = loop.embed_text(TEXT[0].tolist())
        rows = len(adapters)
        for slot, adapter in enumerate(adapters):
            loop.prefill(slot, 0, embeds[:-1], adapter)
            loop.inputs[slot] = embeds[-1]
        drawn = []
        for frame in range(count):
            batch = StepBatch(
                slots=torch.arange(rows),
                positions=torch.full((rows,), len(embeds) - 1 + frame),
                seeds=torch.zeros(rows, dtype=torch.int64),
                frames=torch.full((rows,), frame),
                temperature=torch.zeros(rows),
                top_k=torch.ones(rows, dtype=torch.int64),
                adapters=torch.tensor(adapters),
            )
            drawn.append(loop.step(batch).codes.clone())
        return torch.stack(drawn, dim=1)
