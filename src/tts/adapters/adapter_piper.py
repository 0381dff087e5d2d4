"""Piper: a small neural voice that is fast on a CPU.

`piper-tts` (GPL-3, loaded only here) turns text into phonemes; the network is run directly, so that
a running step can be ended, its threads are bounded and its phoneme durations can be read.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from src.audio.pcm import Float32
from src.rpc.errors import CorruptModel, Internal, InvalidArgument, Unavailable, UnknownName
from src.tts.catalog import ModelMeta
from src.tts.families.joins import Joiner
from src.tts.families.piper.graph import with_durations
from src.tts.families.piper.words import word_marks
from src.tts.families.settings import (
    Range,
    helps,
    known_language,
    known_voice,
    read_settings,
    require_modules,
)
from src.tts.segmenter import soften_stops
from src.tts.tts_base import (
    AdapterCapabilities,
    CancelToken,
    PcmChunk,
    Segment,
    VoiceSpec,
    WordMark,
)
from src.tts.words import estimate_words

INSTALL = "pip install 'piper-tts>=1.3' 'onnxruntime>=1.17'"

_VOICE = {
    "speed": Range(0.5, 2.0, 1.0, "rate of speech against the voice's own"),
    "volume": Range(0.0, 2.0, 1.0, "factor on the voice's own level"),
    "noise": Range(0.0, 1.5, 0.667, "variation of the sound; 0 repeats itself exactly"),
    "noise_w": Range(0.0, 1.5, 0.8, "variation of the rhythm; 0 repeats itself exactly"),
}
_ENGINE = {
    "threads": Range(1, 64, 2, "threads of one run of the network"),
}
# At a real-time factor near 0.1 per core, more would starve each other.
_STREAMS_PER_CORE = 6
# More phonemes than this (a segment that is one long number) are spoken in several runs.
_MAX_PHONEMES = 320

# The phonemiser keeps its voice in globals of its library, whoever's model calls it.
_PHONEMISER = threading.Lock()


class PiperAdapter:
    family = "piper"
    capabilities = AdapterCapabilities(cpu_ok=True, word_times=True, settings=helps(_VOICE))

    def check_installed(self) -> None:
        require_modules(self.family, ("piper", "onnxruntime"), INSTALL)

    def load(
        self,
        meta: ModelMeta,
        files: Mapping[str, Path],
        device: str,
        progress: Callable[[float], None],
    ) -> PiperModel:
        """A catalog entry's `settings` may hold the session's keys (as defaults) and
        `threads` (see `_ENGINE`).
        """
        self.check_installed()
        defaults = {k: v for k, v in meta.settings.items() if k not in _ENGINE}
        engine = read_settings(_ENGINE, {k: v for k, v in meta.settings.items() if k in _ENGINE})
        read_settings(_VOICE, defaults)
        model_path, config_path = _voice_files(meta, files)
        config = _read_config(config_path)
        voice = _load_voice(model_path, config_path, config, device, int(engine["threads"]))
        progress(1.0)
        return PiperModel(meta, config, voice, defaults)


class PiperModel:
    """One voice. Streams share one session, which may run for several of them at once."""

    def __init__(
        self,
        meta: ModelMeta,
        config: Mapping[str, Any],
        voice: Any,
        defaults: Mapping[str, str],
    ) -> None:
        self._voice = voice
        self._defaults = {
            "noise": str(voice.config.noise_scale),
            "noise_w": str(voice.config.noise_w_scale),
            **defaults,
        }
        self._session = voice.session
        self._has_durations = len(self._session.get_outputs()) > 1
        self._speakers = _speakers(voice.config, meta, config)
        self.native_sample_rate = int(voice.config.sample_rate)
        self.max_streams = _STREAMS_PER_CORE * _cores()
        self.voices = tuple(self._speakers)
        self.languages = tuple(meta.languages) or (_language(config),)

    def check_voice(self, spec: VoiceSpec) -> VoiceSpec:
        voice = known_voice(spec.voice, self.voices)
        language = known_language(spec.language, self.languages)
        read_settings(_VOICE, self._defaults, spec.settings)
        return VoiceSpec(voice, language, {**self._defaults, **spec.settings})

    def stream(
        self, segments: Iterable[Segment], spec: VoiceSpec, cancel: CancelToken
    ) -> Iterator[PcmChunk]:
        """One chunk for a segment. Raises as `check_voice` does, and Internal."""
        spec = self.check_voice(spec)
        settings = read_settings(_VOICE, spec.settings)
        inputs = self._inputs(spec.voice, settings)
        joiner = Joiner(self.native_sample_rate)
        for segment in segments:
            if cancel.cancelled:
                return
            phonemes = self._phonemise(soften_stops(segment.text))
            spoken = self._speak(phonemes, inputs, cancel)
            if spoken is None:
                return
            samples, durations = spoken
            words = self._words(segment, phonemes, samples, durations)
            loud = np.clip(samples * np.float32(settings["volume"]), -1.0, 1.0)
            chunk = joiner.join(segment.text, loud, words)
            if chunk.samples.size:
                yield chunk

    def unload(self) -> None:
        self._voice = self._session = None

    def _inputs(self, voice: str, settings: Mapping[str, float]) -> dict[str, Any]:
        config = self._voice.config
        length = config.length_scale / settings["speed"]
        scales = np.array([settings["noise"], length, settings["noise_w"]], dtype=np.float32)
        inputs: dict[str, Any] = {"scales": scales}
        if config.num_speakers > 1:
            inputs["sid"] = np.array([self._speakers[voice]], dtype=np.int64)
        return inputs

    def _phonemise(self, text: str) -> list[str]:
        """Phonemes of the voice's alphabet, words parted by spaces."""
        with _PHONEMISER:
            sentences = self._voice.phonemize(text.replace("…", ","))
        # What the phonemiser takes for sentences is mostly "U.S. Army": we cut sentences before.
        joined = itertools.chain.from_iterable((*sentence, " ") for sentence in sentences)
        known = self._voice.config.phoneme_id_map
        return [phoneme for phoneme in joined if phoneme in known][:-1]

    def _speak(
        self,
        phonemes: Sequence[str],
        inputs: Mapping[str, Any],
        cancel: CancelToken,
    ) -> tuple[Float32, list[int]] | None:
        """Audio and samples per phoneme (none if the voice does not say); None: cancelled."""
        audio: list[Float32] = [np.empty(0, dtype=np.float32)]
        durations: list[int] = []
        for piece in _pieces(phonemes):
            spoken = None if cancel.cancelled else self._run(piece, inputs, cancel)
            if spoken is None:
                return None
            audio.append(spoken[0])
            durations += spoken[1]
        return np.concatenate(audio), durations

    def _run(
        self, phonemes: Sequence[str], inputs: Mapping[str, Any], cancel: CancelToken
    ) -> tuple[Float32, list[int]] | None:
        import onnxruntime

        ids = self._voice.phonemes_to_ids(list(phonemes))
        feed = {
            "input": np.array([ids], dtype=np.int64),
            "input_lengths": np.array([len(ids)], dtype=np.int64),
            **inputs,
        }
        options = onnxruntime.RunOptions()

        def terminate() -> None:
            options.terminate = True

        with cancel.calling(terminate):
            try:
                outputs = self._session.run(None, feed, options)
            except _engine_errors() as error:
                if cancel.cancelled:
                    return None
                raise Internal(f"piper could not speak a segment: {error}") from error
        samples: Float32 = outputs[0].reshape(-1).astype(np.float32, copy=False)
        return samples, self._durations(phonemes, len(ids), outputs)

    def _durations(self, phonemes: Sequence[str], ids: int, outputs: Sequence[Any]) -> list[int]:
        if not self._has_durations or outputs[-1].size != ids:
            return []
        per_id = (outputs[-1].reshape(-1) * self._voice.config.hop_length).astype(int).tolist()
        return _per_phoneme(phonemes, per_id, self._voice.config.phoneme_id_map)

    def _words(
        self,
        segment: Segment,
        phonemes: Sequence[str],
        samples: Float32,
        durations: Sequence[int],
    ) -> tuple[WordMark, ...]:
        rate = self.native_sample_rate
        if len(durations) != len(phonemes):
            return estimate_words(segment.text, segment.char_start, samples, rate)
        return word_marks(segment, phonemes, durations, rate, self._phonemise)


def _pieces(phonemes: Sequence[str]) -> Iterator[Sequence[str]]:
    """Runs of bounded length, cut after a space where there is one."""
    start = 0
    while start < len(phonemes):
        end = min(start + _MAX_PHONEMES, len(phonemes))
        if end < len(phonemes):
            spaces = [i for i in range(start + 1, end) if phonemes[i] == " "]
            end = spaces[-1] + 1 if spaces else end
        yield phonemes[start:end]
        start = end


def _per_phoneme(
    phonemes: Sequence[str], per_id: Sequence[int], id_map: Mapping[str, Sequence[int]]
) -> list[int]:
    """Samples per phoneme; the marks of begin and end count with the first and the last.

    The order is that of `piper.phoneme_ids`: begin, pad, then each phoneme and a pad, then end.
    """
    pad = len(id_map["_"])
    sizes = [len(id_map[phoneme]) + pad for phoneme in phonemes]
    begin, end = len(id_map["^"]) + pad, len(id_map["$"])
    if not sizes or begin + sum(sizes) + end != len(per_id):
        return []
    sizes[0] += begin
    sizes[-1] += end
    edges = np.cumsum([0, *sizes])
    totals = np.concatenate(([0], np.cumsum(per_id)))
    out: list[int] = np.diff(totals[edges]).tolist()
    return out


def _voice_files(meta: ModelMeta, files: Mapping[str, Path]) -> tuple[Path, Path]:
    """The network and its configuration, by our names or by those they are published under."""
    networks = [name for name in files if name.endswith(".onnx")]
    if len(networks) != 1:
        raise CorruptModel(f"{meta.model_id}: a piper voice has one .onnx file, not {networks}")
    for name in ("config.json", networks[0] + ".json"):
        if name in files:
            return files[networks[0]], files[name]
    raise CorruptModel(f"{meta.model_id}: a piper voice needs the file 'config.json'")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptModel(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise CorruptModel(f"{path}: not a piper voice configuration")
    return config


def _load_voice(
    model_path: Path, config_path: Path, config: dict[str, Any], device: str, threads: int
) -> Any:
    from piper import PiperVoice
    from piper.config import PiperConfig

    # It warns of phonemes it does not know, which are pieces of what is said.
    logging.getLogger("piper").setLevel(logging.ERROR)
    try:
        parsed = PiperConfig.from_dict(config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptModel(f"{config_path}: not a piper voice configuration: {error!r}") from error
    return PiperVoice(session=_open_session(model_path, device, threads), config=parsed)


def _open_session(path: Path, device: str, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Spinning threads would take the cores that the recogniser needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers = _providers(device, onnxruntime.get_available_providers())
    try:
        graph = with_durations(path.read_bytes())
        return onnxruntime.InferenceSession(graph, options, providers=providers)
    except (OSError, ValueError, RuntimeError) as error:
        raise CorruptModel(f"{path}: cannot be read as an ONNX voice: {error}") from error
    except _engine_errors() as error:
        raise CorruptModel(f"{path}: cannot be read as an ONNX voice: {error}") from error


def _providers(device: str, available: Sequence[str]) -> list[Any]:
    kind, _, index = device.partition(":")
    if kind in ("", "cpu"):
        return ["CPUExecutionProvider"]
    if kind != "cuda" or not (index or "0").isdigit():
        raise InvalidArgument(f"piper runs on 'cpu' or 'cuda:<index>', not on {device!r}")
    if "CUDAExecutionProvider" not in available:
        raise Unavailable(
            f"device {device!r} needs onnxruntime-gpu; install it or set device to 'cpu'"
        )
    return [("CUDAExecutionProvider", {"device_id": int(index or 0)}), "CPUExecutionProvider"]


def _engine_errors() -> tuple[type[Exception], ...]:
    """onnxruntime's exceptions; they have no base of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    members = vars(state).values()
    return tuple(m for m in members if isinstance(m, type) and issubclass(m, Exception))


def _speakers(parsed: Any, meta: ModelMeta, config: Mapping[str, Any]) -> dict[str, int]:
    """Voice names and speaker ids, the default first."""
    if parsed.num_speakers <= 1:
        return {meta.voices[0] if meta.voices else str(config.get("dataset") or "default"): 0}
    ids = dict(parsed.speaker_id_map) or {str(i): i for i in range(parsed.num_speakers)}
    if meta.voices:
        unknown = next((name for name in meta.voices if name not in ids), None)
        if unknown is not None:
            raise UnknownName.among(f"speaker of {meta.model_id}", unknown, ids)
        return {name: int(ids[name]) for name in meta.voices}
    return dict(sorted(ids.items(), key=lambda item: item[1] != parsed.default_speaker_id))


def _language(config: Mapping[str, Any]) -> str:
    language = config.get("language")
    code = language.get("code") if isinstance(language, dict) else None
    return str(code or config["espeak"]["voice"]).replace("_", "-")


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
