"""eSpeak NG: instant, a hundred languages, no weights. The stand-in voice."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from src.rpc.errors import InvalidArgument, UnknownName
from src.tts.catalog import ModelMeta
from src.tts.families.espeak.engine import (
    PITCH,
    RATE_WPM,
    EnginePool,
    EngineUnavailable,
    EspeakEngine,
    Voice,
    WordEvent,
)
from src.tts.families.joins import Joiner
from src.tts.families.settings import (
    Range,
    helps,
    match_language,
    read_settings,
    require_modules,
)
from src.tts.segmenter import soften_stops
from src.tts.tts_base import (
    AdapterCapabilities,
    CancelToken,
    MissingPackage,
    PcmChunk,
    Segment,
    VoiceSpec,
    WordMark,
)
from src.tts.words import tokens

INSTALL = "pip install 'espeakng-loader>=0.2.4'"
DEFAULT_VOICE = "en-us"

_SETTINGS = {
    "speed": Range(0.5, 2.0, 1.0, f"rate of speech; 1 is {RATE_WPM} words a minute"),
    "pitch": Range(0, 99, PITCH, "pitch of the voice"),
}


class EspeakAdapter:
    family = "espeak"
    capabilities = AdapterCapabilities(cpu_ok=True, word_times=True, settings=helps(_SETTINGS))

    def check_installed(self) -> None:
        require_modules(self.family, ("espeakng_loader",), INSTALL)

    def load(
        self,
        meta: ModelMeta,
        files: Mapping[str, Path],
        device: str,
        progress: Callable[[float], None],
    ) -> EspeakModel:
        """Needs no files. MissingPackage also where the library cannot be loaded."""
        self.check_installed()
        read_settings(_SETTINGS, meta.settings)
        try:
            engine = EspeakEngine()
        except EngineUnavailable as error:
            raise MissingPackage(self.family, INSTALL) from error
        progress(1.0)
        return EspeakModel(meta, engine)


class EspeakModel:
    """Engines are lent for a segment at a time, so any number of streams can share a few.

    `voices` are language tags; a session may also ask for an identifier ("gmw/en-US"), a name
    ("English (America)") or a variant of any of them ("en-us+f2").
    """

    max_streams = 0

    def __init__(self, meta: ModelMeta, engine: EspeakEngine) -> None:
        self.native_sample_rate = engine.sample_rate
        self._defaults = dict(meta.settings)
        listed = _usable(engine.voices())
        self._identifiers = _names(listed)
        self._variants = _variants()
        tags = tuple(dict.fromkeys(voice.tag for voice in listed))
        self.languages = tuple(meta.languages) or tags
        self.voices = tuple(meta.voices) or (
            DEFAULT_VOICE,
            *(t for t in tags if t != DEFAULT_VOICE),
        )
        for voice in self.voices:
            self._identifier(voice)
        self._tags = tags
        self._pool = EnginePool(max(2, os.cpu_count() or 1), engine)

    def check_voice(self, spec: VoiceSpec) -> VoiceSpec:
        voice = spec.voice or self._default_voice(spec.language)
        spoken = self._tag_of(voice)
        language = match_language(spec.language, (spoken, *self.languages)) or spoken
        if spec.language and _base(spec.language) != _base(spoken):
            raise InvalidArgument(f"voice {voice!r} speaks {spoken!r}, not {spec.language!r}")
        read_settings(_SETTINGS, self._defaults, spec.settings)
        return VoiceSpec(voice, language, {**self._defaults, **spec.settings})

    def stream(
        self, segments: Iterable[Segment], spec: VoiceSpec, cancel: CancelToken
    ) -> Iterator[PcmChunk]:
        """One chunk for a segment. Raises as `check_voice` does."""
        spec = self.check_voice(spec)
        settings = read_settings(_SETTINGS, spec.settings)
        identifier = self._identifier(spec.voice)
        joiner = Joiner(self.native_sample_rate)
        for segment in segments:
            if cancel.cancelled:
                return
            with self._pool.engine() as engine:
                speech = engine.speak(
                    soften_stops(segment.text),
                    identifier,
                    rate_wpm=round(RATE_WPM * settings["speed"]),
                    pitch=round(settings["pitch"]),
                    stop=lambda: cancel.cancelled,
                )
            if not speech.complete:
                return
            length_ms = speech.samples.size * 1000 // self.native_sample_rate
            chunk = joiner.join(
                segment.text, speech.samples, word_marks(segment, speech.words, length_ms)
            )
            if chunk.samples.size:
                yield chunk

    def unload(self) -> None:
        self._pool.close()

    def _default_voice(self, language: str) -> str:
        if not language:
            return self.voices[0]
        offered = {self._tag_of(voice): voice for voice in reversed(self.voices)}
        tag = match_language(language, offered)
        if tag is None:
            raise UnknownName.among("language", language, self.languages)
        return offered[tag]

    def _identifier(self, voice: str) -> str:
        """What the engine calls this voice. Raises UnknownName."""
        base, plus, variant = voice.partition("+")
        identifier = self._identifiers.get(base.lower())
        if identifier is None:
            raise UnknownName.among("voice", base, self._identifiers)
        if plus and variant not in self._variants:
            raise UnknownName.among("voice variant", variant, self._variants)
        return identifier.identifier + plus + variant

    def _tag_of(self, voice: str) -> str:
        self._identifier(voice)
        return self._identifiers[voice.partition("+")[0].lower()].tag


def word_marks(
    segment: Segment, events: Sequence[WordEvent], length_ms: int
) -> tuple[WordMark, ...]:
    """Marks for the segment's words; each lasts until the next begins.

    A word that the engine ran into the one before it ("of the") shares its time and is `estimated`.
    """
    words = tokens(segment.text)
    starts = _starts(words_at=[(w.start, w.end) for w in words], events=events)
    known = [(i, at) for i, at in enumerate(starts) if at is not None]
    if not known:
        return ()
    edges = _filled([(0, known[0][1]), *known, (len(words), max(length_ms, known[-1][1]))])
    return tuple(
        WordMark(
            word.text,
            edges[i],
            edges[i + 1],
            segment.char_start + word.start,
            segment.char_start + word.end,
            starts[i] is None or (i + 1 < len(words) and starts[i + 1] is None),
        )
        for i, word in enumerate(words)
    )


def _starts(words_at: Sequence[tuple[int, int]], events: Sequence[WordEvent]) -> list[int | None]:
    """The first event inside each word; both are in the order of the text."""
    starts: list[int | None] = [None] * len(words_at)
    index = 0
    for event in events:
        while index < len(words_at) and words_at[index][1] <= event.start:
            index += 1
        if index == len(words_at):
            break
        if words_at[index][0] <= event.start and starts[index] is None:
            starts[index] = event.at_ms
    return starts


def _filled(known: Sequence[tuple[int, int]]) -> list[int]:
    """Times for every index up to the last, in equal steps between known ones."""
    edges: list[int] = []
    for (i, at), (j, until) in itertools.pairwise(known):
        edges += [at + (until - at) * step // (j - i) for step in range(j - i)]
    return [*edges, known[-1][1]]


def _base(tag: str) -> str:
    return tag.replace("_", "-").lower().partition("-")[0]


def _usable(voices: Iterable[Voice]) -> list[Voice]:
    """Without those that need MBROLA, whose data is not in the wheel."""
    return [voice for voice in voices if not voice.identifier.startswith("mb/")]


def _names(voices: Iterable[Voice]) -> dict[str, Voice]:
    """Every name that a voice answers to, in lower case; the first of a name keeps it."""
    names: dict[str, Voice] = {}
    for voice in voices:
        for name in (voice.tag, voice.identifier, voice.name):
            names.setdefault(name.lower(), voice)
    return names


def _variants() -> frozenset[str]:
    import espeakng_loader

    folder = Path(espeakng_loader.get_data_path()) / "voices" / "!v"
    return frozenset(entry.name for entry in folder.iterdir())
