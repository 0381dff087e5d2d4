"""Whose random numbers MeloTTS's network draws: the stream's that is speaking on this thread.

The package takes them from torch's one generator, which all sessions share: what one says would
depend on when the others speak.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


class _Mine(threading.local):
    generator: Any = None
    """A `torch.Generator` of the processor, or None: torch's own."""


_mine = _Mine()


@contextmanager
def drawing_from(generator: Any) -> Iterator[None]:
    """Inside, on this thread, the network draws from it."""
    _mine.generator = generator
    try:
        yield
    finally:
        _mine.generator = None


class _Torch(ModuleType):
    """torch, but for the two functions with which `melo.models` draws."""

    def __init__(self, torch: Any) -> None:
        super().__init__("torch")
        self._torch = torch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)

    def randn(self, *size: int) -> Any:
        return self._torch.randn(*size, generator=_mine.generator)

    def randn_like(self, like: Any) -> Any:
        return self._torch.randn(like.shape, generator=_mine.generator).to(like)


def share_no_chance(models: Any) -> None:
    """`models` is the module `melo.models`; from now on it draws as `drawing_from` says."""
    if not isinstance(models.torch, _Torch):
        models.torch = _Torch(models.torch)
