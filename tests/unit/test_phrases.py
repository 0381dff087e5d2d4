"""Words as far as taking turns needs them."""

from __future__ import annotations

import pytest

from src.orchestrator.phrases import UNFINISHED, is_sentence


@pytest.mark.parametrize(
    "text",
    [
        "What is the capital of France?",
        "Tell me a joke. ",
        'She said "go home."',
        "No, not at all!",
    ],
)
def test_whole_sentences(text: str) -> None:
    assert is_sentence(text, UNFINISHED)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Stop.",  # too short to tell: judged as a phrase elsewhere
        "Well, maybe.",
        "What is the capital",
        "I would like to...",
        "I would like some…",
        # Recognisers put a mark behind whatever they are given.
        "I want to go to.",
        "I live in Paris and.",
        "I went home, you know.",
    ],
)
def test_sentences_that_may_go_on(text: str) -> None:
    assert not is_sentence(text, UNFINISHED)


def test_the_words_that_ask_for_more_are_the_callers() -> None:
    assert is_sentence("We live in Paris and.", [])
    assert not is_sentence("Ich wohne in Rom und.", ["und"])
