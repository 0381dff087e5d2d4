"""What holds a run in bounds: looks between layers, pieces of a layer, durations of speech."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from src.tts.families.melo import bounds
from src.tts.families.melo.bounds import (
    Stopped,
    bound_durations,
    convolve_in_pieces,
    look_between_layers,
)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "_PIECE", 64)
    monkeypatch.setattr(bounds, "_SHORTEST_PIECE", 7)


def counting() -> tuple[list[int], Any]:
    looks: list[int] = []
    return looks, lambda: looks.append(1)


CONVOLUTIONS = [
    lambda: torch.nn.Conv1d(3, 5, 3, padding=1),
    lambda: torch.nn.Conv1d(2, 2, 11, dilation=5, padding=25),
    lambda: torch.nn.Conv1d(4, 4, 7, padding=3, groups=2, bias=False),
    lambda: torch.nn.Conv1d(3, 3, 4, dilation=3, padding=4),
    lambda: torch.nn.ConvTranspose1d(4, 2, 2, 2),
    lambda: torch.nn.ConvTranspose1d(8, 4, 16, 8, padding=4),
    lambda: torch.nn.ConvTranspose1d(4, 2, 11, 4, padding=3),
]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("make", CONVOLUTIONS)
@pytest.mark.parametrize("samples", [7, 8, 40, 203])
def test_in_pieces_a_layer_makes_what_it_makes_at_once(make: Any, samples: int) -> None:
    torch.manual_seed(samples)
    layer, (looks, look) = make(), counting()
    given = torch.randn(1, layer.in_channels, samples)
    with torch.inference_mode():
        whole = layer(given)
        convolve_in_pieces(layer, look)
        torch.testing.assert_close(layer(given), whole, atol=1e-5, rtol=1e-5)
    assert bool(looks)
    assert len(looks) > 1 or samples < 40


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("layer", [torch.nn.Conv1d(8, 8, 3), torch.nn.ConvTranspose1d(8, 8, 2, 2)])
def test_a_cancel_ends_a_layer_before_its_next_piece(layer: Any) -> None:
    looks: list[int] = []

    def look() -> None:
        looks.append(1)
        if len(looks) == 3:
            raise Stopped

    convolve_in_pieces(layer, look)
    with pytest.raises(Stopped):
        layer(torch.randn(1, 8, 80))
    assert len(looks) == 3


def test_pieces_hold_as_many_numbers_as_a_cache_takes_but_not_too_few_samples() -> None:
    assert list(bounds._pieces(300_000, 2)) == [
        (0, 131_072),
        (131_072, 262_144),
        (262_144, 300_000),
    ]
    assert list(bounds._pieces(2000, 512)) == [(0, 1024), (1024, 2000)]
    assert list(bounds._pieces(1024, 512)) == [(0, 1024)]


def test_before_every_layer_is_a_look() -> None:
    looks, look = counting()
    inner = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.ReLU())
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), inner)
    look_between_layers(net, look)
    net(torch.zeros(1, 2))
    assert len(looks) == 3


def test_durations_of_speech_are_left_alone() -> None:
    usual = torch.full((1, 1, 41), math.log(5.0))
    assert torch.equal(bound_durations(usual, 86.0), usual)
    broken = torch.tensor([[[float("nan"), float("inf"), 3.0, 40.0, -9.0]]])
    assert float(bound_durations(broken, 86.0).exp().sum()) <= 86 * (2 + 5 * 0.15) * 1.001


def test_a_sound_of_one_endless_symbol_is_as_long_as_two_seconds_and_its_share() -> None:
    endless = torch.tensor([[[8.0]]])
    assert float(bound_durations(endless, 86.0).exp()) == pytest.approx(86 * 2.15, rel=1e-4)
    assert torch.isfinite(bound_durations(torch.full((1, 1, 3), float("inf")), 86.0)).all()


def test_only_the_processor_gets_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from src.tts.families.melo import network
    from src.tts.families.melo.sources import SOURCE

    SOURCE.offer()
    cut: list[Any] = []
    monkeypatch.setattr(network, "convolve_in_pieces", lambda part, look: cut.append(part))
    net: Any = torch.nn.Module()
    net.dec, net.dp, net.sdp = (torch.nn.Identity() for _ in range(3))
    config = {"symbols": [], "data": {"sampling_rate": 44_100, "hop_length": 512}}
    pack: Any = SimpleNamespace(config=config)
    for kind in ("cuda", "cpu"):
        network.Network(pack, net, None, torch.device(kind))
        assert cut == ([net.dec] if kind == "cpu" else [])
