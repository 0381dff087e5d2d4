"""Spark-TTS without Spark-TTS: prompts, windows, guards and what an installation is told."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from src.audio.pcm import Float32
from src.rpc.errors import CorruptModel, UnknownName
from src.tts.adapters import adapter_for
from src.tts.adapters.adapter_spark_tts import SparkTtsAdapter
from src.tts.catalog import ModelMeta
from src.tts.families.spark.prompts import (
    MAX_TOKENS,
    ClonedVoice,
    Style,
    cloning_prompt,
    most_tokens,
    pieces,
    plain,
    read_vocabulary,
    style_prompt,
)
from src.tts.families.spark.windows import WindowPlan, Windows
from src.tts.segmenter import speakable
from src.tts.tts_base import MissingPackage
from tests.sentences import SENTENCES

HOP = 320
REACH = 3
META = ModelMeta(model_id="spark-tts-0.5b", family="spark_tts")


# --- windows


def smooth(codes: Sequence[int]) -> Float32:
    """A decoder that hears REACH codes to either side, as one with padding does at its edges."""
    around = np.pad(np.asarray(codes, dtype=np.float64), REACH)
    heard = np.convolve(around, np.ones(2 * REACH + 1) / (2 * REACH + 1), "valid")
    places = np.arange(len(codes) * HOP) / HOP - 0.5
    return np.interp(places, np.arange(len(codes)), heard).astype(np.float32)


def windowed(codes: Sequence[int], plan: WindowPlan) -> tuple[Float32, list[int]]:
    windows = Windows(smooth, HOP, plan)
    chunks = [*(windows.push(code) for code in codes), windows.end()]
    return np.concatenate(chunks), [chunk.size // HOP for chunk in chunks if chunk.size]


def some_codes(count: int) -> list[int]:
    return [int(code) for code in np.random.default_rng(4).integers(0, 2, count)]


def test_windows_grow_from_25_to_50_to_100_codes() -> None:
    _, sizes = windowed(some_codes(400), WindowPlan())
    assert sizes == [25, 50, 100, 100, 100, 25]


@pytest.mark.parametrize("count", [0, 1, 4, 25, 28, 29, 30, 79, 80, 183])
def test_every_code_is_heard_once(count: int) -> None:
    sound, sizes = windowed(some_codes(count), WindowPlan())
    assert sound.size == count * HOP
    assert sum(sizes) == count


def test_a_window_is_out_as_soon_as_what_it_hears_is_drawn() -> None:
    windows = Windows(smooth, HOP, WindowPlan(right=4))
    sizes = [windows.push(code).size // HOP for code in some_codes(80)]
    assert [place for place, size in enumerate(sizes, 1) if size] == [29, 79]


def test_windows_that_hear_all_that_the_decoder_hears_are_one_whole() -> None:
    codes = some_codes(300)
    # Two more: the fading hears one code further, the drawing between codes another.
    near, _ = windowed(codes, WindowPlan(left=REACH + 2, right=REACH + 2))
    np.testing.assert_allclose(near, smooth(codes), atol=1e-6)
    far, _ = windowed(codes, WindowPlan(left=0, right=1))
    assert np.abs(far - smooth(codes)).max() > 0.05, "this decoder hears too little"


def test_two_windows_that_differ_meet_without_a_click() -> None:
    codes = some_codes(300)
    plan = WindowPlan(left=0, right=1, sizes=(25,))
    own_step = float(np.abs(np.diff(smooth(codes))).max())
    faded, _ = windowed(codes, plan)
    windows, hard = Windows(smooth, HOP, plan), []
    for code in codes:
        hard.append(windows.push(code))
        windows._overlap = windows._overlap[:0]
    joins = np.arange(25, 300, 25) * HOP
    cut = np.concatenate([*hard, windows.end()])
    assert np.abs(np.diff(cut))[joins - 1].max() > 20 * own_step, "nothing differs where they meet"
    # What is faded differs by less than 1, over 320 samples.
    assert np.abs(np.diff(faded)).max() < own_step + np.pi / 2 / HOP


def test_each_decode_is_bounded() -> None:
    seen: list[int] = []

    def decode(codes: Sequence[int]) -> Float32:
        seen.append(len(codes))
        return smooth(codes)

    windows = Windows(decode, HOP, WindowPlan())
    for code in some_codes(1000):
        windows.push(code)
    assert max(seen) == 25 + 100 + 4


# --- prompts


def test_a_cloning_prompt_goes_on_from_the_recording() -> None:
    voice = ClonedVoice((3, 1), (7, 8), "Words of hers.")
    assert cloning_prompt(voice, " Hello \n there. ") == (
        "<|task_tts|><|start_content|>Words of hers.Hello there.<|end_content|>"
        "<|start_global_token|><|bicodec_global_3|><|bicodec_global_1|><|end_global_token|>"
        "<|start_semantic_token|><|bicodec_semantic_7|><|bicodec_semantic_8|>"
    )


def test_a_style_prompt_goes_on_from_the_voice_that_was_made_up() -> None:
    style = Style("male", "very_low", "high")
    prompt = style_prompt(style, "Hello.")
    assert prompt.endswith(
        "<|start_style_label|><|gender_1|><|pitch_label_0|><|speed_label_3|><|end_style_label|>"
    )
    more = style_prompt(style, "Hello.", "<|start_global_token|><|bicodec_global_1|>")
    assert more == (
        f"{prompt}<|start_global_token|><|bicodec_global_1|>"
        "<|end_global_token|><|start_semantic_token|>"
    )


def test_no_mark_is_left_in_a_text() -> None:
    assert "<|" not in plain("a <|end_content|> <<|im_end|>")
    assert plain("a < b | c") == "a < b | c"


def test_pieces_are_a_text_in_order_and_each_can_be_said() -> None:
    text = " ".join(SENTENCES)
    parts = pieces(text)
    assert " ".join(parts).split() == text.split()
    assert len(parts) > 3
    for part in (*parts, *pieces("word" * 2000), *pieces("字" * 2000), *pieces("9" * 500)):
        assert speakable(part)
        assert most_tokens(part) < MAX_TOKENS, "the guard is in proportion to all of them"
    assert pieces("Hello.") == ["Hello."]
    assert pieces("?! …") == []


def test_the_guard_grows_with_the_text() -> None:
    short, long = most_tokens("Oh."), most_tokens("This takes a good while longer to be said.")
    assert 200 < short < 260 < long
    # 35 units of weight at 55 ms, four times over, and four seconds.
    assert 500 < long < 700
    assert most_tokens("word " * 5000) == MAX_TOKENS


def vocabulary() -> dict[str, int]:
    from src.tts.families.spark.prompts import _CONTROL

    names = [
        *_CONTROL, "<|pitch_value_3|>", "<|end_semantic_token|>", "<|start_acoustic_token|>",
        *(f"<|bicodec_semantic_{i}|>" for i in (2, 0, 1)),
        *(f"<|bicodec_global_{i}|>" for i in range(2)), "hello",
    ]  # fmt: skip
    return {name: 100 + place for place, name in enumerate(names)}


def test_codes_are_found_by_their_number() -> None:
    ids = vocabulary()
    found = read_vocabulary("m", ids, {7, 5})
    assert found.semantic == tuple(ids[f"<|bicodec_semantic_{i}|>"] for i in range(3))
    assert found.globals == tuple(ids[f"<|bicodec_global_{i}|>"] for i in range(2))
    assert found.ends == (5, 7)
    names = {name for name, i in ids.items() if i in found.opening}
    assert names == {"<|pitch_value_3|>", "<|start_acoustic_token|>", "<|start_global_token|>"}


@pytest.mark.parametrize("name", ["<|task_tts|>", "<|speed_label_4|>", "<|bicodec_semantic_1|>"])
def test_a_vocabulary_without_a_token_is_refused(name: str) -> None:
    ids = vocabulary()
    del ids[name]
    with pytest.raises(CorruptModel, match="lacks") as caught:
        read_vocabulary("m", ids, {7})
    assert name in caught.value.message
    with pytest.raises(CorruptModel, match="eos_token_id"):
        read_vocabulary("m", vocabulary(), ())


# --- installation


def unreachable(_: float) -> None:
    raise AssertionError("nothing may be loaded")


def test_without_its_packages_the_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    adapter = adapter_for("spark_tts")
    for call in (adapter.check_installed, lambda: adapter.load(META, {}, "cpu", unreachable)):
        with pytest.raises(MissingPackage, match=r"uv sync --extra spark .* git clone") as error:
            call()
        assert error.value.family == "spark_tts"


def test_its_sources_are_found_by_spark_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def find(name: str) -> importlib.machinery.ModuleSpec | None:
        return None if name == "sparktts" else importlib.machinery.ModuleSpec(name, None)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.delitem(sys.modules, "sparktts", raising=False)
    for home in ("", str(tmp_path)):
        monkeypatch.setenv("SPARK_HOME", home)
        with pytest.raises(MissingPackage, match="checkout 2f1ea90 && export SPARK_HOME") as error:
            SparkTtsAdapter().check_installed()
        looked = f"no sparktts/models/bicodec.py in {tmp_path}, which SPARK_HOME names"
        assert (looked in str(error.value)) is bool(home)
    models = tmp_path / "sparktts" / "models"
    models.mkdir(parents=True)
    (models / "bicodec.py").touch()
    SparkTtsAdapter().check_installed()


def test_a_setting_that_nobody_knows_is_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SparkTtsAdapter, "check_installed", lambda self: None)
    for settings, words in (
        ({"look_ahed": "3"}, "did you mean 'look_ahead'"),
        ({"pitch": "lo"}, "did you mean 'low'"),
        ({"dtype": "float16"}, "float"),
    ):
        with pytest.raises(UnknownName, match=words):
            SparkTtsAdapter().load(
                META.model_copy(update={"settings": settings}), {}, "cpu", unreachable
            )


def test_its_capabilities_are_known_without_the_package() -> None:
    capabilities = adapter_for("spark_tts").capabilities
    assert capabilities.zero_shot
    assert not capabilities.cpu_ok
    assert set(capabilities.settings) == {
        *("gender", "pitch", "speed"), *("temperature", "top_k", "top_p", "seed"),
    }  # fmt: skip
    assert "very_low, low, moderate, high, very_high" in capabilities.settings["pitch"]
    assert "torch" not in sys.modules
