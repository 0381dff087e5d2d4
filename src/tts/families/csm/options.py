"""A catalog entry's settings for the Sesame families. Pure; unknown keys are errors.

Sampling comes from here alone: a checkpoint's own generation_config.json loses its depth decoder's
values when it was saved with `_from_model_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from src.rpc.errors import InvalidArgument, UnknownName
from src.tts.families.csm.ports import Sampling
from src.tts.families.settings import Range

MAX_TOP_K = 128
SEED = Range(0, 2**31 - 1, 0, "the same seed says the same text in the same way; a whole number")

_DTYPES = ("auto", "float32", "bfloat16")
_SWITCH = {"on": True, "off": False}
_TINY = {"1": True, "0": False}
_WHOLE = {
    "max_slots": Range(1, 256, 0, "utterances at once"),
    "positions": Range(256, 2048, 2048, "of context: one a token, 12.5 a second of sound"),
    "max_adapters": Range(0, 64, 0, "LoRA voices at once on this base"),
    "max_rank": Range(1, 256, 32, "the highest rank of a LoRA voice"),
    "top_k": Range(1, MAX_TOP_K, 50, "candidates of a draw"),
    "speaker": Range(0, 9, 0, "the speaker's number in the text's mark"),
    "seed": SEED,
}
_TEMPERATURE = Range(0.0, 2.0, 0.9, "0 takes the likeliest")
_CPU_SLOTS, _GPU_SLOTS = 8, 32
KEYS = ("dtype", "compile", "temperature", "tiny", *_WHOLE)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What two models must have in common to share an engine."""

    dtype: str = "auto"
    max_slots: int = _CPU_SLOTS
    positions: int = 2048
    compile: bool = False
    max_adapters: int = 0
    """Places for LoRA voices beside the base; without any, nothing is paid for them."""
    max_rank: int = 32

    def serves(self, wanted: EngineOptions) -> bool:
        """May a model that asks for `wanted` have an engine made with these? One without LoRA
        voices does not mind places for others'."""
        if wanted.max_adapters:
            return self == wanted
        return self == replace(wanted, max_adapters=self.max_adapters, max_rank=self.max_rank)


@dataclass(frozen=True, slots=True)
class SesameOptions:
    engine: EngineOptions
    sampling: Sampling
    speaker: int
    seed: int
    tiny: bool
    """Random weights, made while loading."""


def read_options(settings: Mapping[str, str], device: str) -> SesameOptions:
    """Raises UnknownName for a key that is none of KEYS, InvalidArgument for a bad value."""
    for key in settings:
        if key not in KEYS:
            raise UnknownName.among("setting", key, KEYS)
    whole = {name: whole_number(name, each, settings.get(name)) for name, each in _WHOLE.items()}
    on_gpu = device.startswith("cuda")
    dtype = settings.get("dtype", "auto")
    if dtype not in _DTYPES:
        raise InvalidArgument(f"setting 'dtype' must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    temperature = settings.get("temperature", str(_TEMPERATURE.default))
    return SesameOptions(
        EngineOptions(
            dtype=dtype,
            max_slots=whole["max_slots"] or (_GPU_SLOTS if on_gpu else _CPU_SLOTS),
            positions=whole["positions"],
            compile=_switch("compile", settings.get("compile", "on" if on_gpu else "off")),
            max_adapters=whole["max_adapters"],
            max_rank=whole["max_rank"],
        ),
        Sampling(_TEMPERATURE.read("temperature", temperature), whole["top_k"]),
        speaker=whole["speaker"],
        seed=whole["seed"],
        tiny=_switch("tiny", settings.get("tiny", "0"), _TINY),
    )


def whole_number(name: str, limits: Range, raw: str | None) -> int:
    """`limits.default` where nothing is set. Raises InvalidArgument."""
    if raw is None:
        return int(limits.default)
    value = limits.read(name, raw)
    if value != int(value):
        raise InvalidArgument(f"setting {name!r} must be a whole number, got {raw!r}")
    return int(value)


def _switch(name: str, raw: str, meanings: Mapping[str, bool] = _SWITCH) -> bool:
    if raw not in meanings:
        known = " or ".join(map(repr, meanings))
        raise InvalidArgument(f"setting {name!r} must be {known}, got {raw!r}")
    return meanings[raw]
