"""The backbone and the depth decoder over slots: one frame for every row of a batch.

A frame is one backbone step on the row's input (codebook 0 from its logits), then one pass of the
depth decoder for each further codebook; its own codes are the row's next input. The loop uses the
modules of `CsmForConditionalGeneration` and none of its `generate`, which makes a cache a frame,
stops for nobody and cannot take a row in while it runs. tests/families/sesame/test_frame_loop.py
holds the two equal.

`step` is tensor operations on static shapes and no more: nothing waits for the device, so it can be
captured as a CUDA graph for each (batch, length).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from src.tts.families.csm.layers import Layer, Norm, attend, attend_all, gated, rotations
from src.tts.families.csm.lora import add_adapters
from src.tts.families.csm.sampler import Sampler, pick
from src.tts.families.csm.slot_cache import KvPrefix, SlotCache

if TYPE_CHECKING:
    from src.tts.families.csm.lora import LoraBank
    from src.tts.families.csm.weights import CsmWeights


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


@dataclass(frozen=True, slots=True)
class FramePlace:
    """Views of one depth layer's keys and values, for one place of the frame."""

    key: Any  # [B, kv_heads, D], where the place's own goes
    value: Any
    keys: Any  # [B, kv_heads, place + 1, D], what it sees
    values: Any

    @classmethod
    def all_of(cls, cache: Any) -> list[FramePlace]:
        """`cache` [2, B, kv_heads, places, D]"""
        keys, values = cache
        return [
            cls(keys[:, :, i], values[:, :, i], keys[:, :, : i + 1], values[:, :, : i + 1])
            for i in range(keys.shape[2])
        ]


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
        self._layers = [Layer(layer) for layer in self._backbone.layers]
        self._depth_layers = [Layer(layer) for layer in self._depth.layers]
        self._norm, self._depth_norm = Norm(self._backbone.norm), Norm(self._depth.norm)
        self._end_code = int(config.codebook_eos_token_id)
        self._offsets = torch.arange(weights.codebooks, device=device) * weights.vocab
        self._arange = torch.arange(positions, device=device)
        self._turns = rotations(self._backbone.rotary_emb, positions, device, dtype)
        depth_turns = rotations(self._depth.rotary_emb, weights.codebooks, device, dtype)
        self._depth_turns = depth_turns.unbind()
        self._frame_caches: dict[int, list[list[FramePlace]]] = {}
        self._cache = SlotCache(config, slots, positions, device, dtype)
        self._sampler = Sampler(weights.codebooks, weights.codec_vocab, device)
        self.inputs = torch.zeros(slots + 1, weights.hidden, device=device, dtype=dtype)
        # Ids that the codec does not have are never drawn: their logits are never computed.
        valid = weights.codec_vocab
        with torch.no_grad():
            self._head = model.lm_head.weight[:valid].t()
            # Rows of 2051 columns are not aligned for the fast kernels; so, a copy.
            heads = model.depth_decoder.codebooks_head.weight[:, :, :valid]
            self._heads = heads.transpose(1, 2).contiguous().transpose(1, 2).unbind()
            self._depth_in = self._depth.inputs_embeds_projector.weight.t()
            self._code_tables = self._depth.embed_tokens.weight.split(weights.vocab)

    @property
    def slot_bytes(self) -> int:
        """Memory that one more slot takes."""
        return self._cache.slot_bytes + int(self.inputs[0].nbytes)

    def fuse(self, compiler: Callable[[Any], Any]) -> None:
        """Have the parts between the matrix products compiled. On a GPU: on a processor a call of
        something compiled costs what such a small part takes."""
        self._sampler.pick = compiler(pick)
        gate = compiler(gated)
        for layer in (*self._layers, *self._depth_layers):
            layer.gate = gate

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
            self._prefill(slot, position, embeddings.to(self.inputs.dtype))

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

    @property
    def _adapted(self) -> bool:
        return self.bank is not None and self.bank.active

    def _backbone_step(self, batch: StepBatch, length: int) -> Any:
        """[B, hidden]: what the frame is drawn from."""
        adapted = self._adapted
        x = self.inputs[batch.slots]
        turns = self._turns[batch.positions]
        seen = self._arange[:length] <= batch.positions[:, None]
        # What is added to the scores: made of booleans by every layer anew, it takes as long.
        mask = torch.zeros_like(seen, dtype=x.dtype).masked_fill_(~seen, float("-inf"))
        mask = mask[:, None, None]
        for index, layer in enumerate(self._layers):
            q, k, v = layer.project(x, turns, adapted)
            self._cache.write(index, batch.slots, batch.positions, k, v)
            keys, values = self._cache.read(index, batch.slots, length)
            x = layer.finish(x, attend(q, keys, values, mask), adapted)
        return self._norm(x)

    def _prefill(self, slot: int, position: int, x: Any) -> None:
        adapted = self._adapted
        end = position + x.shape[0]
        turns = self._turns[position:end]
        mask = self._arange[:end] <= self._arange[position:end, None]
        for index, layer in enumerate(self._layers):
            q, k, v = layer.project(x, turns, adapted)
            keys, values = self._cache.extend(
                index, slot, position, k.transpose(0, 1), v.transpose(0, 1)
            )
            if layer is not self._layers[-1]:  # nobody reads what the last makes of it
                x = layer.finish(x, attend_all(q, keys[0], values[0], mask), adapted)

    def _depth_pass(self, hidden: Any, batch: StepBatch) -> tuple[Any, Any]:
        """[B, hidden] to a frame's codes [B, codebooks], and whether all logits were numbers."""
        draw = self._sampler.plan(batch.seeds, batch.frames, batch.temperature, batch.top_k)
        places = self._frame_cache(hidden.shape[0])
        self._depth_step(hidden, 0, places)
        codes = [draw(torch.mm(hidden, self._head), 0)]
        for codebook in range(1, self.weights.codebooks):
            x = F.embedding(codes[-1], self._code_tables[codebook - 1])
            x = self._depth_norm(self._depth_step(x, codebook, places))
            codes.append(draw(torch.mm(x, self._heads[codebook - 1]), codebook))
        return torch.stack(codes, 1), draw.healthy()

    def _depth_step(self, x: Any, place: int, places: list[list[FramePlace]]) -> Any:
        """[B, hidden] at a place of the frame: the backbone's output at 0, then a code at each;
        [B, depth hidden]."""
        adapted = self._adapted
        projector = self._depth.inputs_embeds_projector
        read = x
        x = torch.mm(read, self._depth_in)
        if adapted:
            add_adapters(x, read, projector)
        for layer, cache in zip(self._depth_layers, places, strict=True):
            q, k, v = layer.project(x, self._depth_turns[place], adapted)
            at = cache[place]
            at.key.copy_(k)
            at.value.copy_(v)
            x = layer.finish(x, attend(q, at.keys, at.values, None), adapted)
        return x

    def _frame_cache(self, rows: int) -> list[list[FramePlace]]:
        """Of each layer, of each place. Kept: a step has no time to make so many views, and a
        recorded one finds its memory again."""
        if rows not in self._frame_caches:
            config = self._depth.config
            shape = (2, rows, config.num_key_value_heads, self.weights.codebooks, config.head_dim)
            self._frame_caches[rows] = [
                FramePlace.all_of(self.inputs.new_zeros(shape)) for _ in self._depth_layers
            ]
        return self._frame_caches[rows]

    def _embed(self, codes: Any) -> Any:
        table = self._backbone.embed_tokens.embed_audio_tokens.weight
        return F.embedding(codes + self._offsets, table).sum(1)

    def _check(self, slot: int, position: int, n: int) -> None:
        if not 0 <= slot <= self.slots:
            raise ValueError(f"there is no slot {slot} of {self.slots}")
        if position < 0 or position + n > self.positions:
            raise ValueError(f"positions {position} to {position + n} of {self.positions}")
