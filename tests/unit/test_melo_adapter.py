"""MeloTTS's adapter where it needs neither torch nor the sources."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from src.rpc.errors import CorruptModel, InvalidArgument, UnknownName
from src.tts.adapters import adapter_for
from src.tts.adapters import adapter_melo as adapter
from src.tts.adapters.adapter_melo import MeloAdapter
from src.tts.catalog import ModelMeta
from src.tts.families.espeak.engine import EngineUnavailable, EspeakEngine
from src.tts.families.melo import sources
from src.tts.families.melo.english import (
    MAX_TOKENS,
    Dictionary,
    English,
    Phonemes,
    spell,
    spread,
    symbol_and_tone,
)
from src.tts.families.melo.guess import EspeakGuess, arpabet
from src.tts.families.melo.sources import HOME, package_folder
from src.tts.tts_base import MissingPackage

SAID = {"HELLO": "HH AH0 - L OW1", "FIVE": "F AY1 V", "T": "T IY1", "DON": "D AA1 N"}
SYMBOLS = [*"_.,?!'-", "UNK", "hh", "ah", "l", "ow", "f", "ay", "V", "t", "iy", "d", "aa", "n", "b",
           "jh", "p", "y", "uw"]  # fmt: skip


class Letters:
    """A tokenizer that knows a few words and takes all others apart."""

    words = ("[CLS]", "[SEP]", "[UNK]", "hello", "five", "don", "t")

    def encode(self, text: str) -> tuple[list[str], list[int]]:
        out: list[str] = []
        for word in text.replace("'", " ' ").replace(".", " . ").split():
            if not word.isascii():
                out.append("[UNK]")
                continue
            out += [word] if word in self.words else [word[0], *(f"##{c}" for c in word[1:])]
        return out, [len(token) for token in out]


def english(guess: Any = lambda word: ["B", "IY1"], rules: Any = str.lower) -> English:
    return English(Dictionary(SAID), Letters(), rules, guess, SYMBOLS)


def only(runs: Iterator[Phonemes]) -> Phonemes:
    (run,) = runs
    return run


# --- symbols ---


def test_a_text_becomes_symbols_tones_and_tokens() -> None:
    run = only(english().read("Hello five."))
    assert run.symbols == ("_", "hh", "ah", "l", "ow", "f", "ay", "V", ".", "_")
    assert run.tones == (0, 0, 1, 0, 2, 0, 2, 0, 0, 0)
    assert run.per_token == (1, 4, 3, 1, 1)
    assert run.tokens == (5, 5, 4, 1, 5)


def test_what_stands_apart_for_bert_is_said_apart() -> None:
    assert only(english().read("don't")).symbols == ("_", "d", "aa", "n", "'", "t", "iy", "_")


def test_a_words_symbols_are_spread_over_its_tokens() -> None:
    assert spread(7, 3) == [3, 2, 2]
    assert spread(1, 3) == [1, 0, 0]
    assert spread(0, 2) == [0, 0]
    run = only(english(lambda word: ["B", "IY1", "P"]).read("qz"))
    assert run.per_token == (1, 2, 1, 1)


def test_an_unknown_word_is_guessed_and_else_spelled() -> None:
    asked: list[str] = []

    def guess(word: str) -> list[str]:
        asked.append(word)
        return ["B", "IY1"] if word == "bq" else []

    run = only(english(guess).read("bq pt hello"))
    assert asked == ["bq", "pt"]
    assert run.symbols[1:7] == ("b", "iy", "p", "iy", "t", "iy")


def test_capitals_that_are_no_word_are_spelled_and_not_guessed() -> None:
    def guess(word: str) -> list[str]:
        raise AssertionError(word)

    assert only(english(guess).read("GPU")).symbols == ("_", *"jh iy p iy y uw".split(), "_")
    assert only(english(guess).read("HELLO")).symbols == ("_", "hh", "ah", "l", "ow", "_")


def test_a_symbol_that_the_voice_lacks_is_unknown_to_it() -> None:
    assert "UNK" in only(english(lambda word: ["ZH", "IY1"]).read("zz")).symbols


@pytest.mark.parametrize("text", ["", " ", "...", "'", "$", "§", "\N{GRINNING FACE}"])
def test_nothing_to_say_is_no_run(text: str) -> None:
    assert list(english().read(text)) == []


def test_long_texts_are_cut_between_words() -> None:
    runs = list(english().read("hello qqqq " * 60))
    assert len(runs) == 3
    assert all(len(run.tokens) <= MAX_TOKENS + 2 for run in runs)
    assert all(len(run.tokens) == len(run.per_token) for run in runs)
    assert all(sum(run.per_token) == len(run.symbols) for run in runs)
    assert sum(len(run.tokens) - 2 for run in runs) == 60 * 5


def test_stress_is_a_tone() -> None:
    assert [symbol_and_tone(phone) for phone in ("AH0", "AY1", "OW2", "NG", ".")] == [
        ("ah", 1),
        ("ay", 2),
        ("ow", 3),
        ("ng", 0),
        (".", 0),
    ]
    assert spell("a-bé") == ["EY1", "B", "IY1"]


# --- what the rules get ---


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("3-5 and 555-1234", "3 5 and 555 1234"),
        ("-5 is 4 - 1", "-5 is 4 - 1"),
        ("1,234,567,890,123,456", " ".join("1234567890123456")),
        ("1,234,567", "1,234,567"),
        ("50% & more", "50 percent  and  more"),
        ("PyTorch on macOS", "Py Torch on mac OS"),
        ("“it’s” (so)…", "it's so."),
        ("x" * 100, "x" * 48 + " " + "x" * 48 + " " + "x" * 4),
    ],
)
def test_what_the_packages_rules_would_garble_is_put_right_before(text: str, given: str) -> None:
    assert english(rules=lambda text: text).normalise(text) == given


# --- the dictionary ---


def test_the_dictionary_begins_after_its_comments(tmp_path: Path) -> None:
    path = tmp_path / "cmudict.rep"
    lines = ["## comment"] * 48 + ["HELLO  HH AH0 - L OW1", "A  AH0", ""]
    path.write_text("\n".join(lines), encoding="latin-1")
    dictionary = Dictionary.read(path)
    assert len(dictionary) == 2
    assert "hello" in dictionary
    assert "## comment" not in dictionary
    assert dictionary.say("Hello") == ["HH", "AH0", "L", "OW1"]
    path.write_text("\n" * 60)
    with pytest.raises(ValueError, match="dictionary"):
        Dictionary.read(path)


# --- eSpeak's reading ---


@pytest.mark.parametrize(
    ("ipa", "phones"),
    [
        ("kˌuːbɚnˈɛɾiːz", "K UW2 B ER0 N EH1 T IY0 Z"),
        ("dʒˈʌdʒ", "JH AH1 JH"),
        ("tʃˈɜːtʃ", "CH ER1 CH"),
        ("bˈʌʔn̩", "B AH1 T AH0 N"),
        ("ˈɔɪl kˈaʊ", "OY1 L K AW1"),
        ("pˈaɪɾɔːɹtʃ", "P AY1 T AO0 R CH"),
        ("", ""),
        ("(en)¡", "EH0 N"),
    ],
)
def test_ipa_becomes_arpabet(ipa: str, phones: str) -> None:
    assert arpabet(ipa) == phones.split()


@pytest.fixture(scope="module")
def guess() -> Iterator[EspeakGuess]:
    try:
        made = EspeakGuess()
    except EngineUnavailable as error:
        pytest.skip(str(error))
    yield made
    made.close()


def test_a_name_is_read_as_it_is_said(guess: EspeakGuess) -> None:
    assert guess("kubernetes") == "K UW2 B ER0 N EH1 T IY0 Z".split()
    assert guess("measure") == "M EH1 ZH ER0".split()
    assert guess("") == []
    assert guess("a\0b")


def test_every_sound_of_espeaks_american_is_known(guess: EspeakGuess) -> None:
    """A sound that the table lacks would be left out of the word."""
    words = (
        "thing this vision church judge young wool hoot hut hat hot bought boat bout bite boy book"
        " beat bit bait bet bird butter button bottle rhythm fire cure near air tour poor lawyer"
        " about sofa roses happy ask path idea museum chaos naive garage loch rouge uh"
    )
    known = set("ˈˌ ːˑ̃\u200d")
    engine = guess._engine
    for word in words.split():
        left = engine.phonemes(word, "gmw/en-US")
        for piece in sorted(adapter_pieces(), key=len, reverse=True):
            left = left.replace(piece, "")
        assert not set(left) - known, word


def adapter_pieces() -> list[str]:
    from src.tts.families.melo import guess as melo_guess

    return [*melo_guess._VOWELS, *melo_guess._CONSONANTS]


def test_without_espeak_unknown_words_are_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable() -> EspeakGuess:
        raise EngineUnavailable("planned")

    monkeypatch.setattr(adapter, "EspeakGuess", unavailable)
    monkeypatch.setattr(adapter, "package_rules", lambda: str.lower)
    path = tmp_path / "text" / "cmudict.rep"
    path.parent.mkdir()
    path.write_text("##\n" * 48 + "HELLO  HH AH0 - L OW1\n")
    tokenizer: Any = Letters()
    made, engine = adapter._english(tmp_path, tokenizer, SYMBOLS)
    assert engine is None
    assert only(made.read("pt")).symbols == ("_", "p", "iy", "t", "iy", "_")
    path.unlink()
    with pytest.raises(MissingPackage):
        adapter._english(tmp_path, tokenizer, SYMBOLS)


def test_phonemes_of_several_clauses_and_of_no_voice() -> None:
    try:
        engine = EspeakEngine()
    except EngineUnavailable as error:
        pytest.skip(str(error))
    assert len(engine.phonemes("Yes, no. Well", "gmw/en-US").split()) == 3
    assert engine.phonemes("", "gmw/en-US") == ""
    with pytest.raises(ValueError, match="nowhere"):
        engine.phonemes("yes", "nowhere")
    engine.close()


# --- the package ---


def checkout(folder: Path) -> Path:
    path = folder / "melo" / "text" / "cmudict.rep"
    path.parent.mkdir(parents=True)
    path.touch()
    return folder


@pytest.fixture
def all_but_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MODULES", ())


@pytest.mark.usefixtures("all_but_the_package")
def test_the_package_is_where_the_variable_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HOME, str(checkout(tmp_path)))
    assert package_folder() == tmp_path / "melo"
    MeloAdapter().check_installed()


@pytest.mark.usefixtures("all_but_the_package")
def test_a_variable_that_names_no_checkout_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HOME, str(tmp_path))
    lacks = f"there is no melo/text/cmudict.rep in {tmp_path}, which MELO_HOME names$"
    with pytest.raises(MissingPackage, match=lacks):
        MeloAdapter().check_installed()
    with pytest.raises(MissingPackage, match=lacks):
        MeloAdapter().load(ModelMeta(model_id="m", family="melo"), {}, "cpu", lambda _: None)


def test_what_is_missing_is_told_with_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(HOME, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"uv sync --extra melo"):
        adapter_for("melo").check_installed()
    monkeypatch.setattr(sources, "MODULES", ())
    monkeypatch.delitem(sys.modules, "melo", raising=False)
    with pytest.raises(MissingPackage, match=r"checkout 2091453 && export MELO_HOME=.* newer\)$"):
        MeloAdapter().check_installed()


# --- refusals before anything is loaded ---


def load(monkeypatch: pytest.MonkeyPatch, files: dict[str, Path], **changes: Any) -> None:
    monkeypatch.setattr(adapter, "package_folder", lambda: Path("nowhere"))
    meta = ModelMeta(model_id="melo-en", family="melo", **changes)
    MeloAdapter().load(meta, files, "cpu", lambda _: None)


@pytest.mark.parametrize(
    ("language", "needs"),
    [
        ("ja", "bert-base-japanese-v3 and MeCab"),
        ("zh-CN", "bert-base-multilingual-uncased and jieba"),
        ("KR", "bert-kor-base and g2pkk"),
        ("es_ES", "spanish-wwm-uncased and gruut"),
        ("fr", "europeana-cased and gruut"),
        ("de", "no other language$"),
    ],
)
def test_another_language_is_refused_with_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, language: str, needs: str
) -> None:
    with pytest.raises(InvalidArgument, match=needs):
        load(monkeypatch, {}, languages=["en-GB", language])


def test_settings_are_refused_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownName, match="did you mean 'noise'"):
        load(monkeypatch, {}, settings={"nois": "1"})
    with pytest.raises(InvalidArgument, match="'sdp_ratio' must be a number from 0 to 1"):
        load(monkeypatch, {}, settings={"sdp_ratio": "2"})


def test_a_pack_without_weights_says_where_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CorruptModel, match=r"'config\.json'; voicepacks/melo/en/README\.md"):
        load(monkeypatch, {}, languages=["en"])


def test_the_readme_names_the_files_that_are_read() -> None:
    readme = Path(__file__).resolve().parents[2] / "voicepacks" / "melo" / "en" / "README.md"
    text = readme.read_text(encoding="utf-8")
    names = [f"{adapter.BERT}/{name}" for name in adapter._BERT_FILES]
    assert [name for name in ("config.json", "checkpoint.pth", *names) if name not in text] == []


def test_every_setting_is_in_the_family_page() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "families" / "melo.md"
    text = page.read_text(encoding="utf-8")
    assert [name for name in MeloAdapter.capabilities.settings if f"| `{name}` |" not in text] == []
