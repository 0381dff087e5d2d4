"""Small random voice packs in the layout of Spark-TTS-0.5B, made by the package's own classes.

Everything keeps its true architecture; the widths are small and the weights large, so that what a
token hears of the others matters. Rows of the output layer that are neither codes nor an end are
zero, so that the model writes speech.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)

SEMANTIC = 64
LEVELS = (4, 4)
GLOBALS = 16
N_GLOBAL = 32
WIDTH = 32
ENCODER = "wav2vec2-large-xlsr-53"

_MARKS = (
    *(f"<|task_{name}|>" for name in ("tts", "controllable_tts", "vc")),
    *(
        f"<|{edge}_{name}|>"
        for name in ("content", "style_label", "acoustic_token", "global_token", "semantic_token")
        for edge in ("start", "end")
    ),
    *(f"<|gender_{i}|>" for i in range(2)),
    *(f"<|{name}_label_{i}|>" for name in ("pitch", "speed") for i in range(5)),
    *(f"<|{name}_value_{i}|>" for name in ("pitch", "speed") for i in range(5)),
)


def make_tiny_pack(
    folder: Path, *, end_gain: float = 0.0, dtype: str = "bfloat16", seed: int = 0
) -> Path:
    """`end_gain`: how large the end's row is; with 0 no greedy sentence ever ends."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    (folder / "BiCodec").mkdir(parents=True)
    _save_llm(folder / "LLM", end_gain, getattr(torch, dtype))
    _save_encoder(folder / ENCODER)
    _save_bicodec(folder)
    torch.set_rng_state(state)
    return folder


def _save_llm(folder: Path, end_gain: float, dtype: torch.dtype) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokens.decoder = decoders.ByteLevel()
    names = [
        *_MARKS,
        *(f"<|bicodec_semantic_{i}|>" for i in range(SEMANTIC)),
        *(f"<|bicodec_global_{i}|>" for i in range(GLOBALS)),
    ]
    # As in the released pack: added, but not "special", or decoding would drop them.
    tokens.add_tokens([AddedToken(name, normalized=False) for name in names])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer) + 6,  # the released one has rows to spare, too
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        initializer_range=0.3,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    ids = tokenizer.get_vocab()
    rows = model.lm_head.weight.data
    drawn = rows.normal_(0, 0.4).clone()
    rows.zero_()
    for name in names[len(_MARKS) :]:
        rows[ids[name]] = drawn[ids[name]]
    rows[tokenizer.eos_token_id] = end_gain * drawn[tokenizer.eos_token_id]
    model.to(dtype).save_pretrained(folder)


def _save_encoder(folder: Path) -> None:
    config = Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=18,  # hidden states 11, 14 and 16 are read
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=[16] * 7,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        conv_bias=True,
        initializer_range=0.2,
    )
    Wav2Vec2Model(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(
        do_normalize=True, return_attention_mask=True, sampling_rate=16_000
    ).save_pretrained(folder)


def _save_bicodec(folder: Path) -> None:
    vocos = {"vocos_dim": WIDTH, "vocos_intermediate_dim": WIDTH, "vocos_num_layers": 2}
    same = {"sample_ratios": [1, 1], "use_tanh_at_final": False}
    parts: dict[str, Any] = {
        "mel_params": {
            "sample_rate": 16_000,
            "n_fft": 1024,
            "win_length": 640,
            "hop_length": 320,
            "mel_fmin": 10,
            "mel_fmax": None,
            "num_mels": 128,
        },
        "encoder": {"input_channels": 16, "out_channels": WIDTH, "sample_ratios": [1, 1], **vocos},
        "decoder": {
            "input_channel": WIDTH,
            "channels": 32,
            "rates": [8, 5, 4, 2],
            "kernel_sizes": [16, 11, 8, 4],
        },
        "quantizer": {
            "input_dim": WIDTH,
            "codebook_size": SEMANTIC,
            "codebook_dim": 8,
            "commitment": 0.25,
            "codebook_loss_weight": 2.0,
            "use_l2_normlize": True,
            "threshold_ema_dead_code": 0.2,
        },
        "speaker_encoder": {
            "input_dim": 128,
            "out_dim": WIDTH,
            "latent_dim": 16,
            "token_num": N_GLOBAL,
            "fsq_levels": list(LEVELS),
            "fsq_num_quantizers": 1,
        },
        "prenet": {
            "input_channels": WIDTH, "out_channels": WIDTH, "condition_dim": WIDTH, **vocos, **same,
        },
        "postnet": {"input_channels": WIDTH, "out_channels": 16, **vocos, **same},
    }  # fmt: skip
    model = _bicodec(parts)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The package's own start lets a token hear hardly anything of its neighbours.
            if "prenet" in name and name.endswith(("dwconv.weight", "embed.weight")):
                parameter.normal_(0, 0.3)
            if name.startswith("decoder.model") and name.endswith("weight_g"):
                parameter.mul_(1.25)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    # As in the released file: without what is computed from the configuration.
    derived = {key for key in state if key.startswith("mel_transformer.")}
    save_file(
        {k: v for k, v in state.items() if k not in derived}, folder / "BiCodec/model.safetensors"
    )
    (folder / "BiCodec/config.yaml").write_text(yaml.safe_dump({"audio_tokenizer": parts}))
    top = {
        "sample_rate": 16_000,
        "ref_segment_duration": 6,
        "latent_hop_length": 320,
        "volume_normalize": True,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(top))


def _bicodec(parts: dict[str, Any]) -> Any:
    from sparktts.models.bicodec import BiCodec
    from sparktts.modules.encoder_decoder.feat_decoder import Decoder
    from sparktts.modules.encoder_decoder.feat_encoder import Encoder
    from sparktts.modules.encoder_decoder.wave_generator import WaveGenerator
    from sparktts.modules.speaker.speaker_encoder import SpeakerEncoder
    from sparktts.modules.vq.factorized_vector_quantize import FactorizedVectorQuantize

    return BiCodec(
        parts["mel_params"],
        Encoder(**parts["encoder"]),
        WaveGenerator(**parts["decoder"]),
        FactorizedVectorQuantize(**parts["quantizer"]),
        SpeakerEncoder(**parts["speaker_encoder"]),
        Decoder(**parts["prenet"]),
        Decoder(**parts["postnet"]),
    )


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
