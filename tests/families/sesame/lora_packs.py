"""LoRA adapters for the tiny base, saved by peft as Unsloth's notebook saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

# Unsloth's CSM notebook: a list of names, which matches the codec's layers too.
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# What transformers 4.52 called the codec's halves, in whose days the notebook was written.
_SINCE_RENAMED = {
    "codec_model.encoder.encoder_transformer.": "codec_model.encoder_transformer.",
    "codec_model.decoder.decoder_transformer.": "codec_model.decoder_transformer.",
}


def load_base(pack: Path) -> Any:
    from transformers import CsmForConditionalGeneration

    return CsmForConditionalGeneration.from_pretrained(pack, local_files_only=True).eval()


def make_adapter(
    pack: Path, folder: Path, *, seed: int, rank: int = 8, alpha: int = 8, size: float = 0.3
) -> Path:
    """An adapter for `pack` as training leaves it: B is zero under the codec alone."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS, bias="none")
    peft_model = get_peft_model(load_base(pack), config)
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, size, generator=made)
            if "lora_B" in name and ".codec_model." in name:
                parameter.zero_()
            # The tiny model ends a segment by its depth decoder's channel 0, which stays as it is.
            if "depth_decoder" in name and ("o_proj.lora_B" in name or "down_proj.lora_B" in name):
                parameter[0] = 0
    peft_model.save_pretrained(folder)
    edit_config(folder, base_model_name_or_path="unsloth/csm-1b")
    rewrite(folder, {key: _as_in_4_52(key) for key in keys(folder)})
    return folder


def keys(folder: Path) -> list[str]:
    from safetensors.torch import load_file

    return sorted(load_file(folder / "adapter_model.safetensors"))


def rewrite(folder: Path, names: dict[str, str], **tensors: torch.Tensor) -> None:
    """Rename keys (those that `names` lacks are left out) and add others."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    old = load_file(path)
    save_file({**{names[k]: v for k, v in old.items() if k in names}, **tensors}, path)


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _as_in_4_52(key: str) -> str:
    for new, old in _SINCE_RENAMED.items():
        key = key.replace(new, old)
    return key
