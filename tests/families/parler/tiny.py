"""A tiny random Parler-TTS voice pack: T5 encoder, decoder and DAC, in the released layout.

Weights are large: with the usual 0.02 attention hardly matters, and a broken mask or cache draws
the same ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from parler_tts import (
    ParlerTTSConfig,
    ParlerTTSDecoderConfig,
    ParlerTTSForCausalLM,
    ParlerTTSForConditionalGeneration,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DacConfig, DacModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

CODES = 256
CODEBOOKS = 9
HOP = 512
RATE = 44_100


def make_tiny_pack(
    folder: Path,
    *,
    end_gain: float | None = None,
    text_width: int = 48,
    audio: Any = None,
    shard: str = "1GB",
    positions: int = 1024,
    max_length: int = 2580,
    min_steps: int = 0,
    seed: int = 0,
    **config: Any,
) -> Path:
    """`end_gain`: logit of the end mark, 4 for one soon after `min_steps`; None: never drawn.

    `max_length` is the pack's bound, in steps, as `min_steps` is. The text encoder's
    width differs from the decoder's (32), as in the large model.
    `config` goes to the whole model's configuration.
    """
    before = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        vocabulary = make_tokenizer(folder)
        model = _model(vocabulary, text_width, audio or _dac(), positions, config)
        _pin_marks(model, end_gain)
        _set_marks(model, max_length, min_steps)
        model.save_pretrained(folder, max_shard_size=shard)
    finally:
        torch.set_rng_state(before)
    return folder


def make_tokenizer(folder: Path, extra: int = 0) -> int:
    """A byte a token, and `extra` that nobody uses; the size of the vocabulary."""
    marks = ["<pad>", "</s>", "<unk>", *(f"<extra{i}>" for i in range(extra))]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(marks + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return len(vocabulary)


def _dac() -> Any:
    dac = DacModel(
        DacConfig(
            encoder_hidden_size=4,
            downsampling_ratios=[2, 4, 8, 8],
            decoder_hidden_size=32,
            upsampling_ratios=[8, 8, 4, 2],
            n_codebooks=CODEBOOKS,
            codebook_size=CODES,
            codebook_dim=4,
            sampling_rate=RATE,
        )
    )
    for layer in dac.decoder.modules():
        if isinstance(layer, torch.nn.Conv1d | torch.nn.ConvTranspose1d):
            layer.weight.data.normal_(0.0, float(layer.weight[0].numel()) ** -0.5)
    return dac


def _model(
    vocabulary: int, text_width: int, audio: Any, positions: int, config: dict[str, Any]
) -> Any:
    text = T5EncoderModel(
        T5Config(
            vocab_size=vocabulary, d_model=text_width, d_kv=16, d_ff=64, num_layers=1, num_heads=2
        )
    )
    decoder = ParlerTTSForCausalLM(
        ParlerTTSDecoderConfig(
            vocab_size=CODES + 64,
            max_position_embeddings=positions,
            num_hidden_layers=2,
            ffn_dim=64,
            num_attention_heads=2,
            hidden_size=32,
            layerdrop=0.0,
            dropout=0.0,
            num_codebooks=CODEBOOKS,
            initializer_factor=0.3,
            pad_token_id=CODES,
            eos_token_id=CODES,
            bos_token_id=CODES + 1,
        )
    )
    whole = ParlerTTSConfig.from_sub_models_config(
        text.config, audio.config, decoder.config, vocab_size=vocabulary, **config
    )
    return ParlerTTSForConditionalGeneration(
        text_encoder=text, audio_encoder=audio, decoder=decoder, config=whole
    )


def _pin_marks(model: Any, end_gain: float | None) -> None:
    """The last norm's first feature is constant, so that the marks' logits are too."""
    norm = model.decoder.model.decoder.layer_norm
    norm.weight.data[0], norm.bias.data[0] = 0.0, 5.0
    for head in model.decoder.lm_heads:
        head.weight.data[CODES:] = 0.0
        head.weight.data[CODES:, 0] = -10.0
    if end_gain is not None:
        for head in model.decoder.lm_heads:
            head.weight.data[CODES, 0] = end_gain / 5.0


def _set_marks(model: Any, max_length: int, min_steps: int) -> None:
    generation, config = model.generation_config, model.config
    generation.decoder_start_token_id = generation.bos_token_id = CODES + 1
    generation.pad_token_id = generation.eos_token_id = CODES
    generation.max_length, generation.do_sample = max_length, True
    generation.min_new_tokens = min_steps or None
    config.pad_token_id, config.decoder_start_token_id = CODES, CODES + 1
