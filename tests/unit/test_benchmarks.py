"""What turns samples into the page's figures."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.caller import Ear, Microphone, Spoken
from benchmarks.figures import Aim, NoBlock, Outcome, Row, Spread, replace_block, row_table
from benchmarks.livekit import arguments as room_arguments
from benchmarks.load import shut_after_onset
from benchmarks.report import block
from benchmarks.rooms import results as room_results
from benchmarks.rooms.guests import jitter_buffer
from benchmarks.rooms.lab import answer
from benchmarks.rooms.report import BLOCK as ROOM_BLOCK
from benchmarks.rooms.report import block as room_block
from benchmarks.rooms.results import stopped
from benchmarks.rooms.scale import Load, Scaled
from benchmarks.rooms.speech import LINE, PEAK, SHORT, after_silence, trimmed
from benchmarks.rooms.trials import OURS, TUNED, Measured, Trial, order
from src.demo.stack import ROOT


def test_percentiles_lie_between_the_nearest_two() -> None:
    spread = Spread.of(range(101))
    assert (spread.n, spread.p50, spread.p95, spread.p99, spread.worst) == (101, 50, 95, 99, 100)
    assert Spread.of([1, 2]).p50 == 1.5


def test_no_samples_are_a_dash_and_no_verdict() -> None:
    row = Row(what="nothing", sessions=1, spread=Spread.of([]), aim=Aim(p50=5))
    assert row.cells()[2:] == ["– ms", "p50 ≤ 5", "", "0"]


@pytest.mark.parametrize(
    ("aim", "verdict"),
    [
        (Aim(p50=2), "met"),
        (Aim(p50=2, p95=2.5), "**missed**"),
        (Aim(p99=2.9), "**missed**"),
        (Aim(), ""),
    ],
)
def test_an_aim_is_met_by_every_percentile_it_names(aim: Aim, verdict: str) -> None:
    row = Row(what="x", sessions=10, spread=Spread.of([1, 2, 3]), aim=aim, digits=1)
    assert row.cells()[2] == "2.0 / 2.9 / 3.0 ms"
    assert row.cells()[4] == verdict


def test_a_table_has_as_many_cells_in_each_line() -> None:
    lines = row_table([Row(what="a | b is written out", sessions=1, spread=Spread.of([1]))])
    assert len({line.count("|") for line in lines[:2]}) == 1


def test_only_the_block_is_rewritten() -> None:
    page = "before\n<!-- x:begin -->\nold\n<!-- x:end -->\nafter\n"
    once = replace_block(page, "x", ["new", "lines"])
    assert once == "before\n<!-- x:begin -->\nnew\nlines\n<!-- x:end -->\nafter\n"
    assert replace_block(once, "x", ["new", "lines"]) == once
    with pytest.raises(NoBlock):
        replace_block(page, "y", [])


def test_the_block_says_what_each_outcome_measured() -> None:
    row = Row(what="edge → silence", sessions=1, spread=Spread.of([10, 20]), aim=Aim(p50=30))
    outcome = Outcome(
        name="load-1",
        command="just bench load --sessions 1",
        taken="2025-01-02T03:04:05+00:00",
        load_before=0.25,
        rows=[row],
        tables={"More": ["| a |"]},
        raw={},
    )
    text = "\n".join(block([outcome]))
    assert "| edge → silence | 1 | 15 / 20 / 20 ms | p50 ≤ 30 | met | 2 |" in text
    assert "### More\n\n| a |" in text
    assert "| `just bench load --sessions 1` | 2025-01-02 03:04 | 0.25 |" in text


def test_onset_and_end_are_the_frames_that_hold_the_loud_samples() -> None:
    clip = np.zeros(640, dtype=np.int16)
    clip[170:330] = 1000  # second to third of four 10 ms frames
    spoken = Spoken.of(clip)
    for frame in range(4):
        spoken.next_samples(160, at_ms=100.0 + frame, audio_ms=10.0 * frame)
    assert (spoken.onset_ms, spoken.end_ms) == (101.0, 102.0)
    assert spoken.onset_audio_ms == 10.625
    assert spoken.done.is_set()


def test_the_deciding_frame_is_the_one_that_ends_with_or_after_the_step() -> None:
    microphone = Microphone(frame_ms=20, seed=1)
    microphone.handed = [1000.0, 1020.0, 1040.0]
    assert [microphone.handed_ms(at) for at in (10, 20, 30, 60)] == [1000, 1000, 1020, 1040]


def test_the_ear_finds_the_first_frame_with_sound() -> None:
    ear = Ear()
    ear.begin("u", 0)
    ear.push(np.zeros(960, dtype=np.int16))
    ear.push(np.full(960, -7, dtype=np.int16))
    ear.push(np.full(960, 900, dtype=np.int16))
    quiet, soft, loud = ear.arrivals
    assert quiet.peak == 0
    assert ear.first(0.0, peak=1) == soft
    assert ear.first(0.0, peak=100) == loud
    assert ear.first(loud.at_ms + 1, peak=1) is None


def test_a_pause_belongs_to_the_first_gate_that_shut_after_its_edge() -> None:
    told = [{"onsets_at": [100.0, 500.0, 900.0], "edges_at": [120.0, 520.0, 920.0]}]
    assert shut_after_onset(told, [121.5, 523.0]) == [21.5, 23.0]


def trial(silence: float, *, onset_at: float = 0.0, stopped: float | None = None) -> Trial:
    return Trial(
        first_audio=300.0,
        silence=silence,
        onset_at=onset_at,
        silent_at=onset_at + silence,
        stopped=stopped,
    )


def test_a_stop_is_the_sides_own_or_the_first_gate_between_onset_and_silence() -> None:
    measured = Measured(
        [
            trial(140, onset_at=1000),
            trial(140, onset_at=2000),
            trial(140, onset_at=3000, stopped=66),
        ]
    )
    assert stopped(measured, [900, 1080, 1120, 2150]) == [80, 66]


def test_the_sides_stand_side_by_side_and_their_ratio_is_judged() -> None:
    measured = {OURS: Measured([trial(130)]), TUNED: Measured([trial(220)], ["no voice"])}
    result = room_results.trials(measured, [])
    silence, ratio = result.rows
    assert silence.cells()[4] == "met"
    assert (ratio.spread.p50, ratio.cells()[4]) == (1.0, "**missed**")
    lines = result.tables["Side by side"]
    assert len({line.count("|") for line in lines}) == 1
    assert lines[3].endswith("| 1 | 1 |")


def test_only_what_many_rooms_cost_has_an_aim() -> None:
    loads = [
        Load(rooms, {"orchestrator": 0.07 * rooms}, {"orchestrator": 100.0 + 6 * rooms}, [], [], [])
        for rooms in (1, 10)
    ]
    rows = room_results.scale(Scaled({"orchestrator": 100.0}, loads)).rows
    verdicts = [(row.sessions, row.cells()[4]) for row in rows if row.aim != Aim()]
    assert verdicts == [(10, "met"), (10, "**missed**")]


def test_the_room_block_has_both_sides_before_the_aims() -> None:
    result = room_results.trials({OURS: Measured([trial(130)])}, [])
    outcome = Outcome(
        name="trials",
        command="just bench-livekit trials",
        taken="2025-01-02T03:04:05+00:00",
        load_before=0.25,
        rows=result.rows,
        tables=result.tables,
        raw=result.raw,
    )
    text = "\n".join(room_block([outcome]))
    assert text.index("### Side by side") < text.index("### Aims")
    assert "trials 0.25" in text
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert text in replace_block(page, ROOM_BLOCK, [text])


def test_a_round_has_every_side_once_in_an_order_of_its_own() -> None:
    rounds = order(["a", "b", "c", "d"], 6)
    assert all(sorted(one) == ["a", "b", "c", "d"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1


def test_whoever_interrupts_the_line_gets_one_word_and_the_next_one_the_line() -> None:
    asked = [{"role": "system", "content": "x"}, {"role": "user", "content": "q"}]
    assert list(answer(asked).pieces) == [LINE]
    cut = [*asked, {"role": "assistant", "content": "Yes, we will"}, asked[1]]
    assert list(answer(cut).pieces) == [SHORT]
    again = [*cut, {"role": "assistant", "content": SHORT}, asked[1]]
    assert list(answer(again).pieces) == [LINE]


def test_a_clip_begins_and_ends_with_its_first_and_last_5_ms_of_sound() -> None:
    speech = np.zeros(1600, dtype=np.float32)
    speech[320:800] = 0.3
    clip = trimmed(speech)
    assert clip.size == 480
    assert clip.max() == np.float32(PEAK)
    assert after_silence(clip, 12.5).size == 480 + 200


def test_a_jitter_buffer_is_measured_between_two_moments() -> None:
    before = {"delay_s": 10.0, "emitted": 100.0, "received": 100.0, "concealed": 5.0}
    after = {"delay_s": 13.0, "emitted": 200.0, "received": 200.0, "concealed": 6.0}
    assert jitter_buffer(before, after) == {"delay_ms": 30.0, "concealed": 0.01}
    assert jitter_buffer({}, {}) == {}


@pytest.mark.parametrize("argv", [["nonsense"], ["--rooms", "0"]])
def test_a_part_that_is_none_is_refused(argv: list[str]) -> None:
    with pytest.raises(SystemExit):
        room_arguments(argv)
