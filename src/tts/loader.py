"""From a catalog entry to a model that has spoken once: find files, verify, load, warm up.

All of it blocks, so it runs on threads of its own. Loads and synthesis never wait for each other's
threads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from src.rpc.errors import DuplexError, Internal, Unavailable
from src.tts.catalog import ModelMeta
from src.tts.sources import MissingFile, Progress, SourceResolver
from src.tts.tts_base import (
    Adapter,
    AdapterCapabilities,
    CancelToken,
    MissingPackage,
    Model,
    Segment,
    VoiceSpec,
)

STAND_IN_FAMILY = "espeak"
WARM_UP_TEXT = "warm up"

# Shares of the progress bar; what is left is the warm-up.
_VERIFIED, _LOADED = 0.4, 0.9
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A warm model, and which family really speaks."""

    model: Model
    family: str
    device: str
    capabilities: AdapterCapabilities
    fallback_reason: str = ""


class Loader(Protocol):
    """What the ModelManager knows of loading. Both calls leave the event loop free."""

    async def load(self, meta: ModelMeta, progress: Progress) -> LoadedModel:
        """Load and warm up. `progress` takes 0..1 and is called on the event loop.

        Raises CorruptModel, Unavailable, UnknownName (no such family) or Internal.
        """
        ...

    async def unload(self, model: Model) -> None: ...


class ModelLoader:
    """The real one.

    `adapters` gives a family's adapter or raises UnknownName. With `allow_fallback`, a family whose
    package is not installed is spoken for by the stand-in, under the same model id and never
    silently: without it, the load fails with the command that installs the package.
    """

    def __init__(
        self,
        adapters: Callable[[str], Adapter],
        resolver: SourceResolver,
        *,
        device: str = "cpu",
        allow_fallback: bool = False,
    ) -> None:
        self._adapters = adapters
        self._resolver = resolver
        self._device = device
        self._allow_fallback = allow_fallback
        self._threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="model-load")

    async def load(self, meta: ModelMeta, progress: Progress) -> LoadedModel:
        loop = asyncio.get_running_loop()

        def report(value: float) -> None:
            loop.call_soon_threadsafe(progress, value)

        shown = _Shown(meta.model_id, report)
        return await loop.run_in_executor(self._threads, self._load, meta, shown)

    async def unload(self, model: Model) -> None:
        await asyncio.get_running_loop().run_in_executor(self._threads, model.unload)

    def close(self) -> None:
        self._threads.shutdown(wait=False)

    def adapter_of(self, meta: ModelMeta) -> Adapter:
        """Who loads this model: by its backend, else by its family, which must then be known."""
        if meta.backend == "http":
            from src.tts.adapters.adapter_http_speech import HttpSpeechAdapter

            return HttpSpeechAdapter(meta.family)
        return self._adapters(meta.family)

    def _load(self, meta: ModelMeta, progress: Progress) -> LoadedModel:
        started = time.monotonic()
        try:
            loaded = self._load_or_stand_in(meta, progress)
        except DuplexError as error:
            _log.error("model not loaded", extra={"model_id": meta.model_id, "why": error.message})
            raise
        except Exception as error:
            _log.exception("model not loaded", extra={"model_id": meta.model_id})
            kind = type(error).__name__
            raise Internal(f"{meta.model_id} could not be loaded: {kind}: {error}") from error
        load_ms = round((time.monotonic() - started) * 1000)
        _log.info("model loaded", extra={"model_id": meta.model_id, "load_ms": load_ms})
        return loaded

    def _load_or_stand_in(self, meta: ModelMeta, progress: Progress) -> LoadedModel:
        try:
            return self._load_family(meta, progress)
        except MissingPackage as missing:
            if not self._allow_fallback:
                raise Unavailable(f"{meta.model_id} cannot be loaded: {missing}") from missing
            reason = str(missing)
        try:
            return self._load_family(_stand_in(meta), progress, fallback_reason=reason)
        except MissingPackage as missing:
            raise Unavailable(
                f"{meta.model_id} cannot be loaded ({reason}), nor can its stand-in: {missing}"
            ) from missing

    def _load_family(
        self, meta: ModelMeta, progress: Progress, fallback_reason: str = ""
    ) -> LoadedModel:
        adapter = self.adapter_of(meta)
        adapter.check_installed()
        device = meta.device or self._device
        here = meta.backend != "http"
        if meta.needs_gpu and device == "cpu" and here:
            raise Unavailable(
                f"{meta.model_id} needs a GPU and this worker runs on cpu; "
                "start it with --device cuda:0"
            )
        files = self._resolve(meta, _part(progress, 0.0, _VERIFIED)) if here else {}
        model = adapter.load(meta, files, device, _part(progress, _VERIFIED, _LOADED))
        try:
            _warm_up(model)
        except Exception:
            model.unload()
            raise
        progress(1.0)
        if fallback_reason:
            _log.warning(
                "STAND-IN VOICE: %s is spoken for by %s, because %s",
                meta.model_id,
                adapter.family,
                fallback_reason,
            )
        return LoadedModel(model, adapter.family, device, adapter.capabilities, fallback_reason)

    def _resolve(self, meta: ModelMeta, progress: Progress) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for place, (name, file) in enumerate(meta.files.items()):
            part = _part(progress, place / len(meta.files), (place + 1) / len(meta.files))
            try:
                found[name] = self._resolver.resolve(
                    meta.model_id, name, file.sources, file.sha256, part
                )
            except MissingFile:
                if not file.optional:
                    raise
        return found


class _Shown:
    """Progress that only rises, and is logged at each quarter."""

    def __init__(self, model_id: str, progress: Progress) -> None:
        self._model_id = model_id
        self._progress = progress
        self._highest = 0.0

    def __call__(self, value: float) -> None:
        if value <= self._highest:
            return
        if int(value * 4) > int(self._highest * 4):
            percent = round(value * 100)
            _log.info("loading", extra={"model_id": self._model_id, "percent": percent})
        self._highest = value
        self._progress(value)


def _part(progress: Progress, start: float, end: float) -> Progress:
    """Progress of one step, as a stretch of the whole."""
    return lambda value: progress(start + (end - start) * min(1.0, max(0.0, value)))


def _stand_in(meta: ModelMeta) -> ModelMeta:
    """The same id and languages; nothing that only the real family has."""
    return ModelMeta(
        model_id=meta.model_id,
        family=STAND_IN_FAMILY,
        device="cpu",
        languages=meta.languages,
        tags=meta.tags,
    )


def _warm_up(model: Model) -> None:
    """Speak a short hidden utterance and throw it away: caches are filled, kernels are primed."""
    spec = model.check_voice(VoiceSpec(voice="", language=""))
    for _ in model.stream([Segment(WARM_UP_TEXT, 0)], spec, CancelToken()):
        pass
