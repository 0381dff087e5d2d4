"""The surface that every family shows to the worker.

An `Adapter` is what a family is: its static capabilities and how to load one of its models. A
`Model` is one loaded set of weights; `stream` runs on a thread of its own, may block, and looks at
its cancel token between steps. The family's package is imported inside `load`, never before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from src.audio.pcm import Float32

if TYPE_CHECKING:
    from src.tts.catalog import ModelMeta

RANDOM_WEIGHTS = "random-weights"
"""Tag of a model that speaks noise, for tests: nobody gets it who did not ask for it by name."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of an utterance, spoken in one go; `char_start` is its place in the whole text."""

    text: str
    char_start: int


@dataclass(frozen=True, slots=True)
class WordMark:
    """One word: [start_ms, end_ms) from its chunk's first sample, and its place in the text."""

    text: str
    start_ms: int
    end_ms: int
    char_start: int
    char_end: int
    estimated: bool


@dataclass(frozen=True, slots=True)
class PcmChunk:
    """Mono float32 in [-1, 1] at the native rate; none, to bring only words.

    `words` may reach past the chunk's end; known late, they may begin before its first sample.
    """

    samples: Float32
    words: tuple[WordMark, ...] = ()


@dataclass(frozen=True, slots=True)
class VoiceSpec:
    """What a session asked for, already checked against the model's voices and settings."""

    voice: str
    language: str
    settings: Mapping[str, str] = field(default_factory=dict)


class CancelToken:
    """Set once, from any thread; seen by the synthesis between its steps."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancelled = False
        self._callbacks: list[Callable[[], None]] = []

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            callbacks, self._callbacks = self._callbacks, []
            for callback in callbacks:
                callback()

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    @contextmanager
    def calling(self, callback: Callable[[], None]) -> Iterator[None]:
        """Inside, `cancel` calls `callback` (short, not raising), to end a step that is running.

        Called at once if cancelled already; never called after the block.
        """
        with self._lock:
            if not self._cancelled:
                self._callbacks.append(callback)
            else:
                callback()
        try:
            yield
        finally:
            with self._lock:
                if callback in self._callbacks:
                    self._callbacks.remove(callback)


@dataclass(frozen=True, slots=True)
class AdapterCapabilities:
    """What holds for every model of a family."""

    zero_shot: bool = False
    lora: bool = False
    cpu_ok: bool = False
    emotive_zero_prompt: bool = False
    # True: `stream` takes text as it is written. False: it gets whole clauses from the segmenter.
    incremental_text: bool = False
    # True: a segment's first sound comes before the segment is made, however long it is.
    streams: bool = False
    # False: the family has no alignment; its word times are estimates.
    word_times: bool = False
    # True: the engine computes on a thread of its own, for all streams together; `stream` only
    # waits for it, and takes none of the worker's turns at computing.
    own_engine: bool = False
    # Keys that a session's `settings` may hold, each with a sentence on its range.
    settings: Mapping[str, str] = field(default_factory=dict)


class Model(Protocol):
    """One resident model. `stream` may run on several threads at once, up to `max_streams`."""

    native_sample_rate: int
    max_streams: int
    """How many `stream` calls it serves at once; 0 means no limit of its own."""
    voices: tuple[str, ...]
    languages: tuple[str, ...]

    def check_voice(self, spec: VoiceSpec) -> VoiceSpec:
        """Fill in defaults (empty voice or language). Raises UnknownName or InvalidArgument."""
        ...

    def stream(
        self, segments: Iterable[Segment], spec: VoiceSpec, cancel: CancelToken
    ) -> Iterator[PcmChunk]:
        """Speak the segments in order. `segments` may block until more text is written.

        Ends early and quietly when cancelled. Closing the iterator releases everything it holds.
        """
        ...

    def unload(self) -> None:
        """Free weights and engines. No stream is running when this is called."""
        ...


class Adapter(Protocol):
    family: str
    capabilities: AdapterCapabilities

    def check_installed(self) -> None:
        """Cheap, and imports nothing heavy. Raises MissingPackage."""
        ...

    def load(
        self,
        meta: ModelMeta,
        files: Mapping[str, Path],
        device: str,
        progress: Callable[[float], None],
    ) -> Model:
        """Blocking; called on a thread. `files` maps the entry's file names to verified paths.

        `progress` takes 0..1. Raises CorruptModel for weights that cannot be read, and
        MissingPackage when the family's package is not installed.
        """
        ...


class MissingPackage(RuntimeError):
    """The family's Python package is not there. `install` is the exact command that brings it."""

    def __init__(self, family: str, install: str) -> None:
        super().__init__(f"{family} is not installed; run: {install}")
        self.family = family
        self.install = install
