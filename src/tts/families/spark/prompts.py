"""What Spark-TTS's language model reads, and which of its tokens are what. Pure.

    clone:    task_tts  content{transcript text}  global{32 codes}  semantic{the recording's codes …
    make up:  task_controllable_tts  content{text}  style{gender pitch speed}
                  acoustic{…}  global{32 codes}  semantic{ …

and speech goes on from there. In the second form the model writes the line below the task itself;
the global codes are who speaks.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from src.rpc.errors import CorruptModel
from src.tts.families.csm.context import halves
from src.tts.segmenter import speakable
from src.tts.words import tokens, weight

TOKENS_PER_SECOND = 50
GENDERS = ("female", "male")
LEVELS = ("very_low", "low", "moderate", "high", "very_high")

_CONTROL = (
    *("<|task_tts|>", "<|task_controllable_tts|>", "<|start_content|>", "<|end_content|>"),
    *("<|start_style_label|>", "<|end_style_label|>"),
    *("<|start_global_token|>", "<|end_global_token|>", "<|start_semantic_token|>"),
    *(f"<|gender_{i}|>" for i in range(len(GENDERS))),
    *(f"<|{name}_label_{i}|>" for name in ("pitch", "speed") for i in range(len(LEVELS))),
)
# What the model may write of itself before its global codes are complete.
_OPENING = re.compile(r"<\|(start_(acoustic|global)_token|end_acoustic_token|\w+_value_\d+)\|>")

# A quick word to say takes 55 ms for a unit of weight, a slow voice twice that.
_TOKENS_PER_UNIT = 55 * TOKENS_PER_SECOND / 1000
_ROOM_TOKENS = 4 * TOKENS_PER_SECOND
_ROOM_FACTOR = 4.0
MAX_TOKENS = 3000
"""The package's own end of everything, 60 s."""
_MAX_UNITS = 250.0
_MAX_CHARS = 600


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Ids of the language model's tokens."""

    semantic: tuple[int, ...]
    """By code: 20 ms of what is said."""
    globals: tuple[int, ...]
    """By code: a piece of who says it."""
    opening: tuple[int, ...]
    """What else may come before the global codes are complete."""
    ends: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ClonedVoice:
    """What is kept of a recording."""

    global_codes: tuple[int, ...]
    semantic_codes: tuple[int, ...] = ()
    """All of the recording, where it is known what is said in it; else none."""
    transcript: str = ""


@dataclass(frozen=True, slots=True)
class Style:
    """A voice that the model makes up."""

    gender: str
    pitch: str
    speed: str


def read_vocabulary(model_id: str, ids: Mapping[str, int], ends: Collection[int]) -> Vocabulary:
    """Raises CorruptModel for a tokenizer that is not Spark-TTS's."""
    absent = [token for token in _CONTROL if token not in ids]
    if absent:
        raise CorruptModel(
            f"{model_id}: LLM/ is no Spark-TTS: its tokenizer lacks {', '.join(absent[:3])}"
        )
    if not ends:
        raise CorruptModel(f"{model_id}: LLM/ names no token that ends a sentence (eos_token_id)")
    return Vocabulary(
        semantic=_numbered(model_id, ids, "bicodec_semantic"),
        globals=_numbered(model_id, ids, "bicodec_global"),
        opening=tuple(sorted(i for token, i in ids.items() if _OPENING.fullmatch(token))),
        ends=tuple(sorted(ends)),
    )


def cloning_prompt(voice: ClonedVoice, text: str) -> str:
    return "".join(
        (
            "<|task_tts|><|start_content|>",
            plain(voice.transcript) + plain(text),
            "<|end_content|><|start_global_token|>",
            *(f"<|bicodec_global_{code}|>" for code in voice.global_codes),
            "<|end_global_token|><|start_semantic_token|>",
            *(f"<|bicodec_semantic_{code}|>" for code in voice.semantic_codes),
        )
    )


def style_prompt(style: Style, text: str, opening: str | None = None) -> str:
    """`opening`: what the model wrote when it made up the voice, for more words of the same."""
    style_labels = (
        f"<|gender_{GENDERS.index(style.gender)}|>"
        f"<|pitch_label_{LEVELS.index(style.pitch)}|>"
        f"<|speed_label_{LEVELS.index(style.speed)}|>"
    )
    prompt = (
        f"<|task_controllable_tts|><|start_content|>{plain(text)}<|end_content|>"
        f"<|start_style_label|>{style_labels}<|end_style_label|>"
    )
    if opening is None:
        return prompt
    return f"{prompt}{opening}<|end_global_token|><|start_semantic_token|>"


def plain(text: str) -> str:
    """On one line, and with nothing in it that the tokenizer takes for one of the model's marks."""
    return " ".join(text.split()).replace("<|", "< |")


def pieces(text: str) -> list[str]:
    """`text` in pieces that the model says in one go, without those that have no sound."""
    if not speakable(text):
        return []
    if len(text) < 2 or (_units(text) <= _MAX_UNITS and len(text) <= _MAX_CHARS):
        return [text]
    first, second = halves(text)
    return pieces(first) + pieces(second)


def most_tokens(text: str) -> int:
    """After so many the model has lost its end: four times what the text should take, and 4 s."""
    wanted = _ROOM_TOKENS + _ROOM_FACTOR * _TOKENS_PER_UNIT * _units(text)
    return min(MAX_TOKENS, int(wanted))


def _units(text: str) -> float:
    return sum(weight(token.text) for token in tokens(text))


def _numbered(model_id: str, ids: Mapping[str, int], name: str) -> tuple[int, ...]:
    """<|name_0|>, <|name_1|> and so on, without a gap."""
    pattern = re.compile(rf"<\|{name}_(\d+)\|>")
    found = {int(m[1]): i for token, i in ids.items() if (m := pattern.fullmatch(token))}
    gap: int | None = next((n for n in range(len(found)) if n not in found), None)
    if gap is not None or not found:
        raise CorruptModel(f"{model_id}: LLM/tokenizer.json lacks <|{name}_{gap or 0}|>")
    return tuple(found[n] for n in range(len(found)))
