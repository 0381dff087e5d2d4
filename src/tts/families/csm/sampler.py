"""Drawing codes: top-k and temperature for every row its own, with noise that belongs to the row.

The noise is a function of (seed, frame, codebook, id) and of nothing else, so what a slot says
depends neither on its neighbours nor on the device's random state, and a captured graph needs none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

MAX_TOP_K = 128
"""So many candidates are ordered in every draw, whatever the rows ask for."""

_LOW = 0xFFFFFFFF
_WINDOWS = 1 << 20


Pick: TypeAlias = Callable[..., Any]


class Sampler:
    """Draws one of the first `vocab` ids for each row.

    Gumbel-max: the largest of logit / temperature + noise is a draw from the softmax. The noise of
    a draw is a window into one fixed table of 2^20 + `vocab` values, its place a hash of (seed,
    frame, codebook): two operations a draw where hashing every candidate takes some twenty.
    """

    def __init__(self, codebooks: int, vocab: int, device: Any) -> None:
        self._codebooks = torch.arange(codebooks, device=device)
        self._k = min(MAX_TOP_K, vocab)
        table = gumbel(mix(torch.arange(_WINDOWS + vocab)))
        self._noise = table.to(device)
        self.pick = pick
        """`pick`, or what a compiler made of it."""

    def plan(self, seeds: Any, frames: Any, temperature: Any, top_k: Any) -> Draw:
        """What a frame's draws have in common. int64[B], int64[B], float32[B] (0: greedy),
        int64[B] (held to 1..MAX_TOP_K)."""
        greedy = temperature <= 0
        spot = mix(mix(seeds) + frames)[:, None] + self._codebooks * 0x632BE5AB
        window = mix(spot & _LOW) & (_WINDOWS - 1)
        # A greedy row breaks ties alike whatever its seed.
        window = torch.where(greedy[:, None], 0, window)
        kth = torch.where(greedy, 1, top_k).clamp(1, self._k) - 1
        sharpness = torch.where(greedy, 1.0, 1.0 / temperature.clamp_min(1e-3))
        return Draw(self.pick, self._noise, self._k, window, kth[:, None], sharpness[:, None])


def pick(values: Any, ids: Any, kth: Any, sharpness: Any, noise: Any, window: Any) -> Any:
    """Of candidates [B, k] in order, the largest of the first `kth` + 1 after noise; int64[B]."""
    kept = values >= values.gather(1, kth)
    scores = torch.where(kept, values * sharpness + noise.take(window + ids), float("-inf"))
    return ids.gather(1, scores.argmax(-1, keepdim=True))[:, 0]


class Draw:
    """One frame's draws, a codebook at a time."""

    def __init__(
        self, pick: Pick, noise: Any, k: int, window: Any, kth: Any, sharpness: Any
    ) -> None:
        self._pick = pick
        self._noise = noise
        self._k = k
        self._window = window
        self._kth = kth
        self._sharpness = sharpness
        self._largest: list[Any] = []

    def __call__(self, logits: Any, codebook: int) -> Any:
        """[B, vocab] to ids, int64[B].

        Where logits are not numbers the id is of no meaning, but still one of the vocabulary.
        """
        values, ids = torch.topk(logits.float(), self._k, dim=-1)
        # The largest is NaN or infinite if any is: NaN sorts first.
        self._largest.append(values[:, 0])
        window = self._window[:, codebook, None]
        return self._pick(values, ids, self._kth, self._sharpness, self._noise, window)

    def healthy(self) -> Any:
        """bool[B]: the logits of all draws so far were numbers."""
        return torch.stack(self._largest, 1).isfinite().all(1)


def mix(x: Any) -> Any:
    """int64 to 32 well mixed bits in an int64."""
    return _finalise((_finalise((x >> 32) & _LOW) ^ x) & _LOW)


def _finalise(x: Any) -> Any:
    """MurmurHash3's finaliser of 32 bits; products wrap, and the low half is right all the same."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _LOW
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _LOW
    return x ^ (x >> 16)


def gumbel(bits: Any) -> Any:
    """32 random bits to a standard Gumbel variate, float32."""
    uniform = (bits.double() + 0.5) / (1 << 32)
    return -(-uniform.log()).log().float()
