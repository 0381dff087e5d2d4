"""A loaded Spark-TTS: text in segments, windows of sound out as the codes are drawn."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from src.audio.pcm import Float32
from src.rpc.errors import Internal, InvalidArgument
from src.tts.families.settings import (
    Choice,
    Range,
    helps,
    known_language,
    known_voice,
    read_settings,
)
from src.tts.families.spark.llm import Sampling, SpeechLlm
from src.tts.families.spark.prompts import (
    GENDERS,
    LEVELS,
    ClonedVoice,
    Style,
    cloning_prompt,
    most_tokens,
    pieces,
    style_prompt,
)
from src.tts.families.spark.windows import WindowPlan, Windows
from src.tts.families.torch_host import give_back_memory, speaking
from src.tts.paced_words import PacedWords, WordPace
from src.tts.tts_base import CancelToken, PcmChunk, Segment, VoiceSpec

CONTROLLABLE = "controllable"
"""The voice that the model makes up; the package's name for the mode."""
LANGUAGES = ("en", "zh")

_STYLE = {
    "gender": Choice(GENDERS, "female", f"of the voice {CONTROLLABLE!r}"),
    "pitch": Choice(LEVELS, "moderate", f"of the voice {CONTROLLABLE!r}"),
    "speed": Choice(LEVELS, "moderate", f"of the voice {CONTROLLABLE!r}"),
}
_SAMPLING = {
    "temperature": Range(0.0, 2.0, 0.8, "how freely is drawn; 0 takes the likeliest each time"),
    "top_k": Range(1, 200, 50, "so many of the likeliest are drawn from"),
    "top_p": Range(0.05, 1.0, 0.95, "of those, the likeliest that make up this part are kept"),
    "seed": Range(0, 2**31 - 1, 0, "the same seed says the same text in the same way"),
}
SESSION: Mapping[str, Any] = {**_STYLE, **_SAMPLING}
SETTINGS = helps(SESSION)
# Who speaks is drawn with these words, so that it does not depend on what is said first.
_FIRST_WORDS = "Good morning. How are you today?"
_KEPT_OPENINGS = 64
_NO_SOUND: Float32 = np.empty(0, dtype=np.float32)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Voicing:
    """From codes to sound: BiCodec's decoder half. Any number of threads may use it."""

    bicodec: Any
    device: Any
    sample_rate: int
    samples_per_code: int
    plan: WindowPlan

    def windows(self, global_codes: Sequence[int]) -> Windows:
        return Windows(partial(self.decode, global_codes), self.samples_per_code, self.plan)

    def decode(self, global_codes: Sequence[int], semantic_codes: Sequence[int]) -> Float32:
        """Mono float32 in [-1, 1], `samples_per_code` for each semantic code."""
        import torch

        with torch.inference_mode():
            said = torch.tensor([list(semantic_codes)], device=self.device)
            speaker = torch.tensor([[list(global_codes)]], device=self.device)
            sound: Float32 = self.bicodec.detokenize(said, speaker).flatten().cpu().numpy()
        return sound


@dataclass(frozen=True, slots=True)
class _Speaker:
    """Who speaks an utterance, and how its tokens are drawn."""

    prompt: Callable[[str], str]
    global_codes: tuple[int, ...]
    sampling: Sampling
    generator: Any


class SparkTtsModel:
    """`voices`: what is kept of each recording, None for one that the model makes up; the first is
    the default. `defaults` are the catalog entry's for a session's settings."""

    def __init__(
        self,
        model_id: str,
        llm: SpeechLlm,
        voicing: Voicing,
        voices: Mapping[str, ClonedVoice | None],
        *,
        max_streams: int,
        languages: Sequence[str] = (),
        defaults: Mapping[str, str] | None = None,
    ) -> None:
        self._model_id = model_id
        self._parts: tuple[SpeechLlm, Voicing] | None = (llm, voicing)
        self._device = str(voicing.device)
        self._voices = dict(voices)
        self._paces = {name: WordPace() for name in voices}
        self._openings = _Openings()
        self._defaults = dict(defaults or {})
        self.native_sample_rate = voicing.sample_rate
        self.max_streams = max_streams
        self.voices = tuple(voices)
        self.languages = tuple(languages) or LANGUAGES

    def check_voice(self, spec: VoiceSpec) -> VoiceSpec:
        """Raises besides: InvalidArgument for a style asked of a voice that has its own."""
        voice = known_voice(spec.voice, self.voices)
        language = known_language(spec.language, self.languages)
        read = read_settings(SESSION, self._defaults, spec.settings)
        values = {name: _written(value) for name, value in read.items()}
        if self._voices[voice] is not None:
            for name in sorted(set(spec.settings) & set(_STYLE)):
                raise InvalidArgument(
                    f"setting {name!r} is for a voice that the model makes up; "
                    f"{voice!r} speaks as its recording does"
                )
            values = {name: value for name, value in values.items() if name in _SAMPLING}
        return VoiceSpec(voice, language, values)

    def stream(
        self, segments: Iterable[Segment], spec: VoiceSpec, cancel: CancelToken
    ) -> Iterator[PcmChunk]:
        """A chunk for every window. Raises as `check_voice` does, and Internal."""
        spec = self.check_voice(spec)
        speaker: _Speaker | None = None
        for segment in segments:
            if cancel.cancelled:
                return
            if not pieces(segment.text):
                continue
            speaker = speaker or self._speaker(spec, cancel)
            if cancel.cancelled:
                return
            words = PacedWords(
                segment.text, segment.char_start, self._paces[spec.voice], self.native_sample_rate
            )
            for sound in self._say(segment.text, speaker, cancel):
                yield PcmChunk(sound, words.push(sound))
            if cancel.cancelled:
                return
            if left := words.end():
                yield PcmChunk(_NO_SOUND, left)

    def warm_up(self) -> None:
        """Say a little to nobody: what is only computed once is computed, and proves to work."""
        cancel = CancelToken()
        speaker = self._speaker(self.check_voice(VoiceSpec("", "")), cancel)
        sound = next(self._say(_FIRST_WORDS, speaker, cancel), _NO_SOUND)
        if not np.isfinite(sound).all():
            raise Internal(f"{self._model_id}: its first sound is no numbers")

    def unload(self) -> None:
        self._parts = None
        self._voices = dict.fromkeys(self._voices)
        give_back_memory(self._device)

    def _say(self, text: str, speaker: _Speaker, cancel: CancelToken) -> Iterator[Float32]:
        with speaking(self._model_id):
            for piece in pieces(text):
                llm, voicing = self._loaded()
                windows, said, most = voicing.windows(speaker.global_codes), 0, most_tokens(piece)
                prompt = speaker.prompt(piece)
                for code in llm.speech(prompt, most, speaker.sampling, speaker.generator, cancel):
                    said += 1
                    if (sound := windows.push(code)).size:
                        yield sound
                if cancel.cancelled:
                    return
                if said in (0, most):
                    _log.warning(
                        "%s: a segment of %d characters %s",
                        self._model_id,
                        len(piece),
                        "did not end, and was cut" if said else "made no sound",
                    )
                if (sound := windows.end()).size:
                    yield sound

    def _speaker(self, spec: VoiceSpec, cancel: CancelToken) -> _Speaker:
        llm, _ = self._loaded()
        values = spec.settings
        seed = int(values["seed"])
        sampling = Sampling(
            float(values["temperature"]), int(values["top_k"]), float(values["top_p"])
        )
        voice = self._voices[spec.voice]
        if voice is not None:
            prompt, global_codes = partial(cloning_prompt, voice), voice.global_codes
            return _Speaker(prompt, global_codes, sampling, llm.generator(seed))
        style = Style(values["gender"], values["pitch"], values["speed"])
        first = style_prompt(style, _FIRST_WORDS)

        def draw() -> str:
            return llm.opening(first, sampling, llm.generator(seed), cancel)

        with speaking(self._model_id):
            # The same settings are the same voice, in every sentence and for every session.
            opening = self._openings.get((style, sampling, seed), draw)
            return _Speaker(
                partial(style_prompt, style, opening=opening),
                llm.global_codes(opening),
                sampling,
                llm.generator(seed),
            )

    def _loaded(self) -> tuple[SpeechLlm, Voicing]:
        if self._parts is None:
            raise Internal(f"{self._model_id} is unloaded")
        return self._parts


def _written(value: Any) -> str:
    """As a session would write it; what is counted has no decimals."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


class _Openings:
    """The voices that were made up, the least recent forgotten; for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[object, str] = OrderedDict()

    def get(self, key: object, draw: Callable[[], str]) -> str:
        """Two threads may draw the same at once, with the same result."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        drawn = draw()
        with self._lock:
            if drawn:  # else it was cancelled
                self._kept[key] = drawn
            while len(self._kept) > _KEPT_OPENINGS:
                self._kept.popitem(last=False)
        return drawn
