"""The frame loop against `generate`, against full passes, and against itself alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from src.tts.families.csm.frame_loop import FrameLoop, StepBatch
from src.tts.families.csm.lora import LoraBank, StackedLinear
from src.tts.families.csm.weights import CsmWeights, load_weights

SLOTS, POSITIONS = 8, 256
TEXT = "Hello there, this is a test."
FOREIGN = [2048, 2049, 2050]


@pytest.fixture(scope="module")
def weights(tiny_pack: Path) -> CsmWeights:
    return load_weights(tiny_pack)


@pytest.fixture
def loop(weights: CsmWeights) -> FrameLoop:
    return FrameLoop(weights, slots=SLOTS, positions=POSITIONS)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def text(loop: FrameLoop, words: str = TEXT, speaker: int = 0) -> Any:
    return loop.embed_text(loop.weights.text_ids(words, speaker))


ZEROS = torch.zeros(1, 32, dtype=torch.int64)


@dataclass
class Voice:
    """One slot as the engine would drive it."""

    loop: FrameLoop
    slot: int
    seed: int = 0
    temperature: float = 0.9
    top_k: int = 50
    position: int = 0
    frames: int = 0

    def read(self, embeddings: Any, pieces: int = 1) -> Voice:
        """All but the last are prefilled; the last is the next step's input."""
        for piece in embeddings[:-1].tensor_split(pieces):
            self.loop.prefill(self.slot, self.position, piece, 0)
            self.position += len(piece)
        self.loop.inputs[self.slot] = embeddings[-1]
        return self

    def say(self, count: int, **kwargs: Any) -> Any:
        """Frames drawn alone, int64[count, 32]."""
        return torch.cat([tick([self], **kwargs).codes for _ in range(count)])


def tick(voices: list[Voice], *, padding: int = 0, length: int | None = None) -> Any:
    loop = voices[0].loop
    fill = [0] * padding
    batch = StepBatch.of(
        [*(v.slot for v in voices), *([loop.slots] * padding)],
        [*(v.position for v in voices), *fill],
        seeds=[*(v.seed for v in voices), *fill],
        frames=[*(v.frames for v in voices), *fill],
        temperature=[*(v.temperature for v in voices), *fill],
        top_k=[*(v.top_k for v in voices), *([1] * padding)],
    )
    out = loop.step(batch, length)
    for voice in voices:
        voice.position += 1
        voice.frames += 1
    return out


def state(loop: FrameLoop, slot: int, n: int) -> Any:
    """Keys and values of the first `n` positions."""
    prefix = loop.save_prefix(slot, n)
    return torch.stack((prefix.keys, prefix.values))


# --- what the family's own code computes


@pytest.mark.parametrize("words", [TEXT, "Noon."])
def test_greedy_frames_are_those_of_generate(loop: FrameLoop, words: str) -> None:
    """The guard for every upgrade of transformers."""
    ids = torch.tensor([loop.weights.text_ids(words, 0)])
    wanted = loop.weights.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        depth_decoder_do_sample=False,
        suppress_tokens=FOREIGN,
        depth_decoder_suppress_tokens=FOREIGN,
    )[0]
    mine = Voice(loop, 3, temperature=0.0).read(text(loop, words)).say(12)
    assert mine.shape == (12, 32)
    assert torch.equal(mine, wanted)


def test_what_steps_leave_is_what_the_model_computes_of_the_whole(loop: FrameLoop) -> None:
    voice = Voice(loop, 2).read(text(loop), pieces=3)
    codes = voice.say(9)
    whole = torch.cat((text(loop), loop.embed_frames(codes[:-1])))
    backbone = loop.weights.model.backbone_model
    cache = backbone(inputs_embeds=whole[None], use_cache=True).past_key_values
    wanted = torch.stack(
        [torch.stack([getattr(layer, part)[0] for layer in cache.layers])
         for part in ("keys", "values")]
    )  # fmt: skip
    found = state(loop, 2, voice.position)
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 1e-4


# --- who else is there


@dataclass
class Part:
    voice: Voice
    words: str
    joins: int
    stays: int


def parts(loop: FrameLoop) -> list[Part]:
    """Twelve speakers over eight slots, all different; a slot is taken again when it is free."""
    chance = random.Random(4)
    found = []
    for number in range(12):
        round_, slot = divmod(number, SLOTS)
        found.append(
            Part(
                Voice(
                    loop,
                    slot,
                    seed=chance.getrandbits(60),
                    temperature=chance.choice([0.0, 0.6, 0.9, 1.2]),
                    top_k=chance.choice([1, 5, 50, 128]),
                ),
                "la " * chance.randint(1, 20),
                joins=round_ * 13 + chance.randint(0, 4),
                stays=chance.randint(4, 8),
            )
        )
    return found


def test_a_slot_says_alone_what_it_says_in_a_batch_that_others_join_and_leave(
    weights: CsmWeights,
) -> None:
    crowd = parts(FrameLoop(weights, slots=SLOTS, positions=POSITIONS))
    heard: list[list[Any]] = [[] for _ in crowd]
    most = 0
    for now in range(28):
        for part in crowd:
            if part.joins == now:
                part.voice.loop.restore(part.voice.slot, None)
                part.voice.read(text(part.voice.loop, part.words))
        # A speaker rests now and then, as one whose listener is slow.
        here = [
            number
            for number, part in enumerate(crowd)
            if part.joins <= now and len(heard[number]) < part.stays and (now + 2 * number) % 11
        ]
        if not here:
            continue
        most = max(most, len(here))
        out = tick([crowd[number].voice for number in here], padding=SLOTS - len(here))
        for row, number in enumerate(here):
            heard[number].append(out.codes[row])
    assert most == SLOTS
    loop = FrameLoop(weights, slots=SLOTS, positions=POSITIONS)
    for part, codes in zip(parts(loop), heard, strict=True):
        assert len(codes) == part.stays
        alone = part.voice.read(text(loop, part.words)).say(part.stays)
        assert torch.equal(torch.stack(codes), alone)


def test_rows_that_fill_a_batch_up_change_no_slot(loop: FrameLoop) -> None:
    voices = [Voice(loop, slot).read(text(loop)) for slot in (0, 5)]
    others = [state(loop, slot, POSITIONS) for slot in range(SLOTS) if slot not in (0, 5)]
    inputs = loop.inputs.clone()
    tick(voices, padding=6)
    assert torch.equal(torch.stack(others), torch.stack(
        [state(loop, slot, POSITIONS) for slot in range(SLOTS) if slot not in (0, 5)]
    ))  # fmt: skip
    untouched = [1, 2, 3, 4, 6, 7]
    assert torch.equal(loop.inputs[untouched], inputs[untouched])


def test_how_far_attention_may_look_changes_nothing_beyond_the_position(loop: FrameLoop) -> None:
    def said(slot: int, length: int | None) -> Any:
        voice = Voice(loop, slot, seed=5).read(text(loop))
        return torch.cat([tick([voice], length=length or voice.position + 1).codes
                          for _ in range(6)])  # fmt: skip

    assert torch.equal(said(0, None), said(1, POSITIONS))
    assert torch.equal(said(0, None), said(1, 64))


# --- segments, prompts and pieces


def test_the_next_sentence_appended_is_as_if_all_were_read_anew(loop: FrameLoop) -> None:
    voice = Voice(loop, 0, temperature=0.0).read(text(loop, "First part."))
    sound = voice.say(6)
    voice.say(1)  # the step that reads the last frame, as when it draws the segment's end
    more = torch.cat((loop.embed_frames(ZEROS), text(loop, "Second part.")))
    appended = voice.read(more).say(4)

    anew = torch.cat((text(loop, "First part."), loop.embed_frames(sound), more))
    fresh = Voice(loop, 1, temperature=0.0, frames=7).read(anew)
    assert fresh.position == voice.position - 4
    assert (state(loop, 0, fresh.position) - state(loop, 1, fresh.position)).abs().max() < 1e-4
    assert torch.equal(fresh.say(4), appended)


def test_a_restored_prompt_is_the_prompt_read(loop: FrameLoop) -> None:
    prompt = torch.cat((text(loop, "A prompt."), loop.embed_frames(torch.arange(96).view(3, 32))))
    read = Voice(loop, 0, seed=3)
    loop.prefill(0, 0, prompt, 0)
    prefix = loop.save_prefix(0, len(prompt))
    loop.restore(6, prefix)
    read.position = len(prompt)
    wanted = read.read(text(loop)).say(4)
    found = Voice(loop, 6, seed=3, position=prefix.positions).read(text(loop)).say(4)
    assert torch.equal(found, wanted)
    # A copy: what becomes of the slot that it was read in is nothing to it.
    loop.restore(0, None)
    loop.restore(5, prefix)
    again = Voice(loop, 5, seed=3, position=prefix.positions).read(text(loop)).say(4)
    assert torch.equal(again, wanted)


def test_a_text_read_in_pieces_is_the_text(loop: FrameLoop) -> None:
    whole = Voice(loop, 0, temperature=0.0).read(text(loop)).say(4)
    pieces = Voice(loop, 1, temperature=0.0).read(text(loop), pieces=5).say(4)
    assert torch.equal(pieces, whole)
    assert (state(loop, 0, 30) - state(loop, 1, 30)).abs().max() < 1e-4


def test_the_speaker_and_the_words_are_heard(loop: FrameLoop) -> None:
    said = [
        Voice(loop, slot, temperature=0.0).read(text(loop, words, speaker)).say(2)
        for slot, (words, speaker) in enumerate([(TEXT, 0), (TEXT, 1), (TEXT[:-1], 0)])
    ]
    assert not torch.equal(said[0], said[1])
    assert not torch.equal(said[0], said[2])


def test_nothing_is_read_beyond_a_slots_positions_or_into_a_slot_that_is_not(
    loop: FrameLoop,
) -> None:
    many = loop.inputs.new_zeros(POSITIONS, loop.weights.hidden)
    loop.prefill(0, 0, many, 0)
    for slot, position in ((0, 1), (0, -1), (SLOTS + 1, 0), (-1, 0)):
        with pytest.raises(ValueError, match=r"slot|positions"):
            loop.prefill(slot, position, many, 0)
    with pytest.raises(ValueError, match="positions"):
        loop.save_prefix(0, POSITIONS + 1)


# --- the end of a segment, ids without sound


def test_a_segment_ends_at_31_zeros_of_32_codes(tiny_ending_pack: Path) -> None:
    """`generate` stops at 31 but trims at 32, and so decodes a frame of 31 as a click."""
    weights = load_weights(tiny_ending_pack)
    heads = weights.model.depth_decoder.codebooks_head.weight

    def ends() -> tuple[Any, Any]:
        loop = FrameLoop(weights, slots=SLOTS, positions=POSITIONS)
        voices = [Voice(loop, slot, seed=slot).read(text(loop)) for slot in range(SLOTS)]
        outs = [tick(voices) for _ in range(12)]
        return torch.cat([out.codes for out in outs]), torch.cat([out.ended for out in outs])

    heads[-1, 0, 0] *= -1  # now the last codebook's 0 is the unlikeliest of all
    codes, ended = ends()
    assert ended.any()
    assert not ended.all()
    assert torch.equal(ended, (codes[:, :31] == 0).all(-1))
    assert (codes[ended, 31] != 0).all()

    heads[-2, 0, 0] *= -1  # and the one before it
    codes, ended = ends()
    assert (codes[:, :30] == 0).all(-1).any()
    assert not ended.any()


def test_ids_that_the_codec_does_not_have_are_never_drawn(tiny_pack: Path) -> None:
    weights = load_weights(tiny_pack)
    model = weights.model
    model.lm_head.weight[FOREIGN] *= 50
    model.depth_decoder.codebooks_head.weight[:, :, FOREIGN] *= 50
    ids = torch.tensor([weights.text_ids(TEXT, 0)])
    drawn_by_generate = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False
    )
    assert drawn_by_generate.max() >= 2048  # or this test tests nothing
    loop = FrameLoop(weights, slots=SLOTS, positions=POSITIONS)
    voices = [
        Voice(loop, slot, temperature=0.0 if slot % 2 else 1.5, top_k=128).read(text(loop))
        for slot in range(SLOTS)
    ]
    for _ in range(3):
        codes = tick(voices).codes
        assert 0 <= codes.min() <= codes.max() < 2048


# --- numbers that are none


def test_a_row_without_numbers_fails_alone(weights: CsmWeights) -> None:
    def three(poisoned: bool) -> tuple[FrameLoop, list[Any]]:
        loop = FrameLoop(weights, slots=SLOTS, positions=POSITIONS)
        voices = [Voice(loop, slot, seed=slot).read(text(loop)) for slot in range(3)]
        outs = [tick(voices)]
        if poisoned:
            loop.inputs[1] = float("nan")
        return loop, outs + [tick(voices) for _ in range(2)]

    well, (_, *wanted) = three(poisoned=False)
    loop, (before, *after) = three(poisoned=True)
    assert before.healthy.all()
    for out, other in zip(after, wanted, strict=True):
        assert out.healthy.tolist() == [True, False, True]
        assert not out.ended[1]
        assert torch.equal(out.codes[[0, 2]], other.codes[[0, 2]])
        assert 0 <= out.codes.min() <= out.codes.max() < 2048
    assert loop.inputs.isfinite().all()
    for slot in (0, 2, 3):
        assert torch.equal(state(loop, slot, POSITIONS), state(well, slot, POSITIONS))


def test_a_slots_next_owner_inherits_nothing(loop: FrameLoop) -> None:
    """Least of all what is not a number: masked, it still meets a weight of 0."""
    wanted = Voice(loop, 0, seed=1).read(text(loop)).say(3)
    bad = Voice(loop, 4).read(text(loop, "x" * 60))
    loop.inputs[4] = float("nan")
    assert not tick([bad]).healthy.any()
    loop.inputs[4] = float("nan")
    loop.restore(4, None)
    assert loop.inputs[4].isfinite().all()
    out = Voice(loop, 4, seed=1).read(text(loop))
    assert torch.equal(out.say(3), wanted)


def test_a_slot_in_bfloat16_speaks(tiny_pack: Path) -> None:
    loop = FrameLoop(load_weights(tiny_pack, dtype="bfloat16"), slots=2, positions=64)
    voices = [Voice(loop, slot, seed=1).read(text(loop)) for slot in (0, 1)]
    out = tick(voices)
    assert out.healthy.all()
    assert torch.equal(out.codes[0], out.codes[1])
    assert loop.inputs.dtype == torch.bfloat16


# --- adapters


@pytest.mark.parametrize("active", [True, False])
def test_with_adapters_every_layer_that_one_may_change_is_asked(
    weights: CsmWeights, active: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = FrameLoop(weights, slots=SLOTS, positions=POSITIONS)
    loop.bank = bank = LoraBank(weights, capacity=1, max_rank=2)
    bank.prepare()
    bank.active = active
    stacked = {m: n for n, m in weights.model.named_modules() if isinstance(m, StackedLinear)}
    asked = set()
    monkeypatch.setattr(StackedLinear, "add_to", lambda layer, *_: asked.add(stacked[layer]))
    try:
        loop.step(StepBatch.of([0, 1], [3, 0]))
    finally:
        bank.detach()
    assert asked == (set(stacked.values()) if active else set())
    assert len(stacked) == 7 * (3 + 2) + 1


def test_the_adapters_are_chosen_before_anything_is_computed(loop: FrameLoop) -> None:
    class Bank:
        active = False
        chosen: list[list[int]] = []

        def select(self, adapters: Any) -> None:
            self.chosen.append(adapters.tolist())

    loop.bank = Bank()  # type: ignore[assignment]
    loop.prefill(0, 0, text(loop), 3)
    loop.step(StepBatch.of([0, 1], [30, 0], adapters=[3, 0]))
    assert Bank.chosen == [[3], [3, 0]]
