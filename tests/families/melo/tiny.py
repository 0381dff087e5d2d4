"""A tiny random MeloTTS voice pack: what is released, and bert-base-uncased/ beside it."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch

from src.tts.families.melo.network import BERT_WIDTH
from src.tts.families.melo.sources import SOURCE
from src.tts.families.torch_host import well_behaved

VOICES = {"EN-US": 0, "EN-BR": 1, "EN_INDIA": 2, "EN-AU": 3, "EN-Default": 4}
_WHOLE_WORDS = "hello this is a test the second sentence world forty two one number three".split()


def make_tiny_pack(folder: Path, *, seed: int = 0, size: int = 16) -> Path:
    with well_behaved():
        torch.manual_seed(seed)
        _make_bert(folder / "bert-base-uncased")
        config = _config(size)
        folder.joinpath("config.json").write_text(json.dumps(config))
        net = make_net(config)
        _enlarge(net)
        torch.save({"model": net.state_dict(), "iteration": 0}, folder / "checkpoint.pth")
    return folder


def files_of(folder: Path) -> dict[str, Path]:
    return {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}


def make_net(config: dict[str, Any]) -> Any:
    """The package's own network, as `melo.api` makes it."""
    SOURCE.offer()
    from melo.models import SynthesizerTrn

    data = config["data"]
    return SynthesizerTrn(
        len(config["symbols"]),
        data["filter_length"] // 2 + 1,
        config["train"]["segment_size"] // data["hop_length"],
        n_speakers=data["n_speakers"],
        num_tones=config["num_tones"],
        num_languages=config["num_languages"],
        **config["model"],
    )


def _make_bert(folder: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    folder.mkdir(parents=True)
    letters = [*string.ascii_lowercase, *string.digits]
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *".,!?'-"]
    words = [*marks, *letters, *(f"##{char}" for char in letters), *_WHOLE_WORDS]
    words = list(dict.fromkeys(words))
    folder.joinpath("vocab.txt").write_text("\n".join(words) + "\n")
    options = {"do_lower_case": True, "tokenizer_class": "BertTokenizer", "model_max_length": 512}
    folder.joinpath("tokenizer_config.json").write_text(json.dumps(options))
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=BERT_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.2,
    )
    BertForMaskedLM(config).save_pretrained(folder)


def _config(size: int) -> dict[str, Any]:
    SOURCE.offer()
    from melo.text import num_languages, num_tones, symbols

    return {
        "train": {"segment_size": 16384},
        "data": {
            "sampling_rate": 44100,
            "filter_length": 2048,
            "hop_length": 512,
            "n_speakers": 256,
            "add_blank": True,
            "spk2id": VOICES,
        },
        "model": {
            "use_spk_conditioned_encoder": True,
            "use_noise_scaled_mas": True,
            "use_mel_posterior_encoder": False,
            "use_duration_discriminator": True,
            "inter_channels": size,
            "hidden_channels": size,
            "filter_channels": 2 * size,
            "n_heads": 2,
            "n_layers": 4,
            "n_layers_trans_flow": 3,
            "kernel_size": 3,
            "p_dropout": 0.1,
            "resblock": "1",
            "resblock_kernel_sizes": [3],
            "resblock_dilation_sizes": [[1, 3, 5]],
            "upsample_rates": [8, 8, 2, 2, 2],
            "upsample_initial_channel": 64,
            "upsample_kernel_sizes": [16, 16, 8, 2, 2],
            "n_layers_q": 3,
            "use_spectral_norm": False,
            "gin_channels": size,
        },
        "num_languages": num_languages,
        "num_tones": num_tones,
        "symbols": list(symbols),
    }


def _enlarge(net: Any) -> None:
    """With the usual small ones, nothing but the biases would be heard. Durations stay short."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.dim() > 1 and not name.startswith(("sdp", "dp", "dec")):
                parameter.normal_(0, 0.2)
        net.dec.conv_post.weight *= 20
        net.dp.proj.bias.fill_(1.0)
