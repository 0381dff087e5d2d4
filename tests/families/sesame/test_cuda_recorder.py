"""The order in which a CUDA graph is made, with torch.cuda's names stood in for.

What the real ones do is scripts/check_sesame_gpu.py's to say, on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from src.tts.families.csm.graphs import CAPTURING, WARM_UP_RUNS, CudaGraphRecorder, Size

SIZE = Size(2, 64)


class Told:
    """torch.cuda, as far as a recorder knows it; says what it was asked for, in order."""

    def __init__(self) -> None:
        self.story: list[str] = []
        self.pools: list[object] = []
        self.here = "model's stream"
        self.priorities: list[int] = []

    def install(self, patch: pytest.MonkeyPatch) -> None:
        told = self

        class Stream:
            def __init__(self, *_: object, name: str = "side stream", priority: int = 0) -> None:
                self.name = name
                told.priorities.append(priority)

            def wait_stream(self, other: Any) -> None:
                told.story.append(f"{self.name} waits for {other.name}")

            def synchronize(self) -> None:
                told.story.append(f"host waits for {self.name}")

        class Event:
            def __init__(self, *, blocking: bool) -> None:
                assert blocking

            def record(self) -> None:
                told.story.append("event recorded")

            def synchronize(self) -> None:
                told.story.append("host waits for event")

        class Graph:
            def replay(self) -> None:
                told.story.append("replayed")

        @contextmanager
        def stream(which: Any) -> Iterator[None]:
            before, told.here = told.here, which.name
            yield
            told.here = before

        @contextmanager
        def graph(
            made: Graph, *, pool: object, stream: Any, capture_error_mode: str
        ) -> Iterator[None]:
            assert capture_error_mode == "thread_local"
            told.pools.append(pool)
            before, told.here = told.here, f"capture on {stream.name}"
            yield
            told.here = before

        own = Stream(name="model's stream")
        for name, value in {
            "Stream": Stream, "Event": Event, "CUDAGraph": Graph, "stream": stream, "graph": graph,
            "graph_pool_handle": object, "current_stream": lambda *_: own,
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, value)

    def work(self) -> None:
        assert CAPTURING.locked(), "another model may capture"
        self.story.append(f"work on {self.here}")


def test_warmed_up_beside_captured_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    told.install(monkeypatch)
    recorder = CudaGraphRecorder(torch.device("cuda"))
    replay = recorder.record(SIZE, told.work)
    assert told.story == [
        "side stream waits for model's stream",
        *["work on side stream"] * WARM_UP_RUNS,
        "model's stream waits for side stream",
        "host waits for model's stream",
        "work on capture on side stream",
    ]
    told.story.clear()
    replay()
    recorder.wait()
    assert told.story == ["replayed", "event recorded", "host waits for event"]


def test_all_sizes_share_one_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    told.install(monkeypatch)
    recorder = CudaGraphRecorder(torch.device("cuda"))
    for rows in (4, 2, 1):
        recorder.record(Size(rows, 64), told.work)
    assert len(told.pools) == 3
    assert len({id(pool) for pool in told.pools}) == 1


def test_what_is_captured_is_on_no_stream_that_an_engine_may_be_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch gives its streams out in turn, those of each priority by themselves."""
    told = Told()
    told.install(monkeypatch)
    told.priorities.clear()
    CudaGraphRecorder(torch.device("cuda"))
    assert told.priorities == [-1]
