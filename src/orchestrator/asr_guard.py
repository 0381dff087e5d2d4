"""What keeps a recogniser honest: no loops, no words out of silence. Pure.

Whisper loops when its context is cut short, and invents polite phrases when nobody speaks. Both
show in its own numbers; where those are not enough, the voice detector is asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from src.audio.pcm import Float32

_TOKENS_PER_SECOND = 5
_SPARE_TOKENS = 8

_PHRASE = 4
"""Tokens. From this length on, said twice in a row is a loop; shorter may be emphasis."""
_PHRASE_REPEATS = 2
_WORD_REPEATS = 4
_SCATTERED_REPEATS = 3

# Measured on tiny.en: noises score below -1.2 (digital silence -0.9), speech above -0.5.
# The first pair is openai-whisper's own rule for "no speech".
_NO_SPEECH_PROB, _NO_SPEECH_LOGPROB = 0.6, -1.0
_GIBBERISH_LOGPROB = -1.6
_UNSURE_NO_SPEECH, _UNSURE_LOGPROB = 0.2, -0.6

# How much of a voice Silero must hear: for any text, and for one that is suspect. One short word
# has 200 ms.
_ENOUGH_SPEECH_MS, _CLEAR_SPEECH_MS = 96, 192

_INVENTED = frozenset(
    {
        "", "you", "thank you", "thanks", "bye", "bye bye", "okay", "so", "oh", "huh", "hmm",
        "thank you very much", "thanks for watching", "thank you for watching", "the end",
        "thank you for watching please subscribe", "please subscribe", "subtitles by", "music",
        "applause", "blank audio", "silence", "ill see you next time", "see you next time",
    }
)  # fmt: skip


def token_budget(audio_ms: int) -> int:
    """More tokens than this nobody speaks in that time."""
    return _SPARE_TOKENS + _TOKENS_PER_SECOND * audio_ms // 1000


def repetition(tokens: Sequence[int]) -> int | None:
    """Where a loop begins to repeat itself, so that `tokens[:n]` says it once; None: no loop."""
    for start in range(len(tokens)):
        for length in range(1, (len(tokens) - start) // 2 + 1):
            wanted = _PHRASE_REPEATS if length >= _PHRASE else _WORD_REPEATS
            if _repeats(tokens, start, length) >= wanted:
                return start + length
    return _scattered(tokens)


def _repeats(tokens: Sequence[int], start: int, length: int) -> int:
    """How often the phrase at `start` stands there in a row."""
    phrase = tokens[start : start + length]
    count = 1
    while tokens[start + count * length : start + (count + 1) * length] == phrase:
        count += 1
    return count


def _scattered(tokens: Sequence[int]) -> int | None:
    phrases = [tuple(tokens[i : i + _PHRASE]) for i in range(len(tokens) - _PHRASE + 1)]
    often = {p for p, count in Counter(phrases).items() if count >= _SCATTERED_REPEATS}
    seen: set[tuple[int, ...]] = set()
    for position, phrase in enumerate(phrases):
        if phrase in seen:
            return position
        if phrase in often:
            seen.add(phrase)
    return None


@dataclass(frozen=True, slots=True)
class Score:
    """What Whisper says of its own text."""

    no_speech_prob: float
    avg_logprob: float


def is_doubtful(text: str, score: Score) -> bool:
    """Worth asking the voice detector about. Clear speech never is: that costs no time."""
    return _is_unsure(score) or _plain(text) in _INVENTED


def is_invented(text: str, score: Score, speech_ms: int) -> bool:
    """Nothing was said, whatever the text. `speech_ms`: how much the voice detector heard."""
    if score.no_speech_prob > _NO_SPEECH_PROB and score.avg_logprob < _NO_SPEECH_LOGPROB:
        return True
    if speech_ms < _ENOUGH_SPEECH_MS:
        return True
    suspect = score.avg_logprob < _GIBBERISH_LOGPROB or (
        _is_unsure(score) and _plain(text) in _INVENTED
    )
    return suspect and speech_ms < _CLEAR_SPEECH_MS


def _is_unsure(score: Score) -> bool:
    return score.no_speech_prob > _UNSURE_NO_SPEECH or score.avg_logprob < _UNSURE_LOGPROB


def _plain(text: str) -> str:
    spaced = text.lower().replace("-", " ").replace("'", "")
    kept = "".join(c if c.isalnum() else " " for c in spaced)
    return " ".join(kept.split())


def has_words(text: str) -> bool:
    return any(c.isalnum() for c in text)


_CHUNK_S, _EARLIEST_CUT_S = 26, 18


def chunks(samples: Float32, rate: int) -> list[Float32]:
    """Pieces of at most 26 s, cut in the quietest 200 ms after 18 s."""
    pieces = []
    while samples.size > _CHUNK_S * rate:
        cut = _quietest(samples, _EARLIEST_CUT_S * rate, _CHUNK_S * rate, rate // 5)
        pieces.append(samples[:cut])
        samples = samples[cut:]
    return [*pieces, samples]


def _quietest(samples: Float32, start: int, end: int, width: int) -> int:
    """Middle of the block of `width` samples with the least energy in [start, end)."""
    blocks = samples[start : start + (end - start) // width * width].reshape(-1, width)
    return start + int(np.argmin(np.sum(np.square(blocks), axis=1))) * width + width // 2
