"""Was that an interruption? The judge by table."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.orchestrator.duplex_settings import DuplexSettings
from src.orchestrator.judge import Evidence, Opinion, Verdict, is_back_channel, judge

SETTINGS = DuplexSettings()
NONE, CONFIRMED, REJECTED = Opinion.NONE, Opinion.CONFIRMED, Opinion.REJECTED
PENDING, REAL, FALSE = Verdict.PENDING, Verdict.REAL, Verdict.FALSE


@pytest.mark.parametrize(
    ("since", "voiced", "opinion", "talking", "words", "verdict", "reason"),
    [
        # the second opinion
        (20, 20, NONE, True, None, PENDING, ""),
        (90, 90, REJECTED, False, None, FALSE, "not_speech"),
        (590, 590, REJECTED, False, "stop", FALSE, "not_speech"),
        (100, 100, CONFIRMED, True, None, PENDING, ""),
        # sustained speech
        (490, 490, CONFIRMED, True, None, PENDING, ""),
        (500, 500, CONFIRMED, True, None, REAL, "sustained"),
        (500, 500, NONE, True, None, PENDING, ""),
        (520, 500, CONFIRMED, True, "yeah", PENDING, ""),
        (600, 580, CONFIRMED, True, "yeah yeah yeah", REAL, "sustained"),
        # words
        (300, 280, CONFIRMED, True, "what about", REAL, "words"),
        (300, 280, CONFIRMED, True, "Stop.", REAL, "stop_word"),
        (320, 180, CONFIRMED, False, "Wait!", REAL, "stop_word"),
        (320, 180, CONFIRMED, False, "okay, hold on", REAL, "stop_word"),
        (320, 180, NONE, True, "stop", PENDING, ""),
        (350, 250, CONFIRMED, False, "Mm-hmm.", FALSE, "back_channel"),
        (350, 250, CONFIRMED, False, "Yeah, right.", FALSE, "back_channel"),
        (350, 250, CONFIRMED, True, "yeah", PENDING, ""),
        (350, 250, CONFIRMED, False, "yeah but", REAL, "words"),
        (350, 250, CONFIRMED, False, "", FALSE, "no_words"),
        (350, 250, CONFIRMED, True, "", PENDING, ""),
        # the deadline
        (599, 200, CONFIRMED, False, None, PENDING, ""),
        (600, 200, CONFIRMED, False, None, FALSE, "short"),
        (600, 200, NONE, True, None, FALSE, "short"),
        (600, 300, CONFIRMED, True, "yeah", FALSE, "back_channel"),
    ],
)
def test_verdicts(
    since: int,
    voiced: int,
    opinion: Opinion,
    talking: bool,
    words: str | None,
    verdict: Verdict,
    reason: str,
) -> None:
    judgement = judge(Evidence(since, voiced, opinion, talking, words), SETTINGS)
    assert (judgement.verdict, judgement.reason) == (verdict, reason)


def test_a_false_alarm_waits_for_the_listeners_position_but_not_for_ever() -> None:
    def verdict(since_ms: int, known: bool) -> Verdict:
        evidence = Evidence(since_ms, 90, REJECTED, False, playback_known=known)
        return judge(evidence, SETTINGS).verdict

    assert verdict(100, True) is FALSE
    assert verdict(100, False) is PENDING
    assert verdict(150, False) is FALSE


def test_an_interruption_waits_for_nobodys_position() -> None:
    evidence = Evidence(100, 90, CONFIRMED, True, "stop", playback_known=False)
    assert judge(evidence, SETTINGS).verdict is REAL


@given(
    since=st.integers(0, 3000),
    voiced=st.integers(0, 3000),
    opinion=st.sampled_from(Opinion),
    talking=st.booleans(),
    words=st.none() | st.text(alphabet="yeah stop,-", max_size=12),
    known=st.booleans(),
)
def test_the_verdict_falls_by_the_deadline_whatever_is_known(
    since: int, voiced: int, opinion: Opinion, talking: bool, words: str | None, known: bool
) -> None:
    evidence = Evidence(since, voiced, opinion, talking, words, known)
    verdict = judge(evidence, SETTINGS).verdict
    if since >= SETTINGS.verdict_window_ms:
        assert verdict is not PENDING
    if opinion is not CONFIRMED:
        assert verdict is not REAL


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mm-hmm.", True),
        ("Uh-huh", True),
        ("Oh, I see.", True),
        ("okay okay okay", True),
        ("", False),
        ("...", False),
        ("right, but why", False),
        ("I see you", False),
        ("no", False),
    ],
)
def test_back_channels(text: str, expected: bool) -> None:
    assert is_back_channel(text, SETTINGS) is expected


def test_the_lists_are_the_configurations() -> None:
    settings = DuplexSettings(back_channels=("ja", "ach so"), interruptions=("halt",))
    assert is_back_channel("Ach so, ja", settings)
    assert not is_back_channel("yeah", settings)
    confirmed = Evidence(300, 100, CONFIRMED, False, "ja halt")
    assert judge(confirmed, settings).reason == "stop_word"
