"""What of CosyVoice 2's network is done otherwise than in its package, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from src.tts.families.cosyvoice2.plan import stretched
from src.tts.generation import Stopped
from src.tts.tts_base import CancelToken

# As published, in the release's yaml; the package's own `ras_sampling` has the same.
TOP_P, TOP_K, WINDOW, REPEATS = 0.8, 25, 10, 0.1


def make_encoder(llm: Any, folder: Path) -> Any:
    """The package's `Qwen2Encoder`, right on every transformers from 4.51 to 5.x.

    1. A step passes a mask of length 1 with a full cache, which transformers >= 4.53 takes for "the
       past is padding": garbled speech. One utterance has no padding, so there is no mask.
    2. transformers 5 loads the folder in its own bfloat16, and everything around is float32.
    3. The cache of 5.x cannot be indexed, as `inference_bistream` does for its length.

    Besides, a step leaves out the head over the text vocabulary, a quarter of the work, which
    nobody looks at.
    """
    import torch
    from transformers import Qwen2ForCausalLM

    class Encoder(llm.Qwen2Encoder):  # type: ignore[misc]
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.model = Qwen2ForCausalLM.from_pretrained(
                folder, local_files_only=True, use_safetensors=True
            ).float()

        def forward_one_step(self, xs: Any, masks: Any, cache: Past | None = None) -> Any:
            out = self.model.model(
                inputs_embeds=xs,
                attention_mask=None,
                use_cache=True,
                past_key_values=cache.cache if cache else None,
            )
            return out.last_hidden_state, Past(out.past_key_values)

    return Encoder()


class Past:
    """A run's keys and values; `past[0][0].size(2)` is its length, on every transformers."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def __getitem__(self, layer: int) -> tuple[Any, Any]:
        if hasattr(self.cache, "layers"):
            return self.cache.layers[layer].keys, self.cache.layers[layer].values
        return self.cache.key_cache[layer], self.cache.value_cache[layer]


class Sampler:
    """Repetition-aware sampling (VALL-E 2) as in the package, with draws of its own.

    The package's draws from the generator of the whole process, and asks a GPU for every candidate
    one by one. `speech_tokens` is the id of "end"; the two after it are no sound: of them only
    "more text" (the last) may be drawn, and only while there is more text.
    """

    def __init__(self, speech_tokens: int, generator: Any, *, flowing: bool) -> None:
        self._end = speech_tokens
        self._generator = generator
        self._flowing = flowing

    def __call__(self, scores: Any, decoded: Sequence[int], sampling: int) -> int:
        """`scores`: log-probabilities, (ids,); an end that is -inf is not wanted yet."""
        scores = scores.float().cpu()
        scores[self._end + 1] = -float("inf")
        if not (self._flowing and scores[self._end] == -float("inf")):
            scores[self._end + 2] = -float("inf")
        chosen = self._nucleus(scores)
        if list(decoded[-WINDOW:]).count(chosen) >= WINDOW * REPEATS:
            scores[chosen] = -float("inf")
            chosen = self._draw(scores.softmax(0))
        return chosen

    def _nucleus(self, scores: Any) -> int:
        odds, ids = scores.softmax(0).sort(descending=True, stable=True)
        before = odds.cumsum(0) - odds
        count = max(1, min(TOP_K, int((before < TOP_P).sum())))
        return int(ids[self._draw(odds[:count])])

    def _draw(self, odds: Any) -> int:
        return int(odds.multinomial(1, replacement=True, generator=self._generator))


class StretchedFlow:
    """A flow whose mel is read at another speed: the package can do that for whole texts only.

    Every call gives the mel from a run's first token on; what was read before is cut off here, so
    `token2wav` must not do it again.
    """

    token_mel_ratio = 0

    def __init__(self, flow: Any, speed: float) -> None:
        self._flow = flow
        self._speed = speed
        self._read = 0

    def inference(self, **inputs: Any) -> tuple[Any, Any]:
        import torch

        mel, cache = self._flow.inference(**inputs)
        last = mel.shape[2] - 1
        places = stretched(self._read, last + 1, self._speed, final=inputs["finalize"])
        self._read += len(places)
        at = torch.tensor(places, device=mel.device)
        left = at.floor().long()
        right = (left + 1).clamp(max=last)
        share = (at - left).to(mel)
        return mel[:, :, left] * (1 - share) + mel[:, :, right] * share, cache


class Stops:
    """Where the sound of a chunk is given up when nobody wants it any more: before each of the ten
    steps of the flow's solver, each block of its encoder and each stage of the vocoder.

    `model`: the package's `CosyVoice2Model`, which computes one chunk at a time.
    """

    def __init__(self, model: Any) -> None:
        self._cancel: CancelToken | None = None
        flow, hift = model.flow, model.hift
        for part in (
            *flow.encoder.encoders, *flow.encoder.up_encoders, flow.decoder.estimator,
            hift.f0_predictor, *hift.ups, *hift.source_resblocks, *hift.resblocks,
        ):  # fmt: skip
            part.register_forward_pre_hook(self._look)

    @contextmanager
    def at(self, cancel: CancelToken) -> Iterator[None]:
        """Inside, whatever of the model computes raises Stopped after a cancel."""
        self._cancel = cancel
        try:
            yield
        finally:
            self._cancel = None

    def _look(self, part: Any, inputs: Any) -> None:
        if self._cancel is not None and self._cancel.cancelled:
            raise Stopped
