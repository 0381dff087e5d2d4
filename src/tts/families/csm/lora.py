"""LoRA voices: adapters as peft writes them, and several of them on one base in one batch.

peft reads the adapter (its config's targets, ranks and scalings, its file's layout of any version)
onto a copy of the base that has shapes but no weights; its forward never runs. What it read is
stacked beside the base's own Linear layers, so that one step serves the base and every voice.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from src.rpc.errors import CorruptModel, DuplexError, Exhausted, InvalidArgument

if TYPE_CHECKING:
    from src.tts.families.csm.weights import CsmWeights

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Training runs the codec without gradients, so what a list of target names put there stayed zero;
# its modules were renamed after transformers 4.52, so it is also what a newer base does not know.
_CODEC = "codec_model."
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
_ADAPTED = re.compile(
    r"(backbone_model|depth_decoder\.model)\.layers\.\d+\."
    r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    r"|depth_decoder\.model\.inputs_embeds_projector"
)
_PLAIN = "only plain LoRA on the layers of the backbone and the depth decoder can be spoken with"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """What one Linear gains: `b @ a`, float32 on the CPU."""

    a: torch.Tensor
    """[rank, in_features]"""
    b: torch.Tensor
    """[out_features, rank], the adapter's scaling already in it."""


@dataclass(frozen=True, slots=True, eq=False)
class AdapterWeights:
    """One voice's adapter."""

    layers: Mapping[str, LowRank]
    """By the Linear's name in `CsmForConditionalGeneration`."""
    rank: int
    """The highest of its layers."""


def read_adapter(folder: Path, base: Path) -> AdapterWeights:
    """The adapter that peft (or Unsloth, by peft) saved into `folder`, for the base in `base`, of
    which only config.json is read.

    The base that the adapter names is not looked for, neither on disk nor on the hub.
    Raises CorruptModel, which names the key: a file that is missing or cannot be read, an adapter
    of another base, a key too many or too few (under the codec both are let pass).
    """
    shapes = _shapes_in(folder)
    skeleton = _skeleton(base)
    _check_shapes(folder, shapes, skeleton)
    adapted = dict(_adapted(_read_by_peft(folder, skeleton)))
    _check_keys(folder, set(shapes), {key for name in adapted for key in _keys(name)})
    layers = {
        name: _low_rank(folder, name, layer)
        for name, layer in adapted.items()
        if not name.startswith(_CODEC)
    }
    if not layers:
        raise CorruptModel(f"{folder}: this adapter changes nothing that speaks; {_PLAIN}")
    return AdapterWeights(layers, max(pair.a.shape[0] for pair in layers.values()))


class _Rows:
    """What the stacked layers must know of a step. Not the bank, which holds the model: without a
    circle the last reference frees the weights."""

    def __init__(self, mask: torch.Tensor) -> None:
        self.mask = mask
        """[rows, columns], which columns each row keeps."""
        self.active = True


class LoraBank:
    """Up to `capacity` adapters beside one base; index 0 is the base alone.

    A layer's low-rank parts of all voices lie side by side in one pair of matrices of fixed size:
    a row of the batch computes with all of them and keeps its own voice's part. So a voice's
    numbers do not depend on which other voices there are or who else is in the batch, and a CUDA
    graph stays valid while voices come and go.

    Call `add`, `remove` and `detach` between steps only.
    """

    generation: int
    """Rises when other layers than before are adapted: graphs of steps with `active` captured
    before then are of no use. Graphs of steps without it always are."""

    def __init__(self, weights: CsmWeights, *, capacity: int, max_rank: int) -> None:
        self.capacity = capacity
        self.max_rank = max_rank
        self.generation = 0
        self._model = weights.model
        self._layers: dict[str, StackedLinear] = {}
        self._taken: set[int] = set()
        self._owners = torch.arange(capacity * max_rank, device=weights.device) // max_rank + 1
        """[capacity * max_rank], the index that owns each column."""
        self._rows = _Rows(self._owners[None] < 0)

    @property
    def voices(self) -> int:
        """How many there are."""
        return len(self._taken)

    @property
    def active(self) -> bool:
        """False: the next steps are of base rows alone. They compute, and cost, what they would
        without a bank, bit for bit. For the caller to say: a step cannot look without waiting."""
        return self._rows.active

    @active.setter
    def active(self, value: bool) -> None:
        self._rows.active = value

    def prepare(self) -> None:
        """Adapt every layer that an adapter may, now: then no `add` raises `generation`."""
        names = [name for name, _ in self._model.named_modules() if _ADAPTED.fullmatch(name)]
        self._adapt([name for name in names if name not in self._layers])

    def select(self, adapters: torch.Tensor) -> None:
        """The adapter of each row of the next step: int64 [rows]; one for all is [1].

        Tensor operations alone: capture it with the step.
        """
        self._rows.mask = self._owners[None] == adapters[:, None]

    def add(self, adapter: AdapterWeights) -> int:
        """Its index. Raises Exhausted when `capacity` voices are there, InvalidArgument when its
        rank is above `max_rank`.
        """
        if adapter.rank > self.max_rank:
            raise InvalidArgument(
                f"a LoRA adapter of rank {adapter.rank}; this engine takes up to {self.max_rank}"
            )
        free = [i for i in range(1, self.capacity + 1) if i not in self._taken]
        if not free:
            raise Exhausted(f"all {self.capacity} places for LoRA voices on this base are taken")
        index = free[0]
        self._adapt([name for name in adapter.layers if name not in self._layers])
        with torch.inference_mode():
            for name, layer in self._layers.items():
                layer.fill(self._columns(index), adapter.layers.get(name))
        self._taken.add(index)
        return index

    def remove(self, index: int) -> None:
        """No row may name it any more. Raises KeyError if there is no such voice."""
        self._taken.remove(index)
        with torch.inference_mode():
            for layer in self._layers.values():
                layer.fill(self._columns(index), None)

    def detach(self) -> None:
        """The base as it was before the first voice; the stacked matrices are freed."""
        for name, layer in self._layers.items():
            self._put(name, layer.base)
        self.generation += bool(self._layers)
        self._layers.clear()
        self._taken.clear()

    def _columns(self, index: int) -> slice:
        return slice((index - 1) * self.max_rank, index * self.max_rank)

    def _adapt(self, names: Sequence[str]) -> None:
        """All or, when the memory does not suffice, none of them."""
        built = {name: StackedLinear(self._model.get_submodule(name), self._rows) for name in names}
        for name, layer in built.items():
            self._put(name, layer)
        self._layers |= built
        self.generation += bool(built)

    def _put(self, name: str, layer: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self._model.get_submodule(parent), child, layer)


class StackedLinear(nn.Module):  # type: ignore[misc]
    """A Linear of the base, and for each row what its own voice adds to that."""

    def __init__(self, base: nn.Linear, rows: _Rows) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self._rows = rows
        columns = rows.mask.shape[1]
        with torch.inference_mode():
            self.a = base.weight.new_zeros(columns, base.in_features)
            self.b = base.weight.new_zeros(base.out_features, columns)

    def fill(self, columns: slice, pair: LowRank | None) -> None:
        """One voice's part, zeros where its rank is lower or where it has none."""
        self.a[columns], self.b[:, columns] = 0, 0
        if pair is not None:
            rank = pair.a.shape[0]
            self.a[columns][:rank] = pair.a
            self.b[:, columns][:, :rank] = pair.b

    def add_to(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """Into `out` [rows, out_features], in place; x: [rows, in_features]. A mask of one row is
        everybody's."""
        out.addmm_(self._low(x), self.b.t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [rows, …, in_features]; [rows, …, out_features]. For whoever calls the module itself;
        the frame loop does not."""
        out = self.base(x)
        return out + nn.functional.linear(self._low(x), self.b) if self._rows.active else out

    def _low(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, …, columns], zero but for the row's own voice."""
        mask = self._rows.mask
        mask = mask.view(mask.shape[0], *(1,) * (x.dim() - 2), mask.shape[1])
        # Chosen, not multiplied by 0 and 1: another voice's overflow must not become a NaN here.
        return torch.where(mask, nn.functional.linear(x, self.a), 0)


def add_adapters(out: torch.Tensor, x: torch.Tensor, *linears: nn.Module) -> None:
    """What the voices of the rows add to `out` [rows, sum of out_features], which these layers
    made of `x` [rows, in_features] one beside the other. In place; tensor operations alone."""
    parts = out.split([linear.out_features for linear in linears], -1)
    for linear, part in zip(linears, parts, strict=True):
        if isinstance(linear, StackedLinear):
            linear.add_to(part, x)


def _shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """Every key of the adapter's file. peft would look on the hub for a file that is not here."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise CorruptModel(f"{folder}: a LoRA adapter has a file {name!r}, and here is none")
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            trained = [name for name in names if _of_codec(name) and ".lora_B." in name]
            if any(bool(file.get_tensor(name).any()) for name in trained):
                _log.warning(
                    "%s adapts the codec too, which is left out: it is everybody's", folder
                )
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise CorruptModel(f"{path}: cannot be read as safetensors: {error}") from error


def _skeleton(base: Path) -> Any:
    """The base's model, of its shapes, with weights that take no memory.

    Not on torch's `meta` device: peft puts an adapter where the layer that it adapts is.
    """
    from transformers import CsmConfig, CsmForConditionalGeneration

    try:
        config = CsmConfig.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CorruptModel(f"{base / 'config.json'}: cannot be read: {error}") from error
    with torch.device("meta"):
        skeleton = CsmForConditionalGeneration(config)
    for module in skeleton.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            hollow = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            setattr(module, name, nn.Parameter(hollow, requires_grad=False))
    return skeleton


def _check_shapes(folder: Path, shapes: Mapping[str, tuple[int, ...]], skeleton: Any) -> None:
    """Refuse what is not LoRA of a layer of ours, and what fits another base."""
    modules = dict(skeleton.named_modules())
    for key, shape in shapes.items():
        match = _KEY.fullmatch(key)
        if _of_codec(key):
            continue
        if match is None or _ADAPTED.fullmatch(match["module"]) is None:
            raise CorruptModel(f"{folder / WEIGHTS}: the key {key!r} is foreign here; {_PLAIN}")
        layer = modules.get(match["module"])
        if layer is None:
            raise CorruptModel(
                f"{folder / WEIGHTS}: this adapter is of another base: "
                f"ours has no layer for {key!r}"
            )
        side = 1 if match["part"] == "A" else 0
        ours = layer.in_features if match["part"] == "A" else layer.out_features
        if len(shape) != 2 or shape[side] != ours:
            raise CorruptModel(
                f"{folder / WEIGHTS}: this adapter is of another base: {key!r} is {list(shape)}, "
                f"and ours has {ours} there"
            )


def _read_by_peft(folder: Path, skeleton: Any) -> Any:
    from peft import PeftConfig, PeftModel

    try:
        config = PeftConfig.from_pretrained(str(folder))
        _check_config(folder, config)
        # So that nothing is tempted to fetch it.
        config.base_model_name_or_path = ""
        with warnings.catch_warnings():
            # Of the keys, which are counted here more strictly.
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(
                skeleton,
                str(folder),
                config=config,
                torch_device="cpu",
                autocast_adapter_dtype=False,
            )
    except DuplexError:
        raise
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CorruptModel(f"{folder}: peft cannot read this adapter: {reason}") from error


def _check_config(folder: Path, config: Any) -> None:
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise CorruptModel(f"{folder / CONFIG}: a {kind} adapter; {_PLAIN}")
    special = [
        name
        for name in (
            "use_dora",
            "modules_to_save",
            "fan_in_fan_out",
            "lora_bias",
            "trainable_token_indices",
            "target_parameters",
            "layer_replication",
        )
        if getattr(config, name, None)
    ]
    if config.bias != "none":
        special.append("bias")
    if special:
        raise CorruptModel(f"{folder / CONFIG}: sets {special[0]!r}; {_PLAIN}")


def _adapted(peft_model: Any) -> Iterator[tuple[str, Any]]:
    """peft's layers, by the name of what they adapt."""
    for name, module in peft_model.base_model.model.named_modules():
        if getattr(module, "lora_A", None):
            yield name, module


def _of_codec(key: str) -> bool:
    return key.startswith(f"base_model.model.{_CODEC}")


def _keys(name: str) -> tuple[str, str]:
    return (
        f"base_model.model.{name}.lora_A.weight",
        f"base_model.model.{name}.lora_B.weight",
    )


def _check_keys(folder: Path, found: set[str], expected: set[str]) -> None:
    for what, keys in (("has no key", expected - found), ("has a key too many,", found - expected)):
        strict = sorted(key for key in keys if not _of_codec(key))
        if strict:
            more = f" (and {len(strict) - 1} more)" if len(strict) > 1 else ""
            raise CorruptModel(f"{folder / WEIGHTS}: {what} {strict[0]!r}{more}")


def _low_rank(folder: Path, name: str, layer: Any) -> LowRank:
    a, b = (part["default"].weight.detach().float() for part in (layer.lora_A, layer.lora_B))
    for key, weight in zip(_keys(name), (a, b), strict=True):
        if not bool(torch.isfinite(weight).all()):
            raise CorruptModel(f"{folder / WEIGHTS}: {key!r} holds numbers that are not finite")
    return LowRank(a, b * layer.scaling["default"])
