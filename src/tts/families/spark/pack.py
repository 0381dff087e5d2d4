"""A Spark-TTS voice pack, read by the package's own code and checked; torch only inside functions.

What the package does quietly is refused here in words: a tensor that is missing from BiCodec (it
prints its name and speaks noise), another rate, a vocabulary that does not cover the codebooks, a
file elsewhere that a configuration points to.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from src.rpc.errors import CorruptModel, Unavailable
from src.tts.families.settings import require_modules
from src.tts.families.spark.llm import SpeechLlm
from src.tts.families.spark.prompts import TOKENS_PER_SECOND, read_vocabulary
from src.tts.families.torch_host import one_folder
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
    if sources() is None and importlib.util.find_spec("sparktts") is None:
        raise MissingPackage(FAMILY, INSTALL)


def sources() -> Path | None:
    """The checkout's folder `sparktts`, where SPARK_HOME names a checkout."""
    folder = Path(os.environ.get("SPARK_HOME", ""), "sparktts")
    return folder if (folder / "models" / "bicodec.py").is_file() else None


def use_sources() -> None:
    """Make `sparktts` importable, and nothing else: the checkout has a `src` and a `cli` too."""
    folder = sources()
    if folder is not None and "sparktts" not in sys.modules:
        package = ModuleType("sparktts")
        package.__path__ = [str(folder)]
        sys.modules["sparktts"] = package


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
        raise CorruptModel(
            f"{model_id}: LLM/pytorch_model.bin may hold pickled objects, so it is not read; "
            f"convert it: uv run just voicepack-convert {files['LLM/pytorch_model.bin']}"
        )
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
    use_sources()
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

    with refused_as(f"{model_id}: BiCodec"):
        return Complete.load_from_checkpoint(folder / "BiCodec").to(device).eval()


def load_llm(model_id: str, folder: Path, device: Any, dtype: str, bicodec: Any) -> SpeechLlm:
    """Raises CorruptModel, also where its vocabulary is not that of the codec."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype == "auto":
        # The pack is saved in bfloat16, in which most processors compute slower and all rougher.
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    where = {"local_files_only": True, "trust_remote_code": False}
    with refused_as(f"{model_id}: LLM"):
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


@contextmanager
def refused_as(what: str) -> Iterator[None]:
    """What a package raises while it reads weights: CorruptModel, or Unavailable without memory."""
    import torch

    try:
        yield
    except CorruptModel:
        raise
    except torch.OutOfMemoryError as error:
        raise Unavailable(f"{what} does not fit into the device's memory") from error
    except Exception as error:
        raise CorruptModel(f"{what} cannot be read: {type(error).__name__}: {error}") from error


def _named(missing: Iterable[str], unexpected: Sequence[str]) -> list[str]:
    kinds = {"lacks": sorted(missing), "has besides": sorted(unexpected)}
    return [
        f"{kind} {len(names)} tensors: {', '.join(names[:3])}" + ("…" if len(names) > 3 else "")
        for kind, names in kinds.items()
        if names
    ]


def _listed(ids: Any) -> list[Any]:
    return ids if isinstance(ids, list) else [ids]
