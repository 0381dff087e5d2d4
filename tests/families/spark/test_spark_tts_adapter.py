"""The family through its adapter, on the package's real sources; the weights are random."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from src.rpc.errors import Internal, InvalidArgument, Unavailable, UnknownName
from src.tts.families.spark import llm as spark_llm
from src.tts.families.spark.prompts import most_tokens
from src.tts.families.spark.speech import CONTROLLABLE, SparkTtsModel
from src.tts.families.spark.windows import Windows
from src.tts.tts_base import CancelToken, Segment, VoiceSpec
from tests.families.oracles import assert_frames_hold_all
from tests.families.spark.talk import (
    GREEDY,
    TEXT,
    chunks,
    files_of,
    load,
    sound,
    without_memory,
)
from tests.families.spark.tiny import N_GLOBAL, make_tiny_pack

VOICES = ("default", "anna", CONTROLLABLE)
SHORT = "Oh."


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sentences that do not end are cut after two windows."""
    cut_after(monkeypatch, lambda text: min(40, most_tokens(text)))


def cut_after(monkeypatch: pytest.MonkeyPatch, most: Callable[[str], int]) -> None:
    monkeypatch.setattr("src.tts.families.spark.speech.most_tokens", most)


@pytest.fixture(scope="module")
def ending(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkTtsModel]:
    """A model whose sentences do end."""
    pack = make_tiny_pack(tmp_path_factory.mktemp("spark") / "ending", end_gain=1.2)
    model = load(files_of(pack), max_streams="8")
    yield model
    model.unload()


# --- speaking


@pytest.mark.parametrize("voice", VOICES)
def test_a_text_is_16_khz_sound_in_growing_windows(
    model: SparkTtsModel, monkeypatch: pytest.MonkeyPatch, voice: str
) -> None:
    cut_after(monkeypatch, most_tokens)
    said = chunks(model, voice=voice, **GREEDY)
    sizes = [chunk.samples.size for chunk in said if chunk.samples.size]
    assert sizes[:3] == [25 * 320, 50 * 320, 100 * 320]
    assert sum(sizes) == most_tokens(TEXT) * 320, "these weights never end of themselves"
    whole = np.concatenate([chunk.samples for chunk in said])
    assert whole.dtype == np.float32
    assert np.abs(whole).max() <= 1.0
    assert float(whole.std()) > 0.01
    assert model.native_sample_rate == 16_000


def test_the_voices_are_the_recordings_and_one_that_is_made_up(model: SparkTtsModel) -> None:
    assert model.voices == VOICES
    heard = [sound(model, SHORT, voice, **GREEDY) for voice in VOICES]
    assert not any(
        np.array_equal(heard[i][:8000], heard[j][:8000]) for i, j in ((0, 1), (0, 2), (1, 2))
    )


def test_the_first_sound_waits_for_no_more_than_its_window(
    model: SparkTtsModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = counted_draws(monkeypatch)
    stream = model.stream([Segment(TEXT, 0)], VoiceSpec("anna", ""), CancelToken())
    next(stream)
    assert len(drawn) == 25 + 4
    stream.close()  # type: ignore[attr-defined]


def test_words_come_in_order_at_their_places(model: SparkTtsModel) -> None:
    stream = model.stream(
        [Segment(TEXT, 0), Segment("And mine.", 24)], VoiceSpec("", ""), CancelToken()
    )
    words = [word for chunk in stream for word in chunk.words]
    assert [w.text for w in words] == ["Hello", "there,", "my", "friend.", "And", "mine."]
    assert [w.char_start for w in words] == [0, 6, 13, 16, 24, 28]
    assert all(w.estimated for w in words)


def test_all_of_the_sound_is_in_the_frames(ending: SparkTtsModel) -> None:
    assert_frames_hold_all(chunks(ending, seed="1", temperature="1"), 16_000)


def test_a_sentence_ends_where_the_model_ends_it(
    ending: SparkTtsModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_after(monkeypatch, most_tokens)
    sizes = {sound(ending, seed=str(seed)).size // 320 for seed in range(6)}
    assert len(sizes) > 1
    assert min(sizes) < most_tokens(TEXT)


@pytest.mark.parametrize("text", ["", " ", "…", "?!", "\u200b"])
def test_nothing_to_say_is_no_sound(model: SparkTtsModel, text: str) -> None:
    assert not chunks(model, text)


def test_a_text_of_any_length_is_said_in_pieces(
    model: SparkTtsModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[str] = []
    read = spark_llm.SpeechLlm._read

    def spy(self: Any, prompt: str) -> list[int]:
        prompts.append(prompt)
        return read(self, prompt)

    monkeypatch.setattr(spark_llm.SpeechLlm, "_read", spy)
    cut_after(monkeypatch, lambda _: 30)
    said = sound(model, "word " * 300, "default", **GREEDY)
    spoken = [p for p in prompts if "<|task_tts|>" in p]
    assert sum(prompt.count("word") for prompt in spoken) == 300
    assert len(spoken) > 3
    assert said.size == len(spoken) * 30 * 320


# --- a voice that is made up


def test_a_style_is_one_voice_and_another_style_another(model: SparkTtsModel) -> None:
    model._openings._kept.clear()
    first = sound(model, SHORT, CONTROLLABLE, gender="male")
    other = sound(model, SHORT, CONTROLLABLE, gender="female")
    fast = sound(model, SHORT, CONTROLLABLE, gender="male", speed="very_high")
    kept = list(model._openings._kept.values())
    assert len(set(kept)) == 3
    assert all(opening.count("<|bicodec_global_") == N_GLOBAL for opening in kept)
    model._openings._kept.clear()
    assert np.array_equal(first, sound(model, SHORT, CONTROLLABLE, gender="male"))
    assert not np.array_equal(first[:8000], other[:8000])
    assert not np.array_equal(first[:8000], fast[:8000])


def test_who_speaks_is_known_before_the_first_sound_and_stays(
    model: SparkTtsModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 global codes for every decode of an utterance, whatever is said first."""
    from src.tts.families.spark.speech import Voicing

    model._openings._kept.clear()
    speakers: list[tuple[int, ...]] = []
    windows = Voicing.windows

    def spy(self: Voicing, global_codes: Any) -> Windows:
        speakers.append(tuple(global_codes))
        return windows(self, global_codes)

    monkeypatch.setattr(Voicing, "windows", spy)
    for texts in (("One.", "Two, three."), ("Something else.",)):
        segments = [Segment(text, 0) for text in texts]
        list(model.stream(segments, VoiceSpec(CONTROLLABLE, ""), CancelToken()))
    assert len(speakers) == 3
    assert len(set(speakers)) == 1
    assert len(speakers[0]) == N_GLOBAL


def test_voices_that_were_made_up_are_forgotten_at_last(
    model: SparkTtsModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.tts.families.spark.speech._KEPT_OPENINGS", 3)
    model._openings._kept.clear()
    for seed in range(5):
        stream = model.stream(
            [Segment(SHORT, 0)], VoiceSpec(CONTROLLABLE, "", {"seed": str(seed)}), CancelToken()
        )
        next(stream)
        stream.close()  # type: ignore[attr-defined]
    assert len(model._openings._kept) == 3


def test_a_model_that_makes_up_no_voice_says_so(
    model: SparkTtsModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model._openings._kept.clear()
    llm = model._parts[0]  # type: ignore[index]
    monkeypatch.setattr(llm, "_global_ids", frozenset())
    with pytest.raises(Internal, match="no voice within 64 tokens"):
        sound(model, SHORT, CONTROLLABLE)
    assert not model._openings._kept


def test_a_cancelled_beginning_leaves_no_voice_behind(
    model: SparkTtsModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model._openings._kept.clear()
    cancel = CancelToken()
    drawn = counted_draws(monkeypatch, lambda count: cancel.cancel() if count == 10 else None)
    spec = VoiceSpec(CONTROLLABLE, "")
    assert not list(model.stream([Segment(SHORT, 0)], spec, cancel))
    assert len(drawn) == 10
    assert not model._openings._kept


# --- several at once


def test_sessions_that_speak_at_once_say_what_they_say_alone(model: SparkTtsModel) -> None:
    """Each with draws of its own: neither the cache nor the chance is shared."""
    asked = [
        (f"Number {i}.", VOICES[i % 3], {"seed": str(i), "temperature": "1"}) for i in range(4)
    ]
    alone = [sound(model, text, voice, **more) for text, voice, more in asked]
    torch.manual_seed(99)
    with ThreadPoolExecutor(4) as threads:
        futures = [threads.submit(sound, model, t, v, **more) for t, v, more in asked]
        together = [future.result(60) for future in futures]
    for one, same in zip(alone, together, strict=True):
        np.testing.assert_allclose(one, same, atol=1e-5)


def test_streams_that_take_turns_on_one_thread_do_not_disturb_each_other(
    model: SparkTtsModel,
) -> None:
    def stream(i: int) -> Iterator[Any]:
        spec = VoiceSpec("anna", "", {"seed": str(i)})
        return model.stream([Segment(f"Number {i}.", 0)], spec, CancelToken())

    alone = [[chunk.samples for chunk in stream(i)] for i in range(2)]
    turns = list(zip(stream(0), stream(1), strict=True))
    for i in range(2):
        for one, pair in zip(alone[i], turns, strict=True):
            np.testing.assert_allclose(one, pair[i].samples, atol=1e-5)


def test_the_processs_own_chance_and_mode_are_left_alone(model: SparkTtsModel) -> None:
    before = torch.get_rng_state()
    stream = model.stream([Segment(TEXT, 0)], VoiceSpec("", ""), CancelToken())
    for _ in islice(stream, 2):
        assert not torch.is_inference_mode_enabled()
    stream.close()  # type: ignore[attr-defined]
    assert torch.equal(before, torch.get_rng_state())


# --- ending early, and errors


def counted_draws(
    monkeypatch: pytest.MonkeyPatch, each: Any = lambda count: None
) -> list[threading.Thread]:
    """One entry for each token that is drawn."""
    drawn: list[threading.Thread] = []
    pick = spark_llm.pick

    def spy(*arguments: Any) -> int:
        drawn.append(threading.current_thread())
        each(len(drawn))
        return pick(*arguments)

    monkeypatch.setattr(spark_llm, "pick", spy)
    return drawn


def test_cancelling_ends_it_at_the_next_token(
    model: SparkTtsModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancel, threads = CancelToken(), threading.active_count()
    cut_after(monkeypatch, most_tokens)
    drawn = counted_draws(monkeypatch, lambda count: cancel.cancel() if count == 40 else None)
    said = list(model.stream([Segment(TEXT, 0), Segment(TEXT, 24)], VoiceSpec("", ""), cancel))
    assert len(drawn) == 40
    assert sum(chunk.samples.size for chunk in said) == 25 * 320
    assert threading.active_count() == threads


def test_closing_it_leaves_nothing(model: SparkTtsModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import DynamicCache

    drawn = counted_draws(monkeypatch)
    stream = model.stream([Segment(TEXT, 0)], VoiceSpec("", ""), CancelToken())
    next(stream)
    before = len(drawn)
    assert caches(DynamicCache) == 1
    stream.close()  # type: ignore[attr-defined]
    assert caches(DynamicCache) == 0
    assert len(drawn) == before


def caches(kind: type) -> int:
    gc.collect()
    return sum(type(each) is kind for each in gc.get_objects())


def test_segments_are_taken_when_they_are_wanted(model: SparkTtsModel) -> None:
    taken: list[int] = []

    def segments() -> Iterator[Segment]:
        for i in range(3):
            taken.append(i)
            yield Segment(SHORT, 0)

    stream = model.stream(segments(), VoiceSpec("", ""), CancelToken())
    next(stream)
    assert taken == [0]
    stream.close()  # type: ignore[attr-defined]


def fail(*_: object, **__: object) -> None:
    raise RuntimeError("planned")


@pytest.mark.parametrize("where", ["opening", "draw", "decode"])
@pytest.mark.parametrize(
    ("fail", "kind", "words"),
    [
        (fail, Internal, r"failed while speaking \(RuntimeError\)$"),
        (without_memory, Unavailable, "out of memory while speaking"),
    ],
)
def test_an_error_in_the_family_is_told_at_once_and_without_the_text(
    model: SparkTtsModel,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    fail: Callable[..., None],
    kind: type[Exception],
    words: str,
) -> None:
    _, voicing = model._parts  # type: ignore[misc]
    model._openings._kept.clear()
    voice = CONTROLLABLE if where == "opening" else "default"
    if where != "decode":
        monkeypatch.setattr(spark_llm, "pick", fail)
    else:
        monkeypatch.setattr(voicing.bicodec, "detokenize", fail)
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(sound, model, TEXT, voice)
        with pytest.raises(kind, match=f"spark-tts-tiny.*{words}"):
            future.result(20)
    monkeypatch.undo()
    assert sound(model, SHORT).size


def test_numbers_that_are_none_are_an_error_and_not_drawn_from(
    model: SparkTtsModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, _ = model._parts  # type: ignore[misc]
    broken = spark_llm._Head(llm._speech.ids, llm._speech.rows * float("nan"))
    monkeypatch.setattr(llm, "_speech", broken)
    with pytest.raises(Internal, match="no numbers"):
        sound(model, "Hi.", **GREEDY)


def test_what_does_not_fit_into_the_model_is_refused(
    model: SparkTtsModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, _ = model._parts  # type: ignore[misc]
    monkeypatch.setattr(llm, "_positions", 150)
    with pytest.raises(InvalidArgument, match="shorter recording"):
        sound(model, TEXT, "anna")


# --- settings


@pytest.mark.parametrize(
    ("voice", "language", "settings", "words"),
    [
        ("ana", "", {}, "did you mean 'anna'"),
        ("", "xx", {}, "language 'xx'"),
        ("", "", {"temprature": "1"}, "did you mean 'temperature'"),
        ("", "", {"temperature": "3"}, "0 to 2"),
        ("", "", {"top_k": "0"}, "1 to 200"),
        ("", "", {"top_p": "nan"}, r"0\.05 to 1"),
        (CONTROLLABLE, "", {"pitch": "hi"}, "did you mean 'high'"),
        (CONTROLLABLE, "", {"gender": "femal"}, "did you mean 'female'"),
        ("anna", "", {"speed": "low"}, "'anna' speaks as its recording does"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused(
    model: SparkTtsModel, voice: str, language: str, settings: dict[str, str], words: str
) -> None:
    with pytest.raises(InvalidArgument, match=words):
        model.check_voice(VoiceSpec(voice, language, settings))


def test_a_checked_voice_is_whole_and_stays_as_it_is(model: SparkTtsModel) -> None:
    plain = model.check_voice(VoiceSpec("", ""))
    assert plain == VoiceSpec(
        "default", "en", {"temperature": "0.8", "top_k": "50", "top_p": "0.95", "seed": "0"}
    )
    made_up = model.check_voice(VoiceSpec(CONTROLLABLE, "zh-CN", {"gender": "MALE"}))
    assert (made_up.language, made_up.settings["gender"]) == ("zh", "male")
    assert made_up.settings["pitch"] == "moderate"
    for spec in (plain, made_up):
        assert model.check_voice(spec) == spec


def test_a_catalog_entry_may_set_defaults(tiny_pack: Path) -> None:
    model = load(
        files_of(tiny_pack), gender="male", seed="7", look_ahead="10", left_context="30",
        max_streams="2", dtype="bfloat16",
    )  # fmt: skip
    spec = model.check_voice(VoiceSpec("", "", {"seed": "8"}))
    assert spec.voice == CONTROLLABLE
    assert (spec.settings["gender"], spec.settings["seed"]) == ("male", "8")
    llm, voicing = model._parts  # type: ignore[misc]
    assert (voicing.plan.left, voicing.plan.right, model.max_streams) == (30, 10, 2)
    assert llm._model.dtype is torch.bfloat16
    assert next(voicing.bicodec.parameters()).dtype is torch.float32
    assert chunks(model, SHORT)[0].samples.size == 25 * 320
    with pytest.raises(UnknownName, match="did you mean 'max_streams'"):
        load(files_of(tiny_pack), max_stream="2")
    model.unload()


# --- memory


def test_models_come_and_go_and_leave_nothing(voiced_pack: Path) -> None:
    for _ in range(2):
        model = load(files_of(voiced_pack))
        sound(model, SHORT)
        llm, voicing = model._parts  # type: ignore[misc]
        dead = [weakref.ref(llm._model), weakref.ref(voicing.bicodec)]
        del llm, voicing
        model.unload()
        gc.collect()
        assert [ref() for ref in dead] == [None, None]
        with pytest.raises(Internal, match="is unloaded"):
            next(model.stream([Segment(SHORT, 0)], VoiceSpec("", ""), CancelToken()))


def test_many_utterances_leave_nothing(model: SparkTtsModel) -> None:
    def tensors() -> int:
        gc.collect()
        return sum(type(each) is torch.Tensor for each in gc.get_objects())

    def utter(number: int) -> None:
        cancel = CancelToken()
        stream = model.stream([Segment(SHORT, 0)], VoiceSpec(VOICES[number % 3], ""), cancel)
        for _ in islice(stream, 1 + number % 2):
            pass
        cancel.cancel()
        stream.close()  # type: ignore[attr-defined]

    for number in range(3):
        utter(number)
    before = tensors()
    for number in range(20):
        utter(number)
    assert tensors() < before + 20, "less than one for an utterance"
