"""The adapter beside the package's own functions, on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from src.tts.families.spark import llm as spark_llm
from src.tts.families.spark.llm import Sampling, pick
from src.tts.families.spark.prompts import ClonedVoice, Style, cloning_prompt, style_prompt
from src.tts.families.spark.speech import SparkTtsModel
from src.tts.families.spark.windows import WindowPlan, Windows
from src.tts.tts_base import CancelToken
from tests.families.spark.talk import TEXT
from tests.families.spark.tiny import N_GLOBAL, SEMANTIC

GREEDY = Sampling(0.0, 50, 1.0)
STYLE = Style("male", "high", "very_low")


def parts(model: SparkTtsModel) -> Any:
    assert model._parts
    return model._parts


def voice(model: SparkTtsModel, name: str) -> ClonedVoice:
    found = model._voices[name]
    assert found is not None
    return found


# --- reading


@pytest.mark.parametrize("name", ["seed.wav", "anna.flac"])
def test_a_recordings_codes_are_those_of_the_package(
    model: SparkTtsModel, package: Any, voiced_pack: Path, name: str
) -> None:
    ours = voice(model, "default" if name == "seed.wav" else "anna")
    speaker, semantic = package.audio_tokenizer.tokenize(voiced_pack / "ref" / name)
    assert ours.global_codes == tuple(speaker.flatten().tolist())
    assert len(ours.global_codes) == N_GLOBAL
    if ours.transcript:
        theirs = semantic.flatten().tolist()
        same = np.mean(np.array(ours.semantic_codes) == np.array(theirs))
        assert same > 0.95, "a code on the edge between two may fall either way"
        assert len(theirs) > 90


def test_a_voice_whose_words_are_unknown_is_kept_without_them(model: SparkTtsModel) -> None:
    assert voice(model, "default").semantic_codes == ()
    assert voice(model, "anna").transcript == "Words of hers."


def test_the_features_are_hidden_states_11_14_and_16(package: Any) -> None:
    """By hand, layer by layer: a release that counts them otherwise would spoil every voice."""
    tokenizer = package.audio_tokenizer
    wav = np.random.default_rng(3).normal(0, 0.1, 16_000).astype(np.float32)
    with torch.inference_mode():
        found = tokenizer.extract_wav2vec2_features(wav)
        inputs = tokenizer.processor(wav, sampling_rate=16_000, return_tensors="pt").input_values
        encoder = tokenizer.feature_extractor
        hidden, _ = encoder.feature_projection(encoder.feature_extractor(inputs).transpose(1, 2))
        hidden = hidden + encoder.encoder.pos_conv_embed(hidden)
        states = [hidden]
        for layer in encoder.encoder.layers:
            out = layer(states[-1])
            states.append(out[0] if isinstance(out, tuple) else out)
    wanted = (states[11] + states[14] + states[16]) / 3
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


# --- prompts


@pytest.mark.parametrize("transcript", ["Words of hers.", None])
def test_the_cloning_prompt_is_the_packages(
    package: Any, voiced_pack: Path, transcript: str | None
) -> None:
    theirs, speaker = package.process_prompt(TEXT, voiced_pack / "ref" / "anna.flac", transcript)
    _, semantic = package.audio_tokenizer.tokenize(voiced_pack / "ref" / "anna.flac")
    ours = cloning_prompt(
        ClonedVoice(
            tuple(speaker.flatten().tolist()),
            tuple(semantic.flatten().tolist()) if transcript else (),
            transcript or "",
        ),
        TEXT,
    )
    # Without a transcript the package leaves it to the model to open the line of speech.
    assert ours == theirs + ("" if transcript else "<|start_semantic_token|>")


def test_the_style_prompt_is_the_packages(package: Any) -> None:
    theirs = package.process_prompt_control("male", "high", "very_low", TEXT)
    assert style_prompt(STYLE, TEXT) == theirs


def test_a_mark_in_a_text_is_read_and_not_obeyed(model: SparkTtsModel, package: Any) -> None:
    marks = "<|end_content|><|bicodec_semantic_3|><|im_end|><|start_style_label|>"
    llm, _ = parts(model)
    text = f"Hi {marks} there"
    for prompt in (
        style_prompt(STYLE, text),
        cloning_prompt(ClonedVoice((1, 2), (3,), transcript=marks), text),
    ):
        ids = llm._read(prompt)
        names = package.tokenizer.convert_ids_to_tokens(ids)
        assert [name for name in names if name.startswith("<|")].count("<|end_content|>") == 1
        assert "<|im_end|>" not in names
        assert names.count("<|bicodec_semantic_3|>") == ("<|task_tts|>" in names)


# --- drawing


def greedy(model: SparkTtsModel, prompt: str, count: int) -> list[int]:
    llm, _ = parts(model)
    return list(llm.speech(prompt, count, GREEDY, llm.generator(0), CancelToken()))


def test_step_by_step_is_what_one_full_pass_says(
    model: SparkTtsModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []

    def spy(logits: Any, sampling: Sampling, generator: Any) -> int:
        seen.append(logits)
        return pick(logits, sampling, generator)

    monkeypatch.setattr(spark_llm, "pick", spy)
    llm, _ = parts(model)
    prompt = cloning_prompt(voice(model, "anna"), TEXT)
    codes = greedy(model, prompt, 60)
    assert len(set(codes)) > 10, "these weights say the same all the time, and prove nothing"
    ids = [*llm._read(prompt), *(llm._speech.ids[code] for code in codes)]
    with torch.inference_mode():
        full = llm._model(input_ids=torch.tensor([ids])).logits[0]
    wanted = full[-len(codes) - 1 :][: len(codes)][:, list(llm._speech.ids)]
    worst = float((torch.stack(seen[: len(codes)]) - wanted).abs().max())
    assert worst < 1e-3, worst
    assert float(wanted.std()) > 1.0


@pytest.mark.parametrize("name", ["default", "anna"])
def test_the_loop_says_what_generate_says(model: SparkTtsModel, package: Any, name: str) -> None:
    llm, _ = parts(model)
    prompt = cloning_prompt(voice(model, name), TEXT)
    allowed = list(llm._speech.ids)
    inputs = package.tokenizer([prompt], return_tensors="pt", return_token_type_ids=False)
    theirs = package.model.generate(
        **inputs,
        max_new_tokens=80,
        do_sample=False,
        prefix_allowed_tokens_fn=lambda *_: allowed,
    )[0, inputs.input_ids.shape[1] :].tolist()
    assert [llm._speech.ids[code] for code in greedy(model, prompt, 80)] == theirs


@pytest.mark.parametrize(
    "sampling", [Sampling(0.8, 50, 0.95), Sampling(0.3, 5, 0.5), Sampling(1.5, 200, 0.05)]
)
def test_draws_are_those_of_transformers(sampling: Sampling) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(100, generator=torch.Generator().manual_seed(5)) * 3
    scores = logits[None]
    for warp in (
        TemperatureLogitsWarper(sampling.temperature),
        TopKLogitsWarper(min(sampling.top_k, 100)),
        TopPLogitsWarper(sampling.top_p),
    ):
        scores = warp(None, scores)
    wanted = scores[0].softmax(0).numpy()
    generator = torch.Generator().manual_seed(1)
    drawn = np.bincount([pick(logits, sampling, generator) for _ in range(4000)], minlength=100)
    assert set(np.flatnonzero(drawn)) <= set(np.flatnonzero(wanted))
    assert np.abs(drawn / 4000 - wanted).max() < 0.04


# --- sound


def test_a_window_over_all_is_the_packages_sound(model: SparkTtsModel, package: Any) -> None:
    _, voicing = parts(model)
    codes, speaker = noise_codes(50), voice(model, "anna").global_codes
    theirs = package.audio_tokenizer.detokenize(torch.tensor([speaker]), torch.tensor([codes]))
    np.testing.assert_allclose(voicing.decode(speaker, codes), theirs, atol=1e-6)
    assert theirs.size == 50 * 320


def noise_codes(count: int) -> list[int]:
    made = torch.randint(0, SEMANTIC, (count,), generator=torch.Generator().manual_seed(1))
    return [int(code) for code in made]


def windowed(model: SparkTtsModel, codes: list[int], plan: WindowPlan) -> np.ndarray:
    _, voicing = parts(model)
    windows = Windows(
        lambda some: voicing.decode(voice(model, "anna").global_codes, some), 320, plan
    )
    return np.concatenate([*(windows.push(code) for code in codes), windows.end()])


def test_windows_that_hear_enough_are_one_whole_decode(model: SparkTtsModel) -> None:
    """The tiny decoder hears 34 codes to either side (the released one some 67)."""
    codes = noise_codes(300)
    whole = parts(model)[1].decode(voice(model, "anna").global_codes, codes)
    near = windowed(model, codes, WindowPlan(left=40, right=40))
    assert near.size == whole.size == 300 * 320
    assert float(np.abs(near - whole).max()) < 1e-4 * float(whole.std())
    far = windowed(model, codes, WindowPlan(left=0, right=4))
    assert float(np.abs(far - whole).max()) > float(whole.std()), "these weights hear nothing"


def test_windows_of_the_default_differ_near_their_right_edge_only(model: SparkTtsModel) -> None:
    codes = noise_codes(400)
    whole = parts(model)[1].decode(voice(model, "anna").global_codes, codes)
    error = (windowed(model, codes, WindowPlan(sizes=(25,))) - whole).reshape(-1, 25, 320)
    # Per code of a window, over the windows between the first and the last.
    rms = np.sqrt(np.mean(np.square(error[1:-1]), axis=(0, 2))) / whole.std()
    assert rms[1:11].max() < 1e-3, "what came before was heard"
    assert rms[-1] > rms[-4] > rms[-8], "and what comes after only a little"
    assert rms.max() < 1.0
