"""What is computed otherwise than in the package gives what the package gives, or what is right."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from src.tts.families.cosyvoice2.layers import Sampler, StretchedFlow
from src.tts.families.cosyvoice2.speech import CosyVoice2Model
from src.tts.tts_base import Segment
from tests.families.cosyvoice.packs import chunks, spec

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.timeout(400)  # the first test waits for the package's import

# From here on transformers takes a mask that is shorter than the past for padding.
SHORT_MASKS_ARE_PADDED = (4, 53)
TRANSFORMERS = tuple(map(int, version("transformers").split(".")[:2]))


def hidden(model: CosyVoice2Model) -> Any:
    """The package's `CosyVoice2Model` that computes."""
    return model._engine._model  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["clauses", "flowing"])
def test_the_steps_of_a_run_are_one_full_pass(
    model: CosyVoice2Model, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    encoder = hidden(model).llm.llm
    steps: list[tuple[Any, Any]] = []
    real = type(encoder).forward_one_step

    def step(self: Any, xs: Any, masks: Any, cache: Any = None) -> Any:
        out = real(self, xs, masks, cache)
        steps.append((xs.clone(), out[0].clone()))
        return out

    monkeypatch.setattr(type(encoder), "forward_one_step", step)
    segments = [Segment("Hello there,", 0), Segment("how are you?", 13)]
    chunks(model, segments, spec(text=text), most=2)
    if text == "clauses":  # each segment is a run of its own: the first
        begins = [i for i, (xs, _) in enumerate(steps) if xs.shape[1] > 1]
        steps = steps[: begins[1]] if len(begins) > 1 else steps
    assert len(steps) > 25
    xs, ys = (torch.cat(part, dim=1) for part in zip(*steps, strict=True))
    with torch.inference_mode():
        full, _ = encoder(xs, torch.tensor([xs.shape[1]]))
    assert float((full - ys).abs().max()) < 1e-3
    assert float(full.abs().mean()) > 0.1


def test_the_package_s_own_step_is_right_on_old_transformers_only(model: CosyVoice2Model) -> None:
    """So the patch is needed where it is needed; where it is not, it does no harm (above)."""
    encoder = hidden(model).llm.llm
    original = super(type(encoder), encoder).forward_one_step
    with torch.inference_mode():
        xs = torch.randn(1, 12, encoder.model.config.hidden_size)
        full, _ = encoder(xs, torch.tensor([12]))
        mask = torch.ones(1, 11, 11, dtype=torch.bool).tril()
        _, cache = original(xs[:, :11], mask)
        last, _ = original(xs[:, 11:], mask[:, :1, :1], cache)
    wrong = float((full[:, 11:] - last).abs().max()) > 0.05
    assert wrong == (TRANSFORMERS >= SHORT_MASKS_ARE_PADDED)


def test_weights_are_float32_whatever_the_folder_holds(model: CosyVoice2Model) -> None:
    assert {p.dtype for p in hidden(model).llm.parameters()} == {torch.float32}


def test_the_flow_begins_with_the_release_s_noise(model: CosyVoice2Model) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)  # as its `set_all_random_seed(0)` does
        published = torch.randn([1, 80, 50 * 300])
    assert torch.equal(hidden(model).flow.decoder.rand_noise, published)


def test_a_draw_is_the_package_s_draw() -> None:
    from cosyvoice.utils.common import ras_sampling

    ends = 0
    for seed in range(60):
        made = torch.Generator().manual_seed(seed)
        scores = (torch.randn(84, generator=made) * 4).log_softmax(0)
        scores[82:] = -float("inf")  # the package would take these for an end, or fail
        decoded = torch.randint(0, 82, (30,), generator=made).tolist()
        if seed % 3 == 0:
            decoded[-1] = int(scores.argmax())  # so that a repetition is drawn again
        torch.manual_seed(seed)
        wanted = ras_sampling(scores.clone(), decoded, 25)
        torch.manual_seed(seed)
        got = Sampler(81, torch.random.default_generator, flowing=False)(scores, decoded, 25)
        assert got == wanted, seed
        ends += wanted == decoded[-1]
    assert ends < 60


def test_marks_that_are_no_sound_are_drawn_only_where_they_mean_something() -> None:
    generator = torch.Generator().manual_seed(0)
    whole = Sampler(4, generator, flowing=False)
    flowing = Sampler(4, generator, flowing=True)

    def scores(*likely: int) -> Any:
        values = torch.full((7,), -50.0)
        for one in likely:
            values[one] = 0.0
        return values

    assert whole(scores(2, 5, 6), [], 25) == 2
    assert flowing(scores(2, 5, 6), [], 25) == 2, "after the text there is no more of it"
    more = scores(5, 6)
    more[4] = -float("inf")
    assert flowing(more, [], 25) == 6


@pytest.mark.parametrize("speed", [0.5, 0.8, 1.3, 2.0])
def test_another_speed_in_chunks_is_that_speed_in_one_go(speed: float) -> None:
    mel = torch.randn(1, 80, 150)

    class Flow:
        def inference(self, upto: int, finalize: bool) -> tuple[Any, None]:
            return mel[:, :, :upto], None

    chunked, whole = StretchedFlow(Flow(), speed), StretchedFlow(Flow(), speed)
    parts = [chunked.inference(upto=n, finalize=n == 150)[0] for n in (50, 52, 120, 150)]
    assert torch.equal(torch.cat(parts, 2), whole.inference(upto=150, finalize=True)[0])
    assert abs(torch.cat(parts, 2).shape[2] - 150 / speed) <= 1


@pytest.mark.parametrize(
    ("module", "under"),
    [("cosyvoice.cli.model", "cosyvoice"), ("matcha.utils.audio", "third_party/Matcha-TTS")],
)
def test_the_sources_are_those_that_are_named(
    model: CosyVoice2Model, module: str, under: str
) -> None:
    if home := os.environ.get("COSYVOICE_HOME"):
        place = Path(sys.modules[module].__file__ or "")
        assert place.is_relative_to(Path(home).expanduser() / under)
