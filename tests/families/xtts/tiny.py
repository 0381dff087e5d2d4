"""A small random pack of XTTS-v2's architecture, in the formats that the real one is kept in."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from src.audio.pcm import Float32
from src.tts.adapters.adapter_xtts import XttsAdapter, XttsModel
from src.tts.catalog import ModelMeta
from src.tts.tts_base import CancelToken, Segment, VoiceSpec

LIKELIEST = {"top_k": "1"}
"""Settings that say the same text in the same way."""
LANGUAGES = (
    *("en", "es", "fr", "de", "it", "pt", "pl", "tr", "ru"),
    *("nl", "cs", "ar", "zh-cn", "hu", "ko", "ja", "hi"),
)
PRESETS = ("Ana", "Ben")
CODES = 62
"""Audio codes, without the two that begin and end."""
CHANNELS = 16
"""Of the vocoder; the real one has 512, whatever a pack's config says."""


@contextmanager
def narrow_vocoder(channels: int = CHANNELS) -> Iterator[None]:
    """Inside, the package builds its vocoder so narrow: the pack's and the loader's alike."""
    import TTS.tts.models.xtts as module

    whole = module.HifiDecoder
    module.HifiDecoder = functools.partial(whole, upsample_initial_channel_decoder=channels)
    try:
        yield
    finally:
        module.HifiDecoder = whole


def make_tiny_pack(
    folder: Path,
    *,
    dim: int = 64,
    layers: int = 2,
    heads: int = 2,
    max_codes: int = 605,
    end_bias: float = -1e4,
    presets: Sequence[str] = PRESETS,
    seed: int = 0,
) -> Path:
    """`end_bias`: added to the end's logit; by default no text ends by itself.

    Weights are large, or attention would hardly matter and a wrong mask would not be noticed.
    """
    import torch
    from TTS.tts.configs.xtts_config import XttsArgs, XttsConfig
    from TTS.tts.models.xtts import Xtts

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _write_vocabulary(folder / "vocab.json")
    config = XttsConfig(
        model_args=XttsArgs(
            gpt_layers=layers,
            gpt_n_model_channels=dim,
            gpt_n_heads=heads,
            decoder_input_dim=dim,
            gpt_number_text_tokens=len(vocabulary),
            gpt_start_text_token=vocabulary["[START]"],
            gpt_stop_text_token=vocabulary["[STOP]"],
            gpt_num_audio_tokens=CODES + 2,
            gpt_start_audio_token=CODES,
            gpt_stop_audio_token=CODES + 1,
            gpt_max_audio_tokens=max_codes,
            gpt_use_perceiver_resampler=True,
        )
    )
    config.save_json(folder / "config.json")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Xtts(config)
        _enlarge(model.gpt, ("gpt.", "mel_", "text_"))
        _enlarge(model.hifigan_decoder.waveform_decoder, ("conv_pre", "conv_post"))
        model.gpt.mel_head.bias.data.zero_()
        model.gpt.mel_head.bias.data[CODES + 1] = end_bias
        torch.save({"model": model.state_dict()}, folder / "model.pth")
        if presets:
            voices = {name: _latents(dim) for name in presets}
            torch.save(voices, folder / "speakers_xtts.pth")
    return folder


def files_of(folder: Path) -> dict[str, Path]:
    return {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}


def load(
    files: dict[str, Path],
    *,
    device: str = "cpu",
    voices: Sequence[str] = (),
    languages: Sequence[str] = (),
    **settings: str,
) -> XttsModel:
    meta = ModelMeta(
        model_id="xtts-tiny",
        family="xtts",
        voices=list(voices),
        languages=list(languages),
        settings=settings,
    )
    return XttsAdapter().load(meta, files, device, lambda _: None)


def spec(voice: str = "", language: str = "", **settings: str) -> VoiceSpec:
    return VoiceSpec(voice, language, {**LIKELIEST, **settings})


def said(model: XttsModel, text: str, voice: VoiceSpec | None = None) -> Float32:
    stream = model.stream([Segment(text, 0)], voice or spec(), CancelToken())
    sound = [chunk.samples for chunk in stream]
    return np.concatenate(sound) if sound else np.empty(0, dtype=np.float32)


def _enlarge(module: Any, parts: tuple[str, ...]) -> None:
    import torch

    for name, weight in module.named_parameters():
        if weight.dim() > 1 and name.startswith(parts):
            torch.nn.init.normal_(weight, std=0.25)


def _latents(dim: int) -> dict[str, Any]:
    import torch

    speaker = torch.nn.functional.normalize(torch.randn(1, 512, 1), dim=1)
    return {"gpt_cond_latent": torch.randn(1, 32, dim), "speaker_embedding": speaker}


def _write_vocabulary(path: Path) -> dict[str, int]:
    """A byte-pair vocabulary without pairs: a token for a letter."""
    special = ["[STOP]", "[UNK]", "[SPACE]", "[START]", *(f"[{tag}]" for tag in LANGUAGES)]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
    vocabulary = {token: i for i, token in enumerate([*special, *letters])}
    marks = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": token, "special": True, **marks} for i, token in enumerate(special)
    ]
    bpe = {"type": "BPE", "unk_token": "[UNK]", "vocab": vocabulary, "merges": []}
    whole = {"version": "1.0", "added_tokens": added, "pre_tokenizer": {"type": "Whitespace"}}
    model = bpe | dict.fromkeys(("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    unused = ("truncation", "padding", "normalizer", "post_processor", "decoder")
    path.write_text(json.dumps({**whole, **dict.fromkeys(unused), "model": model}))
    return vocabulary
