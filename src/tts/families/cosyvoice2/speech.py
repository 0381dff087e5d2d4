"""CosyVoice 2 as a model of the worker: text in segments, sound in chunks of one to four seconds.

What computes is behind `Engine`, so that everything here runs without torch. There is no thread:
tokens are drawn by whoever takes the sound, so an error is his and a cancel leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from src.audio.pcm import Float32
from src.tts.families.cosyvoice2.plan import (
    EMOTIONS,
    SAMPLE_RATE,
    ChunkSchedule,
    Patience,
    instruction,
    longest,
    unmarked,
)
from src.tts.families.settings import (
    SEED,
    Choice,
    Range,
    Setting,
    Words,
    helps,
    known_language,
    known_voice,
    read_settings,
)
from src.tts.generation import Stopped
from src.tts.paced_words import PacedWords, WordPace
from src.tts.segmenter import Segmenter, speakable
from src.tts.tts_base import CancelToken, PcmChunk, Segment, VoiceSpec

LANGUAGES = ("en", "zh")
_VOICE: dict[str, Setting[object]] = {
    "emotion": Choice(tuple(EMOTIONS), "neutral", "how it is said"),
    "instruct": Words(200, "how it is said, in words (best in Chinese)"),
    "speed": Range(0.5, 2.0, 1.0, "rate of speech against the voice's own"),
    "text": Choice(
        ("clauses", "flowing"), "clauses", "clauses are said one by one, or in one breath"
    ),
    "seed": SEED,
}
SETTINGS = helps(_VOICE)
# The flow computes a run's tokens again for each of its chunks, so a run is cut off at a sentence.
_RUN_CHARS = 240
_LONGEST_RUN_CHARS = 480
_LONGEST_SEGMENT = 400
_ENDS = tuple(".!?…。！？")
_CLOSERS = "\"'”’)]」』）】 "
_NO_SOUND = np.empty(0, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Manner:
    """Who speaks, and how."""

    voice: str
    instruct: str = ""
    speed: float = 1.0
    seed: int = 0
    """0: other draws each time."""


class Vocoder(Protocol):
    def __call__(self, tokens: Sequence[int], offset: int, *, final: bool) -> Float32:
        """The sound (24 kHz) of one run's tokens after the first `offset`, whose sound was made.

        Not `final`: of all but the last `Engine.look_ahead`, and less 8 frames to fade with.
        Raises Stopped where the run's cancel comes meanwhile.
        """
        ...


class Engine(Protocol):
    """The loaded model. Its methods may be called on several threads at once."""

    look_ahead: int

    @property
    def voices(self) -> Sequence[str]: ...

    def prompt(self, voice: str) -> int:
        """Tokens of the voice's recording."""
        ...

    def normal(self, text: str) -> str:
        """Numbers and signs as words."""
        ...

    def tokens(self, text: str, manner: Manner) -> Generator[int, None, None]:
        """What says this text. Closing it ends the run."""
        ...

    def tokens_while_written(
        self, texts: Iterator[str], manner: Manner
    ) -> Generator[int, None, None]:
        """What says these texts in one run, which begins before the last of them is there."""
        ...

    def vocoder(self, manner: Manner, cancel: CancelToken) -> Vocoder:
        """For one run."""
        ...

    def close(self) -> None: ...


class CosyVoice2Model:
    """`voices` of the engine must not be empty; the first is the default."""

    native_sample_rate = SAMPLE_RATE

    def __init__(
        self,
        engine: Engine,
        *,
        languages: Sequence[str] = (),
        defaults: Mapping[str, str] | None = None,
        max_streams: int = 4,
        patience: Callable[[], Patience] = Patience,
    ) -> None:
        self._engine = engine
        self._defaults = dict(defaults or {})
        self._patience = patience
        self._paces = {name: WordPace() for name in engine.voices}
        self.voices = tuple(engine.voices)
        self.languages = tuple(languages) or LANGUAGES
        self.max_streams = max_streams
        self._manner(VoiceSpec(self.voices[0], ""))  # wrong defaults fail here, not in a session

    def check_voice(self, spec: VoiceSpec) -> VoiceSpec:
        voice = known_voice(spec.voice, self.voices)
        language = known_language(spec.language, self.languages)
        settings = read_settings(_VOICE, self._defaults, spec.settings)
        return VoiceSpec(voice, language, {key: _written(value) for key, value in settings.items()})

    def stream(
        self, segments: Iterable[Segment], spec: VoiceSpec, cancel: CancelToken
    ) -> Iterator[PcmChunk]:
        """Raises as `check_voice` does, and Unavailable where computing takes for ever."""
        spec = self.check_voice(spec)
        pieces = _fitting(segments)
        manner, flowing = self._manner(spec), spec.settings["text"] == "flowing"
        # A run takes what follows its first piece as it is written, or nothing of it.
        for piece in pieces:
            run = _Run(self._engine, piece, self._pace(manner), self._patience())
            yield from run.say(manner, pieces if flowing else None, cancel)
            if cancel.cancelled:
                return

    def unload(self) -> None:
        self._engine.close()

    def _pace(self, manner: Manner) -> WordPace:
        own = self._paces[manner.voice]
        return own if manner.speed == 1.0 else WordPace(own.ms_per_unit / manner.speed)

    def _manner(self, spec: VoiceSpec) -> Manner:
        values = read_settings(_VOICE, self._defaults, spec.settings)
        instruct = instruction(str(values["emotion"]), unmarked(str(values["instruct"])))
        speed, seed = float(str(values["speed"])), int(float(str(values["seed"])))
        return Manner(spec.voice, instruct, speed, seed)


def _written(value: object) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _fitting(segments: Iterable[Segment]) -> Iterator[Segment]:
    """What can be said of the segments, none of them too long for one run."""
    for segment in segments:
        if len(segment.text) <= _LONGEST_SEGMENT:
            pieces = [segment]
        else:
            cutter = Segmenter()
            cut = cutter.push(segment.text) + cutter.flush()
            pieces = [replace(p, char_start=segment.char_start + p.char_start) for p in cut]
        yield from (piece for piece in pieces if speakable(piece.text))


def _ends(text: str) -> bool:
    return text.rstrip(_CLOSERS).endswith(_ENDS)


class _Run:
    """One run of the language model, its chunks and its words."""

    def __init__(self, engine: Engine, first: Segment, pace: WordPace, patience: Patience) -> None:
        self._engine = engine
        self._first = first
        self._words = PacedWords(first.text, first.char_start, pace, SAMPLE_RATE)
        self._patience = patience
        self._limit = longest(first.text)
        self._cut_off = False

    def say(
        self, manner: Manner, following: Iterator[Segment] | None, cancel: CancelToken
    ) -> Iterator[PcmChunk]:
        """`following`: more of the text, taken as the run goes on; None: the first is all."""
        with suppress(Stopped):
            for sound in self._sound(manner, following, cancel):
                yield PcmChunk(sound, self._words.push(sound))
        if not cancel.cancelled and (left := self._words.end(learn=not self._cut_off)):
            yield PcmChunk(_NO_SOUND, left)

    def _sound(
        self, manner: Manner, following: Iterator[Segment] | None, cancel: CancelToken
    ) -> Iterator[Float32]:
        plan = ChunkSchedule(self._engine.prompt(manner.voice), self._engine.look_ahead)
        vocoder = self._engine.vocoder(manner, cancel)
        tokens: list[int] = []
        with closing(self._tokens(manner, following)) as made:
            while (token := self._next(made)) is not None:
                if cancel.cancelled:
                    return
                tokens.append(token)
                if (upto := plan.due(len(tokens))) is not None:
                    with self._computing():
                        sound = vocoder(tokens[:upto], plan.offset, final=False)
                    plan.took()
                    yield sound
                if len(tokens) >= self._limit:
                    self._cut_off = True
                    break
        if len(tokens) > plan.offset:
            with self._computing():
                sound = vocoder(tokens, plan.offset, final=True)
            yield sound

    def _tokens(
        self, manner: Manner, following: Iterator[Segment] | None
    ) -> Generator[int, None, None]:
        if following is None:
            return self._engine.tokens(self._normal(self._first), manner)
        return self._engine.tokens_while_written(self._texts(following), manner)

    def _next(self, made: Iterator[int]) -> int | None:
        with self._computing():
            return next(made, None)

    def _computing(self) -> AbstractContextManager[None]:
        return self._patience.computing(lambda: self._limit)

    def _texts(self, following: Iterator[Segment]) -> Iterator[str]:
        """The run's texts, the first at once; no more of them than one run should say."""
        yield self._normal(self._first)
        chars, last = len(self._first.text), self._first.text
        while chars < _LONGEST_RUN_CHARS and not (chars >= _RUN_CHARS and _ends(last)):
            with self._patience.waiting():
                segment = next(following, None)
            if segment is None:
                return
            self._words.extend(segment.text, segment.char_start)
            self._limit += longest(segment.text) - longest("")
            chars, last = chars + len(segment.text), segment.text
            yield " " + self._normal(segment)

    def _normal(self, segment: Segment) -> str:
        return self._engine.normal(" ".join(unmarked(segment.text).split()))
