"""A voice pack on disk to modules in memory, strictly: what does not fit exactly is refused.

`from_pretrained` fills what a checkpoint lacks with random numbers and passes over what it cannot
place, with a warning. A voice made so speaks noise, so here both are errors that name the key.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from src.rpc.errors import CorruptModel, InvalidArgument, Unavailable
from src.tts.families.csm.tiny import BEGIN, END
from src.tts.families.torch_host import loading, quiet_transformers

TRANSFORMERS = (5, 23)
"""frame_loop runs the modules of this release itself; the tests hold the two equal for it alone."""
INSTALL = "pip install 'transformers>=5.23,<5.24' 'torch>=2.11'"
SAMPLE_RATE = 24_000
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(slots=True)
class CsmWeights:
    """`model` is a `CsmForConditionalGeneration` on `device`, without gradients.

    Its parameters are of `dtype`, save the codec's, which stay in float32: it is small beside the
    rest, and what it rounds is heard.
    """

    model: Any
    tokenizer: Any
    """tokenizers.Tokenizer, which takes marks in a text for text."""
    device: Any
    dtype: Any
    codebooks: int
    vocab: int
    """Ids of a codebook, with those that mean no sound."""
    codec_vocab: int
    """Those that the codec can decode: the first so many."""
    hidden: int
    frame_samples: int
    sample_rate: int

    def text_ids(self, text: str, speaker: int) -> list[int]:
        """A message as the family's chat template writes it. A mark within `text` is read out, not
        obeyed."""
        ids: list[int] = self.tokenizer.encode(f"[{speaker}]{text}", add_special_tokens=False).ids
        return [self.tokenizer.token_to_id(BEGIN), *ids, self.tokenizer.token_to_id(END)]


def load_weights(folder: Path, *, device: str = "cpu", dtype: str = "auto") -> CsmWeights:
    """The pack in `folder` as sesame/csm-1b has it: config.json, safetensors, tokenizer.json.

    `dtype`: float32, bfloat16, or auto, which is bfloat16 on a GPU. Nothing is downloaded and
    nothing unpickled. Raises InvalidArgument (device, dtype), Unavailable (another transformers),
    CorruptModel (all that is wrong with the pack), torch.OutOfMemoryError.
    """
    _check_transformers()
    place = _device(device)
    wanted = _dtype(dtype, place)
    with quiet_transformers():
        config = _read_config(folder)
        tokenizer = _read_tokenizer(folder, config)
        model = _read_model(folder, config)
    _place(model, place, wanted)
    codec = config.codec_config
    return CsmWeights(
        model=model,
        tokenizer=tokenizer,
        device=place,
        dtype=wanted,
        codebooks=config.num_codebooks,
        vocab=config.vocab_size,
        codec_vocab=codec.codebook_size,
        hidden=config.hidden_size,
        frame_samples=round(codec.sampling_rate / codec.frame_rate),
        sample_rate=codec.sampling_rate,
    )


def _check_transformers() -> None:
    found = version("transformers")
    if tuple(found.split(".")[:2]) != tuple(map(str, TRANSFORMERS)):
        raise Unavailable(
            f"this engine computes with the layers of transformers {TRANSFORMERS[0]}."
            f"{TRANSFORMERS[1]}; installed is {found}: {INSTALL}"
        )


def _device(name: str) -> Any:
    try:
        device = torch.device(name or "cpu")
    except RuntimeError as error:
        raise InvalidArgument(f"no such device: {name!r}; 'cpu' or 'cuda:<index>'") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise InvalidArgument(f"sesame runs on 'cpu' or 'cuda:<index>', not on {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise InvalidArgument(f"device {name!r} does not exist: torch sees {count} CUDA devices")
    return torch.device("cuda", device.index or 0)


def _dtype(name: str, device: Any) -> Any:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in _DTYPES:
        raise InvalidArgument(f"dtype is 'auto', 'float32' or 'bfloat16', not {name!r}")
    return _DTYPES[name]


def _read_config(folder: Path) -> Any:
    """The pack's CsmConfig, its parts agreeing with each other."""
    from transformers import CsmConfig

    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptModel(f"{path}: cannot be read as JSON: {error}") from error
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind != "csm":
        raise CorruptModel(f"{path}: a model of type {kind!r}, not 'csm'")
    try:
        config = CsmConfig.from_dict(raw)
    except Exception as error:  # its validators have no base of their own
        raise CorruptModel(f"{path}: not a CSM configuration: {error}") from error
    for wrong in _disagreements(config):
        raise CorruptModel(f"{path}: {wrong}")
    return config


def _disagreements(config: Any) -> Iterator[str]:
    depth, codec = config.depth_decoder_config, config.codec_config
    for name, ours, theirs in (
        ("num_codebooks", config.num_codebooks, depth.num_codebooks),
        ("vocab_size", config.vocab_size, depth.vocab_size),
        ("hidden_size", config.hidden_size, depth.backbone_hidden_size),
    ):
        if ours != theirs:
            yield f"{name} is {ours}, but the depth decoder's is {theirs}"
    if codec.num_quantizers < config.num_codebooks:
        yield f"{config.num_codebooks} codebooks, of which the codec knows {codec.num_quantizers}"
    if codec.codebook_size > config.vocab_size:
        yield f"the codec has {codec.codebook_size} codes, the model {config.vocab_size} ids"
    if codec.sampling_rate != SAMPLE_RATE:
        yield f"the codec runs at {codec.sampling_rate} Hz, not at {SAMPLE_RATE}"
    if not isinstance(config.codebook_eos_token_id, int):
        yield f"codebook_eos_token_id is {config.codebook_eos_token_id!r}, not one id"


def _read_tokenizer(folder: Path, config: Any) -> Any:
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CorruptModel(f"{path}: missing; it comes with the model's weights")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # it raises Exception itself
        raise CorruptModel(f"{path}: not a tokenizer: {error}") from error
    if tokenizer.token_to_id(BEGIN) is None or tokenizer.token_to_id(END) is None:
        raise CorruptModel(f"{path}: without the marks {BEGIN} and {END}; of another model?")
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size > config.text_vocab_size:
        raise CorruptModel(
            f"{path}: has {size} tokens, the model {config.text_vocab_size}; of another model?"
        )
    tokenizer.encode_special_tokens = True
    return tokenizer


def _read_model(folder: Path, config: Any) -> Any:
    """CsmForConditionalGeneration in the numbers that it was saved in, on the host."""
    from transformers import CsmForConditionalGeneration

    with loading(str(folder), "the host"):
        model, info = CsmForConditionalGeneration.from_pretrained(
            folder,
            config=config,
            dtype="auto",
            local_files_only=True,
            use_safetensors=True,
            # Listed in `info` then, by name; otherwise an error that names none.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    _check_keys(folder, info)
    return model.eval().requires_grad_(False)


def _check_keys(folder: Path, info: dict[str, Any]) -> None:
    wrong_shapes = [
        f"{name} {tuple(found)} for {tuple(wanted)}"
        for name, found, wanted in info["mismatched_keys"]
    ]
    for what, keys in (
        ("are missing", info["missing_keys"]),
        ("are of the wrong shape", wrong_shapes),
        ("belong to no part of this model", info["unexpected_keys"]),
    ):
        if keys:
            raise CorruptModel(f"{folder}: {len(keys)} tensors {what}: {_some(keys)}")


def _some(keys: Iterable[str]) -> str:
    first, *rest = sorted(keys)
    return f"{first} and {len(rest)} more" if rest else first


def _place(model: Any, device: Any, dtype: Any) -> None:
    """Tensor by tensor, so that no second copy of the model is ever held. Buffers keep their type:
    frequencies of rotary embeddings in bfloat16 would put every position elsewhere."""
    codec = {id(parameter) for parameter in model.codec_model.parameters()}
    for parameter in model.parameters():
        wanted = torch.float32 if id(parameter) in codec else dtype
        parameter.data = parameter.data.to(device, wanted)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            wanted = torch.float32 if buffer.is_floating_point() else buffer.dtype
            setattr(module, name, buffer.to(device, wanted))
