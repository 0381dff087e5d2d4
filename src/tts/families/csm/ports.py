"""The seam between scheduling and mathematics: what the engine asks of a model.

Everything that crosses is a host array or opaque, so the engine runs, and is tested, without a
framework. All calls come from the engine's one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from src.audio.pcm import Float32

Codes = NDArray[np.int64]
"""[frames, codebooks], each code below the codec's codebook size."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Of the voice pack, never of a checkpoint's generation config, which loses its own."""

    temperature: float = 0.9
    """0: greedy."""
    top_k: int = 50


class Embeddings(Protocol):
    """A sequence of backbone inputs; `[a:b]` is the same."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Embeddings: ...


class Prefix(Protocol):
    """The keys and values of a slot's first `positions` positions, kept for other slots."""

    @property
    def positions(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Voice:
    """Who speaks. `prefix` is the voice prompt, read once; None without one."""

    speaker: int = 0
    prefix: Prefix | None = None
    sampling: Sampling = Sampling()
    adapter: int = 0
    """Its place among the engine's LoRA adapters; 0 is the base alone."""


@dataclass(frozen=True, slots=True)
class Row:
    """One slot's part in a tick."""

    slot: int
    position: int
    """Where its input goes: as many positions lie before it."""
    seed: int
    frame: int
    """How many frames the slot has drawn; with `seed` it fixes the noise, whoever else is there."""
    sampling: Sampling
    adapter: int = 0


@dataclass(frozen=True, slots=True)
class TickResult:
    """In the order of the rows."""

    codes: Codes
    """[rows, codebooks]"""
    ended: NDArray[np.bool_]
    """[rows]; the segment is over: the frame is its mark, no sound; the codec did not hear it."""
    healthy: NDArray[np.bool_]
    """[rows]; False: the logits were not numbers. The codec did not hear that frame either."""
    pcm: Float32
    """[rows, frame_samples] in [-1, 1]; of no meaning where `ended` or not `healthy`."""


class CsmModel(Protocol):
    """One device's model with `slots` rows of keys and values, `positions` long each.

    A slot's next input is kept by the model: what `set_input` gave, and after a tick the frame that
    the tick drew.
    """

    slots: int
    positions: int
    max_prefill: int
    """Positions that one `prefill` may take: so long that it fits between two ticks."""
    codebooks: int
    frame_samples: int
    sample_rate: int

    def embed_text(self, text: str, speaker: int) -> Embeddings:
        """A segment's text with its speaker and its marks, at least one position."""
        ...

    def embed_frames(self, codes: Codes) -> Embeddings:
        """One position a frame. The frame of zeros is the mark that ends a segment's sound."""
        ...

    def join(self, parts: Sequence[Embeddings]) -> Embeddings:
        """One after the other, as one: a voice prompt is a text and the frames that say it."""
        ...

    def prefill(self, slot: int, position: int, embeddings: Embeddings) -> None:
        """Read `embeddings` (at most `max_prefill`) into the slot at `position` and after, with the
        adapter of the voice that it is assigned to."""
        ...

    def set_input(self, slot: int, embedding: Embeddings) -> None:
        """The input of the slot's next tick; one position."""
        ...

    def assign(self, slot: int, voice: Voice) -> None:
        """A new owner: the codec starts anew, the voice prompt's keys and values are copied in."""
        ...

    def tick(self, rows: Sequence[Row]) -> TickResult:
        """One frame for every row. Raises what the device raises; then no slot has moved."""
        ...

    def prefix_of(self, embeddings: Embeddings, adapter: int) -> Prefix:
        """Read a voice prompt, keep its keys and values."""
        ...

    def encode(self, samples: Float32) -> Codes:
        """A recording at `sample_rate`, mono, to codes."""
        ...

    def close(self) -> None:
        """Give the memory back. Nothing else is called afterwards."""
        ...
