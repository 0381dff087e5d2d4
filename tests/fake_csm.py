"""A model without mathematics for the Sesame engine: it counts what is asked of it, and checks it.

What it draws depends on everything that the slot has read, so a frame tells whether the engine read
the right things in the right places. It breaks the test that breaks the port's contract.
"""

from __future__ import annotations

import hashlib
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from src.audio.pcm import Float32
from src.tts.families.csm.ports import Codes, Embeddings, Row, TickResult, Voice

CODEBOOKS = 4
FRAME_SAMPLES = 1920
SAMPLE_RATE = 24_000

_ZEROS = "frame " + " ".join(["0"] * CODEBOOKS)


class FakeEmbeddings:
    """One string a position."""

    def __init__(self, items: Sequence[str]) -> None:
        self.items = list(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, part: slice) -> FakeEmbeddings:
        return FakeEmbeddings(self.items[part])


class FakePrefix:
    def __init__(self, items: Sequence[str]) -> None:
        self.items = list(items)
        self.positions = len(self.items)


def prefix_of_size(positions: int) -> FakePrefix:
    return FakePrefix([f"prompt {i}" for i in range(positions)])


@dataclass
class Call:
    """What one call took part in: `slots` is (slot, positions) for a prefill, 1 each for a tick."""

    kind: str
    slots: tuple[tuple[int, int], ...] = ()


@dataclass
class _Row:
    read: list[str] = field(default_factory=list)
    input: str | None = None
    voice: Voice | None = None
    segment: int = 0
    """Frames of sound since the last text was set."""


class FakeCsmModel:
    """`ends` says how many frames of sound a text takes; None: it never ends by itself."""

    codebooks = CODEBOOKS
    frame_samples = FRAME_SAMPLES
    sample_rate = SAMPLE_RATE

    def __init__(
        self,
        *,
        slots: int = 4,
        positions: int = 512,
        max_prefill: int = 64,
        ends: Callable[[str], int | None] = lambda text: len(text),
    ) -> None:
        self.slots = slots
        self.positions = positions
        self.max_prefill = max_prefill
        self.ends = ends
        self.calls: list[Call] = []
        self.rows = [_Row() for _ in range(slots)]
        self.ticks = 0
        self.closed = False
        self.before_tick: Callable[[Sequence[Row]], None] = lambda rows: None
        """May raise, block or look around."""
        self.sick: Callable[[Row], bool] = lambda row: False
        """Whose logits are no numbers."""
        # As a model that copies into the same memory every time.
        self._codes = np.zeros((slots, CODEBOOKS), dtype=np.int64)
        self._pcm = np.zeros((slots, FRAME_SAMPLES), dtype=np.float32)
        self._thread: int | None = None
        self._lengths: dict[int, int | None] = {}

    # --- the port ---

    def embed_text(self, text: str, speaker: int) -> FakeEmbeddings:
        self._called("embed_text")
        return FakeEmbeddings([f"begin {speaker}", *text, f"end {text}"])

    def embed_frames(self, codes: Codes) -> FakeEmbeddings:
        self._called("embed_frames")
        assert codes.ndim == 2
        assert codes.shape[1] == CODEBOOKS
        assert codes.dtype == np.int64
        return FakeEmbeddings([_frame(row) for row in codes])

    def join(self, parts: Sequence[Embeddings]) -> FakeEmbeddings:
        self._called("join")
        items: list[str] = []
        for part in parts:
            assert isinstance(part, FakeEmbeddings)
            items += part.items
        return FakeEmbeddings(items)

    def prefill(self, slot: int, position: int, embeddings: Embeddings) -> None:
        assert isinstance(embeddings, FakeEmbeddings)
        self._called("prefill", ((slot, len(embeddings)),))
        assert 0 < len(embeddings) <= self.max_prefill
        row = self.rows[slot]
        assert row.voice is not None, "a slot is assigned before it reads"
        self._write(row, position, embeddings.items)

    def set_input(self, slot: int, embedding: Embeddings) -> None:
        assert isinstance(embedding, FakeEmbeddings)
        self._called("set_input", ((slot, 1),))
        assert len(embedding) == 1
        row = self.rows[slot]
        row.input, row.segment = embedding.items[0], 0
        assert row.input.startswith("end "), "only a text is spoken"
        self._lengths[slot] = self.ends(row.input[4:])

    def assign(self, slot: int, voice: Voice) -> None:
        self._called("assign", ((slot, 0),))
        prompt = voice.prefix.items if isinstance(voice.prefix, FakePrefix) else []
        self.rows[slot] = _Row(read=list(prompt), voice=voice)

    def tick(self, rows: Sequence[Row]) -> TickResult:
        self._called("tick", tuple((row.slot, 1) for row in rows))
        assert rows
        assert len({row.slot for row in rows}) == len(rows) <= self.slots
        self.before_tick(rows)
        self.ticks += 1
        drawn = [self._draw(row) for row in rows]
        healthy = np.array([not self.sick(row) for row in rows])
        codes, pcm = self._codes[: len(rows)], self._pcm[: len(rows)]
        codes[:] = drawn
        pcm[:] = codes[:, :1] / 2048.0
        return TickResult(codes, ~codes[:, :-1].any(axis=1) & healthy, healthy, pcm)

    def prefix_of(self, embeddings: Embeddings, adapter: int) -> FakePrefix:
        self._called("prefix_of")
        assert isinstance(embeddings, FakeEmbeddings)
        return FakePrefix(embeddings.items)

    def encode(self, samples: Float32) -> Codes:
        self._called("encode")
        return np.ones((len(samples) // FRAME_SAMPLES, CODEBOOKS), dtype=np.int64)

    def close(self) -> None:
        self._called("close")
        self.closed = True

    # --- the tests ---

    def count(self, kind: str, slot: int | None = None) -> int:
        """How often, or how often with this slot's part in it."""
        calls = [call for call in self.calls if call.kind == kind]
        return sum(slot is None or slot in dict(call.slots) for call in calls)

    def batches(self) -> list[tuple[int, ...]]:
        """The slots of every tick."""
        return [tuple(dict(call.slots)) for call in self.calls if call.kind == "tick"]

    # --- inside ---

    def _called(self, kind: str, slots: tuple[tuple[int, int], ...] = ()) -> None:
        self._thread = self._thread or threading.get_ident()
        assert threading.get_ident() == self._thread, f"{kind} came from another thread"
        assert not self.closed, f"{kind} after close"
        self.calls.append(Call(kind, slots))

    def _write(self, row: _Row, position: int, items: Sequence[str]) -> None:
        assert 0 <= position <= len(row.read), "positions are read without gaps"
        assert position + len(items) <= self.positions, "past the last position"
        row.read[position:] = items

    def _draw(self, part: Row) -> Codes:
        row = self.rows[part.slot]
        assert row.input is not None, "a slot that has no input cannot draw"
        self._write(row, part.position, [row.input])
        length = self._lengths[part.slot]
        codes = np.zeros(CODEBOOKS, dtype=np.int64)
        if length is None or row.segment < length:
            codes = _codes(row.read, part)
        row.segment += 1
        row.input = _frame(codes)
        return codes


def said(frames: Iterator[Float32] | Sequence[Float32]) -> list[float]:
    """What tells frames apart: the one value that all samples of a frame have."""
    out = []
    for frame in frames:
        assert frame.shape == (FRAME_SAMPLES,)
        assert frame.dtype == np.float32
        assert frame.min() == frame.max()
        out.append(float(frame[0]))
    return out


def expected(
    texts: Sequence[str],
    *,
    seed: int,
    prompt: Sequence[str] = (),
    voice: Voice | None = None,
    ends: Callable[[str], int] = len,
) -> list[list[float]]:
    """What a slot says that reads its texts in order and has room for all; for each text."""
    voice = voice or Voice()
    read, drawn = list(prompt), 0
    out: list[list[float]] = []
    pending: list[str] = []
    for text in texts:
        items = FakeCsmModel().embed_text(text, voice.speaker).items
        read += pending + items[:-1]
        current, frames = items[-1], []
        for _ in range(ends(text)):
            read.append(current)
            codes = _codes(read, Row(0, len(read) - 1, seed, drawn, voice.sampling, voice.adapter))
            frames.append(float(np.float32(codes[0] / 2048.0)))
            current, drawn = _frame(codes), drawn + 1
        read.append(current)
        drawn, pending = drawn + 1, [_ZEROS]
        out.append(frames)
    return out


def _frame(codes: Codes) -> str:
    return "frame " + " ".join(map(str, codes.tolist()))


def _codes(read: Sequence[str], part: Row) -> Codes:
    """Of everything that was read, and of the noise; never the end mark."""
    heard = hashlib.blake2b("\n".join(read).encode(), digest_size=8).digest()
    noise = f"{part.seed} {part.frame} {part.sampling} {part.adapter}".encode()
    rng = np.random.default_rng([zlib.crc32(heard), zlib.crc32(noise)])
    return rng.integers(1, 2048, CODEBOOKS)
