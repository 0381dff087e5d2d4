"""Named ranges in the timeline of NVIDIA's profilers (NVTX): off, unless DUPLEX_NVTX=1.

Off, nothing is imported, and a range is one shared object that does nothing. On, ranges are made by
the `nvtx` package or by torch, whichever is installed; docs/profiling.md lists them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

SWITCH = "DUPLEX_NVTX"

log = logging.getLogger(__name__)

T = TypeVar("T")

_OFF: AbstractContextManager[None] = nullcontext()


def nvtx_range(name: str) -> AbstractContextManager[None]:
    """What this thread does inside. Ranges of a thread nest, so there may be no `yield` and no
    `await` inside: see `nvtx_span`."""
    library = _library()
    return _OFF if library is None else _pushed(library, name)


def nvtx_span(name: str) -> AbstractContextManager[None]:
    """What lasts from here to there, on whichever thread; spans may overlap."""
    library = _library()
    return _OFF if library is None else _started(library, name)


def nvtx_stream(name: str, items: AsyncIterator[T]) -> AsyncIterator[T]:
    """The same items, with a span `name` over all of them and one more until the first."""
    return items if _library() is None else _with_spans(name, items)


async def _with_spans(name: str, items: AsyncIterator[T]) -> AsyncIterator[T]:
    try:
        with nvtx_span(name), ExitStack() as until_first:
            until_first.enter_context(nvtx_span(f"{name}.first"))
            async for item in items:
                until_first.close()
                yield item
    finally:
        # Who closes this one means the other: a generator holds its socket until it is closed.
        aclose = getattr(items, "aclose", None)
        if aclose is not None:
            await aclose()


@dataclass(frozen=True, slots=True)
class _Library:
    """`push` and `pop` belong to a thread; `end` takes what `start` gave, on any."""

    push: Callable[[str], Any]
    pop: Callable[[], Any]
    start: Callable[[str], Any]
    end: Callable[[Any], Any]


@contextmanager
def _pushed(library: _Library, name: str) -> Iterator[None]:
    library.push(name)
    try:
        yield
    finally:
        library.pop()


@contextmanager
def _started(library: _Library, name: str) -> Iterator[None]:
    handle = library.start(name)
    try:
        yield
    finally:
        library.end(handle)


@lru_cache(maxsize=1)
def _library() -> _Library | None:
    """Chosen once in a process, at its first range."""
    if os.environ.get(SWITCH, "") in ("", "0"):
        return None
    for found in (_nvtx_package, _torch):
        try:
            library = found()
            # A torch that was built without CUDA has the functions and raises in them.
            library.push("nvtx")
            library.pop()
        except (ImportError, RuntimeError):
            continue
        return library
    log.warning("no ranges for the profiler: neither nvtx nor torch can make them here")
    return None


def _nvtx_package() -> _Library:
    import nvtx

    return _Library(nvtx.push_range, nvtx.pop_range, nvtx.start_range, nvtx.end_range)


def _torch() -> _Library:
    from torch.cuda import nvtx

    return _Library(nvtx.range_push, nvtx.range_pop, nvtx.range_start, nvtx.range_end)
