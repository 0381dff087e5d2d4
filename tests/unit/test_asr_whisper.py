"""How Whisper is used, with an engine that does as it is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from src.audio.pcm import Float32
from src.orchestrator.asr_guard import Score
from src.orchestrator.asr_whisper import Decoded, WhisperBackend
from src.orchestrator.ports import Transcript
from src.rpc.errors import UnknownName

CLEAR = Score(0.02, -0.1)
NOISE = Score(0.95, -2.5)


class ScriptedDecoder:
    """Tokens are letters. One answer a call; the last one stays."""

    def __init__(self, *answers: tuple[str, Score, bool], languages: Sequence[str] = ("en",)):
        self.answers = list(answers)
        self.languages = frozenset(languages)
        self.contexts_s: list[float] = []
        self.budgets: list[int] = []

    def decode(
        self, samples: Float32, language: str, budget: int, abandoned: Callable[[], bool]
    ) -> Decoded:
        self.contexts_s.append(samples.size / 16_000)
        self.budgets.append(budget)
        text, score, spent = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return Decoded([ord(c) for c in text], score, spent)

    def text(self, tokens: Sequence[int]) -> str:
        return "".join(map(chr, tokens))


def backend(decoder: ScriptedDecoder) -> WhisperBackend:
    return WhisperBackend(
        "scripted", decoder, default_language="en", context_s=8.0, context_margin_s=4.0
    )


def speech(seconds: float) -> Float32:
    return np.full(int(seconds * 16_000), 0.1, dtype=np.float32)


def transcribe(decoder: ScriptedDecoder, seconds: float, *, draft: bool = False) -> Transcript:
    return backend(decoder).transcribe(speech(seconds), "en", draft=draft, abandoned=lambda: False)


@pytest.mark.parametrize(
    ("seconds", "context_s"), [(0.5, 8.0), (3.0, 8.0), (5.0, 9.0), (25.0, 29.0), (26.0, 30.0)]
)
def test_the_context_is_eight_seconds_or_four_more_than_the_speech(
    seconds: float, context_s: float
) -> None:
    decoder = ScriptedDecoder(("said", CLEAR, False))
    assert transcribe(decoder, seconds).text == "said"
    assert decoder.contexts_s == [context_s]


def test_tokens_are_budgeted_by_duration() -> None:
    decoder = ScriptedDecoder(("said", CLEAR, False))
    transcribe(decoder, 2.0)
    assert decoder.budgets == [18]


@pytest.mark.parametrize(
    "loop", [("one.two.one.two.one.two.", CLEAR, False), ("endless", CLEAR, True)]
)
def test_a_loop_is_decoded_once_more_with_all_the_context(loop: tuple[str, Score, bool]) -> None:
    decoder = ScriptedDecoder(loop, ("right", CLEAR, False))
    assert transcribe(decoder, 2.0).text == "right"
    assert decoder.contexts_s == [8.0, 30.0]


def test_a_loop_in_both_contexts_was_meant_unless_it_never_ended() -> None:
    meant = ScriptedDecoder(("no,no,no,no,", CLEAR, False))
    assert transcribe(meant, 2.0).text == "no,no,no,no,"
    endless = ScriptedDecoder(("wait a moment,wait a moment,", CLEAR, True))
    assert transcribe(endless, 2.0).text == "wait a moment,"


def test_a_draft_is_decoded_only_once() -> None:
    decoder = ScriptedDecoder(("endless,endless,", CLEAR, True))
    assert transcribe(decoder, 2.0, draft=True).text == "endless,"
    assert decoder.contexts_s == [8.0]


@pytest.mark.parametrize("said", [("you", NOISE, False), (" .", CLEAR, False), ("", CLEAR, False)])
def test_nothing_said_is_no_text(said: tuple[str, Score, bool]) -> None:
    assert transcribe(ScriptedDecoder(said), 2.0).text == ""


def test_audio_too_short_for_a_word_is_not_decoded() -> None:
    decoder = ScriptedDecoder(("said", CLEAR, False))
    assert transcribe(decoder, 0.05).text == ""
    assert decoder.contexts_s == []


def test_long_audio_is_read_in_pieces_and_joined() -> None:
    decoder = ScriptedDecoder(("one", CLEAR, False), ("two", Score(0.1, -0.4), False))
    result = transcribe(decoder, 40.0)
    assert result.text == "one two"
    assert result.audio_ms == 40_000
    assert (result.no_speech_prob, result.avg_logprob) == (0.02, -0.4)


@pytest.mark.parametrize(
    ("asked", "code"), [("", "en"), ("en", "en"), ("en-US", "en"), ("EN_gb", "en"), ("auto", "en")]
)
def test_a_language_is_known_by_its_first_part(asked: str, code: str) -> None:
    assert backend(ScriptedDecoder(("", CLEAR, False))).check_language(asked) == code


def test_detection_needs_more_than_one_language() -> None:
    decoder = ScriptedDecoder(("", CLEAR, False), languages=("en", "de"))
    assert backend(decoder).check_language("auto") == "auto"
    assert backend(decoder).check_language("de-AT") == "de"
    with pytest.raises(UnknownName, match="scripted 'fr'"):
        backend(decoder).check_language("fr")
