"""Codes to sound a frame at a time, exactly as the codec decodes them all in one go.

Mimi (arXiv 2410.00037) is causal, so a frame's samples are final as soon as its codes are known. A
layer needs of the past: a convolution its last input columns, a transposed one the part of its
output that reaches into the next frame, attention the keys and values of its window. Those are kept
here per slot, in tensors of fixed address: one step costs one frame of work however long the stream
is, and can be captured as a CUDA graph. transformers' own `decode` keeps the attention's part only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch.nn import functional
from transformers.models.mimi.modeling_mimi import (
    MimiConv1d,
    MimiConvTranspose1d,
    MimiResnetBlock,
)

from src.audio.pcm import Float32
from src.rpc.errors import CorruptModel

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import MimiModel

Stage: TypeAlias = "Callable[[Tensor, _Tails], Tensor]"

# Attention kernels want rows of the mask that are a multiple of this.
_ALIGN = 8


class MimiStream:
    """The decoder of `codec` over `slots` streams; row `slots` of every tensor is scratch.

    Nothing here waits for the device. Calls come from one thread. Raises CorruptModel for a codec
    that cannot be streamed without looking ahead.
    """

    def __init__(self, codec: MimiModel, *, slots: int) -> None:
        _check_causal(codec)
        weight = codec.decoder.decoder_seanet.layers[0].conv.weight
        layout = _TailLayout()
        self._codec = codec
        self._dtype = weight.dtype
        self._latents = _Latents(codec)
        self._upsample = _UpConv(codec.decoder.upsample, layout)
        self._seanet = [_stage(module, layout) for module in codec.decoder.decoder_seanet.layers]
        self._layout = layout
        steps = self._upsample.stride
        self._attention = _WindowAttention(codec.decoder.decoder_transformer, slots, steps, weight)
        self._tails = weight.new_zeros(slots + 1, layout.size)
        self._positions = torch.zeros(slots + 1, dtype=torch.int64, device=weight.device)
        self._steps = torch.arange(steps, device=weight.device)
        self.frame_samples = _frame_samples(codec)

    @property
    def slot_bytes(self) -> int:
        """Memory that one more stream takes."""
        return int(self._tails[0].nbytes) + self._attention.slot_bytes

    def reset(self, slot: int) -> None:
        """The slot's next frame is the first of a stream."""
        with torch.no_grad():
            self._tails[slot].zero_()
            self._positions[slot].zero_()

    def step(self, slots: Tensor, codes: Tensor, keep: Tensor) -> Tensor:
        """One frame of each row's stream.

        `slots` int64 [B], different where `keep`; `codes` int64 [B, codebooks], out of range is
        clamped; `keep` bool [B]: a row without it leaves its slot as it was and gives samples of no
        meaning. Returns float32 [B, frame_samples] as the codec makes them: not clipped to [-1, 1].
        """
        # Not inference mode: torch compiles no step in which its tensors meet others.
        with torch.no_grad():
            # A row that is not kept writes where nobody reads.
            target = torch.where(keep, slots, self._tails.shape[0] - 1)
            tails = _Tails(self._layout, self._tails[slots])
            positions = self._positions[slots][:, None] + self._steps
            x = self._upsample(self._latents(codes), tails)
            x = self._attention(x.transpose(1, 2), slots, target, positions).transpose(1, 2)
            for stage in self._seanet:
                x = stage(x, tails)
            # Last, so that a step that failed can be made again: keys are written by position.
            self._tails[target] = tails.packed()
            self._positions.index_add_(0, slots, keep * len(self._steps))
            return x[:, 0].float()

    def encode(self, samples: Float32) -> Tensor:
        """A mono recording at the codec's rate to codes, int64 [frames, codebooks].

        Of no slot, and as slow as it is long: for voice prompts, before they are needed.
        """
        with torch.no_grad():
            sound = torch.tensor(samples, dtype=self._dtype, device=self._tails.device)
            return self._codec.encode(sound[None, None]).audio_codes[0].T.contiguous()


class _Latents:
    """Codes [B, K] to latents [B, hidden, 1]: one look-up for all codebooks instead of one each."""

    def __init__(self, codec: MimiModel) -> None:
        quantizer = codec.quantizer
        halves = (
            quantizer.semantic_residual_vector_quantizer,
            quantizer.acoustic_residual_vector_quantizer,
        )
        books = [layer.codebook for half in halves for layer in half.layers]
        with torch.no_grad():
            self._table = torch.cat([_entries(book) for book in books])
        self._entries = int(quantizer.codebook_size)
        self._semantic = int(quantizer.num_semantic_quantizers)
        self._projections = [half.output_proj for half in halves]
        self._first = torch.arange(len(books), device=self._table.device) * self._entries

    def __call__(self, codes: Tensor) -> Tensor:
        valid = codes.clamp(0, self._entries - 1) + self._first[: codes.shape[1]]
        vectors = functional.embedding(valid, self._table)
        semantic, acoustic = (
            part.sum(dim=1)[..., None]
            for part in (vectors[:, : self._semantic], vectors[:, self._semantic :])
        )
        return self._project(0, semantic) + self._project(1, acoustic)

    def _project(self, half: int, x: Tensor) -> Tensor:
        projection = self._projections[half]
        return x if projection is None else projection(x)


def _entries(codebook: nn.Module) -> Tensor:
    """[entries, dimension]; the codebook's own property would keep a second copy for ever."""
    out: Tensor = codebook.embed_sum / codebook.cluster_usage.clamp(min=codebook.epsilon)[:, None]
    return out


class _TailLayout:
    """Where each convolution's tail lies in a slot's row: one gather and one scatter serve all."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int]] = []

    def reserve(self, channels: int, columns: int) -> int:
        self.shapes.append((channels, columns))
        return len(self.shapes) - 1

    @property
    def size(self) -> int:
        return sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        return [channels * columns for channels, columns in self.shapes]


class _Tails:
    """What one step reads of the frame before and leaves for the next; `packed` is [B, size]."""

    def __init__(self, layout: _TailLayout, packed: Tensor) -> None:
        parts = packed.split(layout.sizes, dim=1)
        shapes = layout.shapes
        self.parts = [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]

    def packed(self) -> Tensor:
        return torch.cat([part.flatten(1) for part in self.parts], dim=1)


class _Conv:
    """Keeps as many input columns as its kernel reaches back; zeros at first, as its padding is."""

    def __init__(self, module: MimiConv1d, layout: _TailLayout) -> None:
        self._conv = module.conv
        self._reach = (self._conv.kernel_size[0] - 1) * self._conv.dilation[0]
        self._tail = layout.reserve(self._conv.in_channels, self._reach) if self._reach else None

    def __call__(self, x: Tensor, tails: _Tails) -> Tensor:
        if self._tail is not None:
            x = torch.cat([tails.parts[self._tail], x], dim=-1)
            tails.parts[self._tail] = x[..., -self._reach :]
        out: Tensor = self._conv(x)
        return out


class _UpConv:
    """A kernel of two strides reaches one stride into the next column, so the second half of what
    the last column makes is kept. As a matrix product: the ready-made one is slow at few columns.
    """

    def __init__(self, module: MimiConvTranspose1d, layout: _TailLayout) -> None:
        conv = module.conv
        self._conv = conv
        self.stride = int(conv.stride[0])
        self._tail = layout.reserve(conv.out_channels, self.stride)

    def __call__(self, x: Tensor, tails: _Tails) -> Tensor:
        conv = self._conv
        columns = x.unflatten(1, (conv.groups, -1))
        weight = conv.weight.unflatten(0, (conv.groups, -1))
        made = torch.einsum("bgcn,gcok->bngok", columns, weight).flatten(2, 3)
        now, later = made.split(self.stride, dim=-1)
        earlier = torch.cat([tails.parts[self._tail][:, None], later[:, :-1]], dim=1)
        tails.parts[self._tail] = later[:, -1]
        out = (now + earlier).transpose(1, 2).flatten(2)
        return out if conv.bias is None else out + conv.bias[:, None]


class _Resnet:
    def __init__(self, module: MimiResnetBlock, layout: _TailLayout) -> None:
        self._block = [_stage(layer, layout) for layer in module.block]
        self._shortcut = _stage(module.shortcut, layout)

    def __call__(self, x: Tensor, tails: _Tails) -> Tensor:
        out = x
        for stage in self._block:
            out = stage(out, tails)
        return self._shortcut(x, tails) + out


class _Pointwise:
    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, x: Tensor, tails: _Tails) -> Tensor:
        out: Tensor = self._module(x)
        return out


def _stage(module: nn.Module, layout: _TailLayout) -> Stage:
    for kind, stage in (
        (MimiConv1d, _Conv),
        (MimiConvTranspose1d, _UpConv),
        (MimiResnetBlock, _Resnet),
    ):
        if isinstance(module, kind):
            return stage(module, layout)
    return _Pointwise(module)


class _WindowAttention:
    """The decoder's transformer over a ring of keys and values per slot.

    A query at position q sees q - window + 1 .. q, as transformers 5's mask has it. `steps` queries
    come at once, so the ring is longer than the window: the last must not overwrite what the first
    still sees. What a former stream left in the ring is masked by position, never cleared.
    """

    def __init__(self, transformer: nn.Module, slots: int, steps: int, like: Tensor) -> None:
        config = transformer.config
        self._transformer = transformer
        self._window = int(config.sliding_window)
        self._ring = _ALIGN * math.ceil((self._window + steps - 1) / _ALIGN)
        shape = (slots + 1, self._ring, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        self._keys = [like.new_zeros(shape) for _ in layers]
        self._values = [like.new_zeros(shape) for _ in layers]
        self._places = torch.arange(self._ring, device=like.device)

    @property
    def slot_bytes(self) -> int:
        return sum(int(ring[0].nbytes) for ring in (*self._keys, *self._values))

    def __call__(self, x: Tensor, slots: Tensor, target: Tensor, positions: Tensor) -> Tensor:
        """`x` [B, steps, hidden] at `positions` [B, steps] to the same shape; keys and values are
        read from `slots` [B] and written to `target` [B]."""
        rotation = self._transformer.rotary_emb(x, positions)
        visible = self._visible(positions)
        written = (target[:, None], positions % self._ring)
        for index, layer in enumerate(self._transformer.layers):
            mixed = self._attend(index, layer, x, slots, written, rotation, visible)
            x = x + layer.self_attn_layer_scale(mixed)
            x = x + layer.mlp_layer_scale(layer.mlp(layer.post_attention_layernorm(x)))
        return x

    def _visible(self, positions: Tensor) -> Tensor:
        """bool [B, 1, steps, ring]: which places of the ring a query sees."""
        newest = positions[:, -1:]
        held = newest - (newest - self._places) % self._ring
        query, key = positions[:, :, None], held[:, None, :]
        return ((key >= 0) & (key <= query) & (key > query - self._window))[:, None]

    def _attend(
        self,
        index: int,
        layer: nn.Module,
        x: Tensor,
        slots: Tensor,
        written: tuple[Tensor, Tensor],
        rotation: tuple[Tensor, Tensor],
        visible: Tensor,
    ) -> Tensor:
        attention = layer.self_attn
        x = layer.input_layernorm(x)
        heads = (*x.shape[:2], -1, attention.head_dim)
        query = _rotate(attention.q_proj(x).view(heads), rotation)
        self._keys[index][written] = _rotate(attention.k_proj(x).view(heads), rotation)
        self._values[index][written] = attention.v_proj(x).view(heads)
        mixed = functional.scaled_dot_product_attention(
            query.transpose(1, 2),
            self._keys[index][slots].transpose(1, 2),
            self._values[index][slots].transpose(1, 2),
            attn_mask=visible,
            enable_gqa=True,
        )
        out: Tensor = attention.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding of `x` [B, steps, heads, head_dim] in halves, as Llama has it."""
    cos, sin = (part[:, :, None] for part in rotation)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _frame_samples(codec: MimiModel) -> int:
    ups = [m for m in codec.decoder.decoder_seanet.layers if isinstance(m, MimiConvTranspose1d)]
    strides = [module.conv.stride[0] for module in (codec.decoder.upsample, *ups)]
    return math.prod(strides)


def _check_causal(codec: MimiModel) -> None:
    config = codec.config
    facts = {
        "use_causal_conv": (config.use_causal_conv, True),
        "pad_mode": (config.pad_mode, "constant"),
        "trim_right_ratio": (config.trim_right_ratio, 1.0),
        "upsampled": (codec.decoder.upsample is not None, True),
    }
    for name, (found, needed) in facts.items():
        if found != needed:
            raise CorruptModel(f"the codec cannot be streamed: {name} is {found}, not {needed}")
