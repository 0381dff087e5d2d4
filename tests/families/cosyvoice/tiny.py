"""A random CosyVoice 2 voice pack in its published layout, of some 40 MB.

Its weights are large: with the package's own small ones attention hardly matters, and a mask that
hides the whole past gives the same tokens as the right one.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from src.tts.families.cosyvoice2 import opening as opening
from src.tts.families.cosyvoice2.pack import LANGUAGE_MODEL, Sizes
from src.tts.families.cosyvoice2.package import import_package
from src.tts.families.torch_host import well_behaved
from tests.families.cosyvoice import onnx_bytes as onnx

HIDDEN = 32
SIZES = Sizes(
    speech_tokens=81, encoder_heads=2, encoder_units=32, encoder_blocks=1, flow_channels=32,
    flow_head=8, flow_heads=2, flow_blocks=1, flow_middle=1, vocoder_channels=32,
    pitch_channels=32,
)  # fmt: skip
TRANSCRIPT = "This is what I sound like."


def make_tiny_pack(folder: Path, *, mean_tokens: int = 60, seed: int = 0) -> Path:
    """A run ends after `mean_tokens` in the mean, of those that may end it."""
    import torch

    folder.mkdir(parents=True)
    _language_model(folder / LANGUAGE_MODEL, seed)
    with well_behaved():
        package = import_package()
        torch.manual_seed(seed)
        model = opening._make_model(package, folder / LANGUAGE_MODEL, SIZES, HIDDEN)
    with torch.no_grad():
        _enlarge(model.llm, mean_tokens)
    torch.save(model.llm.state_dict(), folder / "llm.pt")
    torch.save(model.flow.state_dict(), folder / "flow.pt")
    hift = {f"generator.{name}": value for name, value in model.hift.state_dict().items()}
    torch.save(hift, folder / "hift.pt")
    torch.save({"anna": {"embedding": torch.randn(1, 192)}}, folder / "spk2info.pt")
    (folder / "cosyvoice2.yaml").write_text(yaml_of(SIZES), encoding="utf-8")
    (folder / "speech_tokenizer_v2.onnx").write_bytes(_speech_tokenizer(SIZES.speech_tokens))
    (folder / "campplus.onnx").write_bytes(_voice_print(seed))
    record(folder / "ref" / "seed.wav")
    (folder / "ref" / "seed.txt").write_text(TRANSCRIPT, encoding="utf-8")
    return folder


def record(path: Path, seconds: float = 2.0, rate: int = 24_000) -> None:
    """Something loud and voiced."""
    path.parent.mkdir(exist_ok=True)
    time = np.arange(int(seconds * rate)) / rate
    sound = 0.3 * np.sin(2 * np.pi * 140 * time) * (1 + 0.5 * np.sin(2 * np.pi * 3 * time))
    soundfile.write(path, sound.astype(np.float32), rate)


def yaml_of(sizes: Sizes) -> str:
    """As the release writes it, tags and all, with what a trimmed reader must step over."""
    return f"""
__set_seed1: !apply:random.seed [1986]
sample_rate: 24000
qwen_pretrain_path: ''
llm: !new:cosyvoice.llm.llm.Qwen2LM
    speech_token_size: {sizes.speech_tokens}
    llm: !new:cosyvoice.llm.llm.Qwen2Encoder
        pretrain_path: !ref <qwen_pretrain_path>
flow: !new:cosyvoice.flow.flow.CausalMaskedDiffWithXvec
    encoder: !new:cosyvoice.transformer.upsample_encoder.UpsampleConformerEncoder
        attention_heads: {sizes.encoder_heads}
        linear_units: {sizes.encoder_units}
        num_blocks: {sizes.encoder_blocks}
    decoder: !new:cosyvoice.flow.flow_matching.CausalConditionalCFM
        estimator: !new:cosyvoice.flow.decoder.CausalConditionalDecoder
            channels: [{sizes.flow_channels}]
            attention_head_dim: {sizes.flow_head}
            n_blocks: {sizes.flow_blocks}
            num_mid_blocks: {sizes.flow_middle}
            num_heads: {sizes.flow_heads}
            static_chunk_size: !ref <chunk_size> * <token_mel_ratio>
hift: !new:cosyvoice.hifigan.generator.HiFTGenerator
    base_channels: {sizes.vocoder_channels}
    f0_predictor: !new:cosyvoice.hifigan.f0_predictor.ConvRNNF0Predictor
        cond_channels: {sizes.pitch_channels}
"""


def _enlarge(llm: Any, mean_tokens: int) -> None:
    """Attention matters; an end may come and the two other marks may not."""
    bias = llm.llm_decoder.bias
    bias.zero_()
    bias[SIZES.speech_tokens + 1 :] = -1e4
    bias[SIZES.speech_tokens] = math.log(SIZES.speech_tokens / mean_tokens)
    for name, value in llm.state_dict().items():
        if value.dim() > 1 and ("layers" in name or "embed_tokens" in name):
            value.mul_(15)
    llm.llm_decoder.weight.mul_(5)


def _language_model(folder: Path, seed: int) -> None:
    """As the release has it: weights in bfloat16 that llm.pt replaces, and a byte-level BPE."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder.mkdir()
    vocabulary, merges = _byte_pairs()
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    count = len(vocabulary)
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    options = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(count + i): {"content": m, "special": True, **options} for i, m in enumerate(marks)
    }
    config = {
        "add_prefix_space": False, "added_tokens_decoder": added, "bos_token": None,
        "additional_special_tokens": marks[1:], "eos_token": marks[0], "pad_token": marks[0],
        "unk_token": None, "errors": "replace", "model_max_length": 32768,
        "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer",
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(seed)
    qwen = Qwen2Config(
        vocab_size=320, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=4096,
        tie_word_embeddings=True, bos_token_id=count, eos_token_id=count,
    )  # fmt: skip
    Qwen2ForCausalLM(qwen).to(torch.bfloat16).save_pretrained(folder)


def _byte_pairs() -> tuple[dict[str, int], list[str]]:
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in shown}
    hidden = [byte for byte in range(256) if byte not in letters]
    letters |= {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    vocabulary = {letters[byte]: byte for byte in range(256)}
    merges = ["h e", "l l", "t h", "Ġ t", "he ll"]
    for pair in merges:
        vocabulary[pair.replace(" ", "")] = len(vocabulary)
    return vocabulary, merges


def _speech_tokenizer(count: int) -> bytes:
    """feats (1, 128, T) f32, length (1,) i32 → ids (1, T / 4) i32: 25 a second."""
    nodes = [
        onnx.node("AveragePool", "feats", "pooled", kernel_shape=[4], strides=[4]),
        onnx.node("ReduceMean", "pooled", "mean", axes=[1], keepdims=0),
        onnx.node("Mul", "mean scale", "scaled"),
        onnx.node("Abs", "scaled", "positive"),
        onnx.node("Floor", "positive", "whole"),
        onnx.node("Cast", "whole", "ids", to=6),
        onnx.node("Mod", "ids count", "wrapped"),
        onnx.node("Mul", "length nought", "nothing"),
        onnx.node("Add", "wrapped nothing", "indices"),
    ]
    inputs = [onnx.value("feats", np.float32, [1, 128, "T"]), onnx.value("length", np.int32, [1])]
    constants = [
        onnx.constant("scale", np.array(97, np.float32)),
        onnx.constant("count", np.array(count, np.int32)),
        onnx.constant("nought", np.array(0, np.int32)),
    ]
    outputs = [onnx.value("indices", np.int32, [1, "L"])]
    return onnx.model(onnx.graph(nodes, inputs, outputs, constants))


def _voice_print(seed: int) -> bytes:
    """(1, T, 80) f32 → (1, 192) f32."""
    nodes = [
        onnx.node("Abs", "input", "positive"),
        onnx.node("ReduceMean", "positive", "mean", axes=[1], keepdims=0),
        onnx.node("MatMul", "mean weights", "output"),
    ]
    weights = np.random.default_rng(seed).standard_normal((80, 192)).astype(np.float32)
    inputs = [onnx.value("input", np.float32, ["B", "T", 80])]
    outputs = [onnx.value("output", np.float32, ["B", 192])]
    return onnx.model(onnx.graph(nodes, inputs, outputs, [onnx.constant("weights", weights)]))
