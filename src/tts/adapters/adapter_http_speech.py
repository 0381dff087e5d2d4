"""A model that lives behind a streaming HTTP speech server (`backend: http`), of any family.

The server takes `POST /v1/audio/speech` as OpenAI's does and answers with raw PCM or WAV.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path

import numpy as np

from src.audio.resample import StreamResampler
from src.rpc.errors import Unavailable, UnknownName
from src.tts.catalog import ModelMeta
from src.tts.families.http_speech.server import SpeechServer
from src.tts.families.http_speech.settings import SPEED, HttpSettings, read_http_settings
from src.tts.families.settings import helps, known_language, known_voice
from src.tts.paced_words import USUAL_MS, PacedWords, WordPace
from src.tts.tts_base import AdapterCapabilities, CancelToken, PcmChunk, Segment, VoiceSpec

_SETTINGS = {"speed": SPEED}
_GREETING = "Hello."
_NO_SOUND = np.empty(0, dtype=np.float32)

log = logging.getLogger(__name__)


class HttpSpeechAdapter:
    """`family` is the catalog entry's: what is behind the server is its business."""

    capabilities = AdapterCapabilities(own_engine=True, settings=helps(_SETTINGS))

    def __init__(self, family: str = "http") -> None:
        self.family = family

    def check_installed(self) -> None:
        """Its packages are among those that everything needs."""

    def load(
        self,
        meta: ModelMeta,
        files: Mapping[str, Path],
        device: str,
        progress: Callable[[float], None],
    ) -> HttpSpeechModel:
        """Has the server say a word, so that the model's sample rate is the server's own.

        Needs no files and no device. Raises InvalidArgument and UnknownName for settings, and what
        `SpeechServer.say` raises, with the server's own message.
        """
        # It would tell of every request.
        logging.getLogger("httpx").setLevel(logging.WARNING)
        settings = read_http_settings(meta)
        server = SpeechServer(settings)
        try:
            rate = _greeted(server, settings)
        except BaseException:
            server.close()
            raise
        progress(1.0)
        return HttpSpeechModel(meta, settings, server, rate)


class HttpSpeechModel:
    """One server. Streams share nothing but idle connections."""

    def __init__(
        self, meta: ModelMeta, settings: HttpSettings, server: SpeechServer, rate: int
    ) -> None:
        self._server = server
        self._theirs = settings.voices
        self._speed = settings.speed
        self._paces = {voice: WordPace() for voice in settings.voices}
        self.native_sample_rate = rate
        self.max_streams = settings.max_streams
        self.voices = tuple(settings.voices)
        self.languages = tuple(meta.languages)

    def check_voice(self, spec: VoiceSpec) -> VoiceSpec:
        """An entry without languages takes any: the API has no field for it."""
        voice = known_voice(spec.voice, self.voices)
        language = spec.language
        if self.languages:
            language = known_language(spec.language, self.languages)
        for name, value in spec.settings.items():
            if name not in _SETTINGS:
                raise UnknownName.among("setting", name, _SETTINGS)
            _SETTINGS[name].read(name, value)
        return VoiceSpec(voice, language, dict(spec.settings))

    def stream(
        self, segments: Iterable[Segment], spec: VoiceSpec, cancel: CancelToken
    ) -> Iterator[PcmChunk]:
        """A request for each segment; a chunk for each piece of its answer.

        Raises as `check_voice` and `SpeechServer.say` do.
        """
        spec = self.check_voice(spec)
        speed = spec.settings.get("speed", self._speed)
        pace = self._paces[spec.voice]
        if speed != self._speed:
            pace = WordPace(USUAL_MS / float(speed))
        for segment in segments:
            if cancel.cancelled:
                return
            yield from self._speak(segment, self._theirs[spec.voice], speed, pace, cancel)

    def unload(self) -> None:
        self._server.close()

    def _speak(
        self, segment: Segment, voice: str, speed: str, pace: WordPace, cancel: CancelToken
    ) -> Iterator[PcmChunk]:
        words = PacedWords(segment.text, segment.char_start, pace, self.native_sample_rate)
        resampler: StreamResampler | None = None
        text = " ".join(segment.text.split())
        with closing(self._server.say(text, voice, speed, cancel)) as sounds:
            for sound in sounds:
                # Another rate than at the load: the server has been given another model.
                resampler = resampler or StreamResampler(sound.rate, self.native_sample_rate)
                samples = resampler.push(sound.samples)
                yield PcmChunk(samples, words.push(samples))
        if cancel.cancelled:
            return
        if resampler is None:
            log.warning("the speech server answered a text with no sound")
            return
        samples = resampler.push(_NO_SOUND, last=True)
        yield PcmChunk(samples, words.push(samples))
        if left := words.end():
            yield PcmChunk(_NO_SOUND, left)


def _greeted(server: SpeechServer, settings: HttpSettings) -> int:
    """The rate at which the server speaks."""
    voice = next(iter(settings.voices.values()))
    with closing(server.say(_GREETING, voice, settings.speed, CancelToken(), ours=True)) as sounds:
        for sound in sounds:
            return sound.rate
    raise Unavailable(f"the speech server {settings.where} answers without any sound")
