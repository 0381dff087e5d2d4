"""MeloTTS's network and its BERT, for one model: loaded from plain files, run for many threads.

torch, transformers and the package are imported inside the functions only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from src.audio.pcm import Float32
from src.rpc.errors import CorruptModel, Internal
from src.tts.families.melo.bounds import (
    Stopped,
    convolve_in_pieces,
    hold_durations,
    look_between_layers,
)
from src.tts.families.melo.chance import drawing_from, share_no_chance
from src.tts.families.melo.english import Phonemes
from src.tts.families.torch_host import load_plain, loading
from src.tts.tts_base import CancelToken

BERT_WIDTH = 768
"""Of the input `ja_bert`, which takes every language's BERT but the Chinese one."""
_UNUSED_WIDTH = 1024
_LAYERS_AFTER = 2  # hidden_states[-3] is what the voices learnt from
_HIGHEST_TONE = 3


@dataclass(frozen=True, slots=True)
class Sound:
    """How a segment is to sound; the package's own names and defaults are in the adapter."""

    speaker: int
    speed: float
    noise: float
    noise_w: float
    sdp_ratio: float


@dataclass(frozen=True, slots=True)
class Pack:
    """What a voice pack holds; `words` is the size of its tokenizer's vocabulary."""

    model_id: str
    config: Mapping[str, Any]
    checkpoint: Path
    bert: Path
    words: int


class Network:
    """The weights. `say` runs on any thread; what one says does not depend on the others."""

    def __init__(self, pack: Pack, net: Any, bert: Any, device: Any) -> None:
        from melo.text import language_id_map, language_tone_start_map

        config = pack.config
        self._net, self._bert, self._device = net, bert, device
        self._ids = {symbol: i for i, symbol in enumerate(config["symbols"])}
        self._language = language_id_map["EN"]
        self._first_tone = language_tone_start_map["EN"]
        data = config["data"]
        self._blanks = bool(data.get("add_blank"))
        self._deaf = bool(data.get("disable_bert"))
        self.sample_rate = int(data["sampling_rate"])
        self._frames_per_s = self.sample_rate / int(data["hop_length"])
        self._running = threading.local()
        self._watch()

    def say(self, phonemes: Phonemes, sound: Sound, chance: Any, cancel: CancelToken) -> Float32:
        """Mono at `sample_rate`, drawn from the generator `chance`.

        Raises Stopped when cancelled meanwhile, Internal for a sound that is none, and what the
        package raises.
        """
        import torch

        self._running.cancel = cancel
        try:
            with drawing_from(chance), torch.inference_mode():
                samples = self._infer(phonemes, sound).float().cpu().numpy()
        finally:
            self._running.cancel = None
        if not np.isfinite(samples).all():
            raise Internal("melo made a sound that is no sound (NaN): its weights are broken")
        return np.asarray(samples, dtype=np.float32)

    def _infer(self, phonemes: Phonemes, sound: Sound) -> Any:
        import torch

        ids = [self._ids[symbol] for symbol in phonemes.symbols]
        tones = [self._first_tone + tone for tone in phonemes.tones]
        languages = [self._language] * len(ids)
        counts = list(phonemes.per_token)
        if self._blanks:
            ids, tones, languages = (_with_blanks(row) for row in (ids, tones, languages))
            counts = [2 * count for count in counts]
            counts[0] += 1
        sequence = [self._row(row) for row in (ids, tones, languages)]
        unused = torch.zeros(1, _UNUSED_WIDTH, len(ids), device=self._device)
        heard = self._features(phonemes.tokens, counts)
        return self._net.infer(
            sequence[0],
            self._row([len(ids)])[0],
            self._row([sound.speaker])[0],
            sequence[1],
            sequence[2],
            unused,
            heard,
            noise_scale=sound.noise,
            noise_scale_w=sound.noise_w,
            sdp_ratio=sound.sdp_ratio,
            length_scale=1 / sound.speed,
        )[0][0, 0]

    def _features(self, tokens: Sequence[int], counts: Sequence[int]) -> Any:
        """[1, 768, symbols]: each token's state, as often as it has symbols."""
        import torch

        if self._deaf:
            return torch.zeros(1, BERT_WIDTH, sum(counts), device=self._device)
        states = self._bert(input_ids=self._row(tokens)).last_hidden_state[0]
        return states.repeat_interleave(self._row(counts)[0], dim=0).T[None]

    def _row(self, numbers: Sequence[int]) -> Any:
        import torch

        return torch.tensor([list(numbers)], dtype=torch.long, device=self._device)

    def _watch(self) -> None:
        """The run is one call: its layers look whether the thread's session has been cancelled."""
        running = self._running

        def look() -> None:
            cancel = getattr(running, "cancel", None)
            if cancel is not None and cancel.cancelled:
                raise Stopped

        for part in (self._bert, self._net):
            if part is not None:
                look_between_layers(part, look)
        if self._device.type == "cpu":
            convolve_in_pieces(self._net.dec, look)
        for predictor in (self._net.dp, self._net.sdp):
            hold_durations(predictor, self._frames_per_s)


def open_network(pack: Pack, device: Any, progress: Callable[[float], None]) -> Network:
    """`melo` must be importable. Raises CorruptModel, and Unavailable where memory is short."""
    with loading(pack.model_id, str(device)):
        net = _synthesizer(pack).to(device)
    progress(0.6)
    bert = None
    # Some packs were trained without it, and say so.
    if not pack.config["data"].get("disable_bert"):
        with loading(f"{pack.model_id}: {pack.bert.name}", str(device)):
            bert = _bert(pack).to(device)
    progress(0.9)
    return Network(pack, net, bert, device)


def _synthesizer(pack: Pack) -> Any:
    from melo import models
    from melo.text import language_id_map, language_tone_start_map

    share_no_chance(models)
    config, data = pack.config, pack.config["data"]
    # An index too high ends the process's CUDA context, so it is not left to the first run.
    tones = config["num_tones"] - language_tone_start_map["EN"]
    if tones <= _HIGHEST_TONE or config["num_languages"] <= language_id_map["EN"]:
        raise CorruptModel(f"{pack.model_id}: config.json has too few tones or languages")
    net = models.SynthesizerTrn(
        len(config["symbols"]),
        data["filter_length"] // 2 + 1,
        config["train"]["segment_size"] // data["hop_length"],
        n_speakers=data["n_speakers"],
        num_tones=config["num_tones"],
        num_languages=config["num_languages"],
        **config["model"],
    )
    state = load_plain(pack.model_id, pack.checkpoint)
    weights = state.get("model") if isinstance(state, dict) else None
    if not isinstance(weights, dict):
        raise CorruptModel(
            f"{pack.model_id}: {pack.checkpoint.name} holds no entry 'model' with weights"
        )
    net.load_state_dict(weights, strict=True)
    return _without_weight_norm(net).eval()


def _without_weight_norm(net: Any) -> Any:
    """Else every run writes the weights anew into the modules, under the feet of the others."""
    from torch.nn.utils import remove_weight_norm

    for module in net.modules():
        if hasattr(module, "weight_g"):
            remove_weight_norm(module)
    return net


def _bert(pack: Pack) -> Any:
    """As far as its states are used: the last layers and the head for words are left out."""
    import torch
    from transformers import BertModel

    what = f"{pack.model_id}: {pack.bert.name}"
    bert, info = BertModel.from_pretrained(
        pack.bert,
        use_safetensors=True,
        add_pooling_layer=False,
        dtype=torch.float32,
        output_loading_info=True,
    )
    if missing := sorted(info["missing_keys"]):
        raise CorruptModel(f"{what} lacks {len(missing)} weights: {missing[0]}")
    sizes = bert.config
    if sizes.hidden_size != BERT_WIDTH or sizes.num_hidden_layers <= _LAYERS_AFTER:
        raise CorruptModel(
            f"{what} is {sizes.hidden_size} wide with {sizes.num_hidden_layers} layers; melo needs "
            f"a BERT {BERT_WIDTH} wide with {_LAYERS_AFTER + 1} or more"
        )
    if pack.words > sizes.vocab_size:
        raise CorruptModel(f"{what}/vocab.txt has {pack.words} words, its weights fewer")
    bert.encoder.layer = bert.encoder.layer[:-_LAYERS_AFTER]
    return bert.eval()


def _with_blanks(row: Sequence[int]) -> list[int]:
    out = [0] * (2 * len(row) + 1)
    out[1::2] = row
    return out
