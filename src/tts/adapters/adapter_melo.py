"""MeloTTS: a light voice with several English accents, a sentence at a time. 44.1 kHz.

The package is a repository, not a distribution; MELO_HOME names a checkout. Of it the network and
the English text rules are used (families/melo/network.py, families/melo/english.py), never
`melo.api`, whose import asks the hub for seven languages' tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from src.audio.pcm import Float32
from src.rpc.errors import CorruptModel, InvalidArgument, UnknownName
from src.tts.catalog import ModelMeta
from src.tts.families.espeak.engine import EngineUnavailable
from src.tts.families.joins import Joiner
from src.tts.families.melo.bounds import Stopped
from src.tts.families.melo.english import Dictionary, English, WordPiece, package_rules, spell
from src.tts.families.melo.guess import EspeakGuess
from src.tts.families.melo.network import Network, Pack, Sound, open_network
from src.tts.families.melo.sources import FAMILY, INSTALL, SOURCE, package_folder
from src.tts.families.settings import (
    SEED,
    Range,
    helps,
    known_language,
    known_voice,
    read_settings,
)
from src.tts.families.torch_host import (
    check_device,
    give_back_memory,
    own_generator,
    quiet_transformers,
    speaking,
    well_behaved,
)
from src.tts.tts_base import (
    AdapterCapabilities,
    CancelToken,
    MissingPackage,
    PcmChunk,
    Segment,
    VoiceSpec,
)
from src.tts.words import estimate_words

BERT = "bert-base-uncased"
_BERT_FILES = ("config.json", "model.safetensors", "vocab.txt")
_MARKS = ("_", "UNK")

_SETTINGS = {
    "speed": Range(0.5, 2.0, 1.0, "rate of speech against the voice's own"),
    "noise": Range(0.0, 1.0, 0.6, "variation of the sound"),
    "noise_w": Range(0.0, 1.5, 0.8, "variation of the rhythm; noise 0 too: the same every time"),
    "sdp_ratio": Range(0.0, 1.0, 0.2, "how much of the rhythm is drawn, the rest being steady"),
    "seed": SEED,
}

# What the other languages' text front ends want, besides a voice pack each.
_OTHERS = {
    "zh": ("bert-base-multilingual-uncased", "jieba, pypinyin and cn2an"),
    "jp": ("tohoku-nlp/bert-base-japanese-v3", "MeCab with unidic, and pykakasi"),
    "kr": ("kykim/bert-kor-base", "g2pkk with MeCab, and jamo"),
    "es": ("dccuchile/bert-base-spanish-wwm-uncased", "gruut with its Spanish part"),
    "fr": ("dbmdz/bert-base-french-europeana-cased", "gruut with its French part"),
}
_CALLED = {"ja": "jp", "ko": "kr", "sp": "es"}


class MeloAdapter:
    family = FAMILY
    capabilities = AdapterCapabilities(cpu_ok=True, settings=helps(_SETTINGS))

    def check_installed(self) -> None:
        package_folder()

    def load(
        self,
        meta: ModelMeta,
        files: Mapping[str, Path],
        device: str,
        progress: Callable[[float], None],
    ) -> MeloModel:
        """The files: config.json and checkpoint.pth as released, and bert-base-uncased/ beside
        them. An entry's `settings` may hold the session's keys, as defaults.

        Raises besides: InvalidArgument for a language but English and for a device that does not
        exist, Unavailable where memory is short.
        """
        sources = package_folder()
        read_settings(_SETTINGS, meta.settings)
        for language in meta.languages:
            _only_english(meta.model_id, language)
        config = _read_config(meta.model_id, files)
        bert = _bert_folder(meta.model_id, files)
        speakers = _speakers(meta, config)
        where = check_device(meta.model_id, device or "cpu")
        with well_behaved(), quiet_transformers():
            SOURCE.offer()
            tokenizer = _tokenizer(meta.model_id, bert)
            english, guess = _english(sources, tokenizer, config["symbols"])
            progress(0.3)
            pack = Pack(meta.model_id, config, files["checkpoint.pth"], bert, tokenizer.size)
            try:
                network = open_network(pack, where, progress)
            except BaseException:
                _close(guess)
                raise
        progress(1.0)
        return MeloModel(meta, english, guess, network, speakers, str(where))


class MeloModel:
    """One voice pack. Streams share the weights and nothing else, so it has no limit of its own."""

    max_streams = 0

    def __init__(
        self,
        meta: ModelMeta,
        english: English,
        guess: EspeakGuess | None,
        network: Network,
        speakers: Mapping[str, int],
        device: str,
    ) -> None:
        self._model_id = meta.model_id
        self._english = english
        self._guess = guess
        self._network = network
        self._speakers = speakers
        self._device = device
        self._defaults = dict(meta.settings)
        self.native_sample_rate = network.sample_rate
        self.voices = tuple(speakers)
        self.languages = tuple(meta.languages) or ("en",)

    def check_voice(self, spec: VoiceSpec) -> VoiceSpec:
        voice = known_voice(spec.voice, self.voices)
        language = known_language(spec.language, self.languages)
        read_settings(_SETTINGS, self._defaults, spec.settings)
        return VoiceSpec(voice, language, {**self._defaults, **spec.settings})

    def stream(
        self, segments: Iterable[Segment], spec: VoiceSpec, cancel: CancelToken
    ) -> Iterator[PcmChunk]:
        """One chunk for a segment. Raises as `check_voice` and `speaking` do."""
        spec = self.check_voice(spec)
        values = read_settings(_SETTINGS, spec.settings)
        chance = own_generator(int(values.pop("seed")))
        sound = Sound(self._speakers[spec.voice], **values)
        joiner = Joiner(self.native_sample_rate)
        for segment in segments:
            try:
                samples = self._speak(segment.text, sound, chance, cancel)
            except Stopped:
                return
            words = estimate_words(
                segment.text, segment.char_start, samples, self.native_sample_rate
            )
            chunk = joiner.join(segment.text, samples, words)
            if chunk.samples.size:
                yield chunk

    def unload(self) -> None:
        del self._network, self._english
        _close(self._guess)
        give_back_memory(self._device)

    def _speak(self, text: str, sound: Sound, chance: Any, cancel: CancelToken) -> Float32:
        """Raises Stopped when cancelled, at the latest at the network's next layer."""
        said: list[Float32] = [np.empty(0, dtype=np.float32)]
        with speaking(self._model_id):
            for run in self._english.read(text):
                said.append(self._network.say(run, sound, chance, cancel))
        if cancel.cancelled:
            raise Stopped
        return np.concatenate(said)


def _only_english(model_id: str, language: str) -> None:
    """Raises InvalidArgument for another language, with what it would need."""
    base = language.replace("_", "-").partition("-")[0].lower()
    if base == "en":
        return
    needs = _OTHERS.get(_CALLED.get(base, base))
    wants = f": {language!r} would need {needs[0]} and {needs[1]}" if needs else ""
    raise InvalidArgument(
        f"{model_id}: this build speaks English with MeloTTS, and no other language{wants}"
    )


def _read_config(model_id: str, files: Mapping[str, Path]) -> dict[str, Any]:
    """config.json, with the parts that the adapter itself reads being there."""
    for name in ("config.json", "checkpoint.pth"):
        if name not in files:
            raise CorruptModel(_lacks(model_id, name))
    try:
        config = json.loads(files["config.json"].read_text(encoding="utf-8"))
        data, symbols = config["data"], config["symbols"]
        ints = [data[name] for name in ("sampling_rate", "hop_length", "n_speakers")]
        ok = all(isinstance(number, int) and number > 0 for number in ints)
        ok = ok and isinstance(config["model"], dict) and set(_MARKS) <= set(symbols)
        ok = ok and all(isinstance(number, int) for number in data["spk2id"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptModel(f"{model_id}: config.json cannot be read: {error!r}") from error
    if not ok:
        raise CorruptModel(f"{model_id}: config.json describes no MeloTTS")
    return dict(config)


def _lacks(model_id: str, name: str) -> str:
    return (
        f"{model_id}: a melo voice pack needs the file {name!r}; "
        "voicepacks/melo/en/README.md says where to get it and where to put it"
    )


def _bert_folder(model_id: str, files: Mapping[str, Path]) -> Path:
    for name in _BERT_FILES:
        if f"{BERT}/{name}" not in files:
            raise CorruptModel(_lacks(model_id, f"{BERT}/{name}"))
    paths = {files[f"{BERT}/{name}"].parent for name in _BERT_FILES}
    wrong = next((n for n in _BERT_FILES if files[f"{BERT}/{n}"].name != n), None)
    if len(paths) > 1 or wrong:
        raise CorruptModel(f"{model_id}: the files of {BERT} must lie in one folder by these names")
    return paths.pop()


def _speakers(meta: ModelMeta, config: Mapping[str, Any]) -> dict[str, int]:
    """Voices and their numbers, those of the entry if it lists some."""
    data = config["data"]
    ids: dict[str, int] = dict(data["spk2id"])
    if not ids or any(not 0 <= number < data["n_speakers"] for number in ids.values()):
        raise CorruptModel(f"{meta.model_id}: config.json names no voices, or too high numbers")
    for name in ids:
        base = name.replace("_", "-").partition("-")[0].lower()
        if _CALLED.get(base, base) in _OTHERS:
            _only_english(meta.model_id, base)
    for name in meta.voices:
        if name not in ids:
            raise UnknownName.among(f"voice of {meta.model_id}", name, ids)
    return {name: ids[name] for name in meta.voices or ids}


def _tokenizer(model_id: str, bert: Path) -> WordPiece:
    try:
        return WordPiece(bert / "vocab.txt")
    except (OSError, ValueError) as error:
        raise CorruptModel(f"{model_id}: {BERT}/vocab.txt cannot be used: {error}") from error


def _english(
    sources: Path, tokenizer: WordPiece, symbols: Iterable[str]
) -> tuple[English, EspeakGuess | None]:
    try:
        dictionary = Dictionary.read(sources / "text" / "cmudict.rep")
    except (OSError, ValueError) as error:
        raise MissingPackage(FAMILY, INSTALL) from error
    try:
        guess = EspeakGuess()
    except EngineUnavailable:
        guess = None
    return English(dictionary, tokenizer, package_rules(), guess or spell, symbols), guess


def _close(guess: EspeakGuess | None) -> None:
    if guess is not None:
        guess.close()
