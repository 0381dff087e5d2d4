"""A voice pack on disk to modules in memory, strictly: what does not fit exactly is refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from src.tts.csm.tiny import BEGIN, END


@dataclass(slots=True)
class CsmWeights:
    """`model` is a `CsmForConditionalGeneration`; its codec stays in float32."""

    model: Any
    tokenizer: Any
    device: Any
    dtype: Any
    codebooks: int
    vocab: int
    codec_vocab: int
    hidden: int
    frame_samples: int
    sample_rate: int

    def text_ids(self, text: str, speaker: int) -> list[int]:
        ids: list[int] = self.tokenizer.encode(f"[{speaker}]{text}", add_special_tokens=False).ids
        return [self.tokenizer.token_to_id(BEGIN), *ids, self.tokenizer.token_to_id(END)]


def load_weights(folder: Path, *, device: str = "cpu", dtype: str = "auto") -> CsmWeights:
    from tokenizers import Tokenizer
    from transformers import CsmForConditionalGeneration

    transformers_logging.disable_progress_bar()
    model = CsmForConditionalGeneration.from_pretrained(folder, local_files_only=True)
    model.eval().requires_grad_(False)
    config = model.config
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    codec = config.codec_config
    return CsmWeights(
        model=model.to(device),
        tokenizer=tokenizer,
        device=torch.device(device),
        dtype=torch.float32,
        codebooks=config.num_codebooks,
        vocab=config.vocab_size,
        codec_vocab=codec.codebook_size,
        hidden=config.hidden_size,
        frame_samples=int(codec.sampling_rate / codec.frame_rate),
        sample_rate=codec.sampling_rate,
    )
