"""MeloTTS's network and its BERT, for one model: loaded from plain files, run for many threads.

torch, transformers and the package are imported inside the functions only.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from src.audio.pcm import Float32
from src.rpc.errors import CorruptModel, Internal
from src.tts.families.melo.english import Phonemes
from src.tts.families.torch_host import load_plain
from src.tts.tts_base import CancelToken

HOME = "MELO_HOME"
BERT_WIDTH = 768
"""Of the input `ja_bert`, which takes every language's BERT but the Chinese one."""
_UNUSED_WIDTH = 1024
_LAYERS_AFTER = 2  # hidden_states[-3] is what the voices learnt from
# Speech has ten to fifteen phonemes a second, each with a blank beside it; this is a third of that.
_LONGEST_S_PER_SYMBOL = 0.15
_LONGEST_S = 2.0
_MOST_LOG_FRAMES = 8.0
_HIGHEST_TONE = 3
_MISFITS = (
    KeyError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError, ArithmeticError
)  # fmt: skip

_IMPORTING = threading.Lock()


class Stopped(Exception):
    """The run was told to end."""


@dataclass(frozen=True, slots=True)
class Sound:
    """How a segment is to sound; the package's own names and defaults are in the adapter."""

    speaker: int
    speed: float
    noise: float
    noise_w: float
    sdp_ratio: float


def find_sources() -> Path | None:
    """The folder `melo` of a checkout that MELO_HOME names, else of what can be imported."""
    places = [Path(home) / "melo"] if (home := os.environ.get(HOME)) else []
    if not places and (spec := importlib.util.find_spec("melo")) is not None:
        places = [Path(place) for place in spec.submodule_search_locations or ()]
    # There are other packages of this name.
    wanted = ("models.py", "text/cmudict.rep", "text/english_utils/number_norm.py")
    return next((at for at in places if all((at / name).is_file() for name in wanted)), None)


@contextmanager
def importable(sources: Path) -> Iterator[None]:
    """Inside, `melo` is imported from there. Nothing is written there and no path stays behind."""
    with _IMPORTING:
        writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        sys.path.insert(0, str(sources.parent))
        try:
            yield
        finally:
            sys.path.remove(str(sources.parent))
            sys.dont_write_bytecode = writes


class Network:
    """The weights. `say` runs on any thread; what one says does not depend on the others."""

    def __init__(self, config: Mapping[str, Any], net: Any, bert: Any, device: Any) -> None:
        from melo.text import language_id_map, language_tone_start_map

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

    def say(self, phonemes: Phonemes, sound: Sound, cancel: CancelToken) -> Float32:
        """Mono at `sample_rate`. Raises Stopped when cancelled meanwhile, and Internal."""
        import torch

        self._running.cancel = cancel
        try:
            with torch.inference_mode():
                samples = self._infer(phonemes, sound).float().cpu().numpy()
        except (RuntimeError, IndexError, ValueError) as error:
            raise Internal(f"melo could not speak a segment: {error}") from error
        finally:
            self._running.cancel = None
        if not np.isfinite(samples).all():
            raise Internal("melo made a sound that is no sound (NaN): its weights are broken")
        out: Float32 = np.clip(samples, -1.0, 1.0)
        return out

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
        """The run is one call: hooks look at its cancel token and keep its length in bounds."""
        running, per_s = self._running, self._frames_per_s

        def look(*_: object) -> None:
            cancel = getattr(running, "cancel", None)
            if cancel is not None and cancel.cancelled:
                raise Stopped

        def bounded(_: object, __: object, log_frames: Any) -> Any:
            return bound_durations(log_frames, per_s)

        net = self._net
        parts = [*self._bert.encoder.layer] if self._bert is not None else []
        for part in (*parts, net.enc_p, *net.flow.flows, *net.dec.ups, *net.dec.resblocks):
            part.register_forward_pre_hook(look)
        for predictor in (net.dp, net.sdp):
            predictor.register_forward_hook(bounded)


def bound_durations(log_frames: Any, frames_per_s: float) -> Any:
    """Logarithms of frames per symbol, [1, 1, symbols]; scaled down where they are beyond speech.

    The flow's memory grows with the square of their sum, so that broken weights could take it all.
    Both predictors' being in bounds, so is their weighted mean, whatever the weight.
    """
    log_frames = log_frames.nan_to_num(nan=0.0).clamp(max=_MOST_LOG_FRAMES)
    most = frames_per_s * (_LONGEST_S + _LONGEST_S_PER_SYMBOL * log_frames.shape[-1])
    beyond = log_frames.logsumexp(-1, keepdim=True) - math.log(most)
    return log_frames - beyond.clamp(min=0.0)


@dataclass(frozen=True, slots=True)
class Pack:
    """What a voice pack holds; `words` is the size of its tokenizer's vocabulary."""

    model_id: str
    config: Mapping[str, Any]
    checkpoint: Path
    bert: Path
    words: int


def open_network(pack: Pack, device: Any, progress: Callable[[float], None]) -> Network:
    """`melo` must be importable. Raises CorruptModel."""
    net = _synthesizer(pack).to(device)
    progress(0.6)
    # Some packs were trained without it, and say so.
    bert = None if pack.config["data"].get("disable_bert") else _bert(pack).to(device)
    progress(0.9)
    return Network(pack.config, net, bert, device)


def _synthesizer(pack: Pack) -> Any:
    from melo.models import SynthesizerTrn
    from melo.text import language_id_map, language_tone_start_map

    config, name = pack.config, pack.checkpoint.name
    data = config["data"]
    try:
        # An index too high ends the process's CUDA context, so it is not left to the first run.
        fits = config["num_tones"] > language_tone_start_map["EN"] + _HIGHEST_TONE
        if not fits or config["num_languages"] <= language_id_map["EN"]:
            raise ValueError("too few tones or languages for English")
        net = SynthesizerTrn(
            len(config["symbols"]),
            data["filter_length"] // 2 + 1,
            config["train"]["segment_size"] // data["hop_length"],
            n_speakers=data["n_speakers"],
            num_tones=config["num_tones"],
            num_languages=config["num_languages"],
            **config["model"],
        )
    except _MISFITS as error:
        raise CorruptModel(
            f"{pack.model_id}: config.json describes no MeloTTS: {error!r}"
        ) from error
    state = load_plain(pack.model_id, pack.checkpoint)
    weights = state.get("model") if isinstance(state, dict) else None
    if not isinstance(weights, dict):
        raise CorruptModel(f"{pack.model_id}: {name} holds no entry 'model' with weights")
    try:
        net.load_state_dict(weights, strict=True)
    except _MISFITS as error:
        message = f"{pack.model_id}: {name} does not fit config.json: {_short(error)}"
        raise CorruptModel(message) from error
    return _without_weight_norm(net).eval().requires_grad_(False)


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
    from safetensors import SafetensorError
    from transformers import BertModel

    what = f"{pack.model_id}: {pack.bert.name}"
    # It warns of the head for words, which nobody asked for.
    report = logging.getLogger("transformers.modeling_utils")
    level = report.level
    report.setLevel(logging.ERROR)
    try:
        bert, info = BertModel.from_pretrained(
            pack.bert,
            local_files_only=True,
            use_safetensors=True,
            add_pooling_layer=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (*_MISFITS, OSError, SafetensorError) as error:
        raise CorruptModel(f"{what} cannot be read: {_short(error)}") from error
    finally:
        report.setLevel(level)
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
    return bert.eval().requires_grad_(False)


def _with_blanks(row: Sequence[int]) -> list[int]:
    out = [0] * (2 * len(row) + 1)
    out[1::2] = row
    return out


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
