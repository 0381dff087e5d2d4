"""Parler-TTS without its package: frames, windows, pieces, packs, settings, the stream."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from src.audio.pcm import Float32
from src.rpc.errors import CorruptModel, Internal, InvalidArgument, UnknownName
from src.tts import generation
from src.tts.adapters import adapter_parler_tts as adapter
from src.tts.adapters.adapter_parler_tts import (
    ParlerTtsAdapter,
    ParlerTtsModel,
    longest_ms,
    pieces,
)
from src.tts.catalog import ModelMeta
from src.tts.families.parler import pack as parler_pack
from src.tts.families.parler.engine import ParlerEngine, SpeechEnded
from src.tts.families.parler.frames import Ids, Undelay, WindowDecoder
from src.tts.families.settings import read_settings
from src.tts.tts_base import CancelToken, MissingPackage, PcmChunk, Segment, VoiceSpec

pytestmark = pytest.mark.timeout(30)
CODES = 16
HOP = 441
REACH = 2


# --- draws to frames ---


def draws(frames: Ids) -> Ids:
    """What the model draws, (steps, codebooks), for frames (codebooks, n): each a step later."""
    codebooks, count = frames.shape
    out = np.full((count + codebooks - 1, codebooks), CODES + 1, dtype=np.int64)
    for k in range(codebooks):
        out[k : k + count, k] = frames[k]
    return out


def undelayed(frames: Ids) -> tuple[list[list[int]], Undelay]:
    undelay = Undelay(frames.shape[0], CODES)
    found = [undelay.push(draw) for draw in draws(frames)]
    return [frame.tolist() for frame in found if frame is not None], undelay


def test_frames_come_out_as_they_were_before_the_delay() -> None:
    frames = np.arange(12).reshape(3, 4)
    found, undelay = undelayed(frames)
    assert found == frames.T.tolist()
    assert not undelay.ended


def test_a_frame_is_complete_with_its_last_codebook_and_not_before() -> None:
    undelay = Undelay(3, CODES)
    steps = draws(np.arange(6).reshape(3, 2))
    assert [undelay.push(step) is not None for step in steps] == [False, False, True, True]


def test_the_end_mark_in_the_first_codebook_ends_speech() -> None:
    frames = np.array([[1, 2, CODES, 4], [1, 2, 3, 4]])
    found, undelay = undelayed(frames)
    assert found == [[1, 1], [2, 2]]
    assert undelay.ended


def test_a_mark_in_another_codebook_leaves_out_its_frame() -> None:
    found, undelay = undelayed(np.array([[1, 2, 3], [1, CODES + 5, 3]]))
    assert found == [[1, 1], [3, 3]]
    assert not undelay.ended


def test_half_a_second_of_marks_is_the_end_however_they_lie() -> None:
    """A codec raises on no frames at all; speech that is only marks must end, not raise."""
    muted = np.ones((2, 60), dtype=np.int64)
    muted[1] = CODES
    found, undelay = undelayed(muted)
    assert not found
    assert undelay.ended


def test_marks_with_sound_between_are_not_the_end() -> None:
    frames = np.ones((2, 200), dtype=np.int64)
    frames[1, ::2] = CODES
    found, undelay = undelayed(frames)
    assert len(found) == 100
    assert not undelay.ended


# --- frames to sound ---


def conv(ids: Ids) -> Float32:
    """A codec that looks REACH frames to either side."""
    level = ids.sum(axis=0) / 100
    kernel = np.arange(1, 2 * REACH + 2) / 20
    seen = np.convolve(level, kernel, mode="same" if ids.shape[1] > 2 * REACH else "full")
    seen = seen if ids.shape[1] > 2 * REACH else seen[REACH : REACH + ids.shape[1]]
    return np.repeat(seen, HOP).astype(np.float32)


class Codec:
    def __init__(self) -> None:
        self.windows: list[int] = []

    def __call__(self, ids: Ids) -> Float32:
        self.windows.append(ids.shape[1])
        return conv(ids)


def windowed(frames: Ids, codec: Codec, first: int = 2, most: int = 8) -> list[Float32]:
    window = WindowDecoder(codec, HOP, REACH, first=first, most=most)
    sounds = [sound for frame in frames.T if (sound := window.push(frame)) is not None]
    return [*sounds, window.end()]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9, 40, 61])
def test_windows_sound_exactly_as_the_whole(count: int) -> None:
    frames = np.random.default_rng(count).integers(0, CODES, (4, count))
    sound = np.concatenate(windowed(frames, Codec()))
    np.testing.assert_allclose(sound, conv(frames), atol=1e-6)


def test_chunks_grow_from_the_first_to_the_most() -> None:
    sounds = windowed(np.ones((4, 40), dtype=np.int64), Codec())
    assert [sound.size // HOP for sound in sounds] == [2, 4, 8, 8, 8, 8, 2]


def test_the_first_chunk_waits_for_what_it_hears_and_no_longer() -> None:
    window = WindowDecoder(Codec(), HOP, REACH, first=2, most=8)
    heard = [window.push(np.ones(4, dtype=np.int64)) is not None for _ in range(2 + REACH)]
    assert heard == [False] * (1 + REACH) + [True]


def test_no_window_grows_with_what_was_said() -> None:
    codec = Codec()
    windowed(np.ones((4, 2000), dtype=np.int64), codec)
    assert max(codec.windows) <= 8 + 2 * REACH
    assert sum(codec.windows) < 2 * 2000


def test_nothing_drawn_is_no_sound_and_asks_the_codec_nothing() -> None:
    codec = Codec()
    assert not WindowDecoder(codec, HOP, REACH, first=2, most=8).end().size
    assert not codec.windows


@pytest.mark.parametrize(
    "bad", [np.ones(HOP - 1, dtype=np.float32), np.full(HOP, np.nan, dtype=np.float32)]
)
def test_what_is_no_sound_is_refused(bad: Float32) -> None:
    window = WindowDecoder(lambda _: bad, HOP, REACH, first=2, most=8)
    window.push(np.ones(4, dtype=np.int64))
    with pytest.raises(Internal):
        window.end()


def test_what_is_too_loud_is_clipped() -> None:
    ids = np.ones(4, dtype=np.int64)
    window = WindowDecoder(lambda _: np.full(HOP, -1.5, np.float32), HOP, REACH, first=2, most=8)
    window.push(ids)
    assert window.end().min() == -1.0


# --- text to pieces ---


def test_a_long_text_is_cut_at_spaces_and_loses_nothing() -> None:
    text = "word " * 300
    cut = pieces(text)
    assert " ".join(cut).split() == text.split()
    assert max(map(len, cut)) <= 300
    assert all(piece.endswith("word") for piece in cut)


def test_a_text_without_spaces_is_cut_too() -> None:
    assert [len(piece) for piece in pieces("x" * 700)] == [300, 300, 100]


def test_what_cannot_be_said_is_no_piece() -> None:
    assert pieces(" … ?! ") == []
    assert pieces("Hi\n there") == ["Hi there"]


def test_the_longest_time_follows_the_text_and_ends_at_thirty_seconds() -> None:
    assert longest_ms("Hi.") < longest_ms("Good morning to all of you.") < 15_000
    assert longest_ms("hundreds of words " * 100) == 30_000


# --- packs ---


def pack(folder: Path, *names: str, **texts: str) -> dict[str, Path]:
    for name in ("config.json", "generation_config.json", *names):
        (folder / name).write_text("{}")
    for name, text in texts.items():
        (folder / name.replace("_yaml", ".yaml")).write_text(text)
    return {path.name: path for path in folder.iterdir()}


def test_a_pack_is_its_folder(tmp_path: Path) -> None:
    assert parler_pack.pack_folder("m", pack(tmp_path, "model.safetensors")) == tmp_path


@pytest.mark.parametrize("missing", ["config.json", "generation_config.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    files = pack(tmp_path, "model.safetensors")
    del files[missing]
    with pytest.raises(CorruptModel, match=missing):
        parler_pack.pack_folder("m", files)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    files = pack(tmp_path, "a-1.safetensors", "model.safetensors.index.json")
    index = {"weight_map": {"x": "a-1.safetensors", "y": "a-2.safetensors"}}
    files["model.safetensors.index.json"].write_text(json.dumps(index))
    with pytest.raises(CorruptModel, match=r"a-2\.safetensors is missing"):
        parler_pack.pack_folder("m", files)
    assert parler_pack.pack_folder("m", {**files, **pack(tmp_path, "a-2.safetensors")}) == tmp_path


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}', "{"])
def test_an_index_that_says_nothing_is_refused(tmp_path: Path, text: str) -> None:
    files = pack(tmp_path, "model.safetensors.index.json")
    files["model.safetensors.index.json"].write_text(text)
    with pytest.raises(CorruptModel, match="cannot be read"):
        parler_pack.pack_folder("m", files)


def test_a_pickled_checkpoint_is_refused_with_the_way_to_convert_it(tmp_path: Path) -> None:
    with pytest.raises(CorruptModel, match=r"voicepack-convert \S+/pytorch_model.bin --i-trust-it"):
        parler_pack.pack_folder("m", pack(tmp_path, "pytorch_model.bin"))


def test_pickled_shards_are_no_weights_and_no_command_turns_them_into_one_file(
    tmp_path: Path,
) -> None:
    files = pack(tmp_path, "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin")
    with pytest.raises(CorruptModel, match=r"model\.safetensors is missing"):
        parler_pack.pack_folder("m", files)


def test_files_of_two_folders_are_no_pack(tmp_path: Path) -> None:
    files = pack(tmp_path, "model.safetensors")
    with pytest.raises(CorruptModel, match="one folder"):
        parler_pack.pack_folder("m", {**files, "tokenizer.json": tmp_path / "cache" / "t.json"})


def voices(folder: Path, text: str, *listed: str) -> dict[str, str]:
    return parler_pack.read_voices("m", pack(folder, descriptions_yaml=text), listed)


def test_described_voices_are_the_packs_in_their_order(tmp_path: Path) -> None:
    text = "jon: Jon mumbles.\nlea: |\n  Lea sings\n  loudly.\n"
    assert voices(tmp_path, text) == {"jon": "Jon mumbles.", "lea": "Lea sings loudly."}
    assert list(voices(tmp_path, text, "lea")) == ["lea"]


def test_a_listed_voice_without_a_description_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match=r"'leo'.*lea"):
        voices(tmp_path, "lea: Lea sings.", "leo")


def test_speakers_by_name_alone_are_described_by_it() -> None:
    found = parler_pack.read_voices("m", {}, ["Laura", "Jon"])
    assert list(found) == ["Laura", "Jon"]
    assert found["Jon"].startswith("Jon speaks")
    assert list(parler_pack.read_voices("m", {}, [])) == ["default"]


@pytest.mark.parametrize(
    "text",
    ["", "- a", "a: 3", "a: ' '", "a: [b]", "a: '" + "x" * 601 + "'", "{", "a: !!python/name:os.x"],
)
def test_descriptions_that_are_none_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(CorruptModel):
        voices(tmp_path, text)


def test_more_voices_than_anybody_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptModel, match="64"):
        voices(tmp_path, "\n".join(f"v{i}: A voice." for i in range(65)))


# --- loading ---


def test_without_the_package_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="uv sync --extra parler"):
        ParlerTtsAdapter().check_installed()


def load(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, Path], *names: str, **settings: str
) -> ParlerTtsModel:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(adapter, "open_engine", lambda *_: Engine())
    meta = ModelMeta(model_id="m", family="parler_tts", voices=list(names), settings=dict(settings))
    return ParlerTtsAdapter().load(meta, files, "cpu", lambda _: None)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"temprature": "1"}, "temperature"),
        ({"temperature": "3"}, "0 to 2"),
        ({"precision": "bf16"}, "bfloat16"),
        ({"streams": "0"}, "1 to 8"),
        ({"first_ms": "5000"}, "20 to 1000"),
        ({"description": "x" * 601}, "600"),
    ],
)
def test_a_bad_setting_of_the_entry_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], error: str
) -> None:
    with pytest.raises(InvalidArgument, match=error):
        load(monkeypatch, pack(tmp_path, "model.safetensors"), **settings)


def test_an_entrys_settings_reach_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = pack(tmp_path, "model.safetensors")
    model = load(monkeypatch, files, streams="3", temperature="0.5", description="A deep voice.")
    assert model.max_streams == 3
    assert model.check_voice(VoiceSpec("", "")).settings["temperature"] == "0.5"
    assert engine_of(model).read == ["A deep voice."]
    assert load(monkeypatch, files).max_streams == 1


def test_one_description_and_names_are_not_both_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = pack(tmp_path, "model.safetensors")
    with pytest.raises(InvalidArgument, match=r"descriptions\.yaml"):
        load(monkeypatch, files, "Jon", description="A deep voice.")


# --- the stream ---


class Engine:
    """Says `length` frames of each text, or `fails` after so many draws."""

    reach, hop, sample_rate, codebooks, codes = REACH, HOP, 44_100, 3, CODES

    def __init__(self, length: int = 30, fails_at: int | None = None) -> None:
        self.length, self.fails_at = length, fails_at
        self.read: list[str] = []
        self.asked: list[str] = []
        self.said: list[tuple[str, object, float, int]] = []
        self.drawn = 0
        self.on_draw: Callable[[int], object] = lambda count: None
        self.running = 0
        self.closed = False

    def frames(self, milliseconds: float) -> int:
        return max(1, round(milliseconds / 10))

    def read_description(self, text: str) -> object:
        self.read.append(text)
        return "state of " + text

    def describe(self, text: str) -> object:
        self.asked.append(text)
        return "state of " + text

    def decode(self, ids: Ids) -> Float32:
        return conv(ids)

    def close(self) -> None:
        self.closed = True

    def generate(
        self,
        text: str,
        description: object,
        *,
        temperature: float,
        frames: int,
        step: Callable[[Ids | None], None],
    ) -> bool:
        self.said.append((text, description, temperature, frames))
        ids = np.ones((3, self.length + 1), dtype=np.int64)
        ids[0, self.length] = CODES
        self.running += 1
        try:
            step(None)
            for draw in draws(ids)[: frames + 2]:
                self.drawn += 1
                self.on_draw(self.drawn)
                if self.drawn == self.fails_at:
                    raise Internal("the model broke")
                step(draw)
        except SpeechEnded:
            return True
        finally:
            self.running -= 1
        return False


def model_of(engine: Engine, **settings: str) -> ParlerTtsModel:
    meta = ModelMeta(model_id="m", family="parler_tts", languages=["en", "fr"])
    options = read_settings(adapter._ENGINE, settings)
    names = {"jon": "Jon speaks.", "lea": "Lea sings."}
    return ParlerTtsModel(meta, cast(ParlerEngine, engine), names, options, {"temperature": 1.0})


def engine_of(model: ParlerTtsModel) -> Engine:
    return cast(Engine, model._engine)


def speak(
    model: ParlerTtsModel, *texts: str, spec: VoiceSpec | None = None, cancel: Any = None
) -> Iterator[PcmChunk]:
    segments = [Segment(text, 100 * i) for i, text in enumerate(texts)]
    return model.stream(segments, spec or VoiceSpec("", ""), cancel or CancelToken())


def sound_of(chunks: Iterator[PcmChunk]) -> Float32:
    return np.concatenate([chunk.samples for chunk in chunks])


def test_every_frame_is_heard_once() -> None:
    sound = sound_of(speak(model_of(Engine(30)), "Hello."))
    np.testing.assert_allclose(sound, conv(np.ones((3, 30), dtype=np.int64)), atol=1e-6)


def test_the_first_chunk_is_small_and_the_next_are_larger() -> None:
    chunks = speak(model_of(Engine(90), first_ms="50", chunk_ms="200"), "Hello you, a long one.")
    assert [c.samples.size // HOP for c in chunks if c.samples.size] == [5, 10, 20, 20, 20, 15]


def test_each_word_is_marked_once_in_its_place() -> None:
    words = [
        word
        for chunk in speak(model_of(Engine(60)), "Hello there, you.", "Good day.")
        for word in chunk.words
    ]
    assert [word.text for word in words] == ["Hello", "there,", "you.", "Good", "day."]
    assert [word.char_start for word in words] == [0, 6, 13, 100, 105]
    assert all(word.estimated for word in words)


def test_text_is_taken_only_when_its_turn_comes() -> None:
    taken: list[str] = []

    def segments() -> Iterator[Segment]:
        for text in ("One.", "Two."):
            taken.append(text)
            yield Segment(text, 0)

    stream = model_of(Engine()).stream(segments(), VoiceSpec("", ""), CancelToken())
    assert not taken
    next(stream)
    assert taken == ["One."]
    list(stream)
    assert taken == ["One.", "Two."]


def test_nothing_speakable_is_not_spoken() -> None:
    engine = Engine()
    assert not list(speak(model_of(engine), "", " … ", "?!"))
    assert not engine.said


def test_voices_are_read_once_and_a_sessions_description_takes_their_place() -> None:
    engine = Engine(5)
    model = model_of(engine)
    own = VoiceSpec("lea", "", {"description": "  A deep\nvoice. ", "temperature": "0.5"})
    for spec in (VoiceSpec("", ""), VoiceSpec("lea", ""), own):
        list(speak(model, "Hello.", spec=spec))
    assert [(state, temperature) for _, state, temperature, _ in engine.said] == [
        ("state of Jon speaks.", 1.0),
        ("state of Lea sings.", 1.0),
        ("state of A deep voice.", 0.5),
    ]
    assert engine.read == ["Jon speaks.", "Lea sings."]
    assert engine.asked == ["A deep voice."]


def test_a_model_that_does_not_end_is_cut_and_teaches_nothing() -> None:
    engine = Engine(100_000)
    model = model_of(engine)
    pace = model._paces["jon"].ms_per_unit
    sound = sound_of(speak(model, "Hi."))
    assert 4.0 < sound.size / 44_100 < 6.0
    assert model._paces["jon"].ms_per_unit == pace
    engine.length = 300
    sound_of(speak(model, "Hi."))
    assert model._paces["jon"].ms_per_unit != pace


def test_a_segment_of_which_one_piece_was_cut_teaches_nothing() -> None:
    engine = Engine(100_000)
    model = model_of(engine)
    pace = model._paces["jon"].ms_per_unit

    def the_next_ends_by_itself(_: int) -> None:
        engine.length = 300

    engine.on_draw = the_next_ends_by_itself
    sound_of(speak(model, "word " * 80))
    assert len(engine.said) == 2
    assert model._paces["jon"].ms_per_unit == pace


def test_a_long_text_is_said_in_pieces_and_whole() -> None:
    engine = Engine(5)
    chunks = list(speak(model_of(engine), "word " * 200))
    assert " ".join(text for text, *_ in engine.said).split() == ["word"] * 200
    assert sum(len(chunk.words) for chunk in chunks) == 200
    assert max(frames for *_, frames in engine.said) <= 3000


def test_cancelled_it_ends_quietly_at_the_next_step() -> None:
    engine, cancel = Engine(100_000), CancelToken()
    stream = speak(model_of(engine), "Hello. " * 20, "More.", cancel=cancel)
    next(stream)
    cancel.cancel()
    assert not list(stream)
    assert not engine.running
    assert len(engine.said) == 1
    assert not [t for t in threading.enumerate() if t.name == "parler_tts"]


def test_cancelled_before_it_began_nothing_is_computed() -> None:
    engine, cancel = Engine(), CancelToken()
    cancel.cancel()
    assert not list(speak(model_of(engine), "Hello.", cancel=cancel))
    assert not engine.said


def test_cancelled_before_its_first_sound_it_ends_at_that_step() -> None:
    """Nothing was handed over yet, so that only a look at each step can end it."""
    engine, cancel = Engine(100_000), CancelToken()
    engine.on_draw = lambda count: cancel.cancel() if count == 5 else None
    two_pieces = "Hello. " * 80
    assert not list(speak(model_of(engine), two_pieces, "More.", cancel=cancel))
    assert engine.drawn == 5
    assert len(engine.said) == 1
    assert not engine.running


def test_cancelled_it_takes_no_more_text() -> None:
    taken: list[str] = []

    def segments() -> Iterator[Segment]:
        for text in ("One.", "Two.", "Three."):
            taken.append(text)
            yield Segment(text, 0)

    cancel = CancelToken()
    stream = model_of(Engine()).stream(segments(), VoiceSpec("", ""), cancel)
    next(stream)
    cancel.cancel()
    assert not list(stream)
    assert taken == ["One.", "Two."], "the one that it waited for, and none after it"


def test_closed_it_ends_at_that_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not at its next sound, which takes many."""
    engine, reached, stopped = Engine(100_000), threading.Event(), threading.Event()
    stop = generation._Hand.stop

    def stopping(hand: generation._Hand[Any]) -> None:
        stop(hand)
        stopped.set()

    def on_draw(count: int) -> None:
        if count == 30:
            reached.set()
            assert stopped.wait(10.0)

    monkeypatch.setattr(generation._Hand, "stop", stopping)
    engine.on_draw = on_draw
    stream = speak(model_of(engine), "Hello. " * 20)
    next(stream)
    assert reached.wait(10.0)
    stream.close()  # type: ignore[attr-defined]
    assert engine.drawn == 30


def test_closed_it_leaves_no_thread() -> None:
    engine = Engine(100_000)
    stream = speak(model_of(engine), "Hello. " * 20)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not engine.running
    assert not [t for t in threading.enumerate() if t.name == "parler_tts"]


def test_what_the_model_raises_reaches_the_caller() -> None:
    stream = speak(model_of(Engine(100, fails_at=40)), "Hello.")
    next(stream)
    with pytest.raises(Internal, match="the model broke"):
        list(islice(stream, 100))
    with pytest.raises(Internal, match="the model broke"):
        list(speak(model_of(Engine(fails_at=1)), "Hello."))


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        (VoiceSpec("john", ""), "jon"),
        (VoiceSpec("", "de"), "de"),
        (VoiceSpec("", "", {"descripton": "x"}), "description"),
        (VoiceSpec("", "", {"temperature": "nan"}), "temperature"),
        (VoiceSpec("", "", {"description": "x" * 601}), "600"),
    ],
)
def test_a_bad_voice_language_or_setting_is_refused(spec: VoiceSpec, error: str) -> None:
    model = model_of(Engine())
    with pytest.raises(InvalidArgument, match=error):
        model.check_voice(spec)
    with pytest.raises(InvalidArgument, match=error):
        next(speak(model, "Hello.", spec=spec))


def test_defaults_are_filled_in_and_stay() -> None:
    model = model_of(Engine())
    spec = model.check_voice(VoiceSpec("", "fr-CA"))
    assert (spec.voice, spec.language) == ("jon", "fr")
    assert spec.settings == {"description": "", "temperature": "1.0"}
    assert model.check_voice(spec) == spec


def test_unloaded_it_closes_its_engine() -> None:
    engine = Engine()
    model = model_of(engine)
    model.unload()
    assert engine.closed
    assert not model._states, "they lie on the device"
