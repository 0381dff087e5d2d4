"""Words as far as taking turns needs them: which phrases say 'go on', which say 'stop', and
whether a sentence is whole. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

BACK_CHANNELS = (
    "ah", "aha", "alright", "cool", "exactly", "fine", "good", "got it", "great", "hm", "hmm",
    "huh", "i see", "mhm", "mm", "mm hmm", "mmm", "nice", "of course", "oh", "oh okay", "ok",
    "okay", "really", "right", "sure", "true", "uh", "uh huh", "um", "wow", "yeah", "yep", "yes",
)  # fmt: skip
INTERRUPTIONS = (
    "be quiet", "cancel", "enough", "excuse me", "hang on", "hold on", "hush", "never mind", "no",
    "nope", "one moment", "pause", "quiet", "shut up", "shush", "stop", "wait",
)  # fmt: skip
UNFINISHED = (
    "a", "about", "after", "also", "although", "an", "and", "are", "as", "at", "because", "before",
    "but", "by", "can", "could", "er", "for", "from", "had", "has", "have", "hm", "hmm", "how",
    "i", "if", "in", "into", "is", "just", "like", "maybe", "mm", "mmm", "my", "of", "on", "or",
    "our", "probably", "really", "should", "since", "so", "some", "than", "that's", "the", "their",
    "then", "to", "uh", "um", "until", "very", "was", "we", "well", "were", "what", "when",
    "where", "whether", "which", "while", "who", "why", "will", "with", "without", "would",
    "you know", "your",
)  # fmt: skip

_SENTENCE_END = re.compile(r"(?<!\.)[.!?][\"'”’)\]»]*\Z")
# Of one or two words nobody knows whether more is to come.
_SENTENCE_WORDS = 3


def joined(*parts: str) -> str:
    return " ".join(part.strip() for part in parts if part.strip())


def same_words(one: str, other: str) -> bool:
    """Equal but for case, spacing and punctuation: it is the same question."""
    return tokens(one) == tokens(other)


def tokens(text: str) -> list[str]:
    """Lower-case words without punctuation; a hyphen parts words ("mm-hmm")."""
    cleaned = "".join(c if c.isalnum() or c == "'" else " " for c in text.lower().replace("’", "'"))
    return [word for part in cleaned.split() if (word := part.strip("'"))]


def covered(words: list[str], phrases: Iterable[str]) -> bool:
    """True when `words` is nothing but phrases of the list, one after the other."""
    known = _split(tuple(phrases))
    reached = {0}
    for start in range(len(words)):
        if start in reached:
            reached |= {
                start + len(phrase)
                for phrase in known
                if tuple(words[start : start + len(phrase)]) == phrase
            }
    return len(words) in reached


def has_phrase(words: list[str], phrases: Iterable[str]) -> bool:
    known = _split(tuple(phrases))
    return any(
        tuple(words[start : start + len(phrase)]) == phrase
        for start in range(len(words))
        for phrase in known
    )


def is_sentence(text: str, unfinished: Iterable[str]) -> bool:
    """Whether nothing needs to follow: at least three words and a mark that ends a sentence, which
    recognisers also put behind a first half; so the last words must not be `unfinished` ones."""
    words = tokens(text)
    if len(words) < _SENTENCE_WORDS or not _SENTENCE_END.search(text.rstrip()):
        return False
    return not any(tuple(words[-len(phrase) :]) == phrase for phrase in _split(tuple(unfinished)))


@lru_cache(maxsize=64)
def _split(phrases: tuple[str, ...]) -> frozenset[tuple[str, ...]]:
    return frozenset(split for phrase in phrases if (split := tuple(tokens(phrase))))
