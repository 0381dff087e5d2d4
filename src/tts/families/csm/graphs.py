"""A tick over buffers that never move, recorded once per size and repeated after: CUDA graphs.

Eager PyTorch spends 5-10 us on every kernel that it starts, and a frame of CSM is some 4,000 of
them: more than the mathematics take. A graph starts all of them at once, but it repeats the very
same addresses and shapes. So a tick's rows go into fixed buffers, filled up to the next recorded
size with rows that work on a scratch slot, and attention looks at the next recorded length.

How a size is recorded is a port: `CudaGraphRecorder` records, `CallRecorder` calls again. All the
rest (sizes, padding, reuse of the buffers, what is done when memory runs out) is the same for both
and is tested without a GPU.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from src.common.nvtx import nvtx_range
from src.tts.families.csm.frame_loop import StepBatch
from src.tts.families.csm.ports import Row, TickResult

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

WARM_UP_RUNS = 2
"""Before a capture: libraries choose their algorithms and take their workspaces in the first."""
SEED_BITS = (1 << 63) - 1
INTS = ("slots", "positions", "seeds", "frames", "top_k", "adapters")
"""The order of the int64 rows in one copy to the device."""


CAPTURING = threading.Lock()
"""Of all models of the process one may capture at a time (torch.cuda.graph), and none may give
memory back meanwhile."""


class Size(NamedTuple):
    """What one recording serves: so many rows, and this many positions for attention to see."""

    rows: int
    length: int


def powers_up_to(most: int, first: int = 1) -> tuple[int, ...]:
    """`first`, twice that, …, and `most` itself."""
    found = []
    while first < most:
        found.append(first)
        first *= 2
    return (*found, most)


def every(step: int, most: int) -> tuple[int, ...]:
    """`step`, twice `step`, three times, …, and `most` itself."""
    return (*range(step, most, step), most)


def choose(recorded: Iterable[Size], rows: int, length: int) -> Size:
    """The least recorded size that holds them; the one of most rows when none has enough.

    Raises LookupError when nothing recorded is as long.
    """
    long_enough = [size for size in recorded if size.length >= length]
    if not long_enough:
        raise LookupError(f"no recorded size holds {length} positions")
    wide_enough = [size for size in long_enough if size.rows >= rows]
    if wide_enough:
        return min(wide_enough)
    most = max(size.rows for size in long_enough)
    return min(size for size in long_enough if size.rows == most)


class Recorder(Protocol):
    """Turns work over fixed buffers into something that repeats it."""

    def record(self, size: Size, work: Callable[[], None]) -> Callable[[], None]:
        """`work` may run on the way. Raises torch.OutOfMemoryError."""
        ...

    def wait(self) -> None:
        """Until all that was asked of the device is done."""
        ...


class CallRecorder:
    """Repeats by calling again. `once`: calls once while recording, for each number of rows, so
    that whatever compiles itself at its first call has done so."""

    def __init__(self, *, once: bool = False) -> None:
        self._once = once
        self._called: set[int] = set()

    def record(self, size: Size, work: Callable[[], None]) -> Callable[[], None]:
        if self._once and size.rows not in self._called:
            self._called.add(size.rows)
            work()
        return work

    def wait(self) -> None:
        pass


class CudaGraphRecorder:
    """torch.cuda.CUDAGraph with one pool of memory for all sizes.

    The pool may be shared because recordings never run at the same time and leave nothing in it:
    what outlives a tick is copied to the fixed buffers.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # torch has 32 streams of each priority and gives them out in turn: at this one, no engine's
        # own stream can be the one that is captured.
        self._side = torch.cuda.Stream(self._device, priority=-1)
        # A spinning wait would burn the core on which the next tick's rows are made.
        self._done = torch.cuda.Event(blocking=True)

    def record(self, size: Size, work: Callable[[], None]) -> Callable[[], None]:
        with CAPTURING:
            self._warm_up(work)
            graph = torch.cuda.CUDAGraph()
            # thread_local: another engine of this process may use the device meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"
            ):
                work()
        replay: Callable[[], None] = graph.replay
        return replay

    def _warm_up(self, work: Callable[[], None]) -> None:
        """On the stream of the capture, so that cuBLAS has its workspace for it."""
        current = torch.cuda.current_stream(self._device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            for _ in range(WARM_UP_RUNS):
                work()
        current.wait_stream(self._side)
        current.synchronize()

    def wait(self) -> None:
        self._done.record()
        self._done.synchronize()


@dataclass(frozen=True, slots=True)
class Drawn:
    """One tick's tensors on the device; [B, K], [B], [B], [B, samples]."""

    codes: Tensor
    ended: Tensor
    healthy: Tensor
    pcm: Tensor


class TickBuffers:
    """Where a tick's rows go in and its frames come out: on the device, and pinned on the host.

    One set for all sizes: a size uses the first rows of each buffer.
    """

    def __init__(self, rows: int, codebooks: int, samples: int, device: torch.device) -> None:
        pinned = device.type == "cuda"

        def host(*shape: int, dtype: Any) -> Tensor:
            return torch.zeros(shape, dtype=dtype, pin_memory=pinned)

        self.rows = rows
        self._ints = host(len(INTS), rows, dtype=torch.int64)
        self._temperature = host(rows, dtype=torch.float32)
        self._codes = host(rows, codebooks, dtype=torch.int64)
        self._verdicts = host(2, rows, dtype=torch.bool)
        self._pcm = host(rows, samples, dtype=torch.float32)
        self._device = [
            buffer.to(device, copy=True)
            for buffer in (self._ints, self._temperature, self._codes, self._verdicts, self._pcm)
        ]

    def fill(self, rows: Sequence[Row], size: int, scratch: int) -> None:
        """`rows`, and after them rows on the slot `scratch` up to `size`; sent to the device."""
        ints, temperature = self._ints.numpy(), self._temperature.numpy()
        ints[:, :size] = 0
        temperature[:size] = 0.0
        ints[0, :size] = scratch
        ints[4, :size] = 1
        for i, row in enumerate(rows):
            ints[:, i] = (row.slot, row.position, row.seed & SEED_BITS, row.frame,
                          row.sampling.top_k, row.adapter)  # fmt: skip
            temperature[i] = row.sampling.temperature
        self._device[0].copy_(self._ints, non_blocking=True)
        self._device[1].copy_(self._temperature, non_blocking=True)

    def batch(self, size: int) -> StepBatch:
        """Views of the device's buffers, the same addresses every time."""
        named = {name: self._device[0][i, :size] for i, name in enumerate(INTS)}
        return StepBatch(temperature=self._device[1][:size], **named)

    def keep(self, drawn: Drawn) -> None:
        """Out of the memory that the next recording takes again. Part of the recorded work."""
        size = len(drawn.codes)
        _, _, codes, verdicts, pcm = self._device
        codes[:size].copy_(drawn.codes)
        verdicts[0, :size].copy_(drawn.ended)
        verdicts[1, :size].copy_(drawn.healthy)
        pcm[:size].copy_(drawn.pcm)

    def fetch(self, size: int) -> None:
        """Ask for the first `size` frames on the host; there after the device was waited for."""
        self._codes[:size].copy_(self._device[2][:size], non_blocking=True)
        self._verdicts.copy_(self._device[3], non_blocking=True)
        self._pcm[:size].copy_(self._device[4][:size], non_blocking=True)

    def result(self, size: int) -> TickResult:
        """A copy: the buffers belong to the next tick."""
        return TickResult(
            codes=self._codes[:size].numpy().copy(),
            ended=self._verdicts[0, :size].numpy().copy(),
            healthy=self._verdicts[1, :size].numpy().copy(),
            pcm=self._pcm[:size].numpy().copy(),
        )


class TickGraphs:
    """`draw(batch, length)` recorded for each of `sizes`, and run for any rows.

    `draw` is tensor operations only. Rows beyond a recording's own work on the slot `scratch`.
    """

    def __init__(
        self,
        draw: Callable[[StepBatch, int], Drawn],
        buffers: TickBuffers,
        recorder: Recorder,
        *,
        scratch: int,
    ) -> None:
        self._draw = draw
        self._buffers = buffers
        self._recorder = recorder
        self._scratch = scratch
        self._replays: dict[Size, Callable[[], None]] = {}

    @property
    def recorded(self) -> tuple[Size, ...]:
        return tuple(sorted(self._replays))

    def record(self, sizes: Iterable[Size]) -> None:
        """Forget what was recorded, and record these: the largest first, so that the smaller fit
        into its memory. A size for which memory does not suffice is left out; raises
        torch.OutOfMemoryError when that is one of a single row."""
        self._replays.clear()
        began = time.monotonic()
        for size in sorted(sizes, reverse=True):
            self._record_one(size)
        log.info("recorded %d sizes of a tick, up to %d rows, in %.1f s", len(self._replays),
                 max(self._replays).rows, time.monotonic() - began)  # fmt: skip

    def _record_one(self, size: Size) -> None:
        self._buffers.fill((), size.rows, self._scratch)
        try:
            self._replays[size] = self._recorder.record(size, self._work(size))
        except RuntimeError as error:
            if size.rows == 1 or not _of_memory(error):
                raise
            log.warning("out of memory while recording ticks of %d rows at %d positions; "
                        "such ticks will be made in smaller pieces", *size)  # fmt: skip

    def _work(self, size: Size) -> Callable[[], None]:
        batch = self._buffers.batch(size.rows)

        def work() -> None:
            self._buffers.keep(self._draw(batch, size.length))

        return work

    def run(self, rows: Sequence[Row]) -> TickResult:
        """One frame for every row, in one piece unless no recording has room for all."""
        length = 1 + max(row.position for row in rows)
        size = choose(self._replays, len(rows), length)
        pieces = [self._piece(rows[i : i + size.rows], length)
                  for i in range(0, len(rows), size.rows)]  # fmt: skip
        return pieces[0] if len(pieces) == 1 else joined(pieces)

    def _piece(self, rows: Sequence[Row], length: int) -> TickResult:
        size = choose(self._replays, len(rows), length)
        with nvtx_range(f"csm tick {len(rows)}/{size.rows} rows, {size.length} positions"):
            self._buffers.fill(rows, size.rows, self._scratch)
            self._replays[size]()
            self._buffers.fetch(len(rows))
            self._recorder.wait()
        return self._buffers.result(len(rows))


def _of_memory(error: BaseException | None) -> bool:
    """The error that ends a capture may hide the one that it ended with."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__context__
    return False


def joined(pieces: Sequence[TickResult]) -> TickResult:
    import numpy as np

    return TickResult(
        codes=np.concatenate([piece.codes for piece in pieces]),
        ended=np.concatenate([piece.ended for piece in pieces]),
        healthy=np.concatenate([piece.healthy for piece in pieces]),
        pcm=np.concatenate([piece.pcm for piece in pieces]),
    )
