"""The room user's mouth and ear: every measurement in rooms rests on their times."""

from __future__ import annotations

import numpy as np
import pytest

from src.audio.pcm import SAMPLE_RATE, Float32, Int16
from src.demo.room_audio import SPEECH_RATE, STEP_MS, Ear, Mouth

STEP = SAMPLE_RATE // 100
SILENCE: Int16 = np.zeros(STEP, dtype=np.int16)
LOUD: Int16 = np.full(STEP, 5000, dtype=np.int16)


def buzz(ms: int) -> Float32:
    time = np.arange(SPEECH_RATE * ms // 1000) / SPEECH_RATE
    return (0.3 * np.sin(2 * np.pi * 300 * time)).astype(np.float32)


def quiet(ms: int) -> Float32:
    return np.zeros(SPEECH_RATE * ms // 1000, dtype=np.float32)


def test_a_step_is_due_when_its_last_sample_exists() -> None:
    mouth = Mouth(origin_ms=1000.0)
    assert mouth.due_ms == 1010.0
    assert mouth.next_step().size == STEP
    assert mouth.due_ms == 1020.0


def test_a_clip_begins_with_the_next_step_and_its_edges_are_the_sound_s() -> None:
    mouth = Mouth(origin_ms=1000.0)
    mouth.next_step()
    spoken = mouth.talk(np.concatenate((quiet(35), buzz(100), quiet(65))))
    assert (spoken.start_ms, spoken.end_ms) == (1010.0, 1210.0)
    assert (spoken.onset_ms, spoken.offset_ms) == (1045.0, 1145.0)


def test_the_samples_lie_where_the_times_say() -> None:
    mouth = Mouth(origin_ms=0.0)
    spoken = mouth.talk(np.concatenate((quiet(35), buzz(100), quiet(65))))
    sound = np.concatenate([mouth.next_step() for _ in range(25)])
    loud = np.flatnonzero(np.abs(sound) > 1000) * 1000 / SAMPLE_RATE
    assert loud[0] == pytest.approx(spoken.onset_ms, abs=1.0)
    assert loud[-1] == pytest.approx(spoken.offset_ms, abs=1.0)


def test_a_second_clip_follows_the_first() -> None:
    mouth = Mouth(origin_ms=0.0)
    first = mouth.talk(buzz(55))
    mouth.next_step()
    second = mouth.talk(buzz(50))
    assert second.start_ms == pytest.approx(first.end_ms, abs=0.1)


def test_between_words_there_is_a_room_and_not_digital_silence() -> None:
    step = Mouth(origin_ms=0.0).next_step()
    assert 0 < np.abs(step).max() < 200


@pytest.mark.parametrize("rate", [8000, 44100])
def test_other_rates_keep_time(rate: int) -> None:
    mouth = Mouth(origin_ms=0.0, sample_rate=rate)
    mouth.talk(buzz(100))
    steps = 0
    while mouth.talking:
        assert mouth.next_step().size == rate * STEP_MS // 1000
        steps += 1
    assert steps == 10


def test_the_ear_finds_both_ends_of_a_sound() -> None:
    ear = Ear()
    half = SILENCE.copy()
    half[STEP // 2 :] = LOUD[STEP // 2 :]
    for at_ms, samples in enumerate((SILENCE, half, LOUD, SILENCE, SILENCE)):
        ear.hear(at_ms * 10.0, samples)
    assert ear.first_loud_ms(0.0) == 15.0
    assert ear.last_loud_ms(0.0) == 30.0
    assert ear.quiet_ms() == 20
    assert ear.first_loud_ms(30.0) is None
    assert ear.last_loud_ms(30.0) is None
    assert ear.since(30.0).size == 2 * STEP


def test_the_ear_forgets_what_is_too_old() -> None:
    ear = Ear(keep_ms=30)
    for at_ms in range(5):
        ear.hear(at_ms * 10.0, LOUD)
    assert [sound.at_ms for sound in ear.heard] == [20.0, 30.0, 40.0]
