"""The family against itself: the package's own call, a full pass, a codec's whole decode."""

from __future__ import annotations

import functools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from src.audio.pcm import Float32
from src.tts.adapters.adapter_parler_tts import ParlerTtsModel
from src.tts.families.parler.engine import ParlerEngine
from src.tts.families.parler.frames import Ids, WindowDecoder, reach_of
from src.tts.tts_base import CancelToken, Segment, VoiceSpec
from tests.families.oracles import assert_frames_hold_all
from tests.families.parler.packs import (
    GREEDY,
    decibels,
    edit_json,
    listening,
    load,
    said,
    torch_model,
)
from tests.families.parler.tiny import CODEBOOKS, CODES, HOP, RATE, make_tiny_pack

pytestmark = pytest.mark.timeout(120)
TEXT = "Hi you."
SEED = 1
DESCRIPTION = "A calm voice, very close."
KINDS: dict[str, dict[str, Any]] = {
    "prepended": {},
    "same-width": {"text_width": 32},
    "cross-attended": {"prompt_cross_attention": True},
}


@pytest.fixture(scope="module", params=KINDS)
def kind(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> ParlerTtsModel:
    """Speech that ends by itself, after a second or two."""
    folder = tmp_path_factory.mktemp("kinds") / request.param
    return load(make_tiny_pack(folder, end_gain=4.0, min_steps=40, **KINDS[request.param]))


@pytest.fixture(scope="module")
def model(brief_pack: Path) -> ParlerTtsModel:
    return load(brief_pack)


def by_the_package(model: ParlerTtsModel, seed: int) -> Float32:
    """The call that the package documents: ids in, everything at once out."""
    tokens = model._engine._prompts
    description = tokens(DESCRIPTION, return_tensors="pt", return_token_type_ids=False)
    prompt = tokens(TEXT, return_tensors="pt", return_token_type_ids=False)
    torch.manual_seed(seed)
    with torch.inference_mode():
        sound = torch_model(model).generate(
            input_ids=description.input_ids,
            attention_mask=description.attention_mask,
            prompt_input_ids=prompt.input_ids,
            prompt_attention_mask=prompt.attention_mask,
            do_sample=True,
            temperature=1.0,
            max_length=model._engine.frames(4_000) + CODEBOOKS,
        )
    out: Float32 = sound.reshape(-1).float().numpy()
    return out


def test_a_stream_says_what_the_packages_own_call_says(kind: ParlerTtsModel) -> None:
    """With the description's states from the cache, frames undelayed and windows put together."""
    whole = by_the_package(kind, SEED)
    torch.manual_seed(SEED)
    spec = VoiceSpec("", "", {"description": DESCRIPTION, "temperature": "1.0"})
    streamed = said(kind, TEXT, spec)
    assert 10 * HOP < whole.size < kind._engine.frames(4_000) * HOP
    assert streamed.size == whole.size
    assert decibels(streamed - whole, whole) < -90


def drawn_greedily(engine: ParlerEngine, state: object, frames: int) -> Ids:
    """(codebooks, steps) of TEXT."""
    draws: list[Ids] = []
    engine.generate(
        TEXT,
        state,
        temperature=0.0,
        frames=frames,
        step=lambda draw: None if draw is None else draws.append(draw),
    )
    return np.stack(draws, axis=1)


def test_a_description_is_kept_as_it_was(kind: ParlerTtsModel) -> None:
    """The package writes the text behind the description that it is given."""
    engine = kind._engine
    state = engine.describe(DESCRIPTION)
    before = state.clone()
    first = drawn_greedily(engine, state, 30)
    assert first.shape[1] >= 30
    assert np.array_equal(first, drawn_greedily(engine, state, 30))
    assert torch.equal(before, state)


def test_a_cached_step_is_the_full_pass(kind: ParlerTtsModel) -> None:
    """Every step's logits, from its cache, are those of one pass over everything drawn."""
    from transformers.modeling_outputs import BaseModelOutput

    engine, inner = kind._engine, torch_model(kind)
    state = engine.describe(DESCRIPTION)
    with listening(kind) as logits:
        draws = drawn_greedily(engine, state, 60)
    start = torch.full((CODEBOOKS, 1), CODES + 1)
    drawn = torch.cat([start, torch.from_numpy(draws)], dim=1)
    _, mask = inner.decoder.build_delay_pattern_mask(
        start, bos_token_id=CODES + 1, pad_token_id=CODES, max_length=60 + CODEBOOKS
    )
    ids = inner.decoder.apply_delay_pattern_mask(drawn, mask)[:, :-1]
    prompt = engine._tokens(engine._prompts, TEXT)
    hidden = BaseModelOutput(last_hidden_state=state)
    with torch.inference_mode():
        extra: dict[str, Any] = {"prompt_input_ids": prompt}
        if inner.prompt_cross_attention:
            words = inner.embed_prompts(prompt)
            words = words + inner.embed_positions(words, 0)
            hidden, extra = BaseModelOutput(torch.cat([state, words], dim=1)), {}
        full = inner(encoder_outputs=hidden, decoder_input_ids=ids, use_cache=False, **extra)
    cached = torch.stack(logits, dim=1)
    whole = full.logits[:, -cached.shape[1] :]
    assert cached.shape[1] == ids.shape[1] > 30
    assert float((cached - whole).abs().max()) < 1e-4 * float(whole.abs().max())


def test_windows_sound_as_the_whole_and_no_less_context_would(model: ParlerTtsModel) -> None:
    engine = model._engine
    frames = np.random.default_rng(0).integers(0, CODES, (CODEBOOKS, 150))
    whole = engine.decode(frames)

    def difference(reach: int) -> float:
        window = WindowDecoder(engine.decode, HOP, reach, first=3, most=20)
        sounds = [sound for f in frames.T if (sound := window.push(f)) is not None]
        return decibels(np.concatenate([*sounds, window.end()]) - whole, whole)

    assert engine.reach == 10
    assert difference(engine.reach) < -100
    assert difference(engine.reach - 4) > -60


def test_a_codec_that_remembers_is_refused() -> None:
    with pytest.raises(Exception, match="DAC"):
        reach_of(torch.nn.Sequential(torch.nn.Conv1d(1, 1, 7), torch.nn.LSTM(4, 4)))


def test_the_released_layout_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Descript's codec behind the package's wrapper, with weights and names of before 4.44."""
    import parler_tts.dac_wrapper.modeling_dac as wrapper
    from parler_tts import DACConfig, DACModel
    from safetensors.torch import load_file, save_file

    # Of the codec's true shape, and narrow: the released one takes 300 MB.
    narrow = functools.partial(wrapper.DAC, encoder_dim=4, decoder_dim=32)
    monkeypatch.setattr(wrapper, "DAC", narrow)
    codec = DACModel(DACConfig(num_codebooks=CODEBOOKS, codebook_size=CODES, latent_dim=16))
    pack = make_tiny_pack(tmp_path / "released", audio=codec, max_length=100)
    config = json.loads((pack / "config.json").read_text())
    config["audio_encoder"]["model_type"] = "dac"
    edit_json(
        pack / "config.json", transformers_version="4.43.3", audio_encoder=config["audio_encoder"]
    )
    weights = load_file(pack / "model.safetensors")
    new, old = "parametrizations.weight.original", ("weight_g", "weight_v")
    renamed = {
        name.replace(f"{new}0", old[0]).replace(f"{new}1", old[1]): tensor
        for name, tensor in weights.items()
    }
    assert any(name.endswith("weight_g") for name in renamed)
    save_file(renamed, pack / "model.safetensors", metadata={"format": "pt"})

    model = load(pack)
    assert type(torch_model(model).audio_encoder) is DACModel
    assert (model._engine.reach, model._engine.hop) == (10, HOP)
    ids = np.random.default_rng(0).integers(0, CODES, (CODEBOOKS, 12))
    with torch.inference_mode():
        truth = codec.eval().decode(torch.from_numpy(ids)[None, None], [None]).audio_values
    np.testing.assert_allclose(model._engine.decode(ids), truth.reshape(-1).numpy(), atol=1e-6)
    assert said(model, TEXT).size > RATE


def test_speech_alone_is_speech_among_others(brief_pack: Path) -> None:
    model = load(brief_pack, streams="4")
    texts = ["One.", "Two, two.", "Three is more.", "Four"]
    alone = [said(model, text) for text in texts]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(functools.partial(said, model), texts))
    for one, same in zip(alone, together, strict=True):
        assert one.size == same.size
        assert decibels(one - same, one) < -90


def test_streams_that_take_turns_say_what_they_say_alone(model: ParlerTtsModel) -> None:
    alone = [said(model, text) for text in ("One.", "Two.")]
    streams = [model.stream([Segment(text, 0)], GREEDY, CancelToken()) for text in ("One.", "Two.")]
    heard: list[list[Float32]] = [[], []]
    for pair in zip(*streams, strict=False):
        for i, chunk in enumerate(pair):
            heard[i].append(chunk.samples)
    for one, same in zip(alone, heard, strict=True):
        joined = np.concatenate(same)
        assert decibels(joined - one[: joined.size], one) < -90
        assert joined.size > RATE


def test_all_sound_is_in_the_frames_of_20_ms(model: ParlerTtsModel) -> None:
    segments = [Segment("One.", 0), Segment("Two.", 5)]
    assert_frames_hold_all(model.stream(segments, GREEDY, CancelToken()), RATE)
