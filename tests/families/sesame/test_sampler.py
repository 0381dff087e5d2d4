"""Draws: each row its own seed, temperature and top-k, and nobody else's business."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from src.tts.families.csm import options
from src.tts.families.csm.sampler import MAX_TOP_K, Sampler, gumbel, mix

VOCAB = 2048


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(codebooks=32, vocab=VOCAB, device="cpu")


def plan(
    sampler: Sampler,
    *,
    seeds: Any,
    frames: Any = 0,
    temperature: Any = 1.0,
    top_k: Any = 50,
) -> Any:
    seeds = torch.as_tensor(seeds)
    rows = torch.zeros(len(seeds), dtype=torch.int64)
    return sampler.plan(
        seeds,
        rows + torch.as_tensor(frames),
        rows.float() + torch.as_tensor(temperature),
        rows + torch.as_tensor(top_k),
    )


def test_draws_are_distributed_as_the_softmax_of_the_top_k(sampler: Sampler) -> None:
    torch.manual_seed(0)
    logits = torch.randn(VOCAB) * 3
    rows, temperature, k = 20_000, 0.9, 20
    drawn = plan(sampler, seeds=range(rows), temperature=temperature, top_k=k)(
        logits.expand(rows, -1), 3
    )
    values, ids = logits.topk(k)
    wanted = torch.softmax(values / temperature, -1)
    got = (drawn[:, None] == ids).float().mean(0)
    assert got.sum() == 1
    # Total variation; 20,000 true draws of this distribution stay below 0.015 nearly always.
    assert (got - wanted).abs().sum() / 2 < 0.015


@pytest.mark.parametrize("across", ["frames", "codebooks"])
def test_one_seed_draws_afresh_in_every_frame_and_codebook(sampler: Sampler, across: str) -> None:
    flat = torch.zeros(1, VOCAB)
    flat[:, :100] = 5.0
    if across == "frames":
        frames = torch.arange(2000)
        seeds = torch.full((2000,), 7)
        drawn = plan(sampler, seeds=seeds, frames=frames, top_k=100)(flat.expand(2000, -1), 0)
    else:
        draws = [plan(sampler, seeds=[7], frames=frame, top_k=100) for frame in range(63)]
        drawn = torch.cat([draw(flat, codebook) for draw in draws for codebook in range(32)])
    counts = torch.bincount(drawn, minlength=100)[:100].float()
    mean = len(drawn) / 100
    # 99 degrees of freedom: 149 is the 99.9th percentile of chi-squared.
    assert ((counts - mean) ** 2 / mean).sum() < 149
    assert (drawn[1:] == drawn[:-1]).float().mean() < 0.03


def test_each_row_has_its_own_top_k_within_bounds(sampler: Sampler) -> None:
    torch.manual_seed(1)
    logits = torch.randn(1, VOCAB).expand(4, -1)
    top_k = torch.tensor([1, 3, 0, 10 * MAX_TOP_K])
    rank = logits[0].argsort(descending=True).argsort()
    seen = torch.stack(
        [
            rank[plan(sampler, seeds=[frame] * 4, frames=frame, temperature=9.0, top_k=top_k)(
                logits, 0
            )]
            for frame in range(300)
        ]
    )  # fmt: skip
    assert seen.max(0).values[:3].tolist() == [0, 2, 0]
    assert 100 < seen[:, 3].max() < MAX_TOP_K


def test_no_more_candidates_are_offered_than_are_drawn_from() -> None:
    """The catalog's bound is written where no torch is."""
    assert options.MAX_TOP_K == MAX_TOP_K


def test_temperature_zero_takes_the_likeliest_whatever_the_seed(sampler: Sampler) -> None:
    torch.manual_seed(2)
    logits = torch.randn(64, VOCAB)
    drawn = plan(sampler, seeds=range(64), temperature=0.0, top_k=50)(logits, 5)
    assert torch.equal(drawn, logits.argmax(-1))


def test_a_tie_is_broken_alike_for_every_seed_and_frame_at_temperature_zero(
    sampler: Sampler,
) -> None:
    """In bfloat16 the two largest logits are often the same number."""
    logits = torch.zeros(64, VOCAB)
    logits[:, [5, 900, 1400]] = 4.0
    drawn = plan(sampler, seeds=range(64), frames=torch.arange(64), temperature=0.0)(logits, 5)
    assert drawn.unique().numel() == 1
    assert int(drawn[0]) in (5, 900, 1400)


def test_a_row_draws_alone_what_it_draws_among_others(sampler: Sampler) -> None:
    torch.manual_seed(3)
    logits = torch.randn(16, VOCAB)
    seeds = torch.randint(0, 2**62, (16,))
    together = plan(sampler, seeds=seeds, frames=9)(logits, 4)
    order = torch.randperm(16)
    shuffled = plan(sampler, seeds=seeds[order], frames=9)(logits[order], 4)
    assert torch.equal(shuffled, together[order])
    for row in range(16):
        assert (
            plan(sampler, seeds=seeds[row : row + 1], frames=9)(logits[row : row + 1], 4)
            == (together[row])
        )


def test_a_seed_says_the_same_in_every_release(sampler: Sampler) -> None:
    logits = (torch.arange(VOCAB) % 61).float()[None].expand(6, -1) / 8
    draw = plan(sampler, seeds=[0, 1, 2, 2**32, 2**62 + 1, -5], frames=torch.arange(6))
    assert draw(logits, 0).tolist() == [121, 1767, 1401, 1828, 304, 1157]


def test_logits_that_are_no_numbers_are_told_and_give_an_id_all_the_same(
    sampler: Sampler,
) -> None:
    logits = torch.randn(6, VOCAB)
    logits[1] = float("nan")
    logits[2, 77] = float("nan")
    logits[3, 5] = float("inf")
    logits[4] = float("-inf")
    logits[5, 5] = float("-inf")
    draw = plan(sampler, seeds=range(6))
    ids = draw(logits, 0)
    draw(torch.randn(6, VOCAB), 1)
    assert draw.healthy().tolist() == [True, False, False, False, False, True]
    assert 0 <= ids.min() <= ids.max() < VOCAB


def test_the_hash_spreads_every_bit() -> None:
    x = torch.arange(4096)
    for bit in (0, 1, 31, 40, 62):
        changed = mix(x) ^ mix(x ^ (1 << bit))
        flips = torch.stack([(changed >> place) & 1 for place in range(32)]).float().mean(1)
        assert 0.4 < flips.min() <= flips.max() < 0.6
    assert mix(torch.tensor([1, 1 << 32])).unique().numel() == 2
    assert mix(torch.tensor([-1, 2**63 - 1])).min() >= 0


def test_the_noise_is_gumbel() -> None:
    noise = gumbel(mix(torch.arange(1 << 18)))
    assert noise.mean() == pytest.approx(0.5772, abs=0.01)
    assert noise.std() == pytest.approx(1.2825, abs=0.01)
    assert noise.isfinite().all()
