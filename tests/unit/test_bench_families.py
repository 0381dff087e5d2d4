"""What the benchmark of the families takes for a cost, and what it writes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from benchmarks import families
from benchmarks.families import BLOCK, TEXT, Outcome, arguments, cancel, crowd, lines, take_turns
from benchmarks.families_sides import SIDES, Say
from src.audio.pcm import Float32
from src.tts.adapters import FAMILIES
from src.tts.catalog import ROOT
from src.tts.tts_base import CancelToken, PcmChunk, Segment, VoiceSpec


class Steady:
    """Tenths of a second of sound until it is cancelled, ten of them at the most."""

    native_sample_rate = 1_000
    voices: tuple[str, ...] = ("one",)
    languages: tuple[str, ...] = ("en",)

    def __init__(self, max_streams: int = 2) -> None:
        self.max_streams = max_streams
        self.texts: list[str] = []
        self.most_at_once = 0
        self._inside = 0
        self._lock = threading.Lock()

    def check_voice(self, spec: VoiceSpec) -> VoiceSpec:
        return spec

    def stream(
        self, segments: Iterable[Segment], spec: VoiceSpec, cancel: CancelToken
    ) -> Iterator[PcmChunk]:
        with self._lock:
            self._inside += 1
            self.most_at_once = max(self.most_at_once, self._inside)
        self.texts += [segment.text for segment in segments]
        for _ in range(10):
            if cancel.cancelled:
                break
            time.sleep(0.001)
            yield PcmChunk(np.zeros(100, dtype=np.float32))
        with self._lock:
            self._inside -= 1

    def unload(self) -> None:
        pass


def outcome(**sides: float) -> Outcome:
    one = Outcome("xtts", "`call`", load_ms=[1.0], unload_ms=[1.0], cancel_ms=[2.0], max_streams=1)
    one.first_ms = {side: [10.0] for side in sides}
    one.cost_ms = {side: [cost] for side, cost in sides.items()}
    one.crowd_first_ms, one.crowd_cost_ms = [20.0], [30.0]
    return one


def test_sides_take_turns_and_a_cost_is_for_a_second_of_sound() -> None:
    said: list[str] = []

    def side(name: str, seconds: int) -> Say:
        def say(text: str) -> Iterator[Float32]:
            said.append(name)
            assert text == TEXT
            busy_until = time.process_time() + 0.01 * seconds
            while time.process_time() < busy_until:
                pass
            yield np.zeros(1_000 * seconds, dtype=np.float32)

        return say

    one = Outcome("xtts", "")
    take_turns({"adapter": side("adapter", 1), "package": side("package", 3)}, 1_000, 4, one)
    assert said[2:] == ["adapter", "package", "package", "adapter"] * 2
    assert all(cost >= 10 for costs in one.cost_ms.values() for cost in costs)
    assert min(one.cost_ms["package"]) < 20, "three seconds cost three times as much"


def test_a_side_without_sound_is_no_comparison() -> None:
    with pytest.raises(RuntimeError, match="no sound"):
        take_turns({"adapter": lambda _: iter(())}, 1_000, 1, Outcome("xtts", ""))


@pytest.mark.parametrize("max_streams", [1, 2])
def test_a_crowd_is_as_large_as_the_model_serves(max_streams: int) -> None:
    model, one = Steady(max_streams), Outcome("xtts", "")
    crowd(model, 8, one)
    assert model.most_at_once <= max_streams
    assert len(one.crowd_first_ms) == 8
    assert len(one.crowd_cost_ms) == 2


def test_a_cancel_is_timed_to_the_end_of_the_stream() -> None:
    assert cancel(Steady(), 0.002) >= 0.0


def test_too_much_is_marked() -> None:
    (missed,) = [
        line for line in lines([outcome(adapter=110.0, package=100.0)]) if "| xtts" in line
    ]
    (met,) = [line for line in lines([outcome(adapter=104.0, package=100.0)]) if "| xtts" in line]
    assert "+10 % (**missed**)" in missed
    assert "+4 %" in met
    assert "missed" not in met


def test_the_page_is_written_from_every_family_that_was_kept(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text(f"before\n<!-- {BLOCK}:begin -->\nold\n<!-- {BLOCK}:end -->\nafter\n")
    for name in ("xtts", "melo"):
        kept = {**asdict(outcome(adapter=1.0, package=1.0)), "name": name}
        (tmp_path / f"families-{name}.json").write_text(json.dumps(kept))
    families.write(tmp_path, page)
    written = page.read_text()
    assert "old" not in written
    assert written.index("| xtts") < written.index("| melo"), "in the order of SIDES"
    assert written.endswith("after\n")


def test_the_page_has_a_place_for_it() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert f"<!-- {BLOCK}:begin -->" in text
    assert f"<!-- {BLOCK}:end -->" in text


def test_every_side_is_of_a_family_of_this_build() -> None:
    assert {side().family for side in SIDES.values()} <= set(FAMILIES)
    assert arguments(["xtts"]).rounds > 0
