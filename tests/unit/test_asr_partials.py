"""Local agreement: what is stable stays."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from src.orchestrator.asr_partials import LocalAgreement


def stable(agreement: LocalAgreement, text: str) -> tuple[str, str]:
    partial = agreement.push(text, 0)
    return partial.text[: partial.stable_chars], partial.text[partial.stable_chars :].strip()


def test_words_that_two_passes_agree_on_become_stable() -> None:
    agreement = LocalAgreement()
    assert stable(agreement, "What is") == ("", "What is")
    assert stable(agreement, "What is the cap") == ("What is", "the cap")
    assert stable(agreement, "What is the capital of") == ("What is the", "capital of")


def test_the_last_word_waits_because_it_may_grow() -> None:
    agreement = LocalAgreement()
    agreement.push("book it to", 0)
    assert stable(agreement, "book it to") == ("book it", "to")
    assert stable(agreement, "book it tomorrow") == ("book it", "tomorrow")


def test_case_and_punctuation_do_not_count_as_disagreement() -> None:
    agreement = LocalAgreement()
    agreement.push("Stop. Please.", 0)
    assert stable(agreement, "stop, please wait") == ("stop, please", "wait")


def test_a_later_pass_cannot_take_stable_words_back() -> None:
    agreement = LocalAgreement()
    agreement.push("one two three", 0)
    agreement.push("one two three", 0)
    assert stable(agreement, "won to three four") == ("one two", "three four")


def test_a_partial_says_how_much_audio_it_is_over() -> None:
    assert LocalAgreement().push("yes", 840).audio_ms == 840


@given(st.lists(st.lists(st.sampled_from(["a", "b", "B.", "c"]), max_size=6), max_size=12))
def test_the_stable_part_only_ever_grows(hypotheses: list[list[str]]) -> None:
    agreement = LocalAgreement()
    before = ""
    for words in hypotheses:
        partial = agreement.push(" ".join(words), 0)
        now = partial.text[: partial.stable_chars]
        assert now.startswith(before)
        assert partial.stable_chars <= len(partial.text)
        before = now
