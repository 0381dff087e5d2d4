"""The layers of a Llama, for one position of many rows at a time.

What a step costs beside its matrices is starting operations: a tiny model on a processor and a big
one on a GPU both wait for that. So projections that read the same are one matrix, a residual is
added by the multiplication before it, and rotary positions are a multiplication too: 14 operations
a layer where the modules' own forward takes some 40. The weights stay the modules' own, as views
into the joined ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from src.rpc.errors import CorruptModel
from src.tts.families.csm.lora import add_adapters


class Layer:
    """One decoder layer of transformers', without a cache of its own.

    Rows are [rows, hidden]. `adapted`: add to each row what its LoRA voice does (lora.py). What it
    is added to is computed alike, so rows of the base alone are bit for bit what they were.
    """

    def __init__(self, module: Any) -> None:
        attention, mlp = module.self_attn, module.mlp
        self._module = module
        self._head_dim = attention.head_dim
        self._heads = attention.q_proj.out_features // self._head_dim
        self._kv_heads = attention.k_proj.out_features // self._head_dim
        self._qkv = joined(attention.q_proj, attention.k_proj, attention.v_proj).t()
        self._out = joined(attention.o_proj).t()
        self._gate_up = joined(mlp.gate_proj, mlp.up_proj).t()
        self._down = joined(mlp.down_proj).t()
        self._before_attention = Norm(module.input_layernorm)
        self._before_mlp = Norm(module.post_attention_layernorm)
        self.gate = gated
        """`gated`, or what a compiler made of it."""

    def project(self, x: Any, rotation: Any, adapted: bool) -> tuple[Any, Any, Any]:
        """Queries [rows, heads, D], keys and values [rows, kv_heads, D].

        `rotation`: of `rotations`, [D, D] for all rows or [rows, D, D].
        """
        y = self._before_attention(x)
        qkv = torch.mm(y, self._qkv)
        if adapted:
            attention = self._module.self_attn
            add_adapters(qkv, y, attention.q_proj, attention.k_proj, attention.v_proj)
        values_from = self._heads + self._kv_heads
        qkv = qkv.view(x.shape[0], values_from + self._kv_heads, self._head_dim)
        # The values are turned for nothing: leaving them out would copy the rest.
        turned = torch.matmul(qkv, rotation)
        return (
            turned[:, : self._heads],
            turned[:, self._heads : values_from],
            qkv[:, values_from:],
        )

    def finish(self, x: Any, attended: Any, adapted: bool) -> Any:
        """The layer's output [rows, hidden], from its input and what its attention saw."""
        mlp = self._module.mlp
        x = torch.addmm(x, attended, self._out)
        if adapted:
            add_adapters(x, attended, self._module.self_attn.o_proj)
        y = self._before_mlp(x)
        both = torch.mm(y, self._gate_up)
        if adapted:
            add_adapters(both, y, mlp.gate_proj, mlp.up_proj)
        inner = self.gate(both)
        x = torch.addmm(x, inner, self._down)
        if adapted:
            add_adapters(x, inner, mlp.down_proj)
        return x


def gated(both: Any) -> Any:
    """[rows, 2 x inner], the gates before what they let pass; [rows, inner]."""
    gate, passed = both.chunk(2, -1)
    return F.silu(gate).mul_(passed)


class Norm:
    """RMSNorm. A GPU has it as one operation; on a processor that one is ten, and these are six."""

    def __init__(self, module: Any) -> None:
        self._weight = module.weight.detach()
        self._shape = self._weight.shape
        self._eps = module.variance_epsilon
        self._ready_made = self._weight.device.type != "cpu" or self._weight.dtype != torch.float32
        size = self._weight.numel()
        self._scaled_weight = self._weight * size**0.5
        self._scaled_eps = self._eps * size

    def __call__(self, x: Any) -> Any:
        if self._ready_made:
            return F.rms_norm(x, self._shape, self._weight, self._eps)
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        return x.mul(squares.add_(self._scaled_eps).rsqrt_()).mul_(self._scaled_weight)


def joined(*linears: Any) -> Any:
    """One matrix of these Linear layers' weights, [sum of outputs, inputs]; theirs become views.

    Raises CorruptModel for a layer with a bias, which this model's configuration does not have.
    """
    weights = [linear.weight for linear in linears]
    if any(linear.bias is not None for linear in linears):
        raise CorruptModel("a layer of the backbone or the depth decoder has a bias")
    outputs = sum(weight.shape[0] for weight in weights)
    with torch.inference_mode(False), torch.no_grad():
        if not _adjacent(weights):
            whole = torch.cat([weight.detach() for weight in weights])
            for weight, part in zip(
                weights, whole.split([w.shape[0] for w in weights]), strict=True
            ):
                if weight.is_cuda:
                    # Of the loader's stream, which may give the memory on before this one read it.
                    weight.data.record_stream(torch.cuda.current_stream(weight.device))
                weight.data = part
        return weights[0].detach().as_strided((outputs, weights[0].shape[1]), weights[0].stride())


def _adjacent(weights: list[Any]) -> bool:
    """Joined before, by another loop over the same model."""
    first = weights[0]
    place = first.data_ptr()
    for weight in weights:
        same = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or weight.data_ptr() != place or not weight.is_contiguous():
            return False
        place += weight.numel() * weight.element_size()
    return True


def rotations(rotary: Any, positions: int, device: Any, dtype: Any) -> Any:
    """[positions, D, D]: a head [D] times the matrix of its position is the head turned to it.

    `rotary` is the model's rotary embedding, in halves as Llama has it. Frequencies are made anew
    in float32: a module that was cast has lost its own.
    """
    fresh = type(rotary)(rotary.config)
    cos, sin = (table[0] for table in fresh(torch.zeros(1), torch.arange(positions)[None]))
    width = cos.shape[-1]
    half, index = width // 2, torch.arange(width)
    turn = torch.zeros(positions, width, width)
    turn[:, index, index] = cos
    turn[:, index[half:], index[:half]] = -sin[:, :half]
    turn[:, index[:half], index[half:]] = sin[:, half:]
    return turn.to(device, dtype)


def attend(q: Any, keys: Any, values: Any, mask: Any) -> Any:
    """One query a row: `q` [rows, heads, D], `keys` and `values` [rows, kv_heads, length, D],
    `mask` [rows, 1, 1, length], bool or to be added, or None; [rows, heads x D].

    The query heads that share a key head become queries of that head: no copy of the keys for each
    of them, and no kernel that must know of groups.
    """
    rows, heads, width = q.shape
    grouped = q.view(rows, keys.shape[1], heads // keys.shape[1], width)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
    return out.reshape(rows, heads * width)


def attend_all(q: Any, keys: Any, values: Any, mask: Any) -> Any:
    """Every row is a query of one sequence: `q` [rows, heads, D], `keys` and `values` [kv_heads,
    length, D], `mask` bool [rows, length]; [rows, heads x D]."""
    rows, heads, width = q.shape
    groups = heads // keys.shape[0]
    grouped = q.view(rows, keys.shape[0], groups, width).permute(1, 2, 0, 3)
    out = F.scaled_dot_product_attention(
        grouped.reshape(keys.shape[0], groups * rows, width), keys, values,
        attn_mask=mask.repeat(groups, 1),
    )  # fmt: skip
    return out.view(keys.shape[0], groups, rows, width).permute(2, 0, 1, 3).reshape(rows, -1)
