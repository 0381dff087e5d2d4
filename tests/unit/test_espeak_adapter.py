from __future__ import annotations

import importlib.util
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import espeakng_loader
import numpy as np
import pytest

from src.audio.pcm import Float32
from src.rpc.errors import InvalidArgument, UnknownName
from src.tts.adapters import adapter_for
from src.tts.adapters.adapter_espeak import EspeakAdapter, EspeakModel, word_marks
from src.tts.catalog import ModelMeta
from src.tts.families.espeak.engine import EnginePool, EspeakEngine, WordEvent
from src.tts.segmenter import Segmenter
from src.tts.tts_base import CancelToken, MissingPackage, Segment, VoiceSpec

ENGLISH = "gmw/en-US"
LONG = "This is a sentence that takes a good while to say, with a clause. "


def load(**changes: object) -> EspeakModel:
    meta = ModelMeta.model_validate({"model_id": "e", "family": "espeak", **changes})
    return EspeakAdapter().load(meta, {}, "", lambda done: None)


@pytest.fixture(scope="module")
def model() -> Iterator[EspeakModel]:
    loaded = load()
    yield loaded
    loaded.unload()


def segments(text: str) -> list[Segment]:
    segmenter = Segmenter()
    return segmenter.push(text) + segmenter.flush()


def speak(model: EspeakModel, text: str, voice: str = "", **settings: str) -> Float32:
    spec = VoiceSpec(voice, "", settings)
    chunks = model.stream(segments(text), spec, CancelToken())
    return np.concatenate([chunk.samples for chunk in chunks])


# --- the engine ---


def test_a_fresh_engine_says_the_same_thing_every_time() -> None:
    def fresh() -> list[Float32]:
        engine = EspeakEngine()
        spoken = [engine.speak(text, ENGLISH).samples for text in ("Hello there.", LONG)]
        engine.close()
        return spoken

    for first, second in zip(fresh(), fresh(), strict=True):
        assert first.size
        np.testing.assert_array_equal(first, second)


def test_engines_do_not_disturb_each_other() -> None:
    alone = EspeakEngine()
    expected = alone.speak(LONG * 5, ENGLISH, pitch=20).samples
    alone.close()
    engines = [EspeakEngine() for _ in range(3)]
    spoken: list[Float32 | None] = [None] * 3

    def run(index: int) -> None:
        pitch = (20, 80, 20)[index]
        spoken[index] = engines[index].speak(LONG * 5, ENGLISH, pitch=pitch).samples

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for engine in engines:
        engine.close()
    assert spoken[0] is not None
    assert spoken[2] is not None
    np.testing.assert_array_equal(spoken[0], expected)
    np.testing.assert_array_equal(spoken[2], expected)


def test_stop_is_obeyed_inside_a_sentence() -> None:
    engine = EspeakEngine()
    asked = itertools.count()
    whole = engine.speak(LONG * 10, ENGLISH)
    cut = engine.speak(LONG * 10, ENGLISH, stop=lambda: next(asked) >= 3)
    assert whole.complete
    assert not cut.complete
    assert cut.samples.size <= 3 * engine.sample_rate * 0.07
    assert engine.speak("Again.", ENGLISH).complete
    engine.close()


def test_an_unknown_identifier_is_refused() -> None:
    engine = EspeakEngine()
    with pytest.raises(ValueError, match="nowhere"):
        engine.speak("x", "nowhere/nothing")
    engine.close()


@pytest.mark.parametrize("text", ["", "\0", "😀", "\ud800 lone", "<speak>", "a\0b", "你好"])
def test_odd_text_does_no_harm(text: str) -> None:
    engine = EspeakEngine()
    assert engine.speak(text, ENGLISH).complete
    engine.close()


def test_a_pool_makes_no_more_engines_than_it_may() -> None:
    pool = EnginePool(2, EspeakEngine())
    with pool.engine() as one, pool.engine() as two:
        assert one is not two
        waiting = threading.Thread(target=lambda: seen.append(pool.engine().__enter__()))
        seen: list[EspeakEngine] = []
        waiting.start()
        assert not seen
    waiting.join(20)
    assert seen[0] in (one, two)


# --- words ---


def test_events_become_marks_in_the_text_of_the_utterance() -> None:
    events = [WordEvent(10, 0, 2), WordEvent(300, 3, 4), WordEvent(500, 8, 2)]
    marks = word_marks(Segment("It cost me.", 40), events, 800)
    assert [(m.text, m.start_ms, m.end_ms, m.char_start, m.char_end) for m in marks] == [
        ("It", 10, 300, 40, 42),
        ("cost", 300, 500, 43, 47),
        ("me.", 500, 800, 48, 51),
    ]
    assert not any(mark.estimated for mark in marks)


def test_a_word_without_an_event_shares_the_time_of_its_neighbour() -> None:
    events = [WordEvent(0, 0, 6), WordEvent(400, 7, 3)]
    marks = word_marks(Segment("of the way", 0), events, 700)
    assert [(m.text, m.start_ms, m.end_ms, m.estimated) for m in marks] == [
        ("of", 0, 200, True),
        ("the", 200, 400, True),
        ("way", 400, 700, False),
    ]


def test_a_number_is_one_word_however_many_events_it_has() -> None:
    events = [WordEvent(at, 0, 4) for at in (0, 100, 200)] + [WordEvent(300, 5, 2)]
    marks = word_marks(Segment("3.14 ok", 0), events, 500)
    assert [(m.start_ms, m.end_ms) for m in marks] == [(0, 300), (300, 500)]
    assert word_marks(Segment("no event", 0), [], 500) == ()


def test_real_marks_are_in_order_in_place_and_inside_the_audio(model: EspeakModel) -> None:
    text = 'Sure. The "bank" of the river, at 3.14 p.m. I met Dr. Smith—naïve café! Привет.'
    spoken: list[str] = []
    for chunk in model.stream(segments(text), VoiceSpec("", ""), CancelToken()):
        end = 0
        for mark in chunk.words:
            assert text[mark.char_start : mark.char_end] == mark.text
            assert end <= mark.start_ms <= mark.end_ms
            end = mark.end_ms
            spoken.append(mark.text)
        assert end <= chunk.samples.size * 1000 / model.native_sample_rate
    assert "".join(spoken) == text.replace(" ", "")


# --- the model ---


def test_speaks_at_a_sane_level_and_length(model: EspeakModel) -> None:
    samples = speak(model, "Hello there, this is a test of the voice.")
    assert samples.dtype == np.float32
    assert 0.1 < float(np.abs(samples).max()) <= 1.0
    assert 1.5 < samples.size / model.native_sample_rate < 5.0


def test_speed_and_pitch_change_the_voice(model: EspeakModel) -> None:
    text = "This is how fast I speak."
    normal = speak(model, text)
    assert speak(model, text, speed="2").size < 0.7 * normal.size
    assert speak(model, text, speed="0.5").size > 1.5 * normal.size
    assert fundamental(speak(model, text, pitch="99")) > 1.3 * fundamental(normal)


def fundamental(samples: Float32) -> float:
    """Hz, by the highest peak of the autocorrelation between 60 and 300 Hz."""
    rate = 22_050
    spectrum = np.abs(np.fft.rfft(samples, 2 * samples.size)) ** 2
    correlation = np.fft.irfft(spectrum)[: rate // 60]
    return rate / (rate // 300 + int(np.argmax(correlation[rate // 300 :])))


def test_cancelled_between_segments_it_ends_quietly(model: EspeakModel) -> None:
    cancel = CancelToken()
    stream = model.stream(segments("One. Two. Three."), VoiceSpec("", ""), cancel)
    next(stream)
    cancel.cancel()
    assert list(stream) == []


def test_cancelled_inside_a_segment_it_yields_nothing(model: EspeakModel) -> None:
    def late() -> Iterator[Segment]:
        cancel.cancel()
        yield Segment(LONG, 0)

    cancel = CancelToken()
    assert list(model.stream(late(), VoiceSpec("", ""), cancel)) == []
    assert speak(model, "Still there.").size


def test_many_streams_share_the_engines_and_leave_no_threads(model: EspeakModel) -> None:
    before = set(threading.enumerate())
    done: list[int] = []
    threads = [
        threading.Thread(target=lambda: done.append(speak(model, LONG * 3).size)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(done) == 8
    assert all(size > 0 for size in done)
    # Not a count: a thread of an earlier test may end meanwhile.
    assert set(threading.enumerate()) <= before


def test_languages_and_voices_are_found_by_tag_identifier_name_and_variant(
    model: EspeakModel,
) -> None:
    assert model.voices[0] == "en-us"
    assert len(model.languages) > 90
    for voice, language, expected in (
        ("", "", ("en-us", "en-us")),
        ("", "fr", ("fr-fr", "fr-fr")),
        ("", "en-GB", ("en-gb", "en-gb")),
        ("en-gb+f2", "en", ("en-gb+f2", "en-gb")),
        ("roa/fr", "fr-FR", ("roa/fr", "fr-fr")),
        ("EN-US", "", ("EN-US", "en-us")),
    ):
        checked = model.check_voice(VoiceSpec(voice, language))
        assert (checked.voice, checked.language) == expected
    assert speak(model, "Bonjour à tous.", voice="fr-fr+f2").size


def test_wrong_names_and_values_say_what_is_right(model: EspeakModel) -> None:
    for spec, error, message in (
        (VoiceSpec("en-uss", ""), UnknownName, "did you mean 'en-us'"),
        (VoiceSpec("en-us+f22", ""), UnknownName, "did you mean 'f2'"),
        (VoiceSpec("", "klingon"), UnknownName, "language 'klingon'"),
        (VoiceSpec("en-us", "fr"), InvalidArgument, "speaks 'en-us', not 'fr'"),
        (VoiceSpec("", "", {"pich": "5"}), UnknownName, "did you mean 'pitch'"),
        (VoiceSpec("", "", {"pitch": "100"}), InvalidArgument, "from 0 to 99"),
        (VoiceSpec("", "", {"speed": ""}), InvalidArgument, "from 0.5 to 2"),
    ):
        with pytest.raises(error, match=message):
            model.check_voice(spec)


def test_an_entry_may_name_its_voices_and_defaults() -> None:
    loaded = load(voices=["en-gb+m3", "de"], settings={"speed": "0.5"})
    assert loaded.check_voice(VoiceSpec("", "")).voice == "en-gb+m3"
    assert loaded.check_voice(VoiceSpec("", "de")).voice == "de"
    assert loaded.check_voice(VoiceSpec("", "", {"pitch": "9"})).settings == {
        "speed": "0.5",
        "pitch": "9",
    }
    loaded.unload()
    with pytest.raises(UnknownName, match="voice 'xqz'"):
        load(voices=["xqz"])


def test_loading_again_and_again_leaks_no_mapping() -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("libespeak-ng")

    before = mapped()
    for _ in range(10):
        loaded = load()
        speak(loaded, "Hi.")
        loaded.unload()
    assert mapped() == before


def test_without_the_package_or_its_library_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "libespeak-ng.so"
    broken.write_bytes(b"not a library")
    for path in (broken, tmp_path / "absent.so"):
        monkeypatch.setattr(espeakng_loader, "get_library_path", lambda path=path: str(path))
        with pytest.raises(MissingPackage, match="pip install 'espeakng-loader"):
            load()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="espeak is not installed"):
        adapter_for("espeak").check_installed()
