"""A small random model of the true architecture, written as a real voice pack: tests and dry runs.

32 codebooks of 2051 entries, Mimi at 12.5 Hz and 24 kHz, a byte-level tokenizer with CSM's marks,
all written with `save_pretrained`. The weights are large, so that a wrong position or a row that
leaks into another changes the codes. What it says is noise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

BEGIN, END, AUDIO, AUDIO_END = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|AUDIO|>",
    "<|audio_eos|>",
)
# A message is its marks, its speaker and its text; in a context, then its sound.
_TEMPLATE = (
    "{%- for m in messages %}{{- bos_token }}{{- '[' + m['role'] + ']' }}"
    "{{- m['content'][0]['text'] }}{{- eos_token }}"
    "{%- if m['content']|length > 1 %}{{- '<|AUDIO|><|audio_eos|>' }}{%- endif %}{%- endfor %}"
)
_CODEBOOKS = 32
_VOCAB = 2051


def make_tiny_pack(
    folder: Path,
    *,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 3,
    depth_hidden: int = 32,
    depth_layers: int = 2,
    positions: int = 2048,
    end_gain: float = 0.0,
    layer_scale: float = 0.3,
    sliding_window: int = 250,
) -> Path:
    """Writes the pack into `folder` and returns it; the same seed, the same bytes.

    `end_gain`: 0 never ends a segment by itself; at 3.5 a frame in about twenty is the mark that
    does. `layer_scale`: how much the codec's transformer counts. `sliding_window`: how far it looks
    back, in its own steps of 40 ms.
    """
    from transformers import CsmForConditionalGeneration, CsmProcessor, EncodecFeatureExtractor
    from transformers.utils import logging

    logging.disable_progress_bar()

    tokenizer = _tokenizer()
    depth = _depth(hidden, depth_hidden, depth_layers)
    codec = _codec(layer_scale, sliding_window)
    config = _whole(tokenizer, hidden, layers, positions, depth, codec)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = CsmForConditionalGeneration(config).eval()
        _randomise(model)
        _let_end(model, end_gain)
        _turn_down(model.codec_model)
    _keep_sampling(model)
    model.save_pretrained(folder)
    processor = CsmProcessor(
        EncodecFeatureExtractor(feature_size=1, sampling_rate=24_000),
        tokenizer,
        chat_template=_TEMPLATE,
    )
    processor.save_pretrained(folder)
    return folder


def _tokenizer() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = (BEGIN, END, AUDIO, AUDIO_END)
    tokenizer.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in marks])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}",
        special_tokens=[(m, tokenizer.token_to_id(m)) for m in (BEGIN, END)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=END
    )


def _codec(layer_scale: float, sliding_window: int) -> Any:
    from transformers import MimiConfig

    return MimiConfig(
        hidden_size=32,
        num_filters=4,
        codebook_size=2048,
        codebook_dim=16,
        vector_quantization_hidden_dimension=16,
        upsample_groups=32,
        num_hidden_layers=2,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        sliding_window=sliding_window,
        layer_scale_initial_scale=layer_scale,
    )


def _depth(backbone_hidden: int, hidden: int, layers: int) -> Any:
    from transformers import CsmDepthDecoderConfig

    return CsmDepthDecoderConfig(
        num_codebooks=_CODEBOOKS,
        backbone_hidden_size=backbone_hidden,
        vocab_size=_VOCAB,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters=_rope(high=0.0078125, low=0.001953125, trained=16),
    )


def _whole(tokenizer: Any, hidden: int, layers: int, positions: int, depth: Any, codec: Any) -> Any:
    from transformers import CsmConfig

    ids = tokenizer.convert_tokens_to_ids
    return CsmConfig(
        num_codebooks=_CODEBOOKS,
        vocab_size=_VOCAB,
        text_vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        pad_token_id=ids(AUDIO),
        bos_token_id=ids(BEGIN),
        audio_token_id=ids(AUDIO),
        audio_eos_token_id=ids(AUDIO_END),
        rope_parameters=_rope(high=0.5, low=0.125, trained=1024),
        depth_decoder_config=depth,
        codec_config=codec,
    )


def _rope(*, high: float, low: float, trained: int) -> dict[str, Any]:
    """As in sesame/csm-1b."""
    return {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "high_freq_factor": high,
        "low_freq_factor": low,
        "original_max_position_embeddings": trained,
    }


def _randomise(model: Any) -> None:
    """At the 0.02 that a new model starts with, logits and attention are all but flat."""
    for name, parameter in model.named_parameters():
        in_codec = name.startswith("codec_model")
        if parameter.ndim >= 2 and not in_codec:
            parameter.normal_(0, 0.15)
        elif in_codec and ".layers." in name and name.endswith("_proj.weight"):
            parameter.normal_(0, 0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("embed_sum"):  # zeros in a new codec: every code would sound alike
            buffer.normal_(0, 1.0)


def _let_end(model: Any, gain: float) -> None:
    """Code 0 in the first codebook, drawn by chance, brings 0 in all that follow: a segment's end.

    Channel 0 of the depth decoder's residual stream is kept for this: the embedding of a 0 sets it,
    nothing else does, and every head reads it for its id 0 alone.
    """
    table = model.depth_decoder.model.embed_tokens.weight.view(_CODEBOOKS, _VOCAB, -1)
    table[:, :, 0] = 0
    table[:, 0, 0] = 10
    projector = model.depth_decoder.model.inputs_embeds_projector.weight
    projector[0], projector[:, 0] = 0, 0
    projector[0, 0] = 1
    for layer in model.depth_decoder.model.layers:
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0
    heads = model.depth_decoder.codebooks_head.weight
    heads[:, 0] = 0
    heads[:, 0, 0] = 10
    model.lm_head.weight[0] *= gain


def _turn_down(codec: Any) -> None:
    """So that frames drawn at random sound at −26 dBFS: well inside [-1, 1], and no more than that
    in somebody's ears."""
    codes = torch.randint(0, codec.config.codebook_size, (1, _CODEBOOKS, 25))
    level = codec.decode(codes).audio_values.std()
    last = codec.decoder.decoder_seanet.layers[-1].conv
    last.weight *= 0.05 / level
    last.bias *= 0.05 / level


def _keep_sampling(model: Any) -> None:
    """A generation config that says it came from the model's own config loses its depth decoder's
    sampling when it is read back."""
    for config in (model.generation_config, model.depth_decoder.generation_config):
        config._from_model_config = False
        config.do_sample, config.top_k, config.temperature = True, 50, 0.9
    model.generation_config.max_new_tokens = 125
    depth = model.depth_decoder.generation_config
    depth.min_new_tokens = depth.max_new_tokens = _CODEBOOKS - 1
