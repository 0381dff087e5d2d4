"""Joined matrices and turned heads, beside what transformers' own modules compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from src.rpc.errors import CorruptModel
from src.tts.families.csm.layers import Layer, Norm, attend, attend_all, joined, rotations
from src.tts.families.csm.weights import CsmWeights, load_weights


@pytest.fixture(scope="module")
def weights(tiny_pack: Path) -> CsmWeights:
    return load_weights(tiny_pack)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_layer_is_the_module_it_is_made_of(weights: CsmWeights, adapted: bool) -> None:
    backbone = weights.model.backbone_model
    x = torch.randn(5, weights.hidden, generator=torch.Generator().manual_seed(1))
    places = torch.arange(5)
    with torch.no_grad():
        module = backbone.layers[0]
        expected = module(
            x[None],
            attention_mask=torch.ones(5, 5, dtype=torch.bool).tril()[None, None],
            position_embeddings=backbone.rotary_emb(x[None], places[None]),
        )[0]
        turns = rotations(backbone.rotary_emb, 8, "cpu", torch.float32)
        layer = Layer(module)
        q, k, v = layer.project(x, turns[places], adapted)
        mask = torch.ones(5, 5, dtype=torch.bool).tril()
        seen = attend_all(q, k.transpose(0, 1), v.transpose(0, 1), mask)
        torch.testing.assert_close(layer.finish(x, seen, adapted), expected, atol=1e-5, rtol=1e-5)


def test_one_query_a_row_sees_what_it_sees_among_all(weights: CsmWeights) -> None:
    layer = Layer(weights.model.backbone_model.layers[0])
    turns = rotations(weights.model.backbone_model.rotary_emb, 8, "cpu", torch.float32)
    x = torch.randn(4, weights.hidden, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        q, k, v = layer.project(x, turns[:4], False)
        keys, values = k.transpose(0, 1), v.transpose(0, 1)
        every = attend_all(q, keys, values, torch.ones(4, 4, dtype=torch.bool).tril())
        mask = torch.tensor([[[[True, True, True, False]]]])
        third = attend(q[2:3], keys[None], values[None], mask)
    torch.testing.assert_close(third[0], every[2], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_is_the_module_it_is_made_of(weights: CsmWeights, dtype: torch.dtype) -> None:
    module = weights.model.backbone_model.norm
    module = type(module)(weights.hidden, module.variance_epsilon).to(dtype)
    x = torch.randn(3, weights.hidden, generator=torch.Generator().manual_seed(3)).to(dtype)
    with torch.no_grad():
        module.weight.copy_(torch.linspace(0.5, 2, weights.hidden))
        torch.testing.assert_close(Norm(module)(x), module(x))


def test_joined_weights_stay_the_modules_own() -> None:
    a, b = nn.Linear(3, 2, bias=False), nn.Linear(3, 4, bias=False)
    before = torch.cat([a.weight, b.weight]).detach().clone()
    whole = joined(a, b)
    torch.testing.assert_close(whole, before, rtol=0, atol=0)
    with torch.no_grad():
        b.weight[1] = 7
    assert (whole[3] == 7).all()
    assert joined(a, b).data_ptr() == whole.data_ptr()


def test_neighbours_that_are_not_in_order_are_joined_anew() -> None:
    a, b = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
    joined(a, b)
    torch.testing.assert_close(joined(b, a), torch.cat([b.weight, a.weight]), rtol=0, atol=0)


def test_a_bias_is_refused() -> None:
    with pytest.raises(CorruptModel, match="bias"):
        joined(nn.Linear(3, 2))
