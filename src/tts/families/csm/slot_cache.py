"""Keys and values of the backbone: one row of fixed size for each slot, at fixed addresses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class KvPrefix:
    """The first `positions` positions of a slot, for other slots to start from.

    keys, values: [layers, kv_heads, positions, head_dim], a copy.
    """

    positions: int
    keys: Any
    values: Any


class SlotCache:
    """[layers, slots + 1, kv_heads, positions, head_dim] twice. The last row is scratch: a batch
    that is filled up to its bucket writes there."""

    def __init__(self, config: Any, slots: int, positions: int, device: Any, dtype: Any) -> None:
        shape = (
            config.num_hidden_layers,
            slots + 1,
            config.num_key_value_heads,
            positions,
            config.head_dim,
        )
        self.positions = positions
        # Not `empty`: what is masked still meets a weight of 0, and 0 times NaN is NaN.
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    @property
    def slot_bytes(self) -> int:
        return 2 * int(self.keys[:, 0].nbytes)

    def write(self, layer: int, slots: Any, positions: Any, keys: Any, values: Any) -> None:
        """One position a row: `slots`, `positions` int64[B], `keys`, `values` [B, kv_heads, D]."""
        self.keys[layer][slots, :, positions] = keys
        self.values[layer][slots, :, positions] = values

    def read(self, layer: int, slots: Any, length: int) -> tuple[Any, Any]:
        """The rows' first `length` positions, [B, kv_heads, length, D] twice, gathered."""
        return (
            self.keys[layer, :, :, :length].index_select(0, slots),
            self.values[layer, :, :, :length].index_select(0, slots),
        )

    def extend(
        self, layer: int, slot: int, position: int, keys: Any, values: Any
    ) -> tuple[Any, Any]:
        """Write `keys` and `values` [kv_heads, n, D] from `position` on; everything up to their
        end, [1, kv_heads, position + n, D] twice, in place."""
        end = position + keys.shape[1]
        self.keys[layer, slot, :, position:end] = keys
        self.values[layer, slot, :, position:end] = values
        rows = slice(slot, slot + 1)
        return self.keys[layer, rows, :, :end], self.values[layer, rows, :, :end]

    def save(self, slot: int, positions: int) -> KvPrefix:
        return KvPrefix(
            positions,
            self.keys[:, slot, :, :positions].clone(),
            self.values[:, slot, :, :positions].clone(),
        )

    def restore(self, slot: int, prefix: KvPrefix | None) -> None:
        """`prefix` and nothing after it: what a slot's last owner left may not be numbers."""
        kept = prefix.positions if prefix is not None else 0
        if prefix is not None:
            self.keys[:, slot, :, :kept] = prefix.keys
            self.values[:, slot, :, :kept] = prefix.values
        self.keys[:, slot, :, kept:] = 0
        self.values[:, slot, :, kept:] = 0
