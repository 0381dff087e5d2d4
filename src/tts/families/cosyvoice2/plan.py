"""What CosyVoice 2 decides before it computes: chunks, bounds, instructions, speed. Pure.

A second of speech is 25 tokens; a token is two frames of mel spectrogram, or 960 samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from src.rpc.errors import Unavailable
from src.tts.paced_words import USUAL_MS
from src.tts.words import tokens, weight

SAMPLE_RATE = 24_000
TOKENS_PER_S = 25
FIRST_HOP = 25
"""Tokens of the first chunk: the width of the mask that the flow was trained with."""
LAST_HOP = 100

END_OF_PROMPT = "<|endofprompt|>"
# The model's authors list these eight and instruct in Chinese (arXiv 2412.10117, table of
# instructions), whatever language is spoken then.
EMOTIONS = {
    "neutral": "",
    "happy": "用开心的语气说这句话",
    "sad": "用悲伤的语气说这句话",
    "surprised": "用惊讶的语气说这句话",
    "angry": "用愤怒的语气说这句话",
    "fearful": "用恐惧的语气说这句话",
    "disgusted": "用厌恶的语气说这句话",
    "calm": "用冷静的语气说这句话",
    "serious": "用严肃的语气说这句话",
}

_SLACK_S = 4.0
_SLOWEST = 4.0
_PATIENCE_S = 30.0
_SLOWEST_RTF = 20.0


@dataclass(slots=True)
class ChunkSchedule:
    """When one run's tokens are enough for its next chunk: 25, then 50, then 100 more of them.

    The family's package keeps this on the model, where every stream makes all later ones slower.
    `prompt`: tokens of the recording, which the first chunk is padded to a whole mask with.
    `look_ahead`: tokens after a chunk's own that the flow has to see.
    """

    prompt: int
    look_ahead: int
    offset: int = 0
    """Tokens whose sound has been made."""
    _hop: int = FIRST_HOP

    def due(self, made: int) -> int | None:
        """How many of the `made` tokens the next chunk is computed from; None: too few yet."""
        wanted = self.offset + self._wanted() + self.look_ahead
        return wanted if made >= wanted else None

    def took(self) -> None:
        """The chunk that was due has been made."""
        self.offset += self._wanted()
        self._hop = min(LAST_HOP, 2 * self._hop)

    def _wanted(self) -> int:
        return self._hop + (-self.prompt % FIRST_HOP if self.offset == 0 else 0)


def longest(text: str) -> int:
    """Tokens after which a text has not found its end: four seconds and four times its length."""
    units = sum(weight(word.text) for word in tokens(text))
    return round((_SLACK_S + _SLOWEST * units * USUAL_MS / 1000) * TOKENS_PER_S)


def instruction(emotion: str, instruct: str) -> str:
    """What the model is told on how to speak; empty: nothing."""
    return "，".join(part for part in (EMOTIONS[emotion], instruct) if part)


def unmarked(text: str) -> str:
    """Without the brackets of control tokens, which a text from outside must not write."""
    return text.replace("<|", " ").replace("|>", " ")


def stretched(begin: int, frames: int, speed: float, *, final: bool) -> list[float]:
    """Places in the first `frames` frames of a mel, where those of the spoken one are read.

    `begin` of the spoken one were read before. What lies between two frames waits for the second,
    unless these are all. The same places, whatever pieces they are asked for in.
    """
    places: list[float] = []
    while (place := (begin + len(places)) * speed) < (frames if final else frames - 1):
        places.append(min(place, frames - 1.0))
    return places


class Patience:
    """How long a text's computing may take: 30 s, and 20 times as long as it can be to say.

    Waiting for text, and for whoever takes the sound, does not count.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._spent = 0.0

    @contextmanager
    def computing(self, limit: Callable[[], int]) -> Iterator[None]:
        """`limit`: as of `longest`, asked afterwards. Raises Unavailable."""
        started = self._clock()
        yield
        self._spent += self._clock() - started
        allowed = _PATIENCE_S + _SLOWEST_RTF * limit() / TOKENS_PER_S
        if self._spent > allowed:
            raise Unavailable(
                f"CosyVoice 2 has computed for {self._spent:.0f} s on one piece of text;"
                " this machine is too slow for it, or too busy"
            )

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside `computing`: this is not it."""
        started = self._clock()
        try:
            yield
        finally:
            self._spent -= self._clock() - started
