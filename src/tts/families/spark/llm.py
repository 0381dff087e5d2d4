"""Spark-TTS's language model, one token after the other.

Not through `generate`: that hands out tokens only to a streamer, on a thread of its own, draws from
the process's one random generator, and computes 166 000 logits for each token, of which speech can
be 8193. A loop over the model with its key-value cache needs no thread, so what it raises is
raised to whoever listens and it stops where it stands; two sessions draw what each draws alone; and
the rows of the output layer that cannot be meant are left out, so that neither text nor a token of
another kind is ever drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from src.rpc.errors import Internal, InvalidArgument
from src.tts.families.spark.prompts import Vocabulary
from src.tts.tts_base import CancelToken

OPENING_SLACK = 32
"""Tokens besides its global codes that a voice's opening may take; the released model takes 5."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """In the order of transformers: temperature (0: the likeliest), then top_k, then top_p."""

    temperature: float
    top_k: int
    top_p: float


@dataclass(frozen=True, slots=True)
class _Head:
    """The tokens that may come, and their rows of the output layer: [tokens, width]."""

    ids: tuple[int, ...]
    rows: Any


class SpeechLlm:
    """`model` is a causal language model of transformers; any number of threads may call this."""

    def __init__(self, model: Any, tokenizer: Any, vocabulary: Vocabulary, n_global: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._n_global = n_global
        self._global_ids = frozenset(vocabulary.globals)
        self._codes = len(vocabulary.semantic)
        self._positions = int(model.config.max_position_embeddings)
        self._speech = self._head((*vocabulary.semantic, *vocabulary.ends))
        self._opening = self._head((*vocabulary.globals, *vocabulary.opening))

    def generator(self, seed: int) -> Any:
        """A stream's own source of chance."""
        import torch

        return torch.Generator(self._model.device).manual_seed(seed)

    def speech(
        self, prompt: str, most: int, sampling: Sampling, generator: Any, cancel: CancelToken
    ) -> Iterator[int]:
        """Semantic codes until the model ends the sentence, at most so many, or cancelled."""
        for count, place in enumerate(self._draws(prompt, most, self._speech, sampling, generator)):
            if cancel.cancelled or place >= self._codes or count == most:
                return
            yield place

    def opening(self, prompt: str, sampling: Sampling, generator: Any, cancel: CancelToken) -> str:
        """All that the model writes up to its last global code; "" when cancelled.

        Raises Internal where it does not come to an end of them.
        """
        ids: list[int] = []
        most = self._n_global + OPENING_SLACK
        for place in self._draws(prompt, most, self._opening, sampling, generator):
            if cancel.cancelled:
                return ""
            ids.append(self._opening.ids[place])
            if sum(i in self._global_ids for i in ids) == self._n_global:
                return "".join(self._tokenizer.convert_ids_to_tokens(ids))
            if len(ids) == most:
                break
        raise Internal(f"the language model made up no voice within {most} tokens")

    def global_codes(self, opening: str) -> tuple[int, ...]:
        """The codes in what `opening` returned."""
        place = {i: n for n, i in enumerate(self._opening.ids) if i in self._global_ids}
        return tuple(place[i] for i in self._read(opening) if i in place)

    def _draws(
        self, prompt: str, most: int, head: _Head, sampling: Sampling, generator: Any
    ) -> Iterator[int]:
        """Places in `head`, without end. Nothing is computed before somebody asks for the next.

        Raises InvalidArgument for a prompt that leaves no room for `most`, Internal for numbers
        that are none.
        """
        import torch
        from transformers import DynamicCache

        ids: Sequence[int] = self._read(prompt)
        if len(ids) + most > self._positions:
            raise InvalidArgument(
                f"a prompt of {len(ids)} tokens and up to {most} of speech do not fit into the "
                f"model's {self._positions}; take a shorter recording"
            )
        cache = DynamicCache(config=self._model.config)
        while True:
            # Not around the yield: whoever listens would inherit the mode.
            with torch.inference_mode():
                fed = torch.tensor([ids], device=self._model.device)
                hidden = self._model.base_model(
                    input_ids=fed, past_key_values=cache, use_cache=True
                ).last_hidden_state
                place = pick((head.rows @ hidden[0, -1]).float(), sampling, generator)
            yield place
            ids = (head.ids[place],)

    def _read(self, prompt: str) -> list[int]:
        return list(self._tokenizer(prompt, return_token_type_ids=False)["input_ids"])

    def _head(self, ids: tuple[int, ...]) -> _Head:
        weight = self._model.get_output_embeddings().weight.detach()
        return _Head(ids, weight[list(ids)].contiguous())


def pick(logits: Any, sampling: Sampling, generator: Any) -> int:
    """One place of `logits` (float32 [n]). Raises Internal if they are no numbers."""
    import torch

    values, places = logits.topk(min(max(1, sampling.top_k), logits.shape[0]))
    # Drawing from such would end a GPU's whole context, and all that speaks on it.
    if not torch.isfinite(values).all():
        raise Internal("the language model's numbers are no numbers")
    if sampling.temperature == 0:
        return int(places[0])
    chances = (values / sampling.temperature).softmax(0)
    before = chances.cumsum(0) - chances
    chances = chances.where(before < sampling.top_p, 0.0)
    return int(places[torch.multinomial(chances, 1, generator=generator)])
