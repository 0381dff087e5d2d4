"""One piece of text through `Xtts.inference_stream`: what the package lacks for a live service.

It keeps the piece that is being spoken on the model itself, computes all of a piece's sound again
for every chunk, has chunks of one size and looks at nobody between them. All of that is mended
from outside: by a view of the model for every piece, and by what is handed to the call.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from src.audio.pcm import Float32
from src.rpc.errors import Internal
from src.tts.families.xtts.text import Piece
from src.tts.tts_base import CancelToken

CODE_MS = 1024 / 22.05
"""What one code of the GPT sounds for, at speed 1."""
OVERLAP = 1024
"""Samples at the end of a chunk that the next one is faded into; the package's default."""
CHUNKS = (8, 12, 20, 30)
"""Codes of the first chunk, the second, …; the last size goes on."""
# Frames of 256 samples that the vocoder hears to either side: 13.5 by its kernels and dilations.
_REACH = 16
_HOP = 256
# The package divides a text's sound by its speed, and cannot divide less than this by two.
_LEAST_CODES = 3
# A text that takes so much longer than a usual voice would take is not being read any more.
_SLACK_MS = 3_000
_SLACK = 3.0


class Cancelled(Exception):
    """Raised through the package, to end it between two codes."""


def speak(
    model: Any,
    piece: Piece,
    language: str,
    voice: tuple[Any, Any],
    sampling: Mapping[str, Any],
    cancel: CancelToken,
) -> Iterator[Float32]:
    """Chunks of mono float32 in [-1, 1] at the model's rate, none of them empty.

    `sampling` are keywords of `inference_stream`. Ends quietly when cancelled. Raises Internal for
    sound that is none, and what the package does.
    """
    watch = Watch(cancel, most_codes(piece.usual_ms))
    call = session_view(model, piece.ids).inference_stream(
        piece.text,
        language,
        *voice,
        stream_chunk_size=Growing(CHUNKS),
        overlap_wav_len=OVERLAP,
        stopping_criteria=[watch],
        min_new_tokens=_LEAST_CODES,
        **sampling,
    )
    try:
        for chunk in call:
            if (sound := _samples(chunk)).size:
                yield sound
            if cancel.cancelled:
                return
    except Cancelled:
        return


def session_view(model: Any, ids: Sequence[int]) -> Any:
    """The same weights, with what a call leaves behind kept apart: as cheap as four objects.

    `GPT2InferenceModel` holds the prompt of the call that is running; two calls at once on one
    model would go on from each other's.
    """
    view, gpt = copy.copy(model), copy.copy(model.gpt)
    gpt.__dict__["_modules"] = {**gpt._modules, "gpt_inference": copy.copy(gpt.gpt_inference)}
    decoder = copy.copy(model.hifigan_decoder)
    vocoder = Vocoder(model.hifigan_decoder.waveform_decoder)
    decoder.__dict__["_modules"] = {**decoder._modules, "waveform_decoder": vocoder}
    view.__dict__["_modules"] = {**view._modules, "gpt": gpt, "hifigan_decoder": decoder}
    view.tokenizer = Prepared(ids)
    return view


class Prepared:
    """A tokenizer that has read its text already, under the lock that the real one needs."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = list(ids)

    def encode(self, txt: str, lang: str) -> list[int]:
        return self._ids


class Vocoder:
    """Of a sound that is longer in every call, only what the last call could not know.

    The package decodes all from the beginning for every chunk and takes the end of it: a cost that
    grows with the square of the length. What it takes is equal here; before that, there is silence.
    """

    def __init__(self, network: Any) -> None:
        self._network = network
        self._known = 0

    def __call__(self, frames: Any, g: Any) -> Any:
        """`frames` (…, channels, n) → sound (…, 1, n * 256)."""
        import torch

        first = max(0, self._known - OVERLAP // _HOP - _REACH)
        self._known = frames.shape[-1]
        sound = self._network(frames[..., first:], g=g)
        return torch.nn.functional.pad(sound, (first * _HOP, 0))


class Growing(int):
    """A `stream_chunk_size` that is another one for each chunk.

    The package asks `codes >= stream_chunk_size` after every code, and Python asks the subclass
    first. Were it to ask in another way, all chunks would have the first one's size.
    """

    _left: list[int]

    def __new__(cls, sizes: Sequence[int]) -> Growing:
        size = super().__new__(cls, sizes[0])
        size._left = list(sizes)
        return size

    def __le__(self, codes: int) -> bool:
        if codes < self._left[0]:
            return False
        if len(self._left) > 1:
            del self._left[0]
        return True


class Watch:
    """A stopping criterion of transformers: called after every code."""

    def __init__(self, cancel: CancelToken, most: int) -> None:
        self._cancel = cancel
        self._most = most
        self.codes = 0

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """Whether each row is done, bool (rows). Raises Cancelled."""
        if self._cancel.cancelled:
            raise Cancelled
        import torch

        self.codes += 1
        done = self.codes >= self._most
        return torch.full(input_ids.shape[:1], done, dtype=torch.bool, device=input_ids.device)


def most_codes(usual_ms: float) -> int:
    """After which a text of this usual length is cut off."""
    return int((_SLACK_MS + _SLACK * usual_ms) / CODE_MS)


def _samples(chunk: Any) -> Float32:
    """Raises Internal for numbers that are none."""
    sound: Float32 = chunk.float().cpu().numpy().copy()
    if not np.isfinite(sound).all():
        raise Internal("xtts made a sound that is no number; are its weights whole?")
    return sound
