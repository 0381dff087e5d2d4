"""What holds a run of MeloTTS's network in bounds: it ends soon after a cancel, and it ends.

The run is one call of the package's. Hooks on its parts look at the cancel token and at the
durations; the vocoder's layers, of which one alone may take a tenth of a second, go in pieces.
torch is imported inside the functions only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

# Speech has ten to fifteen phonemes a second, each with a blank beside it; this is a third of that.
_LONGEST_S_PER_SYMBOL = 0.15
_LONGEST_S = 2.0

# 1 MB of float32: it stays in a core's cache, so that pieces are no slower than the whole.
_PIECE = 2**18
# Of the widest layers, where the borders, computed twice, would cost more.
_SHORTEST_PIECE = 1024

Look = Callable[[], None]
"""Raises Stopped when the run was cancelled."""


class Stopped(BaseException):
    """The run was told to end. No fault, so that nobody on its way takes it for one."""


def look_between_layers(part: Any, look: Look) -> None:
    """Before each module of `part` that holds no others."""
    for module in part.modules():
        if next(module.children(), None) is None:
            module.register_forward_pre_hook(lambda *_: look())


def hold_durations(predictor: Any, frames_per_s: float) -> None:
    predictor.register_forward_hook(lambda _, __, out: bound_durations(out, frames_per_s))


def bound_durations(log_frames: Any, frames_per_s: float) -> Any:
    """Logarithms of frames per symbol, [1, 1, symbols]; scaled down where they are beyond speech.

    The flow's memory grows with the square of their sum, so that broken weights could take it all.
    Both predictors' being in bounds, so is their weighted mean, whatever the weight.
    """
    log_frames = log_frames.nan_to_num(nan=0.0)
    most = frames_per_s * (_LONGEST_S + _LONGEST_S_PER_SYMBOL * log_frames.shape[-1])
    beyond = log_frames.logsumexp(-1, keepdim=True) - math.log(most)
    return log_frames - beyond.clamp(min=0.0)


def convolve_in_pieces(part: Any, look: Look) -> None:
    """Every convolution of `part`, with a look before each piece. For the processor: elsewhere
    their time is not ours, and more of them would cost."""
    import torch

    for module in part.modules():
        if isinstance(module, torch.nn.Conv1d):
            module.forward = partial(_convolved, module, look)
        elif isinstance(module, torch.nn.ConvTranspose1d):
            module.forward = partial(_upsampled, module, look)


def _convolved(conv: Any, look: Look, given: Any) -> Any:
    """[1, channels, samples]: what `conv`, of stride 1, makes of it."""
    from torch.nn.functional import conv1d, pad

    before, inside = conv.padding[0], given.shape[-1]
    reach = conv.dilation[0] * (conv.kernel_size[0] - 1)
    out = given.new_empty(given.shape[0], conv.out_channels, inside + 2 * before - reach)
    for begin, end in _pieces(out.shape[-1], conv.in_channels):
        look()
        first, last = begin - before, end - before + reach
        piece = given[..., max(first, 0) : min(last, inside)]
        if first < 0 or last > inside:
            piece = pad(piece, (max(-first, 0), max(last - inside, 0)))
        out[..., begin:end] = conv1d(
            piece, conv.weight, conv.bias, dilation=conv.dilation, groups=conv.groups
        )
    return out


def _upsampled(conv: Any, look: Look, given: Any) -> Any:
    """[1, channels, samples]: what `conv` makes of it, `stride` times as many."""
    from torch.nn.functional import conv_transpose1d

    stride, kernel, inside = conv.stride[0], conv.kernel_size[0], given.shape[-1]
    reach = -(-kernel // stride)
    length = (inside - 1) * stride - 2 * conv.padding[0] + kernel
    out = given.new_empty(given.shape[0], conv.out_channels, length)
    for begin, end in _pieces(inside, conv.in_channels):
        look()
        first, last = max(begin - reach, 0), min(end + reach, inside)
        made = conv_transpose1d(
            given[..., first:last], conv.weight, conv.bias, conv.stride, conv.padding
        )
        until = length if end == inside else end * stride
        at = first * stride
        out[..., begin * stride : until] = made[..., begin * stride - at : until - at]
    return out


def _pieces(samples: int, channels: int) -> Iterator[tuple[int, int]]:
    step = max(_SHORTEST_PIECE, _PIECE // channels)
    for begin in range(0, samples, step):
        yield begin, min(begin + step, samples)
