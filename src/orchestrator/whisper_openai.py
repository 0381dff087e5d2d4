"""Whisper on openai-whisper (PyTorch), an optional extra."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

from src.audio.pcm import Float32
from src.orchestrator.asr_guard import Score
from src.orchestrator.asr_scheduler import PassAbandoned
from src.orchestrator.asr_whisper import AUTO, Decoded
from src.rpc.errors import CorruptModel, Unavailable


class OpenAiDecoder:
    """`source`: a checkpoint file, or a name that openai-whisper knows (which may download it)."""

    def __init__(self, source: str, *, device: str, threads: int) -> None:
        try:
            import torch
            import whisper
        except ImportError as error:
            raise Unavailable(
                "the openai-whisper backend is not installed; run `uv sync --extra whisper`"
            ) from error
        torch.set_num_threads(threads)
        try:
            self._model: Any = whisper.load_model(source, device=device)
        except (RuntimeError, KeyError, OSError, ValueError) as error:
            raise CorruptModel(
                f"{source} does not load as a Whisper checkpoint: {error}"
            ) from error
        self._whisper = whisper
        # Its decoder keeps the cache of one pass in hooks on the model itself.
        self._one_at_a_time = threading.Lock()
        encoder = self._model.encoder
        encoder.forward = types.MethodType(_encode_any_length, encoder)
        multilingual = bool(self._model.is_multilingual)
        self.languages = frozenset(whisper.tokenizer.LANGUAGES if multilingual else ("en",))
        self._tokenizer: Any = whisper.tokenizer.get_tokenizer(multilingual)

    def decode(
        self, samples: Float32, language: str, budget: int, abandoned: Callable[[], bool]
    ) -> Decoded:
        mel = self._whisper.log_mel_spectrogram(samples, self._model.dims.n_mels)
        mel = mel[:, : mel.shape[1] // 2 * 2].to(self._model.device)
        if abandoned():
            raise PassAbandoned
        options = self._whisper.DecodingOptions(
            language=None if language == AUTO else language,
            without_timestamps=True,
            sample_len=budget,
            fp16=self._model.device.type == "cuda",
        )
        with self._one_at_a_time:
            result = self._whisper.decode(self._model, mel, options)
        score = Score(float(result.no_speech_prob), float(result.avg_logprob))
        return Decoded(list(result.tokens), score, len(result.tokens) >= budget)

    def text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens)))


def _encode_any_length(self: Any, mel: Any) -> Any:
    """`AudioEncoder.forward` without its demand for 30 s: the first positions serve short audio."""
    from torch.nn import functional

    x = functional.gelu(self.conv1(mel))
    x = functional.gelu(self.conv2(x)).permute(0, 2, 1)
    x = (x + self.positional_embedding[: x.shape[1]]).to(x.dtype)
    for block in self.blocks:
        x = block(x)
    return self.ln_post(x)
