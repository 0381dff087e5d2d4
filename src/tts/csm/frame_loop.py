"""The backbone and the depth decoder over slots: one frame for every row of a batch.

A frame is one backbone step on the row's input (codebook 0 from its logits), then one pass of the
depth decoder for each further codebook; its own codes are the row's next input. The loop uses the
modules of `CsmForConditionalGeneration` and none of its `generate`, which makes a cache a frame,
stops for nobody and cannot take a row in while it runs. tests/sesame/test_frame_loop.py holds the
two equal.

`step` is tensor operations on static shapes and no more: nothing waits for the device, so it can be
captured as a CUDA graph for each (batch, length).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from src.tts.csm.sampler import Sampler
from src.tts.csm.slot_cache import KvPrefix, SlotCache

if TYPE_CHECKING:
    from src.tts.csm.lora import LoraBank
    from src.tts.csm.weights import CsmWeights


@dataclass(slots=True)
class StepBatch:
    """What a step is told of its rows, each a tensor on the loop's device.

    A row that fills a batch up has the scratch slot, position 0 and adapter 0.
    """

    slots: Any  # int64[B]
    positions: Any  # int64[B]: where the row's input goes
    seeds: Any  # int64[B]
    frames: Any  # int64[B]: how many frames the slot has drawn
    temperature: Any  # float32[B]; 0 is greedy
    top_k: Any  # int64[B], 1 to sampler.MAX_TOP_K
    adapters: Any  # int64[B]; 0 is the base alone

    @classmethod
    def of(
        cls,
        slots: Sequence[int],
        positions: Sequence[int],
        *,
        seeds: Sequence[int] | None = None,
        frames: Sequence[int] | None = None,
        temperature: float | Sequence[float] = 0.9,
        top_k: int | Sequence[int] = 50,
        adapters: Sequence[int] | None = None,
        device: Any = "cpu",
    ) -> StepBatch:
        """From host numbers; one temperature or top_k is everybody's."""
        n = len(slots)
        nothing = [0] * n
        temperatures = [temperature] * n if isinstance(temperature, (int, float)) else temperature
        top_ks = [top_k] * n if isinstance(top_k, int) else top_k

        def ints(values: Sequence[int]) -> Any:
            return torch.tensor(list(values), dtype=torch.int64, device=device)

        return cls(
            slots=ints(slots),
            positions=ints(positions),
            seeds=ints(seeds or nothing),
            frames=ints(frames or nothing),
            temperature=torch.tensor(list(temperatures), dtype=torch.float32, device=device),
            top_k=ints(top_ks),
            adapters=ints(adapters or nothing),
        )


@dataclass(slots=True)
class StepOut:
    """In the order of the batch's rows, on the device."""

    codes: Any  # int64[B, codebooks], each below the codec's vocabulary, whatever happened
    ended: Any  # bool[B]: the mark that ends a segment, no sound
    healthy: Any  # bool[B]: False where logits were not numbers


class FrameLoop:
    """One model's slots. Not thread-safe: all calls come from the engine's thread.

    `inputs` [slots + 1, hidden] holds what each slot's next step reads; a step leaves there what
    it drew. `bank`: the LoRA adapters, or None.
    """

    def __init__(self, weights: CsmWeights, *, slots: int, positions: int) -> None:
        self.weights = weights
        self.slots = slots
        self.positions = positions
        self.bank: LoraBank | None = None
        model, device, dtype = weights.model, weights.device, weights.dtype
        config = model.config
        self._backbone = model.backbone_model
        self._depth = model.depth_decoder.model
        self._end_code = int(config.codebook_eos_token_id)
        self._offsets = torch.arange(weights.codebooks, device=device) * weights.vocab
        self._arange = torch.arange(positions, device=device)
        self._rope = _rope(self._backbone.rotary_emb, positions, device, dtype)
        self._depth_rope = _rope(self._depth.rotary_emb, weights.codebooks, device, dtype)
        self._cache = SlotCache(config, slots, positions, device, dtype)
        self._sampler = Sampler(weights.codebooks, weights.codec_vocab, device)
        self.inputs = torch.zeros(slots + 1, weights.hidden, device=device, dtype=dtype)
        # Ids that the codec does not have are never drawn: their logits are never computed.
        valid = weights.codec_vocab
        with torch.no_grad():
            self._head = model.lm_head.weight[:valid]
            # Rows of 2051 columns are not aligned for the fast kernels; so, a copy.
            heads = model.depth_decoder.codebooks_head.weight[:, :, :valid]
            self._heads = heads.transpose(1, 2).contiguous()

    @property
    def slot_bytes(self) -> int:
        """Memory that one more slot takes."""
        return self._cache.slot_bytes + int(self.inputs[0].nbytes)

    def embed_text(self, ids: Sequence[int]) -> Any:
        """Token ids to [n, hidden]."""
        with torch.no_grad():
            return self.weights.model.embed_text_tokens(
                torch.tensor(list(ids), dtype=torch.int64, device=self.weights.device)
            )

    def embed_frames(self, codes: Any) -> Any:
        """int64[n, codebooks] to [n, hidden]; the frame of zeros is the mark of a segment's end."""
        with torch.no_grad():
            return self._embed(codes)

    def prefill(self, slot: int, position: int, embeddings: Any, adapter: int = 0) -> None:
        """Read [n, hidden] into the slot's keys and values from `position` on.

        Nothing comes out: the last embedding of what is to be answered goes to `inputs`.
        """
        n = embeddings.shape[0]
        self._check(slot, position, n)
        if n == 0:
            return
        with torch.no_grad():
            if self.bank is not None:
                self.bank.select(torch.tensor([adapter], device=self.weights.device))
            self._prefill(slot, position, embeddings.to(self.inputs.dtype)[None])

    def save_prefix(self, slot: int, n: int) -> KvPrefix:
        """A copy of the slot's first `n` positions."""
        self._check(slot, 0, n)
        with torch.no_grad():
            return self._cache.save(slot, n)

    def restore(self, slot: int, prefix: KvPrefix | None) -> None:
        """A new owner's slot: `prefix`, or nothing, and no trace of the last owner."""
        self._check(slot, 0, prefix.positions if prefix is not None else 0)
        with torch.no_grad():
            self._cache.restore(slot, prefix)
            self.inputs[slot] = 0

    def step(self, batch: StepBatch, length: int | None = None) -> StepOut:
        """Draw a frame for every row and make it the row's input.

        `length`: so many positions of the cache are looked at; more than the largest of
        `batch.positions`, and the same for all rows.
        """
        with torch.no_grad():
            if self.bank is not None:
                self.bank.select(batch.adapters)
            hidden = self._backbone_step(batch, self.positions if length is None else length)
            codes, healthy = self._depth_pass(hidden, batch)
            self.inputs.index_copy_(0, batch.slots, self._embed(codes))
            # As `generate` tests it: of 32 codes, the first 31. The last is drawn all the same.
            ended = (codes[:, :-1] == self._end_code).all(-1) & healthy
            return StepOut(codes, ended, healthy)

    def _backbone_step(self, batch: StepBatch, length: int) -> Any:
        """[B, hidden]: what the frame is drawn from."""
        x = self.inputs[batch.slots][:, None]
        cos, sin = (table[batch.positions][:, None] for table in self._rope)
        seen = self._arange[:length] <= batch.positions[:, None]
        mask = seen[:, None, None]
        for index, layer in enumerate(self._backbone.layers):
            q, k, v = _project(layer, x, cos, sin)
            self._cache.write(index, batch.slots, batch.positions, k[:, :, 0], v[:, :, 0])
            keys, values = self._cache.read(index, batch.slots, length)
            x = _finish(layer, x, _attend(q, keys, values, mask))
        return self._backbone.norm(x)[:, 0]

    def _prefill(self, slot: int, position: int, x: Any) -> None:
        end = position + x.shape[1]
        cos, sin = (table[position:end][None] for table in self._rope)
        mask = self._arange[:end] <= self._arange[position:end, None]
        last = len(self._backbone.layers) - 1
        for index, layer in enumerate(self._backbone.layers):
            q, k, v = _project(layer, x, cos, sin)
            keys, values = self._cache.extend(index, slot, position, k[0], v[0])
            if index < last:  # nobody reads what the last layer makes of it
                x = _finish(layer, x, _attend(q, keys, values, mask[None, None]))

    def _depth_pass(self, hidden: Any, batch: StepBatch) -> tuple[Any, Any]:
        """[B, hidden] to a frame's codes [B, codebooks], and whether all logits were numbers."""
        draw = self._sampler.plan(batch.seeds, batch.frames, batch.temperature, batch.top_k)
        table, project = self._depth.embed_tokens.weight, self._depth.inputs_embeds_projector
        caches = [self._frame_cache(hidden.shape[0]) for _ in self._depth.layers]
        code, healthy = draw(F.linear(hidden, self._head), 0)
        codes = [code]
        x = torch.stack((hidden, F.embedding(code, table)), 1)
        start = 0
        for codebook in range(1, self.weights.codebooks):
            x = self._depth_step(project(x), caches, start)
            code, sound = draw(F.linear(x, self._heads[codebook - 1]), codebook)
            codes.append(code)
            healthy = healthy & sound
            start = codebook + 1
            x = F.embedding(code + codebook * self.weights.vocab, table)[:, None]
        return torch.stack(codes, 1), healthy

    def _depth_step(self, x: Any, caches: Sequence[tuple[Any, Any]], start: int) -> Any:
        """[B, n, depth hidden] at the places from `start` on; the last one's output, [B, hidden].

        n is 2 for the first, which takes the backbone's output and codebook 0, then 1.
        """
        end = start + x.shape[1]
        cos, sin = (table[start:end][None] for table in self._depth_rope)
        mask = None if end - start == 1 else self._arange[:end] <= self._arange[start:end, None]
        for layer, (keys, values) in zip(self._depth.layers, caches, strict=True):
            q, k, v = _project(layer, x, cos, sin)
            keys[:, :, start:end] = k
            values[:, :, start:end] = v
            x = _finish(layer, x, _attend(q, keys[:, :, :end], values[:, :, :end], mask))
        return self._depth.norm(x[:, -1])

    def _frame_cache(self, rows: int) -> tuple[Any, Any]:
        config = self._depth.config
        shape = (rows, config.num_key_value_heads, self.weights.codebooks, config.head_dim)
        like = self.inputs
        return like.new_empty(shape), like.new_empty(shape)

    def _embed(self, codes: Any) -> Any:
        table = self._backbone.embed_tokens.embed_audio_tokens.weight
        return F.embedding(codes + self._offsets, table).sum(1)

    def _check(self, slot: int, position: int, n: int) -> None:
        if not 0 <= slot <= self.slots:
            raise ValueError(f"there is no slot {slot} of {self.slots}")
        if position < 0 or position + n > self.positions:
            raise ValueError(f"positions {position} to {position + n} of {self.positions}")


def _rope(rotary: Any, positions: int, device: Any, dtype: Any) -> tuple[Any, Any]:
    """cos and sin, [positions, head_dim] each, from frequencies in float32: a module that was cast
    has lost its own."""
    fresh = type(rotary)(rotary.config)
    places = torch.arange(positions)[None]
    cos, sin = fresh(torch.zeros(1), places)
    return cos[0].to(device, dtype), sin[0].to(device, dtype)


def _project(layer: Any, x: Any, cos: Any, sin: Any) -> tuple[Any, Any, Any]:
    """Queries [B, heads, n, D], keys and values [B, kv_heads, n, D] of [B, n, hidden]."""
    attention = layer.self_attn
    y = layer.input_layernorm(x)
    shape = (*y.shape[:-1], -1, attention.head_dim)
    q = attention.q_proj(y).view(shape).transpose(1, 2)
    k = attention.k_proj(y).view(shape).transpose(1, 2)
    v = attention.v_proj(y).view(shape).transpose(1, 2)
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def _rotate(x: Any, cos: Any, sin: Any) -> Any:
    """Rotary position embedding; cos, sin [B or 1, n, D]."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def _attend(q: Any, keys: Any, values: Any, mask: Any) -> Any:
    """[B, n, heads x D]. The query heads that share a key head become queries of that head: no copy
    of the keys for each of them, and no kernel that must know of groups."""
    rows, heads, n, width = q.shape
    groups = heads // keys.shape[1]
    q = q.reshape(rows, keys.shape[1], groups * n, width)
    if mask is not None and n > 1:
        mask = mask.repeat(*[1] * (mask.ndim - 2), groups, 1)
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    return out.reshape(rows, heads, n, width).transpose(1, 2).reshape(rows, n, heads * width)


def _finish(layer: Any, x: Any, attended: Any) -> Any:
    """The layer's output from its input and what its attention saw."""
    x = x + layer.self_attn.o_proj(attended)
    return x + layer.mlp(layer.post_attention_layernorm(x))
