"""The family through its adapter and the package's real loader; the weights are random."""

from __future__ import annotations

import gc
import importlib.util
import logging
import sys
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.rpc.errors import Internal, InvalidArgument, Unavailable, UnknownName
from src.tts.adapters.adapter_xtts import XttsModel
from src.tts.families.xtts import stream as xtts_stream
from src.tts.families.xtts.stream import CHUNKS, CODE_MS, most_codes, session_view
from src.tts.families.xtts.text import spoken_ms
from src.tts.tts_base import CancelToken, PcmChunk, Segment, VoiceSpec
from tests.families.oracles import assert_frames_hold_all
from tests.families.xtts.tiny import LANGUAGES, PRESETS, files_of, load, said, spec

TEXT = "Hello there."


def chunks(model: XttsModel, text: str, cancel: CancelToken | None = None) -> list[PcmChunk]:
    return list(model.stream([Segment(text, 0)], spec(), cancel or CancelToken()))


# --- speaking ---


def test_a_text_is_24_khz_sound_in_range(model: XttsModel) -> None:
    sound = said(model, TEXT)
    assert model.native_sample_rate == 24_000
    assert sound.dtype == np.float32
    assert np.abs(sound).max() <= 1.0
    assert float(np.std(sound)) > 0.0


@pytest.mark.usefixtures("brief")
def test_another_text_or_voice_sounds_otherwise(model: XttsModel) -> None:
    one = said(model, TEXT)
    for other in (said(model, "Where is it?"), said(model, TEXT, spec("Ben"))):
        size = min(one.size, other.size)
        assert not np.allclose(one[:size], other[:size], atol=1e-4)


def test_chunks_grow_from_a_small_first_one(model: XttsModel) -> None:
    """Of each chunk, the package keeps the overlap back for the next one."""
    sizes = [chunk.samples.size for chunk in chunks(model, TEXT) if chunk.samples.size]
    codes = np.diff([0, *(round((n + 1024) / 24 / CODE_MS) for n in np.cumsum(sizes)[:-1])])
    assert tuple(codes[:5]) == (*CHUNKS, CHUNKS[-1])
    assert sizes[0] == 7680


def test_no_chunk_is_empty_unless_it_brings_words(model: XttsModel) -> None:
    assert all(chunk.samples.size or chunk.words for chunk in chunks(model, TEXT))


def test_the_package_does_send_empty_chunks_and_none_of_them_comes_through(
    model: XttsModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xtts_stream, "CHUNKS", (1, 20))
    first = next(iter(model.stream([Segment(TEXT, 0)], spec(), CancelToken())))
    assert first.samples.size > 20_000, "not the nothing that one code sounds for"


def test_the_frames_are_as_long_as_the_sound(model: XttsModel) -> None:
    assert_frames_hold_all(chunks(model, TEXT), 24_000)


def test_every_word_is_marked_once_and_in_order(model: XttsModel) -> None:
    text = "Hello there, old friend. How are you?"
    segments = [Segment(text[:25], 0), Segment(text[25:], 25)]
    stream = model.stream(segments, spec(), CancelToken())
    marks = [mark for chunk in stream for mark in chunk.words]
    assert [mark.text for mark in marks] == text.split()
    assert all(text[m.char_start : m.char_end] == m.text and m.estimated for m in marks)


@pytest.mark.parametrize("text", ["", " ", "…", "?!", "\u200b"])
def test_nothing_to_say_is_no_sound(model: XttsModel, text: str) -> None:
    assert not said(model, text).size


def test_a_text_that_does_not_end_is_cut_by_its_length(model: XttsModel) -> None:
    """These weights never say that they are done."""
    for text in ("x", "A few more words than that."):
        codes = round(said(model, text).size / 24 / CODE_MS)
        assert abs(codes - most_codes(spoken_ms(text))) <= 1


@pytest.mark.usefixtures("brief")
def test_speed_makes_it_shorter_by_as_much(model: XttsModel) -> None:
    normal, fast, slow = (said(model, TEXT, spec(speed=s)).size for s in ("1", "2.0", "0.5"))
    assert fast == pytest.approx(normal / 2, rel=0.02)
    assert slow == pytest.approx(normal * 2, rel=0.02)


def test_a_text_that_ends_at_once_is_spoken_at_every_speed(tiny_pack: Path, tmp_path: Path) -> None:
    """The package cannot divide a single code by two."""
    from tests.families.xtts.tiny import make_tiny_pack

    ending = load(files_of(make_tiny_pack(tmp_path, end_bias=1e4, layers=1)))
    assert 0 < said(ending, TEXT, spec(speed="2.0")).size < 24_000 // 4


@pytest.mark.usefixtures("brief")
def test_sampling_settings_reach_the_model(model: XttsModel) -> None:
    likeliest = said(model, TEXT)
    for changed in ({"top_k": "50", "temperature": "1.5"}, {"repetition_penalty": "1.0"}):
        other = said(model, TEXT, spec(**changed))
        size = min(likeliest.size, other.size)
        assert not np.allclose(likeliest[:size], other[:size], atol=1e-4)
    assert np.array_equal(likeliest, said(model, TEXT))
    # A nucleus of the likeliest alone is the likeliest, whatever top_k is.
    assert np.array_equal(
        likeliest, said(model, TEXT, spec(top_k="50", top_p="0.05", temperature="0.1"))
    )


# --- long texts ---


def test_a_text_of_any_length_is_spoken_whole(
    model: XttsModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every word of it reaches the GPT, in pieces below the package's own limits."""
    monkeypatch.setattr(xtts_stream, "most_codes", lambda _: 4)
    ids: list[int] = []

    def view(whole: Any, piece: Any) -> Any:
        assert len(piece) < whole.args.gpt_max_text_tokens
        ids.extend(piece)
        return session_view(whole, piece)

    monkeypatch.setattr(xtts_stream, "session_view", view)
    text = " ".join(f"word{chr(97 + i % 26)}" for i in range(180))
    with caplog.at_level(logging.DEBUG):
        stream = model.stream([Segment(text, 0)], spec(), CancelToken())
        marks = [mark for chunk in stream for mark in chunk.words]
    assert [mark.text for mark in marks] == text.split()
    tokenizer = model._loaded.model.tokenizer
    read = tokenizer.decode(ids).replace("[en]", " ").split()
    assert " ".join(read) == text
    assert "word" not in caplog.text, "no text of a user in the logs"


# --- several at once ---


@pytest.mark.usefixtures("brief")
def test_streams_at_once_sound_as_they_do_alone(model: XttsModel) -> None:
    """Each with its own text, voice and settings."""
    texts = ["Hello", "Other words here", "And a third, longer one", "Four"]
    specs = [
        spec(),
        spec("Ben", repetition_penalty="1.0"),
        spec(speed="1.3", repetition_penalty="3.0"),
        spec("Ben", language="de", temperature="0.3"),
    ]
    alone = [said(model, *each) for each in zip(texts, specs, strict=True)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda *each: said(model, *each), texts, specs))
    for one, same in zip(alone, together, strict=True):
        assert np.array_equal(one, same)


def first_chunks(
    model: XttsModel, text: str, voice: VoiceSpec | None = None
) -> list[np.ndarray[Any, Any]]:
    stream = model.stream([Segment(text, 0)], voice or spec(), CancelToken())
    return [chunk.samples for chunk in islice(stream, 4)]


def interleaved(
    model: XttsModel, texts: list[str], voices: Sequence[VoiceSpec | None] = (None, None)
) -> list[list[np.ndarray[Any, Any]]]:
    """A chunk of each in turns, on one thread: what the package keeps of one meets the others."""
    streams = [
        model.stream([Segment(text, 0)], voice or spec(), CancelToken())
        for text, voice in zip(texts, voices, strict=True)
    ]
    out: list[list[np.ndarray[Any, Any]]] = [[] for _ in texts]
    for _ in range(4):
        for stream, sound in zip(streams, out, strict=True):
            sound.append(next(iter(stream)).samples)
    return out


def test_streams_in_turns_sound_as_they_do_alone(model: XttsModel) -> None:
    texts = ["Hello", "Other words here"]
    alone = [first_chunks(model, text) for text in texts]
    for one, same in zip(alone, interleaved(model, texts), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))


def test_without_a_view_for_each_they_do_not(
    model: XttsModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the two tests above could not fail."""

    def no_view(whole: Any, ids: Any) -> Any:
        monkeypatch.setattr(whole, "tokenizer", xtts_stream.Prepared(ids), raising=False)
        return whole

    texts = ["Hello", "Other words here"]
    alone = [first_chunks(model, text) for text in texts]
    with monkeypatch.context() as patched:
        patched.setattr(xtts_stream, "session_view", no_view)
        try:
            mixed = interleaved(model, texts)
        except Internal:
            return  # as it mostly ends
        finally:
            whole = model._loaded.model
            whole.gpt.gpt_inference.__dict__.pop("cached_prefix_emb", None)
    assert any(
        a.shape != b.shape or not np.allclose(a, b, atol=1e-4)
        for one, same in zip(alone, mixed, strict=True)
        for a, b in zip(one, same, strict=True)
    )


# --- chance ---

FREELY = {"top_k": "50", "top_p": "0.95", "temperature": "1.2"}


@pytest.mark.usefixtures("brief")
def test_a_seed_draws_the_same_again_in_every_piece_and_another_one_does_not(
    model: XttsModel,
) -> None:
    text = "One. Two."
    segments = [Segment(text[:4], 0), Segment(text[4:], 4)]

    def drawn(**settings: str) -> np.ndarray[Any, Any]:
        stream = model.stream(segments, spec(**FREELY, **settings), CancelToken())
        return np.concatenate([chunk.samples for chunk in stream])

    one, again, other = drawn(seed="7"), drawn(seed="7"), drawn(seed="8")
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert not np.array_equal(drawn(), drawn(seed="0")), "by chance, each of them"


def test_streams_that_draw_in_turns_say_what_they_say_alone(model: XttsModel) -> None:
    """And torch's own generator, which belongs to everybody, stands where it stood."""
    import torch

    texts = ["Hello", "Other words here"]
    specs = [spec(**FREELY, seed="7"), spec(**FREELY, seed="8")]
    before = torch.get_rng_state()
    alone = [first_chunks(model, *each) for each in zip(texts, specs, strict=True)]
    assert torch.equal(torch.get_rng_state(), before)
    for one, same in zip(alone, interleaved(model, texts, specs), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))


# --- ending early ---


def test_cancelled_while_it_computes_it_ends_before_the_next_code(
    model: XttsModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancel, codes = CancelToken(), 0
    inference = type(model._loaded.model.gpt.gpt_inference)
    forward = inference.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal codes
        codes += 1
        if codes == CHUNKS[0] + 3:
            cancel.cancel()
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(inference, "forward", counted)
    heard = chunks(model, TEXT, cancel)
    assert len(heard) == 1, "what was made before"
    assert codes == CHUNKS[0] + 3


def test_a_cancelled_stream_says_nothing(model: XttsModel) -> None:
    cancel = CancelToken()
    cancel.cancel()
    assert not chunks(model, TEXT, cancel)


def test_after_a_close_nothing_is_computed_and_nothing_is_left(
    model: XttsModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    views: list[Any] = []

    def kept(whole: Any, ids: Any) -> Any:
        view = session_view(whole, ids)
        views.append(weakref.ref(view.gpt.gpt_inference))
        return view

    monkeypatch.setattr(xtts_stream, "session_view", kept)
    threads = threading.active_count()
    stream: Any = model.stream([Segment(TEXT, 0)], spec(), CancelToken())
    next(stream)
    assert views[0]() is not None
    stream.close()
    del stream
    gc.collect()
    assert views[0]() is None
    assert threading.active_count() == threads
    assert not hasattr(model._loaded.model.gpt.gpt_inference, "cached_prefix_emb")


def test_segments_are_taken_as_they_are_needed(model: XttsModel) -> None:
    taken: list[int] = []

    def segments() -> Any:
        for i in range(3):
            taken.append(i)
            yield Segment("Well.", 6 * i)

    stream = model.stream(segments(), spec(), CancelToken())
    next(iter(stream))
    assert taken == [0]


# --- faults ---


def test_an_error_in_the_package_reaches_the_listener(
    model: XttsModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("said: " + TEXT)

    monkeypatch.setattr(type(model._loaded.model.gpt), "get_generator", broken)
    with pytest.raises(
        Internal, match=r"^xtts-tiny failed while speaking \(RuntimeError\)$"
    ) as error:
        chunks(model, TEXT)
    assert TEXT not in error.value.message


@pytest.mark.usefixtures("brief")
def test_sound_that_is_no_number_is_an_error_and_the_next_stream_speaks(model: XttsModel) -> None:
    import torch

    bias = model._loaded.model.hifigan_decoder.waveform_decoder.conv_pre.bias
    before = bias.detach().clone()
    with torch.no_grad():
        bias.fill_(float("nan"))
    try:
        with pytest.raises(Internal, match="no number"):
            chunks(model, TEXT)
    finally:
        with torch.no_grad():
            bias.copy_(before)
    assert said(model, TEXT).size


@pytest.mark.parametrize("codes", [0, CHUNKS[0] + 2])
def test_short_memory_says_what_to_lower(
    model: XttsModel, monkeypatch: pytest.MonkeyPatch, codes: int
) -> None:
    """At the first code, and in the middle of a text; what was made before is heard."""
    import torch

    inference = type(model._loaded.model.gpt.gpt_inference)
    forward, left = inference.forward, codes

    def full(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise torch.OutOfMemoryError("CUDA out of memory: 2.00 GiB")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(inference, "forward", full)
    heard: list[PcmChunk] = []
    with pytest.raises(Unavailable, match=r"^xtts-tiny: .*memory while speaking; .*max_streams"):
        heard.extend(model.stream([Segment(TEXT, 0)], spec(), CancelToken()))
    assert len(heard) == (codes > 0)


# --- languages ---


def here(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) for module in modules)


def test_the_models_languages_are_those_it_can_read_here(model: XttsModel) -> None:
    missing = {"zh-cn"} if not here("pypinyin") else set()
    missing |= {"ja"} if not here("cutlet", "fugashi", "unidic_lite") else set()
    assert set(model.languages) == set(LANGUAGES) - missing


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("de", "Guten Tag, 20 Leute"),
        ("ko", "안녕 12"),
        ("hi", "नमस्ते 42"),
        ("ar", "مرحبا 7"),
        ("cs", "1. Ahoj"),
        ("ru", "Номер 99999999999999999999,5"),
        ("zh", "你好，有50名士兵"),
        pytest.param(
            "ja",
            "こんにちは 12",
            marks=pytest.mark.skipif(
                not here("cutlet", "fugashi", "unidic_lite"),
                reason="optional: no cutlet and fugashi[unidic-lite], which need a compiler",
            ),
        ),
    ],
)
def test_a_language_is_spoken_with_whatever_numbers(
    model: XttsModel, language: str, text: str
) -> None:
    """Of some of these numbers, the package's own spelling raises."""
    assert said(model, text, spec(language=language)).size


@pytest.mark.parametrize(
    ("language", "module", "packages"),
    [
        ("zh", "pypinyin", "pypinyin"),
        ("zh-CN", "pypinyin", "pypinyin"),
        ("ja", "cutlet", r"cutlet 'fugashi\[unidic-lite\]'"),
    ],
)
def test_a_language_without_its_packages_says_what_to_install(
    model: XttsModel,
    monkeypatch: pytest.MonkeyPatch,
    language: str,
    module: str,
    packages: str,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == module else find(name)
    )
    wanted = rf"uv pip install --python {sys.executable} {packages}$"
    with pytest.raises(Unavailable, match=wanted):
        model.check_voice(spec(language=language))


def test_zh_is_what_the_model_calls_zh_cn(
    model: XttsModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert model.check_voice(spec(language="zh")).language == "zh-cn"
    assert model.check_voice(spec(language="en-GB")).language == "en"


def test_a_language_that_it_does_not_speak_is_refused(model: XttsModel) -> None:
    with pytest.raises(UnknownName, match="unknown language 'sv'"):
        model.check_voice(spec(language="sv"))


# --- voices and settings of a session ---


def test_an_empty_request_is_filled_in(model: XttsModel) -> None:
    checked = model.check_voice(spec())
    assert (checked.voice, checked.language) == (PRESETS[0], "en")
    assert model.voices == PRESETS


@pytest.mark.parametrize(
    ("voice", "settings", "message"),
    [
        ("An", {}, "unknown voice 'An'.*Ana"),
        ("", {"sped": "1"}, "unknown setting 'sped'.*speed"),
        ("", {"speed": "3"}, "'speed' must be a number from 0.5 to 2"),
        ("", {"temperature": "0"}, "'temperature' must be"),
        ("", {"top_k": "nan"}, "'top_k' must be"),
        ("", {"max_streams": "9"}, "unknown setting 'max_streams'"),
    ],
)
def test_what_it_does_not_know_is_refused(
    model: XttsModel, voice: str, settings: dict[str, str], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        model.check_voice(spec(voice, **settings))


# --- memory ---


@pytest.mark.usefixtures("brief")
def test_unloaded_its_weights_are_gone(tiny_pack: Path) -> None:
    own = load(files_of(tiny_pack))
    said(own, "Well.")
    stream = own.stream([Segment(TEXT, 0)], spec(), CancelToken())
    next(iter(stream))
    stream.close()  # type: ignore[attr-defined]
    dead = weakref.ref(own._loaded.model)
    voices = weakref.ref(own._loaded.voices["Ana"][0])
    own.unload()
    assert dead() is None
    assert voices() is None


@pytest.mark.usefixtures("brief")
def test_twenty_utterances_leave_nothing(model: XttsModel) -> None:
    import torch

    def tensors() -> int:
        gc.collect()
        return sum(type(each) is torch.Tensor for each in gc.get_objects())

    assert said(model, "Well.").size
    before = tensors()
    for i in range(20):
        assert said(model, f"Number {i}.").size
    assert tensors() < before + 20, "less than one for an utterance"
