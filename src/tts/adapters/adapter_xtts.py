"""XTTS-v2: a voice from seconds of it, in seventeen languages, by the package `coqui-tts`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from src.rpc.errors import UnknownName
from src.tts.catalog import ModelMeta
from src.tts.families.settings import (
    SEED,
    Range,
    helps,
    known_voice,
    match_language,
    read_settings,
    require_modules,
)
from src.tts.families.torch_host import give_back_memory, own_generator, speaking
from src.tts.families.xtts.draws import drawing
from src.tts.families.xtts.loading import Loaded, open_model
from src.tts.families.xtts.stream import speak
from src.tts.families.xtts.text import Piece, check_extras, speaks
from src.tts.paced_words import USUAL_MS, PacedWords, WordPace
from src.tts.tts_base import AdapterCapabilities, CancelToken, PcmChunk, Segment, VoiceSpec

INSTALL = "uv sync --extra xtts  (coqui-tts and PyTorch; Python 3.11 or newer)"
MODULES = ("torch", "torchaudio", "TTS")

_VOICE = {
    "speed": Range(0.5, 2.0, 1.0, "rate of speech against the voice's own"),
    "temperature": Range(0.1, 1.5, 0.75, "how freely it is spoken; low is flat"),
    "top_k": Range(1, 200, 50, "candidates for each step; 1 repeats itself exactly"),
    "top_p": Range(0.05, 1.0, 0.85, "share of the likeliest candidates"),
    "repetition_penalty": Range(1.0, 20.0, 10.0, "against sounds that hang"),
    "seed": SEED,
}
_ENGINE = {
    "max_streams": Range(1, 64, 4, "utterances at once"),
}
_NO_SOUND = np.empty(0, dtype=np.float32)


class XttsAdapter:
    family = "xtts"
    capabilities = AdapterCapabilities(zero_shot=True, streams=True, settings=helps(_VOICE))

    def check_installed(self) -> None:
        require_modules(self.family, MODULES, INSTALL)

    def load(
        self,
        meta: ModelMeta,
        files: Mapping[str, Path],
        device: str,
        progress: Callable[[float], None],
    ) -> XttsModel:
        """A catalog entry's `settings` may hold the session's keys (as defaults) and
        `max_streams`. The files are those of families/xtts/pack.py and src/tts/recordings.py;
        nothing is written to them.

        Raises besides: InvalidArgument for a device that does not exist, for settings out of range
        and for a recording that makes no voice prompt, Unavailable where memory is short.
        """
        self.check_installed()
        defaults = {k: v for k, v in meta.settings.items() if k not in _ENGINE}
        engine = read_settings(_ENGINE, {k: v for k, v in meta.settings.items() if k in _ENGINE})
        read_settings(_VOICE, defaults)
        loaded = open_model(meta, files, device, progress)
        progress(1.0)
        return XttsModel(meta.model_id, loaded, defaults, int(engine["max_streams"]))


class XttsModel:
    """One set of weights; every piece of text is spoken through a view of it."""

    def __init__(
        self, model_id: str, loaded: Loaded, defaults: Mapping[str, str], max_streams: int
    ) -> None:
        self._model_id = model_id
        self._loaded = loaded
        self._defaults = dict(defaults)
        self._paces = {name: WordPace() for name in loaded.voices}
        self.native_sample_rate = loaded.sample_rate
        self.max_streams = max_streams
        self.voices = tuple(loaded.voices)
        self.languages = speaks(loaded.languages)

    def check_voice(self, spec: VoiceSpec) -> VoiceSpec:
        """Raises besides: Unavailable for a language whose packages are not installed."""
        voice = known_voice(spec.voice, self.voices)
        language = match_language(spec.language or self.languages[0], self._loaded.languages)
        if language is None:
            raise UnknownName.among("language", spec.language, self.languages)
        check_extras(language)
        read_settings(_VOICE, self._defaults, spec.settings)
        return VoiceSpec(voice, language, {**self._defaults, **spec.settings})

    def stream(
        self, segments: Iterable[Segment], spec: VoiceSpec, cancel: CancelToken
    ) -> Iterator[PcmChunk]:
        """Raises as `check_voice` does, Internal where the model fails, Unavailable where memory
        is short."""
        spec = self.check_voice(spec)
        settings = read_settings(_VOICE, spec.settings)
        pace = self._pace(spec.voice, settings["speed"])
        sampling = self._sampling(settings)
        for segment in segments:
            reader = self._loaded.reader
            for piece in reader.pieces(segment.text, segment.char_start, spec.language):
                if cancel.cancelled:
                    return
                yield from self._say(piece, spec, sampling, pace, cancel)

    def unload(self) -> None:
        device = self._loaded.device
        self._loaded.clear()
        give_back_memory(device)

    def _say(
        self,
        piece: Piece,
        spec: VoiceSpec,
        sampling: Mapping[str, Any],
        pace: WordPace,
        cancel: CancelToken,
    ) -> Iterator[PcmChunk]:
        words = PacedWords(piece.text, piece.char_start, pace, self.native_sample_rate)
        voice = self._loaded.voices[spec.voice]
        sound = speak(self._loaded.model, piece, spec.language, voice, sampling, cancel)
        with speaking(self._model_id):
            for samples in sound:
                yield PcmChunk(samples, words.push(samples))
        if not cancel.cancelled and (left := words.end()):
            yield PcmChunk(_NO_SOUND, left)

    def _sampling(self, settings: Mapping[str, float]) -> dict[str, Any]:
        """For all pieces of a stream: each goes on drawing where the last one ended."""
        draws = drawing(
            own_generator(int(settings["seed"]), self._loaded.model.device),
            temperature=settings["temperature"],
            top_k=int(settings["top_k"]),
            top_p=settings["top_p"],
        )
        kept = ("speed", "repetition_penalty")
        return {**draws, **{name: settings[name] for name in kept}}

    def _pace(self, voice: str, speed: float) -> WordPace:
        return self._paces[voice] if speed == 1.0 else WordPace(USUAL_MS / speed)
