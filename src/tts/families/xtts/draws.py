"""A stream's own chance: what is said does not depend on who else speaks, and can be repeated.

The package draws every code from torch's one generator, which the whole process shares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def drawing(generator: Any, *, temperature: float, top_k: int, top_p: float) -> dict[str, Any]:
    """Keywords of `inference_stream`, in place of these three: the same candidates for each code,
    of which the generator draws.

    To the package it is not sampling, or transformers would want to pick candidates after us.
    """
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    steps = [
        TemperatureLogitsWarper(temperature),
        TopKLogitsWarper(top_k),
        TopPLogitsWarper(top_p),
        Draw(generator),
    ]
    unused = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
    return {**unused, "do_sample": False, "logits_processor": steps}


class Draw:
    """The last step. transformers looks at its signature for every code, which of a plain function
    costs half a millisecond."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator

    def __call__(self, input_ids: Any, scores: Any) -> Scores:
        return Scores(scores, self._generator)


class Scores:
    """Scores of all codes, float32 (rows, codes), that are drawn from by a generator of their own.

    The package asks torch for their softmax and then for a draw, and torch asks them first. Were
    the package to ask for anything else, torch would refuse them.
    """

    def __init__(self, scores: Any, generator: Any) -> None:
        self._scores = scores
        self._generator = generator

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        import torch

        if function is torch.nn.functional.softmax:
            return args[0]
        if function is torch.multinomial:
            return args[0]._draw()
        return NotImplemented

    def _draw(self) -> Any:
        """Codes, int64 (rows, 1)."""
        import torch

        shares = torch.softmax(self._scores, dim=-1)
        return torch.multinomial(shares, num_samples=1, generator=self._generator)
