"""An engine with a thread of its own takes no turns at computing: its streams wait all at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Iterator
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from src.common.clock import MonotonicClock
from src.common.timers import Alarm
from src.rpc.generated import tts_pb2 as pb
from src.tts.handover import FrameQueue
from src.tts.playout import Playout, PlayoutPolicy
from src.tts.run_gate import RunGate
from src.tts.session import Session
from src.tts.synthesis import Synthesis, Voicing
from src.tts.tts_base import AdapterCapabilities, CancelToken, PcmChunk, Segment, VoiceSpec

STREAMS = 3
WAIT_S = 10.0


class Choir:
    """Gives a chunk only once `STREAMS` streams are asking for one."""

    native_sample_rate = 24_000
    max_streams = 0

    def __init__(self) -> None:
        self.voices: tuple[str, ...] = ("one",)
        self.languages: tuple[str, ...] = ("en",)
        self.together = threading.Barrier(STREAMS)

    def check_voice(self, spec: VoiceSpec) -> VoiceSpec:
        return spec

    def stream(
        self, segments: Iterable[Segment], spec: VoiceSpec, cancel: CancelToken
    ) -> Iterator[PcmChunk]:
        for _ in segments:
            self.together.wait(WAIT_S)
            yield PcmChunk(np.zeros(1920, dtype=np.float32))

    def unload(self) -> None:
        pass


async def sung(choir: Choir, gate: RunGate, *, own_engine: bool) -> list[BaseException | None]:
    """The error, if any, of each of the streams, which all run at once."""
    clock, queues, threads = MonotonicClock(), [], []
    voicing = Voicing(
        "choir", "choir", choir, VoiceSpec("one", "en"), pb.CODEC_PCM_S16LE, None, own_engine
    )
    for _ in range(STREAMS):
        queue = FrameQueue(Playout(PlayoutPolicy()), clock, Alarm())
        synthesis = Synthesis(voicing, queue, None, gate, clock)
        await synthesis.feed.put(Segment("la", 0))
        synthesis.feed.close()
        queues.append(queue)
        threads.append(asyncio.create_task(asyncio.to_thread(synthesis.run)))
    await asyncio.gather(*threads)
    return [queue.error for queue in queues]


async def test_every_stream_may_wait_for_an_engine_of_its_own() -> None:
    assert await sung(Choir(), RunGate(1), own_engine=True) == [None] * STREAMS


@pytest.mark.parametrize("own_engine", [True, False])
def test_a_session_knows_from_the_family_which_it_is(own_engine: bool) -> None:
    lease: Any = Mock(capabilities=AdapterCapabilities(own_engine=own_engine))
    stage: Any = Mock()
    session = Session("s1", lease, VoiceSpec("one", "en"), pb.CODEC_PCM_S16LE, stage)
    assert session._voicing().own_engine is own_engine


async def test_others_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the flag is for: with turns, the one that waits would keep the others out."""
    choir = Choir()
    monkeypatch.setitem(globals(), "WAIT_S", 0.2)
    assert None not in await sung(choir, RunGate(1), own_engine=False)
