"""What is in a pack of XTTS: checkpoints without pickled objects, voices, configuration.

The package reads the first releases' checkpoints, which hold a pickled configuration, by writing
them anew where they lie. Here they are refused, and `plain_checkpoint` makes one to keep instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.rpc.errors import CorruptModel, UnknownName
from src.tts.families.torch_host import load_plain

CONFIG = "config.json"
CHECKPOINT = "model.pth"
VOCABULARY = "vocab.json"
PRESETS = "speakers_xtts.pth"
_NEEDED = (CONFIG, CHECKPOINT, VOCABULARY)


def plain_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{"model": its tensors by name}, for `torch.save`; nothing else of the checkpoint is kept.

    For the releases' checkpoints and those of the trainer. Raises CorruptModel where there is no
    model in it, or a weight is no tensor.
    """
    import torch

    weights = checkpoint.get("model")
    if not isinstance(weights, Mapping) or not weights:
        raise CorruptModel("an XTTS checkpoint has its weights under 'model'; this one has none")
    other = next((n for n, value in weights.items() if not isinstance(value, torch.Tensor)), None)
    if other is not None:
        raise CorruptModel(f"{other!r} in this checkpoint is no tensor, so it is no XTTS model")
    # A parameter is pickled as an object of its class, and a view with all that it is a part of.
    return {"model": {str(n): value.detach().cpu().clone() for n, value in weights.items()}}


def needed_files(model_id: str, files: Mapping[str, Path]) -> tuple[Path, Path, Path]:
    """Configuration, checkpoint, vocabulary. Raises CorruptModel with the one that is missing."""
    for name in _NEEDED:
        if name not in files:
            raise CorruptModel(
                f"{model_id}: {name} is missing; an XTTS pack has {', '.join(_NEEDED)} "
                "(voicepacks/xtts/v2-en/README.md says where they come from)"
            )
    return files[CONFIG], files[CHECKPOINT], files[VOCABULARY]


def read_config(model_id: str, path: Path) -> Any:
    """The package's `XttsConfig`. Raises CorruptModel."""
    from TTS.tts.configs.xtts_config import XttsConfig

    config = XttsConfig()
    try:
        config.load_json(str(path))
        config.check_values()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise CorruptModel(f"{model_id}: {path.name} cannot be read: {error}") from error
    if config.model != "xtts" or not config.model_args.gpt_use_perceiver_resampler:
        raise CorruptModel(f"{model_id}: {path.name} is not the configuration of an XTTS-v2")
    return config


def read_presets(model_id: str, path: Path | None, width: int) -> dict[str, tuple[Any, Any]]:
    """Voices by name: latents of the GPT (1, n, width) and of the speaker (1, 512, 1), float32.

    Raises CorruptModel for a file that is none, or that was made for another model.
    """
    if path is None:
        return {}
    voices = load_plain(model_id, path)
    wrong = f"{model_id}: {path.name} is no list of XTTS voices"
    if not isinstance(voices, Mapping):
        raise CorruptModel(wrong)
    read = {}
    for name, voice in voices.items():
        if not isinstance(voice, Mapping):
            raise CorruptModel(wrong)
        gpt: Any = voice.get("gpt_cond_latent")
        speaker: Any = voice.get("speaker_embedding")
        shapes = [list(each.shape) if hasattr(each, "shape") else [] for each in (gpt, speaker)]
        if shapes[0][::2] != [1, width] or shapes[1] != [1, 512, 1]:
            raise CorruptModel(
                f"{model_id}: voice {name!r} in {path.name} has latents of {shapes}, and this "
                f"model reads [1, n, {width}] and [1, 512, 1]"
            )
        read[str(name)] = (gpt.float(), speaker.float())
    return read


def pick_voices(model_id: str, known: Mapping[str, Any], listed: list[str]) -> dict[str, Any]:
    """All, or those that the catalog entry lists, in its order.

    Raises UnknownName for one that is not there, CorruptModel for a pack without any.
    """
    if not known:
        raise CorruptModel(
            f"{model_id}: there is no voice to speak with; put a recording of 6 to 15 s into the "
            f"pack as ref/seed.wav, or the model's own {PRESETS}"
        )
    for name in listed:
        if name not in known:
            raise UnknownName.among(f"voice for {model_id}", name, known)
    return {name: known[name] for name in listed or known}
