"""How many cores an engine's thread takes, and that nobody else notices."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from src.tts.families.csm.cores import WIDE, keep_to_one_core, settle
from src.tts.families.csm.opening import open_engine
from src.tts.families.csm.options import EngineOptions
from src.tts.families.csm.weights import CsmWeights, load_weights


@pytest.fixture(autouse=True)
def three_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def on_a_thread(work: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def cores() -> int:
    """Those that the calling thread's operations are shared out to."""
    torch.zeros(1 << 20).add_(1)
    return int(torch.get_num_threads())


def test_a_thread_that_keeps_to_one_core_leaves_the_others_theirs() -> None:
    def settled() -> tuple[int, int]:
        keep_to_one_core()
        return cores(), on_a_thread(cores)

    assert on_a_thread(settled) == (1, 3)
    assert cores() == 3
    assert on_a_thread(cores) == 3


@pytest.mark.parametrize(
    ("device", "hidden", "expected"),
    [("cpu", WIDE - 1, 1), ("cpu", WIDE, 3), ("cuda", WIDE - 1, 3)],
)
def test_only_a_narrow_model_on_a_processor_keeps_to_one(
    device: str, hidden: int, expected: int, tiny_pack: Path
) -> None:
    weights: CsmWeights = replace(
        load_weights(tiny_pack), device=torch.device(device), hidden=hidden
    )

    def settled() -> int:
        settle(weights)
        return cores()

    assert on_a_thread(settled) == expected


def test_an_engine_of_the_worker_is_settled(tiny_pack: Path) -> None:
    lease = open_engine("tiny", tiny_pack, "cpu", EngineOptions(max_slots=1, positions=256))
    try:
        assert lease.engine.run(lambda _: cores()) == 1
    finally:
        lease.release()
    assert cores() == 3
