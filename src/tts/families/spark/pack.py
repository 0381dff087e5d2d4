"""A Spark-TTS voice pack, read by the package's own code and checked; torch only inside functions.

What the package does quietly is refused here in words: a tensor that is missing from BiCodec (it
prints its name and speaks noise), another rate, a vocabulary that does not cover the codebooks, a
file elsewhere that a configuration points to.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from src.rpc.errors import CorruptModel
from src.tts.families.checkout import Source
from src.tts.families.settings import require_modules
from src.tts.families.spark.llm import SpeechLlm
from src.tts.families.spark.prompts import TOKENS_PER_SECOND, read_vocabulary
from src.tts.families.torch_host import loading, one_folder, pickled
from src.tts.tts_base import MissingPackage

FAMILY = "spark_tts"
COMMIT = "2f1ea90"
INSTALL = (
    "uv sync --extra spark && git clone https://github.com/SparkAudio/Spark-TTS && "
    f"git -C Spark-TTS checkout {COMMIT} && export SPARK_HOME=$PWD/Spark-TTS  "
    "(PyTorch and transformers; Python 3.11 or newer)"
)
DOWNLOAD = "hf download SparkAudio/Spark-TTS-0.5B --local-dir {folder}"
MODULES = ("torch", "torchaudio", "transformers", "omegaconf", "einops", "einx", "safetensors")

SOURCE = Source("SPARK_HOME", "sparktts", mark="models/bicodec.py")
_MARK = f"{SOURCE.package}/{SOURCE.mark}"

WAV2VEC2 = "wav2vec2-large-xlsr-53"
_FILES = (
    *("config.yaml", "BiCodec/config.yaml", "BiCodec/model.safetensors"),
    *("LLM/config.json", "LLM/model.safetensors", "LLM/tokenizer.json"),
)
# Computed from the configuration while the model is made; the released weights lack them.
_DERIVED = {"mel_transformer.spectrogram.window", "mel_transformer.mel_scale.fb"}


def check_installed() -> None:
    """Raises MissingPackage, with what to install and clone."""
    require_modules(FAMILY, MODULES, INSTALL)
    if SOURCE.find() is None:
        home = os.environ.get(SOURCE.variable)
        # Who has cloned it already needs another path, not another clone.
        wrong = f"; there is no {_MARK} in {home}, which {SOURCE.variable} names" if home else ""
        raise MissingPackage(FAMILY, INSTALL + wrong)


def pack_folder(model_id: str, files: Mapping[str, Path]) -> Path:
    """The folder that the pack's files lie in. Raises CorruptModel, with what to put where."""
    if "config.yaml" not in files:
        folder = Path("voicepacks", FAMILY, model_id.removeprefix("spark-tts-"))
        raise CorruptModel(
            f"{model_id}: there are no weights. Download 4 GB of them into {folder}, where its "
            f"metadata.yaml is: `{DOWNLOAD.format(folder=folder)}` (non-commercial: CC BY-NC-SA); "
            "docs/families/spark_tts.md says more"
        )
    if "LLM/pytorch_model.bin" in files and "LLM/model.safetensors" not in files:
        raise pickled(model_id, files["LLM/pytorch_model.bin"])
    require_files(model_id, files, _FILES)
    return one_folder(model_id, "a Spark-TTS model", files["config.yaml"].parent, files)


def require_files(model_id: str, files: Mapping[str, Path], names: Iterable[str]) -> None:
    absent = [name for name in names if name not in files or not files[name].is_file()]
    if absent:
        raise CorruptModel(f"{model_id}: the pack lacks {', '.join(absent)}")


def read_yaml(model_id: str, folder: Path, name: str) -> dict[str, Any]:
    """Raises CorruptModel, also for a `base_config`, with which the package reads another file."""
    import yaml

    try:
        raw = yaml.safe_load((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CorruptModel(f"{model_id}: {name} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise CorruptModel(f"{model_id}: {name} is no table of settings")
    if raw.get("base_config") is not None:
        raise CorruptModel(f"{model_id}: {name} has a base_config; write its keys into {name}")
    return raw


def load_bicodec(model_id: str, folder: Path, device: Any) -> Any:
    """The package's BiCodec, complete. Raises CorruptModel with the tensors that are wrong."""
    read_yaml(model_id, folder, "BiCodec/config.yaml")
    SOURCE.offer()
    from sparktts.models.bicodec import BiCodec

    class Complete(BiCodec):  # type: ignore[misc]
        def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
            result = super().load_state_dict(state, strict=False, assign=assign)
            missing = set(result.missing_keys) - _DERIVED
            if missing or result.unexpected_keys:
                raise CorruptModel(
                    f"{model_id}: BiCodec/model.safetensors "
                    + " and ".join(_named(missing, result.unexpected_keys))
                )
            # Nothing is left for the package to print.
            return [], []

    with loading(f"{model_id}: BiCodec", str(device)):
        return Complete.load_from_checkpoint(folder / "BiCodec").to(device).eval()


def load_llm(model_id: str, folder: Path, device: Any, dtype: str, bicodec: Any) -> SpeechLlm:
    """Raises CorruptModel, also where its vocabulary is not that of the codec."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype == "auto":
        # The pack is saved in bfloat16, in which most processors compute slower and all rougher.
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    where = {"local_files_only": True, "trust_remote_code": False}
    with loading(f"{model_id}: LLM", str(device)):
        tokenizer = AutoTokenizer.from_pretrained(folder / "LLM", **where)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder / "LLM",
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            **where,
        )
    if info["missing_keys"]:
        named = _named(info["missing_keys"], ())
        raise CorruptModel(f"{model_id}: LLM/model.safetensors {named[0]}")
    ends = {tokenizer.eos_token_id, *_listed(model.generation_config.eos_token_id)} - {None}
    vocabulary = read_vocabulary(model_id, tokenizer.get_vocab(), ends)
    highest = max(*vocabulary.semantic, *vocabulary.globals, *vocabulary.opening, *vocabulary.ends)
    rows = model.get_output_embeddings().weight.shape[0]
    if highest >= rows:
        raise CorruptModel(f"{model_id}: LLM/ has {rows} rows for a token numbered {highest}")
    speaker = bicodec.speaker_encoder
    sizes = {
        "semantic": (len(vocabulary.semantic), bicodec.quantizer.codebook_size),
        "global": (len(vocabulary.globals), speaker.quantizer.codebook_size),
    }
    for name, (tokens, codes) in sizes.items():
        if tokens != codes:
            raise CorruptModel(f"{model_id}: LLM/ has {tokens} {name} tokens, BiCodec {codes}")
    n_global = speaker.perceiver_sampler.latents.shape[0]
    return SpeechLlm(model.to(device).eval(), tokenizer, vocabulary, n_global)


def samples_per_code(model_id: str, folder: Path) -> tuple[int, int]:
    """The sample rate in Hz, and the samples of one semantic code. Raises CorruptModel."""
    config = read_yaml(model_id, folder, "config.yaml")
    rate, hop = config.get("sample_rate"), config.get("latent_hop_length")
    if not isinstance(rate, int) or not isinstance(hop, int) or rate != hop * TOKENS_PER_SECOND:
        raise CorruptModel(
            f"{model_id}: config.yaml has sample_rate {rate} and latent_hop_length {hop}; "
            f"Spark-TTS says {TOKENS_PER_SECOND} codes a second"
        )
    return rate, hop


def _named(missing: Iterable[str], unexpected: Sequence[str]) -> list[str]:
    kinds = {"lacks": sorted(missing), "has besides": sorted(unexpected)}
    return [
        f"{kind} {len(names)} tensors: {', '.join(names[:3])}" + ("…" if len(names) > 3 else "")
        for kind, names in kinds.items()
        if names
    ]


def _listed(ids: Any) -> list[Any]:
    return ids if isinstance(ids, list) else [ids]
