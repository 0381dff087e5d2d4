"""One device's model behind the engine's port: frame loop, codec and adapters, a graph a tick.

On a GPU a tick is one replay of a CUDA graph (graphs.py) and one wait; on a processor the same code
is called, for exactly the rows that there are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch

from src.audio.pcm import Float32
from src.tts.families.csm.frame_loop import FrameLoop, StepBatch
from src.tts.families.csm.graphs import (
    CAPTURING,
    CallRecorder,
    CudaGraphRecorder,
    Drawn,
    Recorder,
    Size,
    TickBuffers,
    TickGraphs,
    every,
    powers_up_to,
)
from src.tts.families.csm.mimi_stream import MimiStream
from src.tts.families.csm.ports import Codes, Row, TickResult, Voice

if TYPE_CHECKING:
    from src.tts.families.csm.lora import AdapterWeights, LoraBank
    from src.tts.families.csm.slot_cache import KvPrefix
    from src.tts.families.csm.weights import CsmWeights

log = logging.getLogger(__name__)

MAX_PREFILL = 256
SHORTEST_GRAPH = 256
"""Positions; on a GPU attention over fewer costs next to nothing beside the weights."""
CPU_LENGTH_STEP = 64
"""A processor pays for every position that it looks at, and nothing for having many sizes."""


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def _many_sizes() -> AbstractContextManager[None]:
    """Beyond eight sizes, torch.compile silently goes on with what is written."""
    found: AbstractContextManager[None] = torch._dynamo.config.patch(recompile_limit=64)
    return found


def _as_written(part: Any, *, dynamic: bool) -> Any:
    return part


def sizes_for(slots: int, positions: int, *, few: bool) -> list[Size]:
    """What ticks are recorded at: `few` where a size costs time and memory, else exact rows."""
    if few:
        rows, lengths = powers_up_to(slots), powers_up_to(positions, SHORTEST_GRAPH)
    else:
        rows, lengths = every(1, slots), every(CPU_LENGTH_STEP, positions)
    return [Size(count, length) for count in rows for length in lengths]


class DeviceModel:
    """CsmModel (ports.py) on the device of `weights`, which are its own from now on.

    `max_adapters`: places for LoRA voices, of ranks up to `max_rank`. `recorder` and `sizes` are
    for tests. Raises torch.OutOfMemoryError when the slots, or a tick of one row, do not fit.
    """

    def __init__(
        self,
        weights: CsmWeights,
        *,
        slots: int,
        positions: int,
        compile: bool = False,
        max_adapters: int = 0,
        max_rank: int = 32,
        recorder: Recorder | None = None,
        sizes: Sequence[Size] | None = None,
    ) -> None:
        self.slots = slots
        self.positions = positions
        self.max_prefill = MAX_PREFILL
        self.codebooks = weights.codebooks
        self.frame_samples = weights.frame_samples
        self.sample_rate = weights.sample_rate
        self._weights = weights
        self._device = torch.device(weights.device)
        cuda = self._device.type == "cuda"
        # Engines that share a device would wait for each other in its default stream.
        self._stream = torch.cuda.Stream(self._device) if cuda else None
        if self._stream is not None:
            # The weights may still be on their way there, in the stream of who loaded them.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._adapters = [0] * (slots + 1)
        with self._on_device():
            self._loop = FrameLoop(weights, slots=slots, positions=positions)
            self._mimi = MimiStream(weights.model.codec_model, slots=slots)
            self._bank = self._loop.bank = self._make_bank(max_adapters, max_rank)
            if recorder is None:
                recorder = CudaGraphRecorder(self._device) if cuda else CallRecorder(once=compile)
            self._graphs = self._make_graphs(recorder)
            self._record(list(sizes or sizes_for(slots, positions, few=cuda)), compile)

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        with torch.no_grad(), torch.cuda.stream(self._stream):
            yield

    @property
    def slot_bytes(self) -> int:
        """Memory that one more slot takes: its keys and values, the codec's, its next input."""
        return self._loop.slot_bytes + self._mimi.slot_bytes

    # --- ticks

    def tick(self, rows: Sequence[Row]) -> TickResult:
        adapted = any(row.adapter for row in rows)
        with self._on_device():
            inputs = self._loop.inputs.clone()
            try:
                return self._graphs[adapted].run(rows)
            except BaseException:
                # The codec moves last or not at all; keys and values are written by position.
                self._loop.inputs.copy_(inputs)
                raise

    def _draw(self, batch: StepBatch, length: int) -> Drawn:
        """Tensor operations alone: this is what a graph holds."""
        out = self._loop.step(batch, length)
        heard = out.healthy & ~out.ended & (batch.slots != self.slots)
        pcm = self._decode(batch.slots, out.codes, heard).clamp(-1.0, 1.0)
        return Drawn(out.codes, out.ended, out.healthy, pcm)

    def _make_graphs(self, recorder: Recorder) -> dict[bool, TickGraphs]:
        """Those of base rows alone, and those that compute every voice's adapter too."""
        buffers = TickBuffers(self.slots, self.codebooks, self.frame_samples, self._device)
        return {
            adapted: TickGraphs(self._drawer(adapted), buffers, recorder, scratch=self.slots)
            for adapted in ((False, True) if self._bank else (False,))
        }

    def _record(self, sizes: Sequence[Size], compile: bool) -> None:
        try:
            self._use_compiler(torch.compile if compile else None)
            with _many_sizes() if compile else nullcontext():
                for graphs in self._graphs.values():
                    graphs.record(sizes)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler has many ways to fail, and is a help, not a need
            if not compile:
                raise
            log.warning("going on without torch.compile, which failed: %s", first_line(error))
            self._record(sizes, compile=False)

    def _use_compiler(self, compiler: Callable[..., Any] | None) -> None:
        """What lies between the matrix products, where that is worth a call. None: as written."""
        made = compiler or _as_written
        few = self._device.type == "cuda"
        # The codec takes a compiler three times as long for any size as for one of them.
        self._decode = made(self._mimi.step, dynamic=not few)
        if few:
            self._loop.fuse(partial(made, dynamic=True))

    def _drawer(self, adapted: bool) -> Callable[[StepBatch, int], Drawn]:
        def draw(batch: StepBatch, length: int) -> Drawn:
            self._use_adapters(adapted)
            return self._draw(batch, length)

        return draw

    # --- LoRA voices

    def add_adapter(self, adapter: AdapterWeights) -> int:
        """Its index, for `Voice.adapter`. Raises as LoraBank.add, and ValueError without places."""
        with self._on_device():
            return self._need_bank().add(adapter)

    def remove_adapter(self, index: int) -> None:
        """No slot may speak with it any more. Raises KeyError if there is none."""
        with self._on_device():
            self._need_bank().remove(index)

    def _make_bank(self, capacity: int, max_rank: int) -> LoraBank | None:
        if not capacity:
            return None
        from src.tts.families.csm.lora import LoraBank

        bank = LoraBank(self._weights, capacity=capacity, max_rank=max_rank)
        # A graph holds the layers as they are when it is recorded.
        bank.prepare()
        return bank

    def _need_bank(self) -> LoraBank:
        if self._bank is None:
            raise ValueError("this model was made without places for LoRA voices (max_adapters)")
        return self._bank

    def _use_adapters(self, wanted: bool) -> None:
        if self._bank is not None:
            self._bank.active = wanted

    # --- texts, prompts, slots

    def embed_text(self, text: str, speaker: int) -> Any:
        with self._on_device():
            return self._loop.embed_text(self._weights.text_ids(text, speaker))

    def embed_frames(self, codes: Codes) -> Any:
        with self._on_device():
            return self._loop.embed_frames(torch.from_numpy(codes).to(self._device))

    def join(self, parts: Sequence[Any]) -> Any:
        with self._on_device():
            return torch.cat(list(parts))

    def prefill(self, slot: int, position: int, embeddings: Any) -> None:
        adapter = self._adapters[slot]
        with self._on_device():
            self._use_adapters(adapter != 0)
            self._loop.prefill(slot, position, embeddings, adapter)

    def set_input(self, slot: int, embedding: Any) -> None:
        with self._on_device():
            self._loop.inputs[slot] = embedding[0]

    def assign(self, slot: int, voice: Voice) -> None:
        self._adapters[slot] = voice.adapter
        with self._on_device():
            self._mimi.reset(slot)
            self._loop.restore(slot, cast("KvPrefix | None", voice.prefix))

    def prefix_of(self, embeddings: Any, adapter: int) -> KvPrefix:
        """Read on the scratch slot, which holds nothing from one call to the next."""
        scratch = self.slots
        self._adapters[scratch] = adapter
        for start in range(0, len(embeddings), self.max_prefill):
            self.prefill(scratch, start, embeddings[start : start + self.max_prefill])
        with self._on_device():
            return self._loop.save_prefix(scratch, len(embeddings))

    def encode(self, samples: Float32) -> Codes:
        with self._on_device():
            codes: Codes = self._mimi.encode(samples).cpu().numpy()
            return codes

    def close(self) -> None:
        """Calling anything afterwards raises AttributeError."""
        cuda = self._device.type == "cuda"
        if cuda:
            # A text may still be read, with weights that others' streams may have the memory of.
            torch.cuda.synchronize(self._device)
        self._graphs.clear()
        if self._bank is not None:
            self._bank.detach()
        del self._graphs, self._loop, self._mimi, self._bank, self._weights
        if cuda:
            with CAPTURING:
                torch.cuda.empty_cache()
