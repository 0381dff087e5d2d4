"""A stream of frames is what the codec decodes in one go, whoever shares the batch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from transformers import MimiConfig, MimiModel

from src.rpc.errors import CorruptModel
from src.tts.families.csm.mimi_stream import MimiStream

CODEBOOKS = 32
ENTRIES = 2048
FRAME = 1920
EXACT_DB = -140.0
"""In float64, where nothing but a wrong formula differs by more; float32 itself rounds at -121."""
SHORT_WINDOW = 21
"""Steps, two a frame: odd, and no multiple of the ring, which turns many times in a test."""


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def codec() -> MimiModel:
    return make_codec()


@pytest.fixture(scope="module")
def short_codec() -> MimiModel:
    return make_codec(window=SHORT_WINDOW)


def make_codec(
    *, window: int = 250, dtype: torch.dtype = torch.float64, **changes: Any
) -> MimiModel:
    """Few channels, but a transformer that counts as much as the convolutions: what it forgets is
    heard. Two key heads for four query heads."""
    config = MimiConfig(
        **{
            "hidden_size": 32,
            "num_filters": 4,
            "codebook_size": ENTRIES,
            "codebook_dim": 16,
            "vector_quantization_hidden_dimension": 16,
            "upsample_groups": 32,
            "num_hidden_layers": 2,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "layer_scale_initial_scale": 1.0,
            "sliding_window": window,
            **changes,
        }
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        model = MimiModel(config).eval()
        for name, buffer in model.named_buffers():
            if name.endswith("embed_sum"):  # zeros in a new codec: every code would sound alike
                buffer.normal_()
            elif name.endswith("cluster_usage"):
                buffer.uniform_(0.5, 2.0)
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight") and parameter.shape[-1] == 32:
                parameter.normal_(0, 0.4)
    return model.to(dtype)


def some_codes(frames: int, seed: int = 0) -> Tensor:
    """[frames, codebooks]"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, ENTRIES, (frames, CODEBOOKS), generator=generator)


def whole(codec: MimiModel, codes: Tensor) -> Tensor:
    """What transformers makes of all frames at once: [samples]."""
    out: Tensor = codec.decode(codes.T[None]).audio_values[0, 0]
    return out


def streamed(stream: MimiStream, slot: int, codes: Tensor) -> Tensor:
    slots, keep = torch.tensor([slot]), torch.tensor([True])
    return torch.cat([stream.step(slots, frame[None], keep)[0] for frame in codes])


def difference_db(got: Tensor, expected: Tensor) -> float:
    """Of the error's power to the signal's."""
    assert got.shape == expected.shape
    error = (got - expected).double().pow(2).mean()
    return float(10 * torch.log10(error / expected.double().pow(2).mean() + 1e-30))


def test_a_stream_longer_than_the_window_is_the_whole_decode(codec: MimiModel) -> None:
    codes = some_codes(165)
    got, expected = streamed(MimiStream(codec, slots=1), 0, codes), whole(codec, codes)
    ten_seconds = 125 * FRAME
    assert difference_db(got[:ten_seconds], expected[:ten_seconds]) < EXACT_DB
    assert difference_db(got[ten_seconds:], expected[ten_seconds:]) < EXACT_DB


@pytest.mark.parametrize("layer_scale", [0.01, 0.3])
def test_in_float32_too_the_difference_is_below_any_ear(layer_scale: float) -> None:
    codec = make_codec(dtype=torch.float32, layer_scale_initial_scale=layer_scale)
    codes = some_codes(165)
    got = streamed(MimiStream(codec, slots=1), 0, codes)
    assert difference_db(got, whole(codec, codes)) < -120


def test_rounding_takes_a_stream_no_further_from_the_exact_sound_than_the_whole_decode(
    codec: MimiModel,
) -> None:
    single, codes = make_codec(dtype=torch.float32), some_codes(60)
    exact = whole(codec, codes)
    theirs = difference_db(whole(single, codes), exact)
    ours = difference_db(streamed(MimiStream(single, slots=1), 0, codes), exact)
    assert ours < theirs + 3


@pytest.mark.parametrize("window", [2, 7, 8, 16, 21, 24])
def test_the_window_is_exact_wherever_the_ring_turns(window: int) -> None:
    codec = make_codec(window=window)
    codes = some_codes(60)
    got = streamed(MimiStream(codec, slots=1), 0, codes)
    assert difference_db(got, whole(codec, codes)) < EXACT_DB


def test_a_codec_with_shortcuts_dilations_and_more_blocks_streams_too() -> None:
    codec = make_codec(
        window=SHORT_WINDOW, use_conv_shortcut=True, num_residual_layers=3, dilation_growth_rate=3
    )
    codes = some_codes(30)
    got = streamed(MimiStream(codec, slots=1), 0, codes)
    assert difference_db(got, whole(codec, codes)) < EXACT_DB


def test_a_codec_without_projections_and_in_fewer_codebooks_streams_too() -> None:
    codec = make_codec(
        window=SHORT_WINDOW, codebook_dim=32, vector_quantization_hidden_dimension=32
    )
    codes = some_codes(12)[:, :8]
    got = streamed(MimiStream(codec, slots=1), 0, codes)
    assert difference_db(got, whole(codec, codes)) < EXACT_DB


def test_a_frame_is_final_as_soon_as_its_codes_are_known(codec: MimiModel) -> None:
    codes = some_codes(12)
    got = streamed(MimiStream(codec, slots=1), 0, codes[:7])
    assert difference_db(got, whole(codec, codes)[: 7 * FRAME]) < EXACT_DB


def test_streams_that_join_leave_and_wait_at_random_are_each_as_if_alone(
    short_codec: MimiModel,
) -> None:
    """Five slots; each tick some join, some leave, some wait outside the batch and some inside it,
    the rows in any order and padded with scratch."""
    places, ticks, chance = 5, 120, random.Random(11)
    stream = MimiStream(short_codec, slots=places)
    running: dict[int, tuple[Tensor, list[Tensor]]] = {}
    finished: list[tuple[Tensor, Tensor]] = []
    for tick in range(ticks):
        for slot in range(places):
            if slot not in running and chance.random() < 0.3:
                stream.reset(slot)
                running[slot] = (some_codes(chance.randint(1, 50), seed=tick * places + slot), [])
        here = [slot for slot in running if chance.random() < 0.85]
        chance.shuffle(here)
        held = [slot for slot in here if chance.random() < 0.2]
        padding = [places] * chance.randint(0, 3)
        frames = [running[slot][0][len(running[slot][1])] for slot in here]
        if not here + padding:
            continue
        sound = stream.step(
            torch.tensor(here + padding),
            torch.stack(frames + [torch.full((CODEBOOKS,), 9_999)] * len(padding)),
            torch.tensor([slot not in held for slot in here] + [False] * len(padding)),
        )
        for row, slot in enumerate(here):
            if slot in held:
                continue
            codes, samples = running[slot]
            samples.append(sound[row])
            if len(samples) == len(codes) or chance.random() < 0.01:
                finished.append((codes[: len(samples)], torch.cat(samples)))
                del running[slot]
    assert len(finished) > 8
    assert max(len(codes) for codes, _ in finished) * 2 > 2 * SHORT_WINDOW
    worst = max(difference_db(sound, whole(short_codec, codes)) for codes, sound in finished)
    assert worst < EXACT_DB


def test_a_row_that_is_not_kept_leaves_its_stream_bit_for_bit(short_codec: MimiModel) -> None:
    codes, other = some_codes(30), some_codes(30, seed=1)
    calm, disturbed = MimiStream(short_codec, slots=1), MimiStream(short_codec, slots=1)
    slots, keep = torch.tensor([0]), torch.tensor([True])
    for frame, foreign in zip(codes, other, strict=True):
        expected = calm.step(slots, frame[None], keep)
        disturbed.step(slots, foreign[None], ~keep)
        assert torch.equal(disturbed.step(slots, frame[None], keep), expected)


def test_a_reset_slot_remembers_nothing(short_codec: MimiModel) -> None:
    stream, codes = MimiStream(short_codec, slots=2), some_codes(25)
    fresh = streamed(stream, 1, codes)
    streamed(stream, 0, some_codes(25, seed=1))
    stream.reset(0)
    assert torch.equal(streamed(stream, 0, codes), fresh)


def test_a_reset_leaves_the_other_slots_alone(short_codec: MimiModel) -> None:
    stream, codes = MimiStream(short_codec, slots=2), some_codes(25)
    first = streamed(stream, 1, codes[:10])
    streamed(stream, 0, codes)
    stream.reset(0)
    got = torch.cat([first, streamed(stream, 1, codes[10:])])
    assert difference_db(got, whole(short_codec, codes)) < EXACT_DB


@pytest.mark.parametrize("bad", [-1, ENTRIES, 2_050, 2**40])
def test_codes_that_the_codec_does_not_know_are_clamped(codec: MimiModel, bad: int) -> None:
    """2048 to 2050 are in CSM's vocabulary; on a GPU looking them up would end the process."""
    codes = some_codes(3)
    codes[1, 5] = bad
    got = streamed(MimiStream(codec, slots=1), 0, codes)
    assert difference_db(got, whole(codec, codes.clamp(0, ENTRIES - 1))) < EXACT_DB


def test_a_step_that_failed_halfway_can_be_made_again(
    short_codec: MimiModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, codes = MimiStream(short_codec, slots=1), some_codes(30)
    last = short_codec.decoder.decoder_seanet.layers[-1].conv
    sound = []
    for frame in codes:
        with monkeypatch.context() as broken:
            broken.setattr(last, "forward", _out_of_memory)
            with pytest.raises(RuntimeError, match="out of memory"):
                streamed(stream, 0, frame[None])
        sound.append(streamed(stream, 0, frame[None]))
    assert difference_db(torch.cat(sound), whole(short_codec, codes)) < EXACT_DB


def _out_of_memory(_x: Tensor) -> Tensor:
    raise RuntimeError("out of memory")


def test_no_click_where_segments_join_and_where_a_stream_went_on_after_a_pause(
    codec: MimiModel,
) -> None:
    """Between segments of four frames somebody else speaks. No step from one sample to the next is
    another than the model makes by itself; a codec that starts anew at each one makes others."""
    codes, others = some_codes(40), some_codes(40, seed=1)
    stream, anew = MimiStream(codec, slots=2), MimiStream(codec, slots=1)
    parts, torn = [], []
    for start in range(0, 40, 4):
        segment = slice(start, start + 4)
        parts.append(streamed(stream, 0, codes[segment]))
        streamed(stream, 1, others[segment])
        anew.reset(0)
        torn.append(streamed(anew, 0, codes[segment]))
    seams = torch.arange(4, 40, 4) * FRAME - 1
    own_steps, steps, torn_steps = (
        sound.diff() for sound in (whole(codec, codes), torch.cat(parts), torch.cat(torn))
    )
    assert difference_db(steps[seams], own_steps[seams]) < EXACT_DB
    assert float(steps[seams].abs().max()) < float(own_steps.abs().max())
    assert difference_db(torn_steps[seams], own_steps[seams]) > -20


def test_tensors_keep_their_addresses_and_nothing_grows(short_codec: MimiModel) -> None:
    stream = MimiStream(short_codec, slots=1)
    streamed(stream, 0, some_codes(2))
    before = _tensors(stream)
    streamed(stream, 0, some_codes(40))
    stream.reset(0)
    streamed(stream, 0, some_codes(2))
    assert before
    assert _tensors(stream) == before


def _tensors(thing: object) -> list[tuple[int, int]]:
    """Address and size of every tensor that it holds itself, at any depth."""
    if isinstance(thing, Tensor):
        return [(thing.data_ptr(), thing.numel())]
    inside = thing if isinstance(thing, list | tuple) else getattr(thing, "__dict__", {}).values()
    if isinstance(thing, torch.nn.Module):
        return []
    return [entry for part in inside for entry in _tensors(part)]


def test_a_step_reads_no_value_back(short_codec: MimiModel) -> None:
    """A wait for the device, and what no CUDA graph can hold. Fake tensors have no values to read,
    nor a shape that would depend on one."""
    stream, codes = MimiStream(short_codec, slots=2), some_codes(2)
    slots, keep = torch.tensor([0, 1]), torch.tensor([True, False])
    with FakeTensorMode(allow_non_fake_inputs=True):
        sound = stream.step(slots, codes, keep)
    assert sound.shape == (2, FRAME)


def test_a_codec_in_bfloat16_streams_as_it_decodes_whole(codec: MimiModel) -> None:
    """It rounds at -30 dB, which is heard, but a stream must not add to it."""
    codes, half = some_codes(40), make_codec(dtype=torch.bfloat16)
    exact = whole(codec, codes)
    got = streamed(MimiStream(half, slots=1), 0, codes)
    assert got.dtype == torch.float32
    assert difference_db(got, exact) < difference_db(whole(half, codes).float(), exact) + 3


@pytest.mark.parametrize("samples", [1, FRAME, FRAME + 1, 10 * FRAME])
def test_a_recording_becomes_as_many_frames_as_it_begins(codec: MimiModel, samples: int) -> None:
    sound = np.random.default_rng(0).normal(0, 0.1, samples).astype(np.float32)
    codes = MimiStream(codec, slots=1).encode(sound)
    assert codes.dtype == torch.int64
    assert codes.shape == (-(-samples // FRAME), CODEBOOKS)
    expected = codec.encode(torch.from_numpy(sound).double()[None, None]).audio_codes[0].T
    assert torch.equal(codes, expected)


def test_encoding_leaves_the_streams_alone(short_codec: MimiModel) -> None:
    stream, codes = MimiStream(short_codec, slots=1), some_codes(20)
    first = streamed(stream, 0, codes[:10])
    stream.encode(np.full(5 * FRAME, 0.1, np.float32))
    got = torch.cat([first, streamed(stream, 0, codes[10:])])
    assert difference_db(got, whole(short_codec, codes)) < EXACT_DB


def test_it_says_how_long_a_frame_is(codec: MimiModel) -> None:
    assert MimiStream(codec, slots=1).frame_samples == FRAME


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_causal_conv": False}, "use_causal_conv is False"),
        ({"pad_mode": "replicate"}, "pad_mode is replicate"),
        ({"trim_right_ratio": 0.5}, "trim_right_ratio is 0.5"),
        ({"frame_rate": 25.0}, "upsampled is False"),
    ],
)
def test_a_codec_that_needs_what_comes_later_is_refused_by_name(
    change: dict[str, Any], named: str
) -> None:
    with pytest.raises(CorruptModel, match=named):
        MimiStream(make_codec(**change), slots=1)
