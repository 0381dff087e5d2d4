"""The two-stage detector: its rules with scripted detectors, its judgement with the real ones."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.audio.pcm import Int16, level_dbfs, to_int16
from src.orchestrator.vad import (
    NoiseFloor,
    VadEvent,
    VadPhase,
    VadSettings,
    VoiceActivityDetector,
)
from tests import audio_fixtures as audio

EDGE, CONFIRMED, REJECTED = VadPhase.EDGE, VadPhase.CONFIRMED, VadPhase.REJECTED
QUIET, VOICED_AGAIN, ENDED = VadPhase.QUIET, VadPhase.VOICED_AGAIN, VadPhase.ENDED

FLOOR_DB, SPEECH_DB = -70.0, -25.0


def tone(dbfs: float) -> Int16:
    amplitude = 10 ** (dbfs / 20) * np.sqrt(2)
    t = np.arange(160) / 16_000
    return to_int16((amplitude * np.sin(2 * np.pi * 400 * t)).astype(np.float32))


class ScriptedOpinion:
    """Says `probability` at every step while awake, and remembers when it was woken."""

    def __init__(self, probability: float | None = 0.0) -> None:
        self.probability = probability
        self.awake: list[bool] = []

    def listen(self, samples: Int16, *, awake: bool) -> float | None:
        self.awake.append(awake)
        return self.probability if awake else None


class ScriptedEdge:
    def __init__(self) -> None:
        self.says = False

    def voiced(self, samples: Int16) -> bool:
        return self.says


class Bench:
    """A detector in a quiet room that has settled for 300 ms."""

    def __init__(self, **changes: object) -> None:
        self.opinion = ScriptedOpinion()
        self.edge = ScriptedEdge()
        self.settings = VadSettings.model_validate(changes)
        self.vad = VoiceActivityDetector(self.settings, self.opinion, self.edge)
        self.run(FLOOR_DB, 300)

    def run(
        self,
        dbfs: float,
        ms: int,
        probability: float | None = 0.0,
        *,
        playing: bool = False,
        playback_dbfs: float = -120.0,
    ) -> list[VadEvent]:
        self.opinion.probability = probability
        return [
            event
            for _ in range(ms // 10)
            for event in self.vad.step(tone(dbfs), playing=playing, playback_dbfs=playback_dbfs)
        ]

    def speak(self) -> None:
        assert phases(self.run(SPEECH_DB, 100, 0.9)) == [EDGE, CONFIRMED]


def phases(events: Iterable[VadEvent]) -> list[VadPhase]:
    return [event.phase for event in events]


# --- rules ---


def test_a_loud_sound_is_an_edge_within_two_steps() -> None:
    bench = Bench()
    assert bench.run(SPEECH_DB, 10) == []
    [edge] = bench.run(SPEECH_DB, 10)
    assert (edge.phase, edge.at_ms) == (EDGE, 320)
    assert 270 <= edge.onset_ms <= 300


def test_one_loud_step_alone_is_not_an_edge() -> None:
    bench = Bench()
    assert bench.run(SPEECH_DB, 10) + bench.run(FLOOR_DB, 100) == []


def test_a_soft_voice_is_an_edge_by_the_voice_detector() -> None:
    bench = Bench(min_level_dbfs=-65.0)
    assert bench.run(FLOOR_DB + 10, 50) == []
    bench.edge.says = True
    assert phases(bench.run(FLOOR_DB + 10, 20)) == [EDGE]


def test_a_voice_at_the_level_of_the_noise_is_not_an_edge() -> None:
    bench = Bench(min_level_dbfs=-90.0)
    bench.edge.says = True
    assert bench.run(FLOOR_DB + 6, 200) == []


def test_the_edge_does_not_wait_for_the_second_opinion_which_confirms_in_the_next_step() -> None:
    events = Bench().run(SPEECH_DB, 30, 0.9)
    assert phases(events) == [EDGE, CONFIRMED]
    assert events[1].at_ms == events[0].at_ms + 10
    assert events[1].probability == 0.9


@pytest.mark.parametrize(("playing", "window_ms"), [(True, 140), (False, 300)])
def test_rejected_when_the_window_closes(playing: bool, window_ms: int) -> None:
    bench = Bench()
    edge, rejected = bench.run(SPEECH_DB, 20 + window_ms, 0.2, playing=playing)
    assert (edge.phase, rejected.phase) == (EDGE, REJECTED)
    assert rejected.at_ms - edge.at_ms == window_ms


def test_a_second_opinion_that_never_speaks_rejects() -> None:
    assert phases(Bench().run(SPEECH_DB, 400, None)) == [EDGE, REJECTED]


def test_false_alarms_come_less_often_the_longer_the_noise_lasts() -> None:
    bench = Bench(refractory_ms=200, refractory_max_ms=800)
    edges = []
    for _ in range(40):
        events = bench.run(SPEECH_DB, 50, 0.1) + bench.run(FLOOR_DB, 150, 0.1)
        edges += [event.at_ms for event in events if event.phase is EDGE]
    gaps = np.diff(edges)
    assert gaps[0] < gaps[1] < gaps[2]
    assert gaps.max() <= 800 + 300 + 200


def test_false_alarms_are_forgiven_after_a_while() -> None:
    bench = Bench(refractory_ms=200)
    for _ in range(3):
        bench.run(SPEECH_DB, 50, 0.1)
        bench.run(FLOOR_DB, 1500, 0.1)
    bench.run(FLOOR_DB, 6000)
    bench.run(SPEECH_DB, 50, 0.1)
    [rejected] = bench.run(FLOOR_DB, 300, 0.1)
    events = bench.run(FLOOR_DB, 200) + bench.run(SPEECH_DB, 20)
    assert phases(events) == [EDGE]
    assert events[0].at_ms - rejected.at_ms < 400


def test_speech_is_heard_while_the_first_stage_rests() -> None:
    bench = Bench(refractory_ms=2000)
    bench.run(SPEECH_DB, 60, 0.1)
    bench.run(FLOOR_DB, 300, 0.1)
    events = bench.run(SPEECH_DB, 30, 0.8)
    assert phases(events) == [EDGE, CONFIRMED]


def test_the_second_opinion_sleeps_in_silence_and_during_nothing_else() -> None:
    bench = Bench()
    assert not any(bench.opinion.awake)
    bench.speak()
    bench.opinion.awake.clear()
    bench.run(FLOOR_DB, 100, 0.1)
    assert all(bench.opinion.awake)
    bench.run(FLOOR_DB, 200, 0.1)
    assert not bench.opinion.awake[-1]


def test_silence_is_quiet_first_and_the_end_later() -> None:
    bench = Bench(quiet_ms=80, endpoint_ms=220)
    bench.speak()
    quiet, ended = bench.run(FLOOR_DB, 300, 0.1)
    assert (quiet.phase, quiet.at_ms) == (QUIET, 480)
    assert (ended.phase, ended.at_ms) == (ENDED, 620)
    assert not bench.vad.speaking


def test_speech_after_a_short_silence_is_the_same_speech() -> None:
    bench = Bench()
    bench.speak()
    bench.run(FLOOR_DB, 150, 0.1)
    assert phases(bench.run(SPEECH_DB, 50, 0.9)) == [VOICED_AGAIN]
    assert phases(bench.run(FLOOR_DB, 300, 0.1)) == [QUIET, ENDED]


def test_a_click_in_the_pause_does_not_delay_the_end() -> None:
    bench = Bench()
    bench.speak()
    events = bench.run(FLOOR_DB, 100, 0.6) + bench.run(SPEECH_DB, 10, 0.6)
    events += bench.run(FLOOR_DB, 200, 0.1)
    assert phases(events) == [QUIET, ENDED]
    assert events[1].at_ms == 400 + 220


def test_loud_noise_after_speech_ends_it_by_the_second_opinion() -> None:
    bench = Bench()
    bench.speak()
    assert phases(bench.run(SPEECH_DB, 280, 0.1))[:2] == [QUIET, ENDED]


def test_a_whole_sentence_needs_less_silence_to_end() -> None:
    bench = Bench(endpoint_ms=220, sentence_endpoint_ms=140)
    bench.speak()
    bench.run(FLOOR_DB, 100, 0.1)
    bench.vad.whole_sentence()
    [ended] = bench.run(FLOOR_DB, 300, 0.1)
    assert (ended.phase, ended.at_ms) == (ENDED, 400 + 140)


def test_a_sentence_that_is_known_late_ends_at_the_next_step() -> None:
    bench = Bench(endpoint_ms=220, sentence_endpoint_ms=140)
    bench.speak()
    bench.run(FLOOR_DB, 190, 0.1)
    bench.vad.whole_sentence()
    assert phases(bench.run(FLOOR_DB, 10, 0.1)) == [ENDED]


def test_a_sentence_that_goes_on_was_not_whole() -> None:
    bench = Bench(endpoint_ms=220, sentence_endpoint_ms=140)
    bench.speak()
    bench.vad.whole_sentence()  # nobody has paused yet
    bench.run(FLOOR_DB, 100, 0.1)
    bench.vad.whole_sentence()
    bench.run(SPEECH_DB, 100, 0.9)
    _, ended = bench.run(FLOOR_DB, 400, 0.1)
    assert ended.at_ms == 600 + 220


def test_the_end_of_a_barge_in_has_its_own_patience() -> None:
    bench = Bench(endpoint_ms=300, barge_in_endpoint_ms=150)
    bench.run(SPEECH_DB, 100, 0.9, playing=True)
    _, ended = bench.run(FLOOR_DB, 400, 0.1)
    assert ended.at_ms == 400 + 150


def test_an_echo_softer_than_the_gate_is_not_an_edge() -> None:
    bench = Bench()
    assert bench.run(-36.0, 300, 0.9, playing=True, playback_dbfs=-20.0) == []
    assert phases(bench.run(-26.0, 50, 0.9, playing=True, playback_dbfs=-20.0))[:1] == [EDGE]


def test_a_late_echo_is_still_an_echo() -> None:
    bench = Bench()
    bench.run(FLOOR_DB, 100, playing=True, playback_dbfs=-20.0)
    assert bench.run(-36.0, 100, 0.9, playing=True, playback_dbfs=-120.0) == []


def test_where_no_echo_comes_back_a_soft_consonant_is_heard_beside_the_playback() -> None:
    bench = Bench()
    assert bench.run(-42.0, 50, 0.9, playing=True, playback_dbfs=-20.0) == []
    bench.run(FLOOR_DB, 3000, playing=True, playback_dbfs=-20.0)
    assert phases(bench.run(-42.0, 30, 0.9, playing=True, playback_dbfs=-20.0))[:1] == [EDGE]


@pytest.mark.parametrize("probability", [0.1, 0.9])
def test_an_echo_that_comes_of_a_sudden_interrupts_once(probability: float) -> None:
    bench = Bench()
    bench.run(FLOOR_DB, 3000, playing=True, playback_dbfs=-20.0)
    assert phases(bench.run(-38.0, 60, probability, playing=True, playback_dbfs=-20.0))[0] is EDGE
    bench.run(FLOOR_DB, 1000, 0.1)
    for _ in range(10):
        assert bench.run(-38.0, 600, probability, playing=True, playback_dbfs=-20.0) == []
        bench.run(FLOOR_DB, 600, 0.1)


def test_a_soft_voice_that_goes_on_without_us_is_heard_again() -> None:
    bench = Bench()
    for _ in range(3):
        bench.run(FLOOR_DB, 3000, playing=True, playback_dbfs=-20.0)
        assert phases(bench.run(-42.0, 30, 0.9, playing=True, playback_dbfs=-20.0))[0] is EDGE
        bench.run(-42.0, 700, 0.9)
        assert phases(bench.run(FLOOR_DB, 400, 0.1)) == [QUIET, ENDED]


def test_nothing_gates_the_user_when_we_are_silent() -> None:
    assert phases(Bench().run(-36.0, 50, 0.9, playback_dbfs=-20.0)) == [EDGE, CONFIRMED]


def test_a_stream_that_starts_loud_has_no_edge_before_the_floor_is_known() -> None:
    vad = VoiceActivityDetector(VadSettings(), ScriptedOpinion(0.9), ScriptedEdge())
    assert not [e for _ in range(9) for e in vad.step(tone(SPEECH_DB), playing=False)]


def test_preroll_holds_the_last_audio_with_the_current_step() -> None:
    bench = Bench(preroll_ms=100)
    bench.run(SPEECH_DB, 20)
    roll = bench.vad.preroll(40)
    assert roll.size == 640
    assert np.array_equal(roll[-320:], np.tile(tone(SPEECH_DB), 2))
    assert bench.vad.preroll(5000).size == 1600


def test_a_step_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="160 samples, got 80"):
        Bench().vad.step(tone(SPEECH_DB)[:80], playing=False)


@pytest.mark.parametrize("key", ["aggressivness", "endpoint"])
def test_an_unknown_setting_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=key):
        VadSettings.model_validate({key: 1})


@pytest.mark.parametrize("steps", [(3, 2), (0, 2)])
def test_an_edge_that_could_never_be_is_refused(steps: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="can never be"):
        VadSettings(energy_steps=steps)


# --- properties ---

_FOLLOWS: dict[VadPhase | None, set[VadPhase]] = {
    None: {EDGE},
    EDGE: {CONFIRMED, REJECTED},
    REJECTED: {EDGE},
    CONFIRMED: {QUIET},
    QUIET: {VOICED_AGAIN, ENDED},
    VOICED_AGAIN: {QUIET},
    ENDED: {EDGE},
}

_stretch = st.tuples(
    st.sampled_from([-120.0, -70.0, -50.0, -38.0, -25.0, -6.0]),
    st.integers(1, 40),
    st.sampled_from([None, 0.0, 0.3, 0.4, 0.5, 0.97]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([-120.0, -30.0, -15.0]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(_stretch, max_size=25))
def test_events_follow_each_other_legally_whatever_is_heard(
    stretches: list[tuple[float, int, float | None, bool, bool, float]],
) -> None:
    opinion, edge = ScriptedOpinion(), ScriptedEdge()
    vad = VoiceActivityDetector(VadSettings(), opinion, edge)
    last: VadEvent | None = None
    now_ms = 0
    for dbfs, steps, probability, voiced, playing, playback in stretches:
        opinion.probability, edge.says = probability, voiced
        for _ in range(steps):
            now_ms += 10
            for event in vad.step(tone(dbfs), playing=playing, playback_dbfs=playback):
                assert event.phase in _FOLLOWS[last.phase if last else None]
                assert event.at_ms == now_ms
                assert 0 <= event.onset_ms <= event.at_ms
                last = event
            assert vad.speaking == (
                last is not None and last.phase in (CONFIRMED, QUIET, VOICED_AGAIN)
            )


@given(st.lists(st.floats(-120, 0), min_size=10, max_size=400))
def test_the_noise_floor_is_the_low_percentile_of_the_last_second_and_a_half(
    levels: list[float],
) -> None:
    floor = NoiseFloor()
    for level in levels:
        floor.add(level)
    window = sorted(levels[-150:])
    assert floor.level_db == window[int(len(window) * 0.15)]


# --- the real detectors ---


def listen(
    samples: Int16, *, playing: bool = False, playback: Int16 | None = None
) -> list[VadEvent]:
    vad = VoiceActivityDetector(VadSettings())
    events: list[VadEvent] = []
    for start in range(0, samples.size - 159, 160):
        out = level_dbfs(playback[start : start + 160]) if playback is not None else -120.0
        step = samples[start : start + 160]
        events += vad.step(step, playing=playing, playback_dbfs=out)
    return events


@pytest.mark.parametrize("snr_db", [None, 20])
def test_every_phrase_is_heard_confirmed_and_ended_once(snr_db: float | None) -> None:
    random = np.random.default_rng(3)
    edge_delays = []
    for number, phrase in enumerate(audio.PHRASES):
        voice = audio.ESPEAK_VOICES[number % len(audio.ESPEAK_VOICES)]
        clip = audio.speech_clip(audio.espeak_speech(phrase, voice), random, snr_db=snr_db)
        events = listen(clip.samples, playing=True)
        found = phases(events)
        assert found.count(CONFIRMED) == found.count(ENDED) == 1, phrase
        confirmed = next(e for e in events if e.phase is CONFIRMED)
        assert confirmed.at_ms > clip.onset_ms
        edge_delays.append(
            next(e.at_ms for e in events if e.phase is EDGE and e.at_ms > clip.onset_ms)
            - clip.onset_ms
        )
        assert abs(events[-1].at_ms - clip.offset_ms - 220) < 250
    if snr_db is None:
        assert np.percentile(edge_delays, 50) <= 35
        assert np.percentile(edge_delays, 95) <= 60


def test_no_noise_is_taken_for_speech() -> None:
    for name, sound in audio.noise_set(10_000).items():
        assert CONFIRMED not in phases(listen(sound, playing=True)), name


@pytest.mark.models
@pytest.mark.skipif(not audio.has_piper(), reason="needs the local-models group")
def test_our_own_voice_coming_back_does_not_interrupt_but_a_person_does() -> None:
    random = np.random.default_rng(4)
    reply = audio.piper_speech("The next train to Boston leaves at a quarter past seven, I think.")
    reply = audio.gain(reply, -20.0 - audio.active_dbfs(reply))
    echo = audio.gain(audio.room(np.concatenate((audio.silence(100), reply)), random), -20.0)
    echo = echo[: reply.size] + audio.at_level(audio.pink(10_000, random), -65.0)[: reply.size]
    assert listen(to_int16(echo), playing=True, playback=to_int16(reply)) == []

    person = audio.user_speech("stop please")
    person = audio.gain(person, audio.SPEECH_DBFS - audio.active_dbfs(person))
    echo[16_000 : 16_000 + person.size] += person
    found = phases(listen(to_int16(echo), playing=True, playback=to_int16(reply)))
    assert found[:2] == [EDGE, CONFIRMED]


def test_the_second_opinion_woken_late_agrees_with_one_that_never_slept() -> None:
    from src.orchestrator.vad_models import SileroOpinion

    clip = audio.speech_clip(
        audio.espeak_speech("what did you say"), np.random.default_rng(1), snr_db=20
    )
    steps = [clip.samples[i : i + 160] for i in range(0, clip.samples.size - 159, 160)]
    for wake_ms in (600, 1500):
        always, late = SileroOpinion(), SileroOpinion()
        last = 0.0
        for number, step in enumerate(steps[: wake_ms // 10 + 1]):
            last = answer if (answer := always.listen(step, awake=True)) is not None else last
            woken = late.listen(step, awake=number * 10 >= wake_ms)
        assert woken is not None
        assert (woken >= 0.5) == (last >= 0.5)
