"""The package's own loader on a pack that stays as it is, and the voices' latents."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.rpc.errors import CorruptModel, UnknownName
from src.tts.catalog import ModelMeta
from src.tts.families.settings import match_language
from src.tts.families.torch_host import check_device, load_plain, loading, well_behaved
from src.tts.families.xtts.pack import (
    PRESETS,
    needed_files,
    pick_voices,
    read_config,
    read_presets,
)
from src.tts.families.xtts.stream import CODE_MS
from src.tts.families.xtts.text import Reader
from src.tts.recordings import Reference, Transcripts, read_recording, read_references

_SHORTEST_MS = 1_000
"""The package takes a third of a second, of which no voice can be learnt."""
_RATE = 22_050
"""The rate that the GPT hears recordings at."""


@dataclass(slots=True)
class Loaded:
    """A model on its device, its voices' latents beside it, and what reads text for it."""

    model: Any
    voices: dict[str, tuple[Any, Any]]
    languages: tuple[str, ...]
    reader: Reader
    sample_rate: int
    device: str

    def clear(self) -> None:
        self.model = None
        self.voices.clear()


def open_model(
    meta: ModelMeta,
    files: Mapping[str, Path],
    device: str,
    progress: Callable[[float], None],
) -> Loaded:
    """Raises as `XttsAdapter.load` does."""
    config_file, checkpoint, vocabulary = needed_files(meta.model_id, files)
    place = check_device(meta.model_id, device)
    recordings = _recordings(meta, files)
    with well_behaved(), loading(meta.model_id, device):
        _quiet()
        config = read_config(meta.model_id, config_file)
        languages = _languages(meta, config.languages)
        presets = read_presets(
            meta.model_id, files.get(PRESETS), config.model_args.gpt_n_model_channels
        )
        # Before gigabytes are read: a voice that is missing, a recording that is none.
        pick_voices(meta.model_id, {**recordings, **presets}, meta.voices)
        sounds = {
            name: read_recording(reference.audio, _RATE, shortest_ms=_SHORTEST_MS)
            for name, reference in recordings.items()
            if name in (meta.voices or recordings)
        }
        progress(0.1)
        model = _load(meta.model_id, config, checkpoint, vocabulary, place)
        progress(0.8)
        cloned = {name: _latents(model, config, sound) for name, sound in sounds.items()}
        placed = {name: (gpt.to(place), spk.to(place)) for name, (gpt, spk) in presets.items()}
    reader = Reader(
        model.tokenizer,
        max_tokens=model.args.gpt_max_text_tokens,
        longest_ms=model.args.gpt_max_audio_tokens * CODE_MS,
    )
    return Loaded(
        model,
        pick_voices(meta.model_id, {**placed, **cloned}, _order(meta, cloned, placed)),
        languages,
        reader,
        int(model.args.output_sample_rate),
        device,
    )


def _recordings(meta: ModelMeta, files: Mapping[str, Path]) -> dict[str, Reference]:
    """All of the pack's; which of them are wanted, only the list of presets can tell."""
    found = read_references(meta.model_id, files, (), Transcripts.OPTIONAL)
    return {name: reference for name, reference in found.items() if reference is not None}


def _order(meta: ModelMeta, cloned: Mapping[str, Any], presets: Mapping[str, Any]) -> list[str]:
    return list(meta.voices) or [*cloned, *(name for name in presets if name not in cloned)]


def _languages(meta: ModelMeta, known: Sequence[str]) -> tuple[str, ...]:
    """The model's own tags for what the catalog entry lists, or all. Raises UnknownName."""
    picked = []
    for tag in meta.languages or known:
        match = match_language(tag, known)
        if match is None:
            raise UnknownName.among(f"language of {meta.model_id}", tag, known)
        picked.append(match)
    return tuple(dict.fromkeys(picked))


def _load(model_id: str, config: Any, checkpoint: Path, vocabulary: Path, device: Any) -> Any:
    """In float32, as the package computes. Raises what the package does."""
    from TTS.tts.models.xtts import Xtts

    class PlainXtts(Xtts):  # type: ignore[misc]
        """Reads plain checkpoints alone: the package would write an old one anew."""

        def _load_checkpoint(self, model_path: Path) -> dict[str, Any]:
            read = load_plain(model_id, model_path)
            if not isinstance(read, dict) or not isinstance(read.get("model"), dict):
                raise CorruptModel(f"{model_id}: {model_path.name} is no checkpoint of XTTS")
            weights: dict[str, Any] = read["model"]
            return weights

    model = PlainXtts(config)
    # No file of voices: the package would put them where they were saved, a GPU perhaps.
    model.load_checkpoint(
        config,
        checkpoint_path=str(checkpoint),
        vocab_path=str(vocabulary),
        speaker_file_path="",
        eval=True,
    )
    return model.to(device)


def _latents(model: Any, config: Any, sound: Any) -> tuple[Any, Any]:
    """Of the GPT and of the speaker, as the package's `get_conditioning_latents` takes them."""
    import torch

    audio = torch.from_numpy(sound)[None, : _RATE * config.max_ref_len]
    gpt = model.get_gpt_cond_latents(
        audio, _RATE, length=config.gpt_cond_len, chunk_length=config.gpt_cond_chunk_len
    )
    speaker = model.get_speaker_embedding(audio, _RATE)
    return gpt.clone(), speaker.clone()


def _quiet() -> None:
    # It warns of long texts by quoting them.
    logging.getLogger("TTS.tts.layers.xtts.tokenizer").setLevel(logging.ERROR)
