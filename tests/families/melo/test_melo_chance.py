"""Whose random numbers a stream draws: its own, whoever speaks beside it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from src.audio.pcm import Float32
from src.rpc.errors import InvalidArgument
from src.tts.adapters.adapter_melo import MeloAdapter, MeloModel
from src.tts.catalog import ModelMeta
from src.tts.families.melo.chance import drawing_from, share_no_chance
from src.tts.families.torch_host import own_generator
from src.tts.segmenter import Segmenter
from src.tts.tts_base import CancelToken, PcmChunk, VoiceSpec
from tests.families.melo.tiny import files_of

TEXT = "Hello world, this is a test. The second sentence is number two!"


@pytest.fixture(scope="module")
def model(tiny_pack: Path) -> Iterator[MeloModel]:
    meta = ModelMeta(model_id="melo-tiny", family="melo")
    loaded = MeloAdapter().load(meta, files_of(tiny_pack), "cpu", lambda _: None)
    yield loaded
    loaded.unload()


def stream(model: MeloModel, seed: int, **settings: str) -> Iterator[PcmChunk]:
    segmenter = Segmenter()
    segments = segmenter.push(TEXT) + segmenter.flush()
    spec = VoiceSpec("", "", {"seed": str(seed), **settings})
    return model.stream(segments, spec, CancelToken())


def sound(chunks: Iterator[PcmChunk]) -> Float32:
    return np.concatenate([chunk.samples for chunk in chunks])


def test_a_seed_draws_the_same_again_and_another_does_not(model: MeloModel) -> None:
    said = sound(stream(model, 7))
    assert np.array_equal(said, sound(stream(model, 7)))
    assert not np.array_equal(said, sound(stream(model, 8)))
    assert not np.array_equal(said, sound(stream(model, 7, noise="0")))
    assert not np.array_equal(said, sound(stream(model, 7, noise_w="0")))


def test_without_a_seed_it_is_another_each_time_wherever_torchs_own_is(model: MeloModel) -> None:
    said = []
    for _ in range(2):
        torch.manual_seed(3)
        said.append(sound(stream(model, 0)))
    assert not np.array_equal(said[0], said[1])


def test_streams_that_take_turns_say_bit_for_bit_what_they_say_alone(model: MeloModel) -> None:
    alone = [sound(stream(model, seed)) for seed in (1, 2)]
    taken: list[list[Float32]] = [[], []]
    for chunks in zip(stream(model, 1), stream(model, 2), strict=True):
        for kept, chunk in zip(taken, chunks, strict=True):
            kept.append(chunk.samples)
    for kept, expected in zip(taken, alone, strict=True):
        assert len(kept) > 1
        assert np.array_equal(np.concatenate(kept), expected)


def test_streams_at_once_say_bit_for_bit_what_they_say_alone(model: MeloModel) -> None:
    alone = [sound(stream(model, seed)) for seed in range(1, 5)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda seed: sound(stream(model, seed)), range(1, 5)))
    assert all(np.array_equal(one, same) for one, same in zip(alone, together, strict=True))


def test_speaking_draws_nothing_from_torchs_own_generator(model: MeloModel) -> None:
    before = torch.get_rng_state()
    sound(stream(model, 0))
    sound(stream(model, 7))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_seed_may_be_an_entrys_default_and_is_checked(tiny_pack: Path, model: MeloModel) -> None:
    meta = ModelMeta(model_id="m", family="melo", settings={"seed": "7"})
    loaded = MeloAdapter().load(meta, files_of(tiny_pack), "cpu", lambda _: None)
    segmenter = Segmenter()
    segments = segmenter.push(TEXT) + segmenter.flush()
    said = sound(loaded.stream(segments, VoiceSpec("", ""), CancelToken()))
    assert np.array_equal(said, sound(stream(model, 7)))
    loaded.unload()
    with pytest.raises(InvalidArgument, match="'seed' must be a number from 0 to 2"):
        model.check_voice(VoiceSpec("", "", {"seed": "-1"}))


def test_who_calls_the_package_without_us_draws_from_torchs_own() -> None:
    class Models:
        torch: Any = torch

    models = Models()
    share_no_chance(models)
    ours = models.torch
    share_no_chance(models)
    assert models.torch is ours
    assert ours.exp is torch.exp
    torch.manual_seed(5)
    expected = torch.randn(2, 3)
    torch.manual_seed(5)
    assert torch.equal(models.torch.randn(2, 3), expected)
    like = torch.zeros(2, 3, dtype=torch.float64)
    with drawing_from(own_generator(5)):
        drawn = models.torch.randn_like(like)
    assert drawn.dtype == like.dtype
    assert torch.equal(drawn.float(), expected)
    torch.manual_seed(5)
    assert torch.equal(models.torch.randn(2, 3), expected)
