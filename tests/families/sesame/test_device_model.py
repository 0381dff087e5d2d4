"""The model behind the engine's port, and what a CUDA graph needs of it, on a processor.

A recorder that calls again stands in for the graphs: fixed buffers, padding, sizes and what happens
when memory runs out are the same.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from src.tts.families.csm.device_model import DeviceModel, sizes_for
from src.tts.families.csm.frame_loop import FrameLoop, StepBatch
from src.tts.families.csm.graphs import CallRecorder, Size, TickBuffers, choose, every, powers_up_to
from src.tts.families.csm.mimi_stream import MimiStream
from src.tts.families.csm.ports import Row, Sampling, TickResult, Voice
from src.tts.families.csm.weights import CsmWeights, load_weights

POSITIONS = 128
TEXTS = ("A", "Good morning.", "How far is it to the sea?", "Left, then right.")
SAMPLING = Sampling()


@pytest.fixture(scope="module")
def weights(tiny_pack: Path) -> CsmWeights:
    return load_weights(tiny_pack)


class SpyRecorder(CallRecorder):
    """Runs the work once while recording, as a capture does, and remembers what was replayed."""

    def __init__(self, most_rows: int = 99) -> None:
        self.recorded = 0
        self.replayed: list[Size] = []
        self._most_rows = most_rows

    def record(self, size: Size, work: Callable[[], None]) -> Callable[[], None]:
        if size.rows > self._most_rows:
            self._run_out(size)
        work()
        self.recorded += 1

        def replay() -> None:
            self.replayed.append(size)
            work()

        return replay

    def _run_out(self, size: Size) -> None:
        try:
            raise torch.OutOfMemoryError("planned")
        except torch.OutOfMemoryError:
            if size.length > 32:
                raise
            # As where the end of a capture fails because of what ended it.
            raise RuntimeError("capture was invalidated")  # noqa: B904


def graphed(weights: CsmWeights, slots: int, recorder: SpyRecorder, **options: Any) -> DeviceModel:
    """As on a GPU: few sizes, so that most ticks are padded and see more positions than needed."""
    sizes = [Size(rows, length) for rows in powers_up_to(slots) for length in (32, POSITIONS)]
    return DeviceModel(
        weights, slots=slots, positions=POSITIONS, recorder=recorder, sizes=sizes, **options
    )


def begin(model: DeviceModel, slot: int, text: str, voice: Voice = Voice()) -> int:  # noqa: B008
    """Read all but the last of the text; the position of the first tick."""
    model.assign(slot, voice)
    start = voice.prefix.positions if voice.prefix else 0
    embeddings = model.embed_text(text, 0)
    last = len(embeddings) - 1
    model.prefill(slot, start, embeddings[:last])
    model.set_input(slot, embeddings[last:])
    return start + last


class Talk:
    """What each slot says while others come and go; ticks take the rows they are given."""

    def __init__(self, model: DeviceModel) -> None:
        self.model = model
        self.at: dict[int, tuple[int, int]] = {}
        self.codes: dict[int, list[np.ndarray]] = {}
        self.pcm: dict[int, list[np.ndarray]] = {}

    def join(self, slot: int, voice: Voice = Voice()) -> None:  # noqa: B008
        self.at[slot] = (begin(self.model, slot, TEXTS[slot % len(TEXTS)], voice), 0)
        self.codes[slot], self.pcm[slot] = [], []

    def tick(self, slots: Sequence[int], adapters: Mapping[int, int] = {}) -> TickResult:
        rows = [Row(slot, *self._place(slot), SAMPLING, adapters.get(slot, 0)) for slot in slots]
        result = self.model.tick(rows)
        for i, slot in enumerate(slots):
            position, frame = self.at[slot]
            self.at[slot] = (position + 1, frame + 1)
            self.codes[slot].append(result.codes[i])
            self.pcm[slot].append(result.pcm[i])
        return result

    def _place(self, slot: int) -> tuple[int, int, int]:
        position, frame = self.at[slot]
        return position, 7 + slot, frame


def joins_and_leaves(talk: Talk) -> None:
    talk.join(0)
    talk.tick([0])
    talk.join(2)
    talk.join(3)
    for slots in ([0, 2, 3], [3, 0], [2], [3, 2, 0]):
        talk.tick(slots)
    talk.join(4)
    talk.join(1)
    for _ in range(12):  # past the shorter of the recorded lengths
        talk.tick([4, 0, 1, 2, 3])


def test_padded_sizes_say_what_exact_sizes_say(weights: CsmWeights) -> None:
    exact = Talk(DeviceModel(weights, slots=5, positions=POSITIONS))
    recorder = SpyRecorder()
    padded = Talk(graphed(weights, 5, recorder))
    joins_and_leaves(exact)
    joins_and_leaves(padded)
    assert {size.rows for size in recorder.replayed} == {1, 2, 4, 5}
    assert {size.length for size in recorder.replayed} == {32, POSITIONS}
    for slot in exact.codes:
        np.testing.assert_array_equal(exact.codes[slot], padded.codes[slot])
        np.testing.assert_allclose(exact.pcm[slot], padded.pcm[slot], atol=2e-6)


def test_the_parts_by_hand_say_the_same(weights: CsmWeights) -> None:
    """One tick is a step of the loop, and a step of the codec for what is sound."""
    model = DeviceModel(weights, slots=1, positions=POSITIONS)
    talk = Talk(model)
    talk.join(0)
    for _ in range(4):
        talk.tick([0])
    loop = FrameLoop(weights, slots=1, positions=POSITIONS)
    mimi = MimiStream(weights.model.codec_model, slots=1)
    embeddings = loop.embed_text(weights.text_ids(TEXTS[0], 0))
    last = len(embeddings) - 1
    loop.prefill(0, 0, embeddings[:last])
    loop.inputs[0] = embeddings[last]
    for frame in range(4):
        out = loop.step(StepBatch.of([0], [last + frame], seeds=[7], frames=[frame]))
        pcm = mimi.step(torch.tensor([0]), out.codes, out.healthy & ~out.ended)
        np.testing.assert_array_equal(talk.codes[0][frame], out.codes[0].numpy())
        np.testing.assert_allclose(talk.pcm[0][frame], pcm[0].clamp(-1, 1).numpy(), atol=2e-6)


def test_a_result_outlives_the_ticks_after_it(weights: CsmWeights) -> None:
    talk = Talk(graphed(weights, 2, SpyRecorder()))
    talk.join(0)
    first = talk.tick([0])
    codes, pcm = first.codes.copy(), first.pcm.copy()
    talk.tick([0])
    np.testing.assert_array_equal(first.codes, codes)
    np.testing.assert_array_equal(first.pcm, pcm)


def test_what_does_not_fit_into_memory_is_ticked_in_pieces(
    weights: CsmWeights, caplog: pytest.LogCaptureFixture
) -> None:
    whole = Talk(graphed(weights, 5, SpyRecorder()))
    with caplog.at_level(logging.WARNING):
        small = SpyRecorder(most_rows=2)
        pieces = Talk(graphed(weights, 5, small))
    assert "out of memory" in caplog.text
    assert "5 rows" in caplog.text
    for talk in (whole, pieces):
        for slot in range(5):
            talk.join(slot)
        talk.tick([0, 1, 2, 3, 4])
        talk.tick([4, 2, 0])
    assert [size.rows for size in small.replayed] == [2, 2, 1, 2, 1]
    for slot in range(5):
        np.testing.assert_array_equal(whole.codes[slot], pieces.codes[slot])


def test_without_memory_for_one_row_there_is_no_model(weights: CsmWeights) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        graphed(weights, 2, SpyRecorder(most_rows=0))


def test_a_tick_that_raises_has_moved_nobody(
    weights: CsmWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, disturbed = (
        Talk(DeviceModel(weights, slots=2, positions=POSITIONS)) for _ in range(2)
    )
    for talk in (undisturbed, disturbed):
        talk.join(0)
        talk.join(1)
        talk.tick([0, 1])

    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("planned")

    with monkeypatch.context() as patch:
        patch.setattr(disturbed.model, "_decode", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            disturbed.tick([1, 0])
    for talk in (undisturbed, disturbed):
        talk.tick([1, 0])
        talk.tick([0, 1])
    for slot in (0, 1):
        np.testing.assert_array_equal(undisturbed.codes[slot], disturbed.codes[slot])
        np.testing.assert_array_equal(undisturbed.pcm[slot], disturbed.pcm[slot])


def test_a_voice_prompt_read_once_is_the_prompt_read_every_time(weights: CsmWeights) -> None:
    model = graphed(weights, 2, SpyRecorder())
    codes = np.random.default_rng(1).integers(1, 2000, (40, model.codebooks))
    prompt = model.join([model.embed_text("Once upon a time.", 0), model.embed_frames(codes)])
    voice = Voice(prefix=model.prefix_of(prompt, 0))
    kept = Talk(model)
    kept.join(1, voice)
    read = Talk(model)
    model.assign(0, Voice())
    model.prefill(0, 0, prompt)
    embeddings = model.embed_text(TEXTS[1], 0)
    model.prefill(0, len(prompt), embeddings[:-1])
    model.set_input(0, embeddings[-1:])
    read.at[0] = (len(prompt) + len(embeddings) - 1, 0)
    read.codes[0], read.pcm[0] = [], []
    for frame in range(6):
        kept.tick([1])
        model_row = Row(0, read.at[0][0] + frame, 7 + 1, frame, SAMPLING)
        np.testing.assert_array_equal(model.tick([model_row]).codes[0], kept.codes[1][-1])


def test_a_prompt_longer_than_a_prefill_is_read_in_pieces(weights: CsmWeights) -> None:
    model = DeviceModel(weights, slots=1, positions=POSITIONS)
    prompt = model.embed_text("A prompt of more positions than one piece.", 0)
    whole = model.prefix_of(prompt, 0)
    model.max_prefill = 7
    pieces = model.prefix_of(prompt, 0)
    assert pieces.positions == whole.positions == len(prompt)
    torch.testing.assert_close(pieces.keys, whole.keys, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pieces.values, whole.values, atol=1e-5, rtol=1e-4)


def test_a_slot_sounds_as_if_nobody_had_had_it_before(weights: CsmWeights) -> None:
    model = DeviceModel(weights, slots=2, positions=POSITIONS)
    first, second = Talk(model), Talk(model)
    for talk in (first, second):
        talk.join(1)
        for _ in range(3):
            talk.tick([1])
    np.testing.assert_array_equal(first.codes[1], second.codes[1])
    np.testing.assert_array_equal(first.pcm[1], second.pcm[1])


def test_rows_that_fill_up_are_of_the_base_at_the_first_position() -> None:
    buffers = TickBuffers(4, codebooks=2, samples=3, device=torch.device("cpu"))
    rows = [Row(i, 90 + i, 5, 6, SAMPLING, adapter=2) for i in range(4)]
    buffers.fill(rows, 4, scratch=9)
    buffers.fill(rows[:1], 4, scratch=9)
    batch = buffers.batch(4)
    assert batch.slots.tolist() == [0, 9, 9, 9]
    assert batch.positions.tolist() == [90, 0, 0, 0]
    assert batch.adapters.tolist() == [2, 0, 0, 0]
    assert batch.top_k.tolist() == [SAMPLING.top_k, 1, 1, 1]
    assert batch.temperature.tolist() == pytest.approx([SAMPLING.temperature, 0, 0, 0])


def test_an_end_mark_is_not_heard_by_the_codec(tiny_ending_pack: Path) -> None:
    """The frames after it sound as if it had not been."""
    weights = load_weights(tiny_ending_pack)
    model = DeviceModel(weights, slots=1, positions=POSITIONS)
    talk = Talk(model)
    talk.join(0)
    heard: list[np.ndarray] = []
    sound: list[np.ndarray] = []
    since_mark = -1
    while since_mark < 3:
        result = talk.tick([0])
        if result.ended[0]:
            since_mark = 0
            continue
        since_mark += since_mark >= 0
        heard.append(result.codes[0])
        sound.append(result.pcm[0])
    codec = weights.model.codec_model
    whole = codec.decode(torch.from_numpy(np.stack(heard)).T[None]).audio_values[0, 0]
    np.testing.assert_allclose(np.concatenate(sound), whole.detach().numpy(), atol=2e-6)


def test_sound_stays_within_full_scale(weights: CsmWeights) -> None:
    talk = Talk(DeviceModel(weights, slots=1, positions=POSITIONS))
    last = weights.model.codec_model.decoder.decoder_seanet.layers[-1].conv
    before = last.weight.clone()
    try:
        with torch.no_grad():
            last.weight *= 1000
        talk.join(0)
        for _ in range(3):
            talk.tick([0])
    finally:
        with torch.no_grad():
            last.weight.copy_(before)
    assert np.abs(talk.pcm[0]).max() == 1.0


def test_seeds_of_any_size_are_taken(weights: CsmWeights) -> None:
    model = DeviceModel(weights, slots=1, positions=POSITIONS)
    for seed in (-1, 1 << 70):
        position = begin(model, 0, "Hello.")
        assert model.tick([Row(0, position, seed, 0, SAMPLING)]).healthy[0]


def test_a_lora_voice_and_the_base_speak_in_one_tick(
    tiny_pack: Path, tmp_path: Path, weights: CsmWeights
) -> None:
    """Each as it does alone, and without recording anything anew."""
    from src.tts.families.csm.lora import read_adapter
    from tests.families.sesame.lora_packs import make_adapter

    adapter_weights = read_adapter(make_adapter(tiny_pack, tmp_path, seed=3), tiny_pack)
    recorder = SpyRecorder()
    model = graphed(load_weights(tiny_pack), 2, recorder, max_adapters=2, max_rank=8)
    before, layers = recorder.recorded, model._bank.generation  # type: ignore[union-attr]
    adapter = model.add_adapter(adapter_weights)
    together = Talk(model)
    together.join(0)
    together.join(1, Voice(adapter=adapter))
    alone = Talk(DeviceModel(weights, slots=2, positions=POSITIONS))
    alone.join(0)
    for _ in range(4):
        together.tick([0, 1], adapters={1: adapter})
        alone.tick([0])
    np.testing.assert_array_equal(together.codes[0], alone.codes[0])
    assert recorder.recorded == before
    model.remove_adapter(adapter)
    voice = model.add_adapter(adapter_weights)
    again = Talk(model)
    again.join(0)
    again.tick([0])  # of the base alone; the text after it is read with the adapter all the same
    again.join(1, Voice(adapter=voice))
    for _ in range(4):
        again.tick([1], adapters={1: voice})
    np.testing.assert_array_equal(again.codes[1], together.codes[1])
    assert not np.array_equal(again.codes[1], alone.codes[0])
    assert recorder.recorded == before
    assert model._bank.generation == layers  # type: ignore[union-attr]


def test_without_places_there_are_no_lora_voices(weights: CsmWeights) -> None:
    model = DeviceModel(weights, slots=1, positions=POSITIONS)
    with pytest.raises(ValueError, match="max_adapters"):
        model.remove_adapter(1)


def test_closing_gives_the_memory_back(tiny_pack: Path) -> None:
    weights = load_weights(tiny_pack)
    module = weakref.ref(weights.model)
    model = graphed(weights, 2, SpyRecorder())
    begin(model, 0, "Hello.")
    del weights
    model.close()
    gc.collect()
    assert module() is None


def test_sizes() -> None:
    assert powers_up_to(8) == (1, 2, 4, 8)
    assert powers_up_to(6) == (1, 2, 4, 6)
    assert powers_up_to(200, 256) == (200,)
    assert every(64, 150) == (64, 128, 150)
    assert sizes_for(2, 600, few=True) == [
        Size(rows, length) for rows in (1, 2) for length in (256, 512, 600)
    ]
    assert {size.rows for size in sizes_for(5, 128, few=False)} == {1, 2, 3, 4, 5}


def test_the_least_size_that_fits_is_chosen() -> None:
    recorded = [Size(1, 64), Size(1, 128), Size(4, 64), Size(2, 128)]
    assert choose(recorded, 1, 64) == Size(1, 64)
    assert choose(recorded, 1, 65) == Size(1, 128)
    assert choose(recorded, 3, 10) == Size(4, 64)
    assert choose(recorded, 2, 20) == Size(2, 128)
    assert choose(recorded, 9, 100) == Size(2, 128)
    with pytest.raises(LookupError):
        choose(recorded, 1, 129)


def test_the_codec_and_the_small_parts_compile_in_one_piece(weights: CsmWeights) -> None:
    """Traced as for a GPU, where both are compiled; what would be made of it is left out here."""
    compiler = partial(torch.compile, fullgraph=True, dynamic=False, backend="eager")
    plain, compiled = (Talk(DeviceModel(weights, slots=2, positions=POSITIONS)) for _ in range(2))
    compiled.model._loop.fuse(compiler)
    compiled.model._decode = compiler(compiled.model._mimi.step)
    for talk in (plain, compiled):
        talk.join(0)
        talk.join(1)
        talk.tick([1, 0])
        talk.tick([0, 1])
    for slot in (0, 1):
        np.testing.assert_array_equal(plain.codes[slot], compiled.codes[slot])
        np.testing.assert_allclose(plain.pcm[slot], compiled.pcm[slot], atol=2e-6)


def test_a_compiler_that_fails_is_done_without(
    weights: CsmWeights, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(part: object, **_: object) -> Callable[..., object]:
        def fail(*_: object) -> object:
            raise RuntimeError("there is no C compiler\nand much more")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    with caplog.at_level(logging.WARNING):
        model = DeviceModel(weights, slots=1, positions=POSITIONS, compile=True)
    assert "RuntimeError: there is no C compiler" in caplog.text
    talk = Talk(model)
    talk.join(0)
    assert talk.tick([0]).healthy[0]
