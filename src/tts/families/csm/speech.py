"""A model of the worker over an engine that it may share: text in segments, 80 ms chunks out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack

import numpy as np

from src.rpc.errors import UnknownName
from src.tts.families.csm.engine import Engine, Slot
from src.tts.families.csm.engines import Lease
from src.tts.families.csm.options import SEED, whole_number
from src.tts.families.csm.ports import Voice
from src.tts.families.settings import known_language, known_voice
from src.tts.paced_words import PacedWords, WordPace
from src.tts.segmenter import speakable
from src.tts.tts_base import CancelToken, PcmChunk, Segment, VoiceSpec

SETTINGS = {"seed": SEED.help}
LANGUAGES = ("en",)
_NO_SOUND = np.empty(0, dtype=np.float32)


class SesameModel:
    """Every stream takes a slot of the engine from its first word to its end.

    `voices` must not be empty; the first is the default. `seed` is for sessions that set none.
    `on_unload` is called before the share in the engine is given back.
    """

    def __init__(
        self,
        lease: Lease[Engine],
        voices: Mapping[str, Voice],
        *,
        languages: Sequence[str] = (),
        seed: int = 0,
        on_unload: Callable[[], None] = lambda: None,
    ) -> None:
        self._lease = lease
        self._voices = dict(voices)
        self._paces = {name: WordPace() for name in voices}
        self._seed = seed
        self._on_unload = on_unload
        self.voices = tuple(voices)
        self.languages = tuple(languages) or LANGUAGES
        self.native_sample_rate = lease.engine.sample_rate
        self.max_streams = lease.engine.slots

    def check_voice(self, spec: VoiceSpec) -> VoiceSpec:
        voice = known_voice(spec.voice, self.voices)
        language = known_language(spec.language, self.languages)
        return VoiceSpec(voice, language, {"seed": str(self._seed_of(spec.settings))})

    def stream(
        self, segments: Iterable[Segment], spec: VoiceSpec, cancel: CancelToken
    ) -> Iterator[PcmChunk]:
        """A chunk for every frame. Raises as `check_voice` does, Exhausted where no slot becomes
        free, Internal where the model fails, Unavailable where the engine ends."""
        spec = self.check_voice(spec)
        with ExitStack() as held:
            slot: Slot | None = None
            for segment in segments:
                if cancel.cancelled:
                    return
                if not speakable(segment.text):
                    continue
                if slot is None:
                    # Not before there is a word to say: others could speak in it meanwhile.
                    taken = self._lease.engine.slot(
                        self._voices[spec.voice], seed=self._seed_of(spec.settings), cancel=cancel
                    )
                    slot = held.enter_context(taken)
                yield from self._say(slot, segment, self._paces[spec.voice], cancel)

    def unload(self) -> None:
        self._voices.clear()
        try:
            self._on_unload()
        finally:
            self._lease.release()

    def _say(
        self, slot: Slot, segment: Segment, pace: WordPace, cancel: CancelToken
    ) -> Iterator[PcmChunk]:
        words = PacedWords(segment.text, segment.char_start, pace, self.native_sample_rate)
        for frame in slot.say(" ".join(segment.text.split())):
            yield PcmChunk(frame, words.push(frame))
        if not cancel.cancelled and (left := words.end()):
            yield PcmChunk(_NO_SOUND, left)

    def _seed_of(self, settings: Mapping[str, str]) -> int:
        """Raises UnknownName for another key, InvalidArgument for a bad value."""
        for key in settings:
            if key not in SETTINGS:
                raise UnknownName.among("setting", key, SETTINGS)
        return whole_number("seed", SEED, settings.get("seed", str(self._seed)))
