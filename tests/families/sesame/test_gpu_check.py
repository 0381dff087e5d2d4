"""scripts/check_sesame_gpu.py, as far as it goes without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.check_sesame_gpu import (
    CHECKS,
    a_row_that_is_not_numbers_is_alone_with_it,
    check,
    graphs_draw_what_calls_draw,
    lora_voices_share_a_tick,
    out_of_memory_while_recording_leaves_smaller_ticks,
)

ROOT = Path(__file__).resolve().parents[3]
ON_A_BARE_MACHINE = """
import sys
for name in ("grpc", "pydantic", "soxr", "soundfile", "rich", "matplotlib", "peft", "aiohttp"):
    sys.modules[name] = None
sys.argv = ["check_sesame_gpu.py", "--device", "cpu", "--only", "checks", "--checks", "nothing"]
import runpy
runpy.run_path("scripts/check_sesame_gpu.py", run_name="__main__")
"""


def test_it_needs_torch_and_transformers_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ON_A_BARE_MACHINE], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "all checks passed" in done.stdout


def test_checks_pass_where_there_are_no_graphs(capsys: pytest.CaptureFixture[str]) -> None:
    quick = (
        graphs_draw_what_calls_draw,
        lora_voices_share_a_tick,
        a_row_that_is_not_numbers_is_alone_with_it,
        out_of_memory_while_recording_leaves_smaller_ticks,
    )
    assert set(quick) < set(CHECKS)
    assert check("cpu", [one.__name__ for one in quick]) == 0
    assert capsys.readouterr().out.count("ok   ") == len(quick)


def test_a_check_that_fails_is_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from src.tts.families.csm.frame_loop import FrameLoop

    monkeypatch.setattr(FrameLoop, "restore", lambda *_: None)
    step = FrameLoop.step

    def forgetful(self: FrameLoop, batch: object, length: int | None = None) -> object:
        batch.positions = batch.positions.clamp(max=len(batch.slots) + 9)  # type: ignore[attr-defined]
        return step(self, batch, length)  # type: ignore[arg-type]

    monkeypatch.setattr(FrameLoop, "step", forgetful)
    assert check("cpu", [graphs_draw_what_calls_draw.__name__]) == 1
    assert "FAIL graphs draw what calls draw" in capsys.readouterr().out
