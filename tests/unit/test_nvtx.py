"""Ranges for NVIDIA's profilers: where they are, that they nest, and that off costs nothing."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from src.audio.pcm import Float32
from src.common import nvtx
from src.common.clock import MonotonicClock
from src.common.nvtx import SWITCH, nvtx_range, nvtx_span, nvtx_stream
from src.common.timers import Alarm
from src.orchestrator.asr_scheduler import FairRecognizer
from src.orchestrator.ports import Transcript
from src.rpc.generated import tts_pb2 as pb
from src.tts.handover import FrameQueue
from src.tts.playout import Playout, PlayoutPolicy
from src.tts.run_gate import RunGate
from src.tts.synthesis import Synthesis, Voicing
from src.tts.tts_base import CancelToken, PcmChunk, Segment, VoiceSpec
from tests.unit.test_session import Conversation
from tests.virtual_time import run_virtual


class Recorded(ModuleType):
    """Stands for the `nvtx` package: each thread's ranges in order, and the spans of the process.

    The signatures are those of nvtx 0.2.16.
    """

    def __init__(self) -> None:
        super().__init__("nvtx")
        self.log: list[str] = []
        self.open: dict[int, list[str]] = {}
        self.spans: dict[int, str] = {}

    def push_range(self, message: str | None = None) -> None:
        self.open.setdefault(threading.get_ident(), []).append(str(message))
        self.log.append(f"({message}")

    def pop_range(self) -> None:
        self.log.append(f"{self.open[threading.get_ident()].pop()})")

    def start_range(self, message: str | None = None) -> int:
        self.spans[len(self.log)] = str(message)
        self.log.append(f"[{message}")
        return len(self.log) - 1

    def end_range(self, range_id: int) -> None:
        self.log.append(f"{self.spans.pop(range_id)}]")


@pytest.fixture(autouse=True)
def _chosen_anew() -> Iterator[None]:
    nvtx._library.cache_clear()
    yield
    nvtx._library.cache_clear()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    found = Recorded()
    monkeypatch.setitem(sys.modules, "nvtx", found)
    monkeypatch.setenv(SWITCH, "1")
    with nvtx_range("first"):
        pass
    found.log.clear()
    return found


def test_on_ranges_nest_and_end_whatever_is_raised_inside(recorded: Recorded) -> None:
    with pytest.raises(KeyError), nvtx_range("outer"), nvtx_range("inner"):
        raise KeyError
    assert recorded.log == ["(outer", "(inner", "inner)", "outer)"]


def test_spans_may_overlap(recorded: Recorded) -> None:
    first, second = nvtx_span("one"), nvtx_span("two")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert recorded.log == ["[one", "[two", "one]", "two]"]


def test_ranges_of_threads_do_not_mix(recorded: Recorded) -> None:
    meet = threading.Barrier(2, timeout=10)

    def work(name: str) -> None:
        with nvtx_range(name):
            meet.wait()
            assert recorded.open[threading.get_ident()] == [name]
            meet.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(recorded.log) == ["(a", "(b", "a)", "b)"]


@pytest.mark.parametrize("value", [None, "", "0"])
def test_off_a_range_is_the_same_nothing_every_time(
    value: str | None, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv(SWITCH)
    else:
        monkeypatch.setenv(SWITCH, value)
    nvtx._library.cache_clear()
    assert nvtx_range("a") is nvtx_range("b") is nvtx_span("c")
    items = texts("a")
    assert nvtx_stream("llm", items) is items
    with nvtx_range("a"):
        assert not recorded.log


def test_off_nothing_is_imported() -> None:
    program = (
        "import sys; from src.common.nvtx import nvtx_range\n"
        "with nvtx_range('a'): pass\n"
        "assert not {'nvtx', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={SWITCH: ""})


def test_on_but_without_a_library_it_says_so_once_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(SWITCH, "1")
    for name in ("nvtx", "torch", "torch.cuda"):
        monkeypatch.setitem(sys.modules, name, None)
    with caplog.at_level(logging.WARNING), nvtx_range("a"), nvtx_range("b"):
        pass
    assert len(caplog.records) == 1


def test_a_torch_without_cuda_is_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the functions, and they raise."""

    def refuse(*_: object) -> None:
        raise RuntimeError("NVTX functions not installed. Are you sure you have a CUDA build?")

    torch, cuda, inner = ModuleType("torch"), ModuleType("torch.cuda"), ModuleType("nvtx")
    for name in ("range_push", "range_pop", "range_start", "range_end"):
        setattr(inner, name, refuse)
    cuda.nvtx = inner  # type: ignore[attr-defined]
    torch.cuda = cuda  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch.cuda", cuda)
    monkeypatch.setenv(SWITCH, "1")
    with nvtx_range("a"):
        pass


# --- where they are ---


async def texts(*written: str, then: Callable[[], None] = lambda: None) -> AsyncIterator[str]:
    for text in written:
        yield text
    then()


async def test_a_reply_has_a_span_and_one_to_its_first_token(recorded: Recorded) -> None:
    taken = []
    async for text in nvtx_stream("llm", texts("one", "two")):
        taken.append(text)
        recorded.log.append(text)
    assert taken == ["one", "two"]
    assert recorded.log == ["[llm", "[llm.first", "llm.first]", "one", "two", "llm]"]


async def test_both_end_with_a_reply_that_fails_before_its_first_token(recorded: Recorded) -> None:
    def fail() -> None:
        raise LookupError

    with pytest.raises(LookupError):
        _ = [text async for text in nvtx_stream("llm", texts(then=fail))]
    assert not recorded.spans


async def test_closing_closes_the_request(recorded: Recorded) -> None:
    closed = []

    async def request() -> AsyncIterator[str]:
        try:
            yield "one"
            yield "two"
        finally:
            closed.append(True)

    stream: Any = nvtx_stream("llm", request())
    assert await stream.__anext__() == "one"
    await stream.aclose()
    assert closed
    assert not recorded.spans


def test_a_turn_asks_the_language_model_inside_a_span(recorded: Recorded) -> None:
    async def story() -> None:
        async with Conversation() as talk:
            await talk.ask()
            await talk.speaking()

    run_virtual(story())
    assert {"[llm", "[llm.first", "llm.first]", "llm]"} <= set(recorded.log)


class Asked:
    """A recogniser, and a family of one chunk a segment."""

    name = "asked"
    native_sample_rate = 24_000
    max_streams = 0
    voices: tuple[str, ...] = ("one",)
    languages: tuple[str, ...] = ("en",)

    def __init__(self, recorded: Recorded) -> None:
        self._log = recorded.log

    def check_language(self, language: str) -> str:
        return language

    def transcribe(
        self, samples: Float32, language: str, *, draft: bool, abandoned: Callable[[], bool]
    ) -> Transcript:
        self._log.append("draft" if draft else "whole")
        return Transcript("", 0, 0)

    def check_voice(self, spec: VoiceSpec) -> VoiceSpec:
        return spec

    def stream(
        self, segments: Iterable[Segment], spec: VoiceSpec, cancel: CancelToken
    ) -> Iterator[PcmChunk]:
        for segment in segments:
            self._log.append(segment.text)
            yield PcmChunk(np.zeros(960, dtype=np.float32))

    def unload(self) -> None:
        pass


async def test_every_pass_of_the_recogniser_is_in_a_range(recorded: Recorded) -> None:
    recogniser = FairRecognizer(Asked(recorded), parallel=1, queue_limit=2)
    samples = np.zeros(1600, dtype=np.float32)
    for urgent in (True, False):
        await recogniser.transcribe(samples, session_id="s1", language="en", urgent=urgent)
    await recogniser.aclose()
    assert recorded.log == [
        *("(asr.final", "whole", "asr.final)"),
        *("(asr.partial", "draft", "asr.partial)"),
    ]


async def test_every_step_of_an_engine_and_the_cutting_of_its_sound_are_in_ranges(
    recorded: Recorded,
) -> None:
    clock = MonotonicClock()
    voicing = Voicing(
        "m", "choir", Asked(recorded), VoiceSpec("one", "en"), pb.CODEC_PCM_S16LE, None
    )
    queue = FrameQueue(Playout(PlayoutPolicy()), clock, Alarm())
    synthesis = Synthesis(voicing, queue, None, RunGate(1), clock)
    for text in ("la", "li"):
        await synthesis.feed.put(Segment(text, 0))
    synthesis.feed.close()
    await asyncio.to_thread(synthesis.run)
    cut = ("(repacketize", "repacketize)")
    assert recorded.log == [
        *("(tts.choir", "la", "tts.choir)", *cut),
        *("(tts.choir", "li", "tts.choir)", *cut),
        *("(tts.choir", "tts.choir)"),
    ]
