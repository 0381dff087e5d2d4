"""Whisper on CTranslate2, the engine under faster-whisper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from src.audio.pcm import Float32
from src.orchestrator.asr_guard import Score
from src.orchestrator.asr_scheduler import PassAbandoned
from src.orchestrator.asr_whisper import AUTO, Decoded
from src.rpc.errors import CorruptModel, Unavailable


class Ct2Decoder:
    """CTranslate2 runs up to `parallel` passes at once; others wait inside it."""

    def __init__(
        self, folder: Path, *, device: str, compute_type: str, threads: int, parallel: int
    ) -> None:
        try:
            import ctranslate2
            import tokenizers
            from faster_whisper.feature_extractor import FeatureExtractor
            from faster_whisper.tokenizer import _LANGUAGE_CODES, Tokenizer
        except ImportError as error:
            raise Unavailable(
                "the faster-whisper backend is not installed; run `uv sync`"
            ) from error
        try:
            self._model: Any = ctranslate2.models.Whisper(
                str(folder),
                device=device,
                compute_type=compute_type,
                intra_threads=threads,
                inter_threads=parallel,
            )
        except (RuntimeError, ValueError) as error:
            raise CorruptModel(f"{folder} does not load as a Whisper model: {error}") from error
        self._view = ctranslate2.StorageView.from_array
        self._features = FeatureExtractor(feature_size=self._model.n_mels)
        vocabulary = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        codes = _LANGUAGE_CODES if self._model.is_multilingual else ("en",)
        self._tokenizers = {
            code: Tokenizer(vocabulary, self._model.is_multilingual, "transcribe", code)
            for code in codes
        }
        self.languages = frozenset(self._tokenizers)

    def decode(
        self, samples: Float32, language: str, budget: int, abandoned: Callable[[], bool]
    ) -> Decoded:
        encoded = self._encode(samples)
        if abandoned():
            raise PassAbandoned
        tokenizer = self._tokenizers[self._language_of(encoded) if language == AUTO else language]
        prompt = [*tokenizer.sot_sequence, tokenizer.no_timestamps]
        [result] = self._model.generate(
            encoded,
            [prompt],
            beam_size=1,
            # CTranslate2 stops at min(max_length / 2, max_length - prompt) new tokens.
            max_length=max(2 * budget, budget + len(prompt)),
            return_scores=True,
            return_no_speech_prob=True,
        )
        tokens = list(result.sequences_ids[0])
        return Decoded(
            tokens, Score(result.no_speech_prob, result.scores[0]), len(tokens) >= budget
        )

    def text(self, tokens: Sequence[int]) -> str:
        tokenizer = next(iter(self._tokenizers.values()))
        return str(tokenizer.decode(list(tokens)))

    def _encode(self, samples: Float32) -> Any:
        mel = self._features(samples, padding=0)
        even = mel.shape[1] // 2 * 2
        batch = np.ascontiguousarray(mel[None, :, :even], dtype=np.float32)
        return self._model.encode(self._view(batch), to_cpu=False)

    def _language_of(self, encoded: Any) -> str:
        [ranked] = self._model.detect_language(encoded)
        return str(ranked[0][0]).strip("<|>")
