"""The guard against the agent's own echo: what it never lets in, and whom it never keeps out."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.orchestrator.echo_gate import LEARN_MS, PROBATION_MS, REST_MS, EchoGate, SlidingMax

FIXED, RELAXED, MARGIN, HOLD_MS = 15.0, 30.0, 10.0, 400
PLAYED, NOTHING = -20.0, -120.0
LEARNT_MS = LEARN_MS + HOLD_MS + PROBATION_MS


def make() -> EchoGate:
    return EchoGate(FIXED, RELAXED, MARGIN, HOLD_MS)


def run(gate: EchoGate, return_db: float, ms: int) -> float:
    """Playback of which so much comes back; the gate's last distance from it."""
    for _ in range(ms // 10):
        gate.step(PLAYED + return_db, PLAYED)
    return gate.below_db


def silence(gate: EchoGate, ms: int) -> None:
    for _ in range(ms // 10):
        gate.step(-70.0, NOTHING)


def relaxed() -> EchoGate:
    gate = make()
    assert run(gate, -60.0, LEARNT_MS) == RELAXED
    return gate


# --- what it learns ---


def test_before_anything_was_measured_it_is_the_fixed_gate() -> None:
    gate = make()
    for _ in range((LEARNT_MS - 10) // 10):
        assert gate.step(-80.0, PLAYED) == PLAYED - FIXED
        assert gate.below_db == FIXED


@pytest.mark.parametrize(
    ("return_db", "below_db"), [(-10, 15), (-20, 15), (-28, 18), (-35, 25), (-60, 30)]
)
def test_it_keeps_a_margin_above_the_measured_echo_within_bounds(
    return_db: float, below_db: float
) -> None:
    assert run(make(), return_db, LEARNT_MS + 500) == pytest.approx(below_db)


def test_silence_teaches_nothing() -> None:
    gate = make()
    silence(gate, 60_000)
    assert gate.below_db == FIXED


def test_playback_too_soft_for_its_echo_to_be_heard_teaches_nothing() -> None:
    gate = make()
    for _ in range(1000):
        gate.step(-70.0, -40.0)
    assert gate.below_db == FIXED


def test_an_echo_that_grows_is_followed_as_soon_as_it_is_no_onset() -> None:
    gate = relaxed()
    assert run(gate, -30.0, PROBATION_MS) == RELAXED
    assert run(gate, -30.0, 10) == 20.0


def test_an_echo_that_shrinks_is_remembered_through_a_pause_of_the_voice() -> None:
    gate = make()
    run(gate, -25.0, 3000)
    assert run(gate, -60.0, 1900) == FIXED
    assert run(gate, -60.0, 500) == RELAXED


def test_the_onset_of_a_voice_is_no_echo() -> None:
    gate = relaxed()
    run(gate, -18.0, PROBATION_MS)
    gate.suspect()
    run(gate, -5.0, 100)
    silence(gate, 1000)
    gate.settle(silent_ms=220)
    assert run(gate, -60.0, 1000) == RELAXED


@pytest.mark.parametrize("silent_ms", [None, 220])
def test_what_only_the_relaxed_gate_let_in_fixes_it_for_long(silent_ms: int | None) -> None:
    gate = relaxed()
    run(gate, -18.0, 20)
    gate.suspect()
    silence(gate, HOLD_MS + 100)
    gate.settle(silent_ms)
    assert run(gate, -60.0, REST_MS + PROBATION_MS - 100) == FIXED
    assert run(gate, -60.0, 100) == RELAXED


def test_a_loud_sound_that_ended_with_the_playback_has_it_measured_anew() -> None:
    gate = relaxed()
    run(gate, -8.0, 20)
    gate.suspect()
    silence(gate, HOLD_MS + 100)
    gate.settle(silent_ms=220)
    assert run(gate, -60.0, LEARNT_MS - 10) == FIXED
    assert run(gate, -60.0, 10) == RELAXED


@pytest.mark.parametrize("silent_ms", [None, 220])
def test_a_sound_while_we_listened_says_nothing_about_echoes(silent_ms: int | None) -> None:
    gate = relaxed()
    silence(gate, 1000)
    gate.suspect()
    silence(gate, 200)
    gate.settle(silent_ms)
    assert gate.below_db == RELAXED


# --- properties ---

_db = st.floats(-120, 0, allow_nan=False)
_doing = st.lists(
    st.tuples(_db, _db, st.integers(1, 60), st.sampled_from(["", "suspect", "voice", "noise"])),
    max_size=40,
)


@given(_doing)
def test_it_never_asks_more_of_a_user_than_the_fixed_gate(
    doing: list[tuple[float, float, int, str]],
) -> None:
    gate, played = make(), [NOTHING]
    for mic, playback, steps, then in doing:
        for _ in range(steps):
            played.append(playback)
            held = max(played[-HOLD_MS // 10 :])
            asked = gate.step(mic, playback)
            assert held - RELAXED - 1e-9 <= asked <= held - FIXED + 1e-9
        if then == "suspect":
            gate.suspect()
        elif then:
            gate.settle(220 if then == "voice" else None)


_syllable = st.tuples(st.floats(-32, -10), st.integers(3, 30), st.integers(1, 60))


def voice(syllables: Iterable[tuple[float, int, int]]) -> list[float]:
    """Levels of a voice, 10 ms each: some loud, then a gap."""
    return [
        level for dbfs, steps, gap in syllables for level in [dbfs] * steps + [dbfs - 40.0] * gap
    ]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(_syllable, min_size=5, max_size=60),
    st.floats(-60, -FIXED),
    st.integers(0, HOLD_MS // 10 - 1),
)
def test_an_echo_is_never_let_in_from_the_first_syllable_on(
    syllables: list[tuple[float, int, int]], return_db: float, late_steps: int
) -> None:
    gate = make()
    played = voice(syllables) + [NOTHING] * 60
    back = [NOTHING] * late_steps + [level + return_db for level in played]
    for playback, mic in zip(played, back, strict=False):
        assert mic <= gate.step(mic, playback)


@given(st.floats(-90, -FIXED), st.floats(0.1, 20))
def test_a_voice_above_the_echo_and_its_margin_is_let_in(echo_db: float, above_db: float) -> None:
    gate = make()
    run(gate, echo_db, 4000)
    voice_dbfs = PLAYED + max(echo_db + MARGIN, -RELAXED) + above_db
    assert voice_dbfs > gate.step(voice_dbfs, PLAYED)


@given(st.lists(st.floats(-120, 0), min_size=1), st.integers(1, 20))
def test_the_sliding_maximum_is_that_of_the_last_steps(values: list[float], steps: int) -> None:
    sliding = SlidingMax(steps)
    for count, value in enumerate(values, 1):
        assert sliding.push(value) == max(values[max(0, count - steps) : count])
