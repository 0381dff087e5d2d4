"""Parler-TTS: the package's model, driven a step at a time.

The package's own streamer blocks for ever when generating raises, decodes everything from the
beginning for every chunk, and lets `generate` decode it all once more at the end. Here each step's
ids are handed out as they are drawn, and an exception ends the call where the ids do.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from src.audio.pcm import Float32
from src.rpc.errors import CorruptModel, Internal, InvalidArgument
from src.tts.families.parler.frames import Ids, reach_of
from src.tts.families.parler.pack import DESCRIPTION_TOKENIZER
from src.tts.families.torch_host import (
    check_device,
    give_back_memory,
    loading,
    speaking,
    well_behaved,
)

MAX_DESCRIPTIONS = 64
"""How many descriptions of sessions are remembered; those of voices are kept beside them."""
# The begin and end of the codebooks' staircase, and a frame between.
_FEWEST_STEPS = 32


class SpeechEnded(Exception):
    """Raised by whoever takes the draws, to end `generate`."""


class ParlerEngine:
    """Batch 1; calls from several threads share weights and nothing else."""

    def __init__(self, model_id: str, model: Any, prompts: Any, descriptions: Any) -> None:
        self._model_id = model_id
        self._model = model
        self._prompts = prompts
        self._descriptions = descriptions
        codec = model.audio_encoder
        self.reach, self.hop = reach_of(getattr(codec, "model", codec).decoder)
        self.sample_rate = int(model.config.sampling_rate)
        self.codebooks = int(model.decoder.num_codebooks)
        self.codes = int(codec.config.codebook_size)
        self._states: OrderedDict[str, Any] = OrderedDict()
        self._describing = threading.Lock()

    @property
    def described(self) -> int:
        return len(self._states)

    def frames(self, milliseconds: float) -> int:
        return max(1, round(milliseconds * self.sample_rate / 1000 / self.hop))

    def describe(self, text: str) -> Any:
        """What the decoder hears of a description: (1, tokens, width), remembered."""
        with self._describing:
            if text not in self._states:
                self._states[text] = self.read_description(text)
                if len(self._states) > MAX_DESCRIPTIONS:
                    self._states.popitem(last=False)
            self._states.move_to_end(text)
            return self._states[text]

    def read_description(self, text: str) -> Any:
        import torch

        model = self._model
        with torch.inference_mode(), speaking(self._model_id):
            ids = self._tokens(self._descriptions, text)
            states = model.text_encoder(input_ids=ids).last_hidden_state
            # `generate` does this itself only if it runs the encoder.
            return model.enc_to_dec_proj(states) if hasattr(model, "enc_to_dec_proj") else states

    def generate(
        self,
        text: str,
        description: Any,
        *,
        temperature: float,
        frames: int,
        step: Callable[[Ids | None], None],
    ) -> bool:
        """Calls `step` before the first step with None and after each with its ids (codebooks,).

        True: `step` ended it with SpeechEnded; False: `frames` were drawn, or all that the pack
        allows. Raises what `step` raises, InvalidArgument for a text of too many tokens, Internal.
        """
        import torch
        from transformers.modeling_outputs import BaseModelOutput

        sampling = {"do_sample": True, "temperature": temperature}
        with torch.inference_mode(), speaking(self._model_id):
            prompt = self._tokens(self._prompts, text)
            try:
                self._model.generate(
                    # A new one each time: the model may write the text behind the description.
                    encoder_outputs=BaseModelOutput(last_hidden_state=description),
                    attention_mask=torch.ones_like(description[..., 0], dtype=torch.long),
                    prompt_input_ids=prompt,
                    max_length=self._steps(frames, prompt.shape[1]),
                    streamer=_Streamer(step),
                    **(sampling if temperature else {"do_sample": False}),
                )
            except SpeechEnded:
                return True
            except _AllDrawn:
                return False
            raise Internal(f"{self._model_id}: parler_tts went on after its last step")

    def decode(self, ids: Ids) -> Float32:
        """(codebooks, frames) to frames * hop samples."""
        import torch

        with torch.inference_mode(), speaking(self._model_id):
            model = self._model
            codes = torch.from_numpy(ids)[None].to(model.device)
            scales = {"audio_scales": [None]} if model.use_audio_scales else {}
            # The package's wrapper around descript's codec takes a list of chunks: one.
            codes = codes[None] if model.use_4dim_audio_codes else codes
            sound = model.audio_encoder.decode(audio_codes=codes, **scales).audio_values
            out: Float32 = sound.reshape(-1).float().cpu().numpy()
            return out

    def close(self) -> None:
        device = str(self._model.device)
        self._model = self._prompts = self._descriptions = None
        self._states.clear()
        give_back_memory(device)

    def _tokens(self, tokenizer: Any, text: str) -> Any:
        found = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        return found.input_ids.to(self._model.device)

    def _steps(self, frames: int, prompt: int) -> int:
        """`max_length`, which counts the begin mark."""
        model = self._model
        # Places beyond these are not cut by the package, they are an index error.
        room = int(model.config.decoder.max_position_embeddings) - prompt
        if room < _FEWEST_STEPS:
            raise InvalidArgument(f"{self._model_id}: a text of {prompt} tokens is too long for it")
        allowed = int(model.generation_config.max_length or room)
        return max(_FEWEST_STEPS, min(frames + self.codebooks, allowed, room))


class _AllDrawn(Exception):
    """No more steps. Raised so that `generate` does not decode what was decoded already."""


class _Streamer:
    """What `generate` calls: `put` with the begin marks (codebooks, 1), then with each draw."""

    def __init__(self, step: Callable[[Ids | None], None]) -> None:
        self._step = step

    def put(self, value: Any) -> None:
        self._step(value.numpy().astype(np.int64) if value.ndim == 1 else None)

    def end(self) -> None:
        raise _AllDrawn


def open_engine(
    model_id: str, folder: Path, device: str, precision: str, progress: Callable[[float], None]
) -> ParlerEngine:
    """Raises CorruptModel, InvalidArgument for a device that is not there, Unavailable where its
    memory is short."""
    place = check_device(model_id, device)
    # It warns of flash attention that nobody asked for, of configs, of masks.
    logging.getLogger("parler_tts").setLevel(logging.ERROR)
    with well_behaved(), loading(model_id, device):
        prompts, descriptions = _tokenizers(folder)
        progress(0.1)
        model = _load_model(model_id, folder, _dtype(precision, place.type))
        progress(0.8)
        _check_vocabularies(model_id, model.config, prompts, descriptions)
        model.to(place).eval().requires_grad_(False)
        # Ids go in and sound comes out, so it may differ; in half precision one hears it.
        model.audio_encoder.float()
        return ParlerEngine(model_id, model, prompts, descriptions)


def _load_model(model_id: str, folder: Path, dtype: Any) -> Any:
    from parler_tts import ParlerTTSForConditionalGeneration

    model, told = ParlerTTSForConditionalGeneration.from_pretrained(
        str(folder),
        torch_dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    # The package would fill these with noise and go on.
    if missing := sorted(told["missing_keys"]):
        raise CorruptModel(
            f"{model_id}: {len(missing)} tensors are missing from its weights, the first is "
            f"{missing[0]}"
        )
    config = model.generation_config
    # A cache of fixed size is kept on the model, where two streams would share it.
    config.cache_implementation = config.max_new_tokens = None
    config.num_beams, config.return_dict_in_generate = 1, False
    return model


def _tokenizers(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    prompts = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    own = folder / DESCRIPTION_TOKENIZER
    if not own.is_dir():
        return prompts, prompts
    return prompts, AutoTokenizer.from_pretrained(str(own), local_files_only=True)


def _check_vocabularies(model_id: str, config: Any, prompts: Any, descriptions: Any) -> None:
    if len(prompts) > config.vocab_size:
        raise CorruptModel(
            f"{model_id}: its tokenizer knows {len(prompts)} tokens and the model "
            f"{config.vocab_size}; they are not of one model"
        )
    if len(descriptions) > config.text_encoder.vocab_size:
        raise CorruptModel(
            f"{model_id}: descriptions need the text encoder's own tokenizer; put that of "
            f"{config.text_encoder._name_or_path or 'its text encoder'} into "
            f"{DESCRIPTION_TOKENIZER}/"
        )


def _dtype(precision: str, device_type: str) -> Any:
    import torch

    if precision == "auto":
        precision = "bfloat16" if device_type == "cuda" else "float32"
    return getattr(torch, precision)
