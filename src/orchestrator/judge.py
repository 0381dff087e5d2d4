"""Was that an interruption? One pure function of what is known so far."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from src.orchestrator.duplex_settings import DuplexSettings
from src.orchestrator.phrases import covered, has_phrase, tokens


class Opinion(Enum):
    """The second opinion of the detector."""

    NONE = "none"
    CONFIRMED = "confirmed"
    REJECTED = "rejected"


class Verdict(Enum):
    PENDING = "pending"
    REAL = "real"
    FALSE = "false"


@dataclass(frozen=True, slots=True)
class Evidence:
    """`words` is None until the recogniser has said anything; empty: it heard no words.

    `playback_known`: the client has said how far it had played when it was flushed.
    """

    since_edge_ms: int
    voiced_ms: int
    opinion: Opinion = Opinion.NONE
    talking: bool = True
    words: str | None = None
    playback_known: bool = True


@dataclass(frozen=True, slots=True)
class Judgement:
    verdict: Verdict
    reason: str = ""


PENDING = Judgement(Verdict.PENDING)


def judge(evidence: Evidence, settings: DuplexSettings) -> Judgement:
    """PENDING until the evidence suffices; never later than `verdict_window_ms` after the edge.

    A false alarm waits `flush_ack_ms` for the client's position: a resume must repeat nothing.
    """
    judgement = _weigh(evidence, settings)
    waiting = not evidence.playback_known and evidence.since_edge_ms < settings.flush_ack_ms
    return PENDING if judgement.verdict is Verdict.FALSE and waiting else judgement


def _weigh(evidence: Evidence, settings: DuplexSettings) -> Judgement:
    words = None if evidence.words is None else tokens(evidence.words)
    if evidence.opinion is Opinion.REJECTED:
        return Judgement(Verdict.FALSE, "not_speech")
    if evidence.opinion is Opinion.CONFIRMED and words:
        if has_phrase(words, settings.interruptions):
            return Judgement(Verdict.REAL, "stop_word")
        if not covered(words, settings.back_channels):
            return Judgement(Verdict.REAL, "words")
        if not evidence.talking:
            return Judgement(Verdict.FALSE, "back_channel")
    if words == [] and not evidence.talking:
        return Judgement(Verdict.FALSE, "no_words")
    return _without_telling_words(evidence, settings, back_channel=bool(words))


def _without_telling_words(
    evidence: Evidence, settings: DuplexSettings, *, back_channel: bool
) -> Judgement:
    late = evidence.since_edge_ms >= settings.verdict_window_ms
    sustained = (
        evidence.opinion is Opinion.CONFIRMED and evidence.voiced_ms >= settings.sustained_ms
    )
    # "Yeah, yeah, okay" may be long: words that say 'go on' get the whole window to become others.
    if sustained and (late or not back_channel):
        return Judgement(Verdict.REAL, "sustained")
    if late:
        return Judgement(Verdict.FALSE, "back_channel" if back_channel else "short")
    return PENDING


def is_back_channel(text: str, settings: DuplexSettings) -> bool:
    """Only words that say 'go on', and none that says 'stop'."""
    words = tokens(text)
    return (
        bool(words)
        and covered(words, settings.back_channels)
        and not has_phrase(words, settings.interruptions)
    )
