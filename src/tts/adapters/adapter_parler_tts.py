"""Parler-TTS: a voice by its description in words, streamed in windows of codec frames.

The package (`parler-tts`, with a `transformers` of its own) is imported while a model loads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import cast

import numpy as np

from src.audio.pcm import Float32
from src.rpc.errors import InvalidArgument
from src.tts.catalog import ModelMeta
from src.tts.families.parler.engine import ParlerEngine, SpeechEnded, open_engine
from src.tts.families.parler.frames import Ids, Undelay, WindowDecoder
from src.tts.families.parler.pack import DESCRIPTION, DESCRIPTIONS, pack_folder, read_voices
from src.tts.families.settings import (
    Choice,
    Range,
    Setting,
    helps,
    known_language,
    known_voice,
    read_settings,
    require_modules,
)
from src.tts.generation import Put, Stopped, generated
from src.tts.paced_words import USUAL_MS, PacedWords, WordPace
from src.tts.segmenter import speakable
from src.tts.tts_base import AdapterCapabilities, CancelToken, PcmChunk, Segment, VoiceSpec
from src.tts.words import tokens, weight

INSTALL = "uv sync --extra parler  (an environment of its own: `uv run just run-tts-parler`)"
LANGUAGES = ("en",)
_SESSION: Mapping[str, Setting[object]] = {
    "description": DESCRIPTION,
    "temperature": Range(0.0, 2.0, 1.0, "variation of the speech; 0 takes the likeliest"),
}
_ENGINE: Mapping[str, Setting[object]] = {
    "precision": Choice(
        ("auto", "float32", "bfloat16", "float16"), "auto", "of the weights, but for the codec's"
    ),
    "streams": Range(1, 8, 1, "utterances at once; each slows the others down"),
    "first_ms": Range(20, 1000, 120, "sound in the first chunk"),
    "chunk_ms": Range(100, 2000, 900, "sound in a chunk, at the most"),
}
# Twenty seconds of speech: the model is lost after thirty.
_MAX_CHARS = 300
# A piece may take this much longer than its text should, and a little for a slow voice or a pause.
_SLOWEST = 4.0
_GRACE_MS = 4_000
_LONGEST_MS = 30_000
_NO_SOUND: Float32 = np.empty(0, dtype=np.float32)


class ParlerTtsAdapter:
    family = "parler_tts"
    capabilities = AdapterCapabilities(
        emotive_zero_prompt=True, streams=True, settings=helps(_SESSION)
    )

    def check_installed(self) -> None:
        require_modules(self.family, ("parler_tts", "torch", "transformers"), INSTALL)

    def load(
        self,
        meta: ModelMeta,
        files: Mapping[str, Path],
        device: str,
        progress: Callable[[float], None],
    ) -> ParlerTtsModel:
        """A catalog entry's `settings` may hold `temperature`, `description` (of the one voice
        of a pack that names none) and those of `_ENGINE`.

        Raises besides: InvalidArgument and UnknownName for settings and voices.
        """
        self.check_installed()
        engine = read_settings(_ENGINE, _only(meta.settings, _ENGINE))
        defaults = read_settings(
            _SESSION, {k: v for k, v in meta.settings.items() if k not in _ENGINE}
        )
        folder = pack_folder(meta.model_id, files)
        voices = _voices(meta, files, str(defaults.pop("description")))
        opened = open_engine(meta.model_id, folder, device, str(engine["precision"]), progress)
        model = ParlerTtsModel(meta, opened, voices, engine, defaults)
        progress(1.0)
        return model


class ParlerTtsModel:
    """`voices` (name → description) must not be empty; each is read once, here."""

    def __init__(
        self,
        meta: ModelMeta,
        engine: ParlerEngine,
        voices: Mapping[str, str],
        options: Mapping[str, object],
        defaults: Mapping[str, object],
    ) -> None:
        self._engine = engine
        self._states = {name: engine.read_description(text) for name, text in voices.items()}
        self._paces = {name: WordPace() for name in voices}
        self._defaults = {name: str(value) for name, value in defaults.items()}
        self._first = engine.frames(cast(float, options["first_ms"]))
        self._most = engine.frames(cast(float, options["chunk_ms"]))
        self.native_sample_rate = engine.sample_rate
        # Steps of two streams wait for each other, so that on most machines one keeps up alone.
        self.max_streams = int(cast(float, options["streams"]))
        self.voices = tuple(voices)
        self.languages = tuple(meta.languages) or LANGUAGES

    def check_voice(self, spec: VoiceSpec) -> VoiceSpec:
        voice = known_voice(spec.voice, self.voices)
        language = known_language(spec.language, self.languages)
        settings = read_settings(_SESSION, self._defaults, spec.settings)
        return VoiceSpec(voice, language, {name: str(value) for name, value in settings.items()})

    def stream(
        self, segments: Iterable[Segment], spec: VoiceSpec, cancel: CancelToken
    ) -> Iterator[PcmChunk]:
        """A description in the settings takes the place of the voice's. Raises as `check_voice`
        does, Internal where the model fails, Unavailable where memory is short."""
        spec = self.check_voice(spec)
        for segment in segments:
            if cancel.cancelled:
                return
            if speakable(segment.text):
                yield from self._say(segment, spec, cancel)

    def unload(self) -> None:
        self._states.clear()
        self._engine.close()

    def _say(self, segment: Segment, spec: VoiceSpec, cancel: CancelToken) -> Iterator[PcmChunk]:
        words = PacedWords(
            segment.text, segment.char_start, self._paces[spec.voice], self.native_sample_rate
        )
        piece = _Piece(self._engine, self._first, self._most, spec, cancel)
        for text in pieces(segment.text):
            if cancel.cancelled:
                return
            state = self._state(spec)

            def run(put: Put[Float32], text: str = text, state: object = state) -> None:
                piece.speak(text, state, put)

            with closing(generated(run, "parler_tts")) as sounds:
                for sound in sounds:
                    if cancel.cancelled:
                        return
                    yield PcmChunk(sound, words.push(sound))
        if not cancel.cancelled and (left := words.end(learn=piece.whole)):
            yield PcmChunk(_NO_SOUND, left)

    def _state(self, spec: VoiceSpec) -> object:
        description = spec.settings["description"]
        return self._engine.describe(description) if description else self._states[spec.voice]


class _Piece:
    """A segment's pieces, one after the other, on the thread that computes them."""

    def __init__(
        self, engine: ParlerEngine, first: int, most: int, spec: VoiceSpec, cancel: CancelToken
    ) -> None:
        self.whole = True
        """Did the model end every piece by itself, or was one cut?"""
        self._engine = engine
        self._first, self._most = first, most
        self._temperature = float(spec.settings["temperature"])
        self._cancel = cancel

    def speak(self, text: str, state: object, put: Put[Float32]) -> None:
        engine = self._engine
        undelay = Undelay(engine.codebooks, engine.codes)
        window = WindowDecoder(
            engine.decode, engine.hop, engine.reach, first=self._first, most=self._most
        )

        def step(draw: Ids | None) -> None:
            if put.stopped or self._cancel.cancelled:
                raise Stopped
            frame = None if draw is None else undelay.push(draw)
            if frame is not None and (sound := window.push(frame)) is not None:
                put(sound)
            if undelay.ended:
                raise SpeechEnded

        limit = engine.frames(longest_ms(text))
        ended = engine.generate(text, state, temperature=self._temperature, frames=limit, step=step)
        self.whole = self.whole and ended
        if (rest := window.end()).size:
            put(rest)


def longest_ms(text: str) -> float:
    """After this long the model has lost its way and would go on for ever."""
    units = sum(weight(word.text) for word in tokens(text))
    return min(_LONGEST_MS, _GRACE_MS + _SLOWEST * USUAL_MS * units)


def pieces(text: str) -> Sequence[str]:
    """Of bounded length, on one line, cut at a space where there is one; only what can be said."""
    left = " ".join(text.split())
    out: list[str] = []
    while len(left) > _MAX_CHARS:
        cut = left.rfind(" ", _MAX_CHARS // 2, _MAX_CHARS + 1)
        cut = cut if cut > 0 else _MAX_CHARS
        out.append(left[:cut])
        left = left[cut:].lstrip()
    return [piece for piece in (*out, left) if speakable(piece)]


def _only(settings: Mapping[str, str], known: Mapping[str, object]) -> dict[str, str]:
    return {name: value for name, value in settings.items() if name in known}


def _voices(meta: ModelMeta, files: Mapping[str, Path], description: str) -> dict[str, str]:
    if not description:
        return read_voices(meta.model_id, files, meta.voices)
    if meta.voices or DESCRIPTIONS in files:
        raise InvalidArgument(
            f"{meta.model_id}: the entry's setting 'description' is the only voice's; where there "
            f"are names, write it into {DESCRIPTIONS}"
        )
    return {"default": description}
