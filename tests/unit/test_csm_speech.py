"""The worker's model over the engine: segments in, frames and words out, nothing held too long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from src.rpc.errors import CorruptModel, Exhausted, Internal, InvalidArgument, UnknownName
from src.tts.families.csm.engine import Engine
from src.tts.families.csm.engines import Lease, SharedEngines
from src.tts.families.csm.opening import pack_folder
from src.tts.families.csm.ports import Sampling, Voice
from src.tts.families.csm.speech import SesameModel
from src.tts.families.csm.voices import load_voices
from src.tts.recordings import Reference, read_references
from src.tts.tts_base import CancelToken, PcmChunk, Segment, VoiceSpec
from tests.fake_csm import FRAME_SAMPLES, FakeCsmModel, FakePrefix, expected

WAIT_S = 10.0
SPEC = VoiceSpec("", "")


def segments(*texts: str) -> list[Segment]:
    starts = [sum(len(text) + 1 for text in texts[:i]) for i in range(len(texts))]
    return [Segment(text, start) for text, start in zip(texts, starts, strict=True)]


class Stage:
    """A fake model behind a real engine behind the model of the worker."""

    def __init__(self, *, slots: int = 2, max_wait_ms: int = 5_000, seed: int = 0) -> None:
        self.fake = FakeCsmModel(slots=slots)
        self.engines = SharedEngines()
        self.max_wait_ms = max_wait_ms
        self.model = SesameModel(self.lease(), {"default": Voice(), "anna": Voice(1)}, seed=seed)

    def lease(self) -> Lease[Engine]:
        return self.engines.lease("fake", self._engine)

    def _engine(self) -> Engine:
        engine = Engine(self.fake, name="fake", max_waiting=1, max_wait_ms=self.max_wait_ms)
        engine.start()
        return engine

    def speak(self, *texts: str, spec: VoiceSpec = SPEC) -> list[PcmChunk]:
        return list(self.model.stream(segments(*texts), spec, CancelToken()))

    @property
    def active(self) -> int:
        lease = self.lease()
        try:
            return lease.engine.stats.active
        finally:
            lease.release()


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.model.unload()


def firsts(chunks: list[PcmChunk]) -> list[float]:
    return [float(chunk.samples[0]) for chunk in chunks if chunk.samples.size]


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.005)


def test_a_text_is_its_segments_frames_in_order(stage: Stage) -> None:
    chunks = stage.speak("Hello there.", "General!")
    first, second = expected(["Hello there.", "General!"], seed=0)
    assert firsts(chunks) == first + second
    assert {chunk.samples.size for chunk in chunks} <= {FRAME_SAMPLES, 0}
    assert stage.model.native_sample_rate == 24_000
    assert stage.model.max_streams == 2


def test_every_word_is_told_once_and_marked_estimated(stage: Stage) -> None:
    texts = ("Hello there,", "this has many more words than frames could hold.")
    marks = [mark for chunk in stage.speak(*texts) for mark in chunk.words]
    whole = " ".join(texts)
    assert [whole[m.char_start : m.char_end] for m in marks] == whole.split()
    assert all(mark.estimated for mark in marks)


def test_words_that_were_too_late_come_without_sound_and_lie_in_their_segment() -> None:
    stage = Stage()
    stage.fake.ends = lambda text: 2
    chunks = stage.speak("seven words in two frames of sound")
    assert not chunks[-1].samples.size
    assert all(-160 <= m.start_ms <= m.end_ms <= 0 for m in chunks[-1].words)
    assert sum(len(chunk.words) for chunk in chunks) == 7
    stage.model.unload()


def test_what_is_not_for_the_ear_leaves_one_space(stage: Stage) -> None:
    assert firsts(stage.speak("one  \t two")) == expected(["one two"], seed=0)[0]


def test_only_punctuation_takes_no_slot_and_costs_nothing(stage: Stage) -> None:
    assert stage.speak("…", "?!") == []
    assert not stage.fake.calls


def test_no_slot_is_held_before_there_is_a_word(stage: Stage) -> None:
    written = threading.Event()

    def text() -> Iterator[Segment]:
        assert written.wait(WAIT_S)
        yield Segment("now", 0)

    chunks: list[PcmChunk] = []
    stream = stage.model.stream(text(), SPEC, CancelToken())
    reader = threading.Thread(target=lambda: chunks.extend(stream))
    reader.start()
    assert stage.active == 0
    written.set()
    reader.join(WAIT_S)
    assert chunks
    assert stage.active == 0


def test_the_seed_is_the_sessions_or_the_packs() -> None:
    stage = Stage(seed=5)
    default = stage.model.check_voice(SPEC)
    assert default.settings == {"seed": "5"}
    assert stage.model.check_voice(default) == default
    assert firsts(stage.speak("hi you")) == expected(["hi you"], seed=5)[0]
    seven = stage.model.check_voice(VoiceSpec("", "", {"seed": "7"}))
    assert firsts(stage.speak("hi you", spec=seven)) == expected(["hi you"], seed=7)[0]
    stage.model.unload()


def test_names_that_nobody_knows_are_refused(stage: Stage) -> None:
    check = stage.model.check_voice
    with pytest.raises(UnknownName, match="voice 'ana'; did you mean 'anna'"):
        check(VoiceSpec("ana", ""))
    with pytest.raises(UnknownName, match="language 'zz'"):
        check(VoiceSpec("", "zz"))
    with pytest.raises(UnknownName, match="setting 'speed'"):
        check(VoiceSpec("", "", {"speed": "1"}))
    with pytest.raises(InvalidArgument, match="whole number"):
        check(VoiceSpec("", "", {"seed": "1.5"}))
    assert check(VoiceSpec("anna", "en-US")).language == "en"


def test_a_cancelled_stream_ends_quietly_and_gives_its_slot_back(stage: Stage) -> None:
    stage.fake.ends = lambda text: None
    cancel, chunks = CancelToken(), []
    for chunk in stage.model.stream(segments("for ever", "and ever"), SPEC, cancel):
        chunks.append(chunk)
        if len(chunks) == 5:
            cancel.cancel()
    assert len(chunks) <= 6
    until(lambda: stage.active == 0)


def test_a_closed_stream_gives_its_slot_back(stage: Stage) -> None:
    stage.fake.ends = lambda text: None
    stream = stage.model.stream(segments("for ever"), SPEC, CancelToken())
    next(stream)
    assert stage.active == 1
    stream.close()  # type: ignore[attr-defined]
    until(lambda: stage.active == 0)


def test_a_stream_that_is_not_read_computes_nothing_more(stage: Stage) -> None:
    stage.fake.ends = lambda text: None
    stream = stage.model.stream(segments("for ever"), SPEC, CancelToken())
    next(stream)
    until(lambda: stage.fake.ticks >= 3)
    time.sleep(0.1)
    assert stage.fake.ticks <= 4, "the one that was taken, and three of credit"
    stream.close()  # type: ignore[attr-defined]


def test_without_a_free_slot_the_place_in_the_queue_is_told() -> None:
    stage = Stage(slots=1, max_wait_ms=50)
    stage.fake.ends = lambda text: None
    held = stage.model.stream(segments("for ever"), SPEC, CancelToken())
    next(held)
    with pytest.raises(Exhausted) as refused:
        stage.speak("me too")
    assert refused.value.queue_position == 1
    assert refused.value.retry_after_ms
    assert stage.speak("…") == [], "who has nothing to say needs no slot"
    held.close()  # type: ignore[attr-defined]
    stage.model.unload()


def test_a_sick_slot_fails_typed(stage: Stage) -> None:
    stage.fake.sick = lambda row: True
    with pytest.raises(Internal):
        stage.speak("hello")
    assert stage.active == 0


def test_unload_closes_the_engine_when_nobody_else_has_it(stage: Stage) -> None:
    told: list[str] = []
    other = SesameModel(stage.lease(), {"x": Voice()}, on_unload=lambda: told.append("unload"))
    other.unload()
    assert told == ["unload"]
    assert not stage.fake.closed
    stage.model.unload()
    assert stage.fake.closed


# --- recordings ---


def recording(path: Path, seconds: float, rate: int = 24_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(1).normal(0, 0.1, round(rate * seconds))
    soundfile.write(path, noise.astype(np.float32), rate)
    return path


def pack(folder: Path, **texts: str | None) -> dict[str, Path]:
    """`<voice>.wav` of a second for every name, and its transcript where there is one."""
    files = {}
    for voice, text in texts.items():
        files[f"ref/{voice}.wav"] = recording(folder / "ref" / f"{voice}.wav", 1.0)
        if text is not None:
            (folder / "ref" / f"{voice}.txt").write_text(text, encoding="utf-8")
            files[f"ref/{voice}.txt"] = folder / "ref" / f"{voice}.txt"
    return files


def test_a_pack_without_recordings_has_one_voice() -> None:
    assert read_references("m", {}) == {"default": None}
    assert read_references("m", {}, ["joe"]) == {"joe": None}
    with pytest.raises(UnknownName, match="recording for a voice of m 'ann'"):
        read_references("m", {}, ["joe", "ann"][::-1])


def test_recordings_are_voices_and_the_seed_is_the_default(tmp_path: Path) -> None:
    files = pack(tmp_path, zoe="hi", seed=" the\n seed ", bob="ho")
    found = read_references("m", files)
    assert list(found) == ["default", "bob", "zoe"]
    assert found["default"] == Reference(files["ref/seed.wav"], "the seed")
    assert list(read_references("m", files, ["zoe", "default"])) == ["zoe", "default"]
    with pytest.raises(UnknownName, match="did you mean 'zoe'"):
        read_references("m", files, ["zo"])


def test_a_voice_needs_its_transcript_and_the_seed_does_not(tmp_path: Path) -> None:
    seed = read_references("m", pack(tmp_path / "a", seed=None))["default"]
    assert seed is not None
    assert seed.transcript == ""
    with pytest.raises(CorruptModel, match=r"has ref/zoe.wav but not ref/zoe.txt"):
        read_references("m", pack(tmp_path / "b", zoe=None))
    with pytest.raises(CorruptModel, match="1001 characters"):
        read_references("m", pack(tmp_path / "c", zoe="x" * 1001))
    files = pack(tmp_path / "d", zoe="")
    files["ref/zoe.txt"].write_bytes(b"\xff\xfe\xff")
    with pytest.raises(CorruptModel, match="UTF-8"):
        read_references("m", files)


def test_a_voice_prompt_is_text_sound_and_the_mark_that_ends_it(tmp_path: Path) -> None:
    stage, lease = Stage(), None
    try:
        lease = stage.lease()
        references = read_references("m", pack(tmp_path, zoe="I am Zoe."))
        voices = load_voices(
            lease.engine, references, speaker=3, sampling=Sampling(0.5, 9), adapter=2
        )
        voice = voices["zoe"]
        assert isinstance(voice.prefix, FakePrefix)
        said = FakeCsmModel().embed_text("I am Zoe.", 3).items
        assert voice.prefix.items == [*said, *["frame 1 1 1 1"] * 12, "frame 0 0 0 0"]
        assert (voice.speaker, voice.adapter) == (3, 2)
        assert voice.sampling == Sampling(0.5, 9)
        zoe = SesameModel(stage.lease(), voices)
        spoken = list(zoe.stream(segments("hello"), SPEC, CancelToken()))
        assert (
            firsts(spoken) == expected(["hello"], seed=0, prompt=voice.prefix.items, voice=voice)[0]
        )
        assert stage.fake.count("prefix_of") == 1, "read once, however often it speaks"
        zoe.unload()
    finally:
        if lease is not None:
            lease.release()
        stage.model.unload()


@pytest.mark.parametrize(
    ("seconds", "rate", "said"),
    [(0.0, 24_000, "lasts 0"), (31.0, 24_000, "lasts 31"), (1.0, 8_000, "8000")],
)
def test_a_recording_that_is_no_voice_prompt_is_refused(
    tmp_path: Path, stage: Stage, seconds: float, rate: int, said: str
) -> None:
    reference = Reference(recording(tmp_path / "x.wav", seconds, rate), "")
    lease = stage.lease()
    with pytest.raises(InvalidArgument, match=said):
        load_voices(lease.engine, {"x": reference}, speaker=0, sampling=Sampling())
    lease.release()


def test_a_voice_prompt_leaves_half_of_the_context(tmp_path: Path, stage: Stage) -> None:
    reference = Reference(recording(tmp_path / "x.wav", 22.0), "")
    lease = stage.lease()
    with pytest.raises(InvalidArgument, match=r"x.wav takes 278 of 512 positions"):
        load_voices(lease.engine, {"x": reference}, speaker=0, sampling=Sampling())
    lease.release()


# --- the weights' folder ---


def test_without_weights_it_says_what_to_download_and_where_to_put_it() -> None:
    with pytest.raises(CorruptModel) as error:
        pack_folder("sesame-csm-1b", "sesame", {})
    for part in ("hf download sesame/csm-1b", "voicepacks/sesame/csm-1b", "tiny-csm-random"):
        assert part in error.value.message


def test_the_weights_are_one_folder(tmp_path: Path) -> None:
    files = {"config.json": tmp_path / "config.json", "ref/a.wav": tmp_path / "ref" / "a.wav"}
    assert pack_folder("m", "sesame", files) == tmp_path
    with pytest.raises(CorruptModel, match=r"model\.safetensors is at /elsewhere"):
        pack_folder("m", "sesame", {**files, "model.safetensors": Path("/elsewhere/x")})
