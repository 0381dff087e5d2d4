"""What is computed step by step, or in part, is what the package computes whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from src.tts.adapters.adapter_xtts import XttsModel
from src.tts.families.torch_host import own_generator
from src.tts.families.xtts import stream as xtts_stream
from src.tts.families.xtts.draws import Scores, drawing
from src.tts.families.xtts.stream import Growing, Prepared, Watch, session_view
from src.tts.tts_base import CancelToken

STEPS = 24
GREEDY = {
    "top_k": 1,
    "top_p": 1.0,
    "temperature": 1.0,
    "do_sample": True,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 10.0,
    "output_hidden_states": True,
    "return_dict_in_generate": True,
}


def step_against_full(model: XttsModel) -> float:
    """The largest difference between latents drawn with the cache and those of one pass."""
    import torch

    whole = model._loaded.model
    gpt = session_view(whole, []).gpt
    ids = torch.tensor([whole.tokenizer.encode("hello there, friend", "en")])
    with torch.inference_mode():
        prompt = gpt.compute_embeddings(model._loaded.voices["Ana"][0], ids)
        steps = gpt.get_generator(prompt, **GREEDY)
        drawn = [next(steps) for _ in range(STEPS)]
        codes = torch.stack([code for code, _ in drawn], dim=1)
        inputs = torch.cat([prompt, codes[:, :-1]], dim=1)
        out = gpt.gpt_inference(inputs, output_hidden_states=True, return_dict=True)
        full = gpt.gpt_inference.final_norm(out.hidden_states[-1])[:, -STEPS:]
        assert len(set(codes[0].tolist())) > 5, "a model that hardly says anything proves little"
        return float((torch.stack([latent for _, latent in drawn], dim=1) - full).abs().max())


def test_a_step_with_the_cache_is_the_whole_pass(model: XttsModel) -> None:
    assert step_against_full(model) < 1e-4


def test_and_a_wrong_place_would_show(model: XttsModel, monkeypatch: pytest.MonkeyPatch) -> None:
    positions = model._loaded.model.gpt.mel_pos_embedding
    right = positions.get_fixed_embedding
    monkeypatch.setattr(positions, "get_fixed_embedding", lambda at, dev: right(at + 1, dev))
    assert step_against_full(model) > 0.1


def streamed(model: XttsModel, view: Any, speed: float) -> list[np.ndarray[Any, Any]]:
    watch: Any = Watch(CancelToken(), 93)
    return [
        chunk.numpy().copy()
        for chunk in view.inference_stream(
            "hello",
            "en",
            *model._loaded.voices["Ana"],
            stream_chunk_size=Growing((5, 8, 20, 30)),
            stopping_criteria=[watch],
            top_k=1,
            speed=speed,
        )
    ]


def both_ways(model: XttsModel, speed: float) -> float:
    """The largest difference between the package's chunks and ours."""
    whole = model._loaded.model
    ids = whole.tokenizer.encode("hello", "en")
    ours = session_view(whole, ids)
    theirs = session_view(whole, ids)
    decoder = theirs.hifigan_decoder
    decoder.__dict__["_modules"]["waveform_decoder"] = whole.hifigan_decoder.waveform_decoder
    pairs = list(zip(streamed(model, ours, speed), streamed(model, theirs, speed), strict=True))
    assert len(pairs) >= 5
    assert all(one.shape == other.shape for one, other in pairs)
    return max(float(np.abs(one - other).max()) for one, other in pairs if one.size)


@pytest.mark.parametrize("speed", [1.0, 0.7, 1.9])
def test_what_the_vocoder_leaves_out_is_not_heard(model: XttsModel, speed: float) -> None:
    assert both_ways(model, speed) < 1e-5


def test_and_a_shorter_reach_would_be(model: XttsModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xtts_stream, "_REACH", 2)
    assert both_ways(model, 1.0) > 1e-4


def test_the_vocoder_hears_no_more_for_a_later_chunk(model: XttsModel) -> None:
    whole = model._loaded.model
    vocoder = whole.hifigan_decoder.waveform_decoder
    heard: list[int] = []
    hook = vocoder.register_forward_pre_hook(lambda _, args: heard.append(args[0].shape[-1]))
    try:
        view = session_view(whole, whole.tokenizer.encode("hello", "en"))
        streamed(model, view, 1.0)
    finally:
        hook.remove()
    assert abs(heard[-2] - heard[-3]) <= 1, "30 codes and what lies around them, wherever they are"
    assert heard[-1] < 30, "after them, their overlap is all that is left"


@pytest.mark.parametrize("top_k", [5, 50])
def test_our_own_draws_are_the_packages(model: XttsModel, top_k: int) -> None:
    """From its own generator, with the same seed, it says the same."""
    import torch

    whole, most = model._loaded.model, 60
    ids = whole.tokenizer.encode("hello", "en")
    sampling: dict[str, Any] = {"temperature": 0.9, "top_k": top_k, "top_p": 0.8}

    def sound(**manner: Any) -> np.ndarray[Any, Any]:
        watch: Any = Watch(CancelToken(), most)
        call = session_view(whole, ids).inference_stream(
            "hello", "en", *model._loaded.voices["Ana"], stopping_criteria=[watch], **manner
        )
        return np.concatenate([chunk.numpy() for chunk in call])

    with torch.random.fork_rng():
        torch.manual_seed(7)
        theirs = sound(**sampling)
    ours = sound(**drawing(own_generator(7, whole.device), **sampling))
    assert np.array_equal(ours, theirs)
    assert not np.array_equal(ours, sound(**drawing(own_generator(8, whole.device), **sampling)))


@pytest.mark.parametrize("asked", ["argmax", "log_softmax"])
def test_scores_give_nothing_but_a_draw(asked: str) -> None:
    """A package that would draw in another way fails, and does not say anything."""
    import torch

    scores = Scores(torch.zeros(1, 4), own_generator(1, "cpu"))
    with pytest.raises(TypeError):
        getattr(torch, asked)(scores, dim=-1)


def test_a_text_is_encoded_as_the_package_would(model: XttsModel) -> None:
    """`inference_stream` reads our tokens, not its own."""
    text = "Hello there, 42 friends."
    (piece,) = model._loaded.reader.pieces(text, 0, "en")
    tokenizer = model._loaded.model.tokenizer
    assert piece.ids == tokenizer.encode(text.lower(), lang="en")
    assert Prepared(piece.ids).encode("", "en") == piece.ids
