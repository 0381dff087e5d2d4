"""CosyVoice 2 without its sources: it says so; and what is ours of it, with a fake engine."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from src.audio.pcm import Float32
from src.rpc.errors import CorruptModel, InvalidArgument, Unavailable, UnknownName
from src.tts.adapters import adapter_for
from src.tts.catalog import ModelMeta
from src.tts.families.cosyvoice2.pack import Sizes, read_sizes
from src.tts.families.cosyvoice2.plan import (
    EMOTIONS,
    ChunkSchedule,
    Patience,
    instruction,
    longest,
    stretched,
)
from src.tts.families.cosyvoice2.speech import CosyVoice2Model, Manner, Vocoder
from src.tts.generation import Stopped
from src.tts.paced_words import PacedWords, WordPace
from src.tts.tts_base import CancelToken, MissingPackage, PcmChunk, Segment, VoiceSpec

META = ModelMeta(model_id="cosyvoice2-en-base", family="cosyvoice2")
PER_TOKEN = 960


# --- without the sources ---


@pytest.fixture
def _nothing_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COSYVOICE_HOME", raising=False)


@pytest.mark.usefixtures("_nothing_named")
def test_without_the_package_check_and_load_name_the_family_and_the_way_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    adapter = adapter_for("cosyvoice2")
    for call in (adapter.check_installed, lambda: adapter.load(META, {}, "cuda", _progress)):
        with pytest.raises(MissingPackage, match=r"COSYVOICE_PYTORCH_CONFLICT\.md") as error:
            call()
        assert error.value.family == "cosyvoice2"
        assert "uv sync --extra cosyvoice" in error.value.install


def checkout(folder: Path, *files: str) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


SPEAKS, HELPS = "cosyvoice/cli/model.py", "third_party/Matcha-TTS/matcha/utils/audio.py"


@pytest.fixture
def _all_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.machinery.ModuleSpec("torch", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)


@pytest.mark.usefixtures("_all_modules")
def test_a_variable_that_names_another_folder_is_told_what_was_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cosyvoice").mkdir()  # what a release of the weights might be called
    monkeypatch.setenv("COSYVOICE_HOME", str(tmp_path))
    wanted = f"no {SPEAKS} in {tmp_path}, which COSYVOICE_HOME names"
    with pytest.raises(MissingPackage, match=wanted) as told:
        adapter_for("cosyvoice2").check_installed()
    assert "git clone" in told.value.install


@pytest.mark.usefixtures("_all_modules")
def test_a_checkout_without_its_submodule_is_told_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COSYVOICE_HOME", str(checkout(tmp_path, SPEAKS)))
    command = f"run: git -C {tmp_path} submodule update --init third_party/Matcha-TTS$"
    with pytest.raises(MissingPackage, match=command):
        adapter_for("cosyvoice2").check_installed()
    checkout(tmp_path, HELPS)
    adapter_for("cosyvoice2").check_installed()


@pytest.mark.usefixtures("_nothing_named")
def test_both_may_lie_on_the_path_as_in_an_image(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checkout(tmp_path, SPEAKS, HELPS)
    real = importlib.util.find_spec
    ours = ("cosyvoice", "matcha")
    there = importlib.machinery.ModuleSpec("torch", None)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: real(name) if name in ours else there
    )
    for name in ours:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingPackage, match="git clone"):
        adapter_for("cosyvoice2").check_installed()
    monkeypatch.syspath_prepend(tmp_path / "third_party" / "Matcha-TTS")
    adapter_for("cosyvoice2").check_installed()


def test_a_checkout_is_not_enough_without_what_it_imports(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COSYVOICE_HOME", str(checkout(tmp_path, SPEAKS, HELPS)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="uv sync --extra cosyvoice"):
        adapter_for("cosyvoice2").check_installed()


def test_its_capabilities_are_known_without_the_package() -> None:
    capabilities = adapter_for("cosyvoice2").capabilities
    assert capabilities.zero_shot
    assert capabilities.emotive_zero_prompt
    assert not capabilities.cpu_ok
    assert {"emotion", "instruct", "speed"} <= set(capabilities.settings)
    assert "torch" not in sys.modules or importlib.util.find_spec("torch") is not None


def _progress(done: float) -> None:
    raise AssertionError("nothing may be loaded")


# --- a pack's yaml is data ---


def test_of_a_yaml_only_the_numbers_are_taken(tmp_path: Path) -> None:
    mark = tmp_path / "was_here"
    path = tmp_path / "cosyvoice2.yaml"
    path.write_text(
        f'a: !apply:os.system ["touch {mark}"]\n'
        f'b: !!python/object/apply:os.system ["touch {mark}"]\n'
        f'c: !new:subprocess.Popen\n  args: ["touch", "{mark}"]\n'
        "llm: !new:cosyvoice.llm.llm.Qwen2LM\n  speech_token_size: 81\n"
        "flow: !new:x\n  decoder: !new:y\n    estimator: !new:z\n      channels: [32]\n"
        "hift: !ref <other>\n"
    )
    assert read_sizes("m", path) == Sizes(speech_tokens=81, flow_channels=32)
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    ["llm: [", "llm: {speech_token_size: 1000000000}", "llm: {speech_token_size: true}",
     "llm: {speech_token_size: !ref <x>}", "hift: {base_channels: -1}", "\x00", "[" * 50_000,
     "a: 1\n" * 100_000],
    ids=["broken", "huge", "bool", "reference", "negative", "nul", "deep", "long"],
)  # fmt: skip
def test_a_yaml_that_cannot_be_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "cosyvoice2.yaml"
    path.write_text(content)
    with pytest.raises(CorruptModel, match="m: "):
        read_sizes("m", path)


# --- the plan ---


def chunks_of(total: int, prompt: int = 0, look_ahead: int = 3) -> list[tuple[int, int]]:
    """(offset, tokens seen) of every chunk but the last."""
    plan, found = ChunkSchedule(prompt, look_ahead), []
    for made in range(1, total + 1):
        if (upto := plan.due(made)) is not None:
            found.append((plan.offset, upto))
            plan.took()
    return found


def test_chunks_are_25_then_50_then_100_tokens_and_see_3_more() -> None:
    assert chunks_of(27) == []
    assert chunks_of(400) == [(0, 28), (25, 78), (75, 178), (175, 278), (275, 378)]


@pytest.mark.parametrize(("prompt", "first"), [(0, 25), (25, 25), (26, 49), (49, 26), (240, 35)])
def test_a_recording_and_the_first_chunk_fill_whole_masks(prompt: int, first: int) -> None:
    offsets = [offset for offset, _ in chunks_of(300, prompt)]
    assert offsets[:3] == [0, first, first + 50], "and only the first"
    assert (prompt + first) % 25 == 0


def test_a_bound_grows_with_the_text_and_never_cuts_slow_speech() -> None:
    assert longest("") == 100
    assert longest("A sentence that takes about four seconds to say.") > 2.5 * 25 * 4
    assert longest("你好世界" * 10) > 2 * 25 * 40 / 4.5
    assert longest("word " * 100) < 10 * 25 * 60


@pytest.mark.parametrize("speed", [0.5, 0.77, 1.0, 1.9, 2.0])
def test_places_of_another_speed_are_the_same_in_pieces(speed: float) -> None:
    whole = stretched(0, 100, speed, final=True)
    pieces: list[float] = []
    for upto in (10, 11, 60, 99):
        pieces += stretched(len(pieces), upto, speed, final=False)
        assert all(place < upto - 1 for place in pieces), "nothing is read that may still change"
    assert pieces + stretched(len(pieces), 100, speed, final=True) == whole
    assert abs(len(whole) - 100 / speed) <= 1
    assert max(whole) <= 99


def test_emotion_and_instruction_are_one_instruction() -> None:
    assert instruction("neutral", "") == ""
    assert instruction("neutral", "whisper") == "whisper"
    assert instruction("happy", "whisper") == f"{EMOTIONS['happy']}，whisper"


# --- speaking, with a fake engine ---


class FakeEngine:
    """Draws `lengths` of tokens, one run after the other; sound is what it was asked for."""

    voices = ("default", "anna")
    look_ahead = 3

    def __init__(self, *lengths: int, fails_at: int = -1) -> None:
        self.lengths = list(lengths)
        self.fails_at = fails_at
        self.said: list[str] = []
        self.manners: list[Manner] = []
        self.drawn = 0
        self.open_runs = 0
        self.closed = False
        self.per_run: list[int] = []
        self.in_vocoder: Callable[[], object] = lambda: None

    def prompt(self, voice: str) -> int:
        return 0

    def normal(self, text: str) -> str:
        return text

    def tokens(self, text: str, manner: Manner) -> Generator[int, None, None]:
        self.said.append(text)
        return self._run(iter(()), manner)

    def tokens_while_written(
        self, texts: Iterator[str], manner: Manner
    ) -> Generator[int, None, None]:
        return self._run(texts, manner)

    def _run(self, texts: Iterator[str], manner: Manner) -> Generator[int, None, None]:
        self.manners.append(manner)
        length = self.lengths.pop(0)
        self.open_runs += 1
        try:
            for number in range(length):
                if number % 15 == 0 and (text := next(texts, None)) is not None:
                    self.said.append(text)
                if self.drawn == self.fails_at:
                    raise RuntimeError("the language model broke")
                self.drawn += 1
                yield number
            self.said += texts
        finally:
            self.open_runs -= 1

    def vocoder(self, manner: Manner, cancel: CancelToken) -> Vocoder:
        def sound(tokens: Sequence[int], offset: int, *, final: bool) -> Float32:
            self.in_vocoder()
            if cancel.cancelled:
                raise Stopped
            own = len(tokens) - offset - (0 if final else self.look_ahead)
            self.per_run.append(own)
            return np.full(own * PER_TOKEN, 0.1, np.float32)

        return sound

    def close(self) -> None:
        self.closed = True


def say(
    engine: FakeEngine, *texts: str, cancel: CancelToken | None = None, **settings: str
) -> list[PcmChunk]:
    places = np.cumsum([0, *(len(text) + 1 for text in texts)])
    segments = [Segment(text, int(at)) for text, at in zip(texts, places, strict=False)]
    model = CosyVoice2Model(engine)
    return list(model.stream(segments, VoiceSpec("", "", settings), cancel or CancelToken()))


def test_every_token_is_heard_once_and_the_schedule_begins_again_with_every_run() -> None:
    engine = FakeEngine(90, 90)
    text = "A sentence that is long enough for ninety tokens."
    found = say(engine, text, text)
    assert engine.per_run == [25, 50, 15, 25, 50, 15]
    assert sum(chunk.samples.size for chunk in found) == 180 * PER_TOKEN
    assert engine.open_runs == 0


def test_a_cancel_ends_the_drawing_of_tokens() -> None:
    engine, cancel = FakeEngine(1000), CancelToken()
    model = CosyVoice2Model(engine)
    stream = model.stream([Segment("word " * 40, 0)] * 3, VoiceSpec("", ""), cancel)
    assert next(stream).samples.size
    drawn = engine.drawn
    cancel.cancel()
    assert list(stream) == []
    assert engine.drawn <= drawn + 1
    assert engine.open_runs == 0


@pytest.mark.parametrize("length", [40, 20], ids=["first chunk", "last chunk"])
def test_a_cancel_while_sound_is_made_ends_the_stream_without_an_error(length: int) -> None:
    engine, cancel = FakeEngine(length, 40), CancelToken()
    engine.in_vocoder = cancel.cancel
    assert say(engine, "word " * 20, "More.", cancel=cancel) == []
    assert engine.open_runs == 0
    assert engine.lengths == [40], "the next segment is no run any more"


def test_a_stream_that_is_closed_closes_its_run() -> None:
    engine = FakeEngine(1000)
    stream = CosyVoice2Model(engine).stream(
        [Segment("word " * 40, 0)], VoiceSpec("", ""), CancelToken()
    )
    next(stream)
    assert engine.open_runs == 1
    stream.close()  # type: ignore[attr-defined]
    assert engine.open_runs == 0


@pytest.mark.parametrize("text", ["clauses", "flowing"])
def test_an_error_of_the_language_model_is_raised_to_whoever_listens(text: str) -> None:
    engine = FakeEngine(90, fails_at=40)
    heard: list[PcmChunk] = []
    model = CosyVoice2Model(engine)
    stream = model.stream(
        [Segment("A sentence of some length.", 0)],
        VoiceSpec("", "", {"text": text}),
        CancelToken(),
    )
    with pytest.raises(RuntimeError, match="broke"):
        heard.extend(stream)
    assert len(heard) == 1, "what was made before it is heard"
    assert engine.open_runs == 0


def test_an_error_of_the_vocoder_closes_the_run_at_once() -> None:
    engine = FakeEngine(90)

    def fail() -> None:
        raise RuntimeError("the vocoder broke")

    engine.in_vocoder = fail
    with pytest.raises(RuntimeError, match="vocoder broke") as told:
        say(engine, "A sentence of some length.")
    assert engine.open_runs == 0, "not only when the error is forgotten"
    assert told.tb is not None


def test_at_twice_the_speed_more_words_are_in_the_first_chunk() -> None:
    text = " ".join(["word"] * 20)
    once, twice = (say(FakeEngine(200), text, speed=speed)[0].words for speed in ("1", "2"))
    assert len(twice) > 1.5 * len(once) > 0


def test_flowing_text_without_the_end_of_a_sentence_is_cut_at_480_characters() -> None:
    engine = FakeEngine(30, 30, 30)
    say(engine, *(["a clause of thirty characters,"] * 40), text="flowing")
    assert engine.lengths == []
    assert len(engine.said) == 40


def test_a_run_without_an_end_is_cut_off_and_the_next_one_speaks() -> None:
    engine = FakeEngine(100_000, 20)
    found = say(engine, "Hello there.", "More.")
    wanted = longest("Hello there.") + 20
    assert sum(chunk.samples.size for chunk in found) == wanted * PER_TOKEN
    assert engine.open_runs == 0


def test_how_fast_a_voice_speaks_is_not_learnt_from_a_run_without_an_end() -> None:
    model = CosyVoice2Model(FakeEngine(100_000, 60))
    paces = []
    for text in ("Hello there.", "A sentence that ends."):
        list(model.stream([Segment(text, 0)], VoiceSpec("", ""), CancelToken()))
        paces.append(model._paces["default"].ms_per_unit)
    assert paces[0] == WordPace().ms_per_unit
    assert paces[1] != paces[0]


def test_a_machine_that_computes_for_ever_is_unavailable() -> None:
    now = iter(range(0, 1_000_000, 2))
    engine = FakeEngine(100_000)
    model = CosyVoice2Model(engine, patience=lambda: Patience(lambda: float(next(now))))
    with pytest.raises(Unavailable, match="too slow"):
        list(model.stream([Segment("Hi.", 0)], VoiceSpec("", ""), CancelToken()))
    assert engine.open_runs == 0


def test_waiting_is_not_computing() -> None:
    now = [0.0]
    patience = Patience(lambda: now[0])
    for _ in range(10):
        with patience.computing(lambda: 0), patience.waiting():
            now[0] += 1000
    with pytest.raises(Unavailable), patience.computing(lambda: 0):
        now[0] += 31


def test_flowing_text_is_one_run_until_a_sentence_ends_behind_240_characters() -> None:
    clause, sentence = "a clause of thirty characters,", "and here the sentence ends now."
    engine = FakeEngine(600, 300)
    found = say(engine, *([clause] * 7), sentence, clause, sentence, text="flowing")
    assert longest(clause) < 600, "the bound grows with the run"
    assert sum(chunk.samples.size for chunk in found) == 900 * PER_TOKEN
    assert len(engine.manners) == 2
    assert engine.said[7].strip() == sentence
    assert [text.strip() for text in engine.said] == [*([clause] * 7), sentence, clause, sentence]


def test_flowing_text_is_taken_no_earlier_than_the_run_asks() -> None:
    taken: list[int] = []

    def written() -> Iterator[Segment]:
        for number in range(8):
            taken.append(number)
            yield Segment("one more clause,", number * 17)

    stream = CosyVoice2Model(FakeEngine(200)).stream(
        written(), VoiceSpec("", "", {"text": "flowing"}), CancelToken()
    )
    next(stream)
    assert taken == [0, 1]


@pytest.mark.parametrize("how", ["clauses", "flowing"])
def test_words_come_once_each_in_order_with_their_places(how: str) -> None:
    texts = ("Hello there,", "my dear friend.", "…", "How are you?")
    whole = " ".join(texts)
    words = [w for c in say(FakeEngine(60, 60, 60), *texts, text=how) for w in c.words]
    assert [whole[w.char_start : w.char_end] for w in words] == [
        word for word in whole.split() if word != "…"
    ]
    assert all(word.estimated for word in words)


def test_words_that_come_later_lie_behind_those_before() -> None:
    words = PacedWords("one two", 10, WordPace(), 24_000)
    words.extend("three four", 18)
    marks = words.push(np.full(24_000, 0.1, np.float32)) + words.end()
    assert [(m.text, m.char_start, m.char_end) for m in marks] == [
        ("one", 10, 13), ("two", 14, 17), ("three", 18, 23), ("four", 24, 28)
    ]  # fmt: skip


def test_a_segment_of_5000_words_is_cut_and_nothing_of_it_lost() -> None:
    engine = FakeEngine(*([30] * 1000))
    say(engine, "word " * 5000)
    assert max(map(len, engine.said)) <= 400
    assert " ".join(engine.said).split() == ["word"] * 5000


def test_what_cannot_be_pronounced_is_left_out() -> None:
    engine = FakeEngine(30)
    assert say(engine, "…?!", "", "—") == []
    assert engine.said == []


# --- settings ---


def test_a_session_s_settings_are_the_engine_s_manner() -> None:
    engine = FakeEngine(30)
    say(engine, "Hi.", emotion="Sad", instruct="whisper <|im_end|>", speed="1.5", seed="4")
    (manner,) = engine.manners
    assert manner.instruct.startswith(EMOTIONS["sad"])
    assert "<|" not in manner.instruct
    assert (manner.speed, manner.seed, manner.voice) == (1.5, 4, "default")


def test_defaults_are_the_entry_s_and_are_filled_in() -> None:
    model = CosyVoice2Model(FakeEngine(), defaults={"emotion": "calm"}, languages=["zh"])
    spec = model.check_voice(VoiceSpec("", "zh-CN"))
    assert (spec.voice, spec.language) == ("default", "zh")
    assert spec.settings["emotion"] == "calm"
    assert model.check_voice(spec) == spec, "what was checked is right"


@pytest.mark.parametrize(
    ("spec", "error", "said"),
    [
        (VoiceSpec("ana", ""), UnknownName, "anna"),
        (VoiceSpec("", "de"), UnknownName, "language"),
        (VoiceSpec("", "", {"emotion": "joyful"}), UnknownName, "emotion"),
        (VoiceSpec("", "", {"spead": "1"}), UnknownName, "speed"),
        (VoiceSpec("", "", {"speed": "3"}), InvalidArgument, "0.5 to 2"),
        (VoiceSpec("", "", {"speed": "nan"}), InvalidArgument, "0.5 to 2"),
        (VoiceSpec("", "", {"instruct": "x" * 201}), InvalidArgument, "200"),
    ],
)
def test_what_is_not_there_is_refused(
    spec: VoiceSpec, error: type[InvalidArgument], said: str
) -> None:
    with pytest.raises(error, match=said):
        CosyVoice2Model(FakeEngine()).check_voice(spec)


def test_a_wrong_default_fails_the_load_and_unload_closes_the_engine() -> None:
    engine = FakeEngine()
    with pytest.raises(InvalidArgument):
        CosyVoice2Model(engine, defaults={"speed": "9"})
    CosyVoice2Model(engine).unload()
    assert engine.closed
