"""A model behind a fake speech server, for tests."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from src.audio.pcm import Float32
from src.tts.adapters.adapter_http_speech import HttpSpeechAdapter, HttpSpeechModel
from src.tts.catalog import ModelMeta
from src.tts.tts_base import CancelToken, PcmChunk, Segment, VoiceSpec
from tests.speech_server import FakeSpeechServer, Reply, Script, hangs, pcm, wav

TEXT = "One two three, four five six."
SECRET = "my mother's maiden name"


def entry(server: FakeSpeechServer, **settings: str) -> ModelMeta:
    quick = {"url": server.url, "retries": "0"}
    return ModelMeta(
        model_id="orpheus-en", family="orpheus", backend="http", settings={**quick, **settings}
    )


@contextmanager
def loaded(server: FakeSpeechServer, **settings: str) -> Iterator[HttpSpeechModel]:
    """A model that has greeted; what was asked for that is forgotten."""
    with loaded_as(entry(server, **settings)) as model:
        server.asked.clear()
        yield model


@contextmanager
def loaded_as(meta: ModelMeta) -> Iterator[HttpSpeechModel]:
    model = HttpSpeechAdapter(meta.family).load(meta, {}, "cpu", lambda _: None)
    try:
        yield model
    finally:
        model.unload()


def stream(
    model: HttpSpeechModel,
    *texts: str,
    cancel: CancelToken | None = None,
    spec: VoiceSpec | None = None,
) -> Any:
    places = itertools.accumulate((len(text) + 1 for text in texts), initial=0)
    segments = [Segment(text, at) for text, at in zip(texts or (TEXT,), places, strict=False)]
    return model.stream(segments, spec or VoiceSpec("", ""), cancel or CancelToken())


def sound_of(chunks: list[PcmChunk]) -> Float32:
    return np.concatenate([chunk.samples for chunk in chunks])


def after(ms: int, what: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(ms / 1000.0, what)
    timer.start()
    return timer


def refusing(status: int, text: str = "", kind: str = "application/json", **headers: str) -> Script:
    async def script(reply: Reply) -> None:
        await reply.refuse(status, text, kind, **headers)

    return script


async def begins_and_hangs(reply: Reply) -> None:
    await reply.begin("audio/wav")
    await reply.send(wav(b"", size=0))
    await hangs(reply)


async def speaks_and_hangs(reply: Reply) -> None:
    await reply.send(pcm(100))
    await hangs(reply)
