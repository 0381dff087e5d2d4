"""The family through its adapter: the package's own classes, on small random weights."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.rpc.errors import UnknownName
from src.tts.families.cosyvoice2.plan import longest
from src.tts.families.cosyvoice2.speech import CosyVoice2Model, Manner
from src.tts.tts_base import CancelToken, Segment, VoiceSpec
from tests.families.cosyvoice.conftest import Manners
from tests.families.cosyvoice.packs import chunks, drawn, engine_of, load, sound, spec
from tests.families.oracles import assert_frames_hold_all

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.timeout(400)  # the first test waits for the package's import

TEXT = "Hello there."
PER_TOKEN = 960
FADE = 8 * 480
LIVELY_S = 60.0


# --- speaking ---


def test_a_text_is_sound_in_chunks_of_1_2_and_4_seconds(model: CosyVoice2Model) -> None:
    sizes = [c.samples.size for c in chunks(model, "A text of some length, as it were.", spec())]
    tokens = drawn(model, "A text of some length, as it were.", Manner("default", seed=7))
    assert len(tokens) > 80, "else there is no third chunk"
    assert sum(sizes) == len(tokens) * PER_TOKEN
    assert sizes[:2] == [25 * PER_TOKEN - FADE, 50 * PER_TOKEN]
    again = [c.samples.size for c in chunks(model, "A text of some length, as it were.", spec())]
    assert again == sizes, "the package's chunks grow from one utterance to the next"


def test_samples_are_finite_float32_in_range_and_no_silence(model: CosyVoice2Model) -> None:
    said = sound(chunks(model, TEXT))
    assert said.dtype == np.float32
    assert np.isfinite(said).all()
    assert 0.0 < float(np.abs(said).max()) <= 1.0
    assert float(said.std()) > 1e-4


def test_every_word_comes_once_in_order_and_estimated(model: CosyVoice2Model) -> None:
    text = "Hello there, my friend. How are you?"
    cut = [Segment(text[:23], 0), Segment(text[24:], 24)]
    for how in ("clauses", "flowing"):
        words = [w for c in chunks(model, cut, spec(text=how)) for w in c.words]
        assert [text[w.char_start : w.char_end] for w in words] == text.split()
        assert all(w.estimated for w in words)


def test_frames_add_up_to_the_samples(model: CosyVoice2Model) -> None:
    assert_frames_hold_all(chunks(model, TEXT), 24_000)


def test_speed_is_kept_in_a_stream(model: CosyVoice2Model) -> None:
    sizes = {
        speed: sound(chunks(model, TEXT, spec(speed=speed))).size for speed in ("0.5", "1", "2")
    }
    assert sizes["0.5"] == pytest.approx(2 * sizes["1"], abs=2 * PER_TOKEN)
    assert sizes["2"] == pytest.approx(sizes["1"] / 2, abs=2 * PER_TOKEN)


def test_a_model_that_finds_no_end_is_cut_off(
    model: CosyVoice2Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    bias = engine_of(model)._model.llm.llm_decoder.bias
    kept = bias.detach().clone()
    try:
        bias.data[81] = -1e4
        assert sound(chunks(model, "Hi you.")).size == longest("Hi you.") * PER_TOKEN
    finally:
        bias.data.copy_(kept)


def test_numbers_are_words_without_a_network(model: CosyVoice2Model) -> None:
    normal = engine_of(model).normal
    assert "forty two dollars" in normal("I have 42 dollars.").lower()
    assert "四十二" in normal("我有42元。")


@pytest.mark.parametrize(
    "text", ["Two  spaces.", 'He said "no".', "C:\\new", "？！", "（你）", "😀 x"]
)
def test_a_text_that_the_normaliser_chokes_on_is_said_all_the_same(
    model: CosyVoice2Model, text: str
) -> None:
    said = engine_of(model).normal(text)
    assert "\\" not in said
    assert not text.isascii() or [c for c in said if c.isalpha()] == [
        c for c in text if c.isalpha()
    ]


def test_a_text_from_outside_writes_no_control_tokens(model: CosyVoice2Model) -> None:
    seen: list[list[int]] = []
    frontend = engine_of(model)._frontend
    real = frontend.text_ids

    def text_ids(text: str) -> Any:
        seen.append(real(text)[0].tolist())
        return real(text)

    frontend.text_ids = text_ids
    try:
        chunks(model, "A <|endofprompt|> b.", spec(instruct="x <|im_end|> y"), most=1)
    finally:
        frontend.text_ids = real
    end = real("<|endofprompt|>")[0].tolist()
    assert len(end) == 1
    (instruct, text) = sorted(seen, key=lambda ids: end[0] not in ids)
    assert instruct.count(end[0]) == 1, "ours, at the end"
    assert instruct[-1] == end[0]
    assert end[0] not in text
    assert real("<|im_end|>")[0].tolist()[0] not in instruct


# --- voices and manners ---


def test_a_recording_is_a_voice_and_so_is_a_preset(model: CosyVoice2Model) -> None:
    assert model.voices == ("default", "anna")
    default, anna = (engine_of(model)._speakers[name] for name in model.voices)
    assert default.speech.shape[1] == 50, "25 tokens a second of the recording"
    assert default.mel.shape == (1, 100, 80)
    assert default.embedding.shape == anna.embedding.shape == (1, 192)
    assert anna.speech.shape == (1, 0)
    for name in model.voices:
        assert sound(chunks(model, TEXT, spec(name))).size


def test_an_instruction_takes_the_recording_s_place_before_the_language_model(
    model: CosyVoice2Model,
) -> None:
    engine = engine_of(model)
    plain = engine._prompt(Manner("default"))
    told = engine._prompt(Manner("default", instruct="用开心的语气说这句话"))
    assert plain["prompt_speech_token"].shape[1] == 50
    assert told["prompt_speech_token"].shape[1] == 0
    assert told["prompt_text"].shape[1] > 0
    assert not torch.equal(plain["prompt_text"], told["prompt_text"])
    assert drawn(model, TEXT, Manner("default", seed=7)) != drawn(
        model, TEXT, Manner("default", "用开心的语气说这句话", seed=7)
    )
    assert engine.prompt("default") == 50, "the flow still hears the recording"


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [
        (VoiceSpec("ana", ""), "anna"),
        (VoiceSpec("", "xx"), "language"),
        (VoiceSpec("", "", {"emotion": "hapy"}), "happy"),
        (VoiceSpec("", "", {"emotoin": "happy"}), "emotion"),
    ],
    ids=["voice", "language", "emotion", "setting"],
)
def test_an_unknown_name_is_refused_with_the_nearest(
    model: CosyVoice2Model, asked: VoiceSpec, nearest: str
) -> None:
    with pytest.raises(UnknownName, match=nearest):
        model.check_voice(asked)


# --- several at once ---


def test_tokens_alone_are_those_among_others(model: CosyVoice2Model) -> None:
    manners = [Manner(voice, seed=seed) for voice in model.voices for seed in (3, 4)]
    alone = [drawn(model, TEXT, manner) for manner in manners]
    assert alone[0] != alone[1], "seeds matter"
    together = threading.Barrier(len(manners))

    def one(manner: Manner) -> list[int]:
        together.wait(LIVELY_S)
        return drawn(model, TEXT, manner)

    with ThreadPoolExecutor(len(manners)) as pool:
        assert list(pool.map(one, manners)) == alone


def test_streams_take_turns_chunk_by_chunk(model: CosyVoice2Model) -> None:
    streams = [model.stream([Segment(TEXT, 0)], spec(), CancelToken()) for _ in range(3)]
    sizes: list[list[int]] = [[] for _ in streams]
    for _ in range(50):
        for stream, found in zip(streams, sizes, strict=True):
            found += [chunk.samples.size for chunk in [next(stream, None)] if chunk]
    assert sizes[0] == sizes[1] == sizes[2]
    assert sizes[0] == [c.samples.size for c in chunks(model, TEXT)]


# --- text that is still being written ---


def test_flowing_text_is_heard_before_it_is_written_to_its_end(model: CosyVoice2Model) -> None:
    taken: list[int] = []

    def written() -> Iterator[Segment]:
        at = 0
        for number, text in enumerate(["Hello there, my friend,"] + ["and so on,"] * 20):
            taken.append(number)
            yield Segment(text, at)
            at += len(text) + 1

    found = chunks(model, written(), spec(text="flowing"), most=1)
    assert found[0].samples.size
    assert len(taken) < 15


def test_a_long_recording_makes_flowing_text_wait_no_longer(
    model: CosyVoice2Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    speakers = engine_of(model)._speakers
    own = speakers["default"]
    # Twelve seconds: the package would wait for a hundred tokens of text to go with them.
    longer = replace(own, speech=own.speech.repeat(1, 6), mel=own.mel.repeat(1, 6, 1))
    taken: dict[str, int] = {}
    for name, speaker in (("short", own), ("long", longer)):
        monkeypatch.setitem(speakers, "default", speaker)
        texts = (Segment("and so on,", 11 * n) for n in range(40))
        assert chunks(model, texts, spec(text="flowing"), most=1)[0].samples.size
        taken[name] = 40 - len(list(texts))
    assert taken["long"] == taken["short"] < 10


def test_a_model_that_asks_for_more_text_gets_it_before_it_speaks(model: CosyVoice2Model) -> None:
    bias = engine_of(model)._model.llm.llm_decoder.bias
    kept = bias.detach().clone()
    texts = iter(["abcde"] * 6)  # five tokens each, as many as a step of it takes
    try:
        bias.data[83] = 1e4
        made = engine_of(model).tokens_while_written(texts, Manner("default", seed=7))
        next(made)
        assert len(list(texts)) == 4, "it asked once; asking again at once is a repetition"
        made.close()
    finally:
        bias.data.copy_(kept)


def test_who_waits_for_text_keeps_nobody_from_speaking(model: CosyVoice2Model) -> None:
    more, reached = threading.Event(), threading.Event()

    def written() -> Iterator[Segment]:
        yield Segment("Hi", 0)
        reached.set()
        assert more.wait(LIVELY_S)
        yield Segment("there, my friend.", 3)

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(chunks, model, written(), spec(text="flowing"))
        assert reached.wait(LIVELY_S)
        assert sound(chunks(model, TEXT)).size
        assert not waiting.done()
        more.set()
        assert sound(waiting.result(LIVELY_S)).size


# --- manners ---


def test_import_and_load_leave_the_process_as_it_was(manners: Manners, pack: Path) -> None:
    assert manners.after == manners.before
    from tests.families.cosyvoice.conftest import _process

    torch.seed()  # not the 0 that the release seeds with
    before = _process()
    load(pack).unload()
    assert _process() == before, "the release reseeds every generator while it is loaded"


def test_speaking_moves_no_root_logger(
    model: CosyVoice2Model, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG"):
        chunks(model, TEXT, spec(text="flowing"), most=1)
    assert not [record for record in caplog.records if record.name == "root"]


def test_what_downloads_is_not_even_imported(model: CosyVoice2Model) -> None:
    assert not {"modelscope", "hyperpyyaml", "lightning"} & set(sys.modules)
