"""What XTTS's adapter decides by itself; neither torch nor the package is needed."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from src.rpc.errors import CorruptModel, Internal, InvalidArgument, Unavailable, UnknownName
from src.tts.adapters import adapter_for
from src.tts.catalog import ModelMeta
from src.tts.families.xtts import text as xtts_text
from src.tts.families.xtts.pack import needed_files, pick_voices
from src.tts.families.xtts.stream import CODE_MS, Cancelled, Growing, Watch, most_codes
from src.tts.families.xtts.text import (
    Piece,
    Reader,
    check_extras,
    digit_by_digit,
    speaks,
    spoken_ms,
)
from src.tts.tts_base import CancelToken, MissingPackage

META = ModelMeta(model_id="xtts-v2-en", family="xtts")


class FakeTokenizer:
    """A token for a letter; `refuses` the texts that the package would fail on."""

    char_limits: Mapping[str, int] = {"en": 40, "zh": 10}

    def __init__(self, refuses: Callable[[str], BaseException | None] = lambda _: None) -> None:
        self.refuses = refuses
        self.read: list[tuple[str, str]] = []

    def encode(self, txt: str, lang: str) -> list[int]:
        if error := self.refuses(txt):
            raise error
        self.read.append((txt, lang))
        return [ord(char) for char in txt]


def pieces(
    text: str,
    tokenizer: FakeTokenizer | None = None,
    *,
    language: str = "en",
    max_tokens: int = 400,
    longest_ms: float = 28_000,
) -> list[Piece]:
    reader = Reader(tokenizer or FakeTokenizer(), max_tokens=max_tokens, longest_ms=longest_ms)
    return list(reader.pieces(text, 100, language))


# --- without the package ---


def test_without_the_package_check_and_load_name_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    adapter = adapter_for("xtts")
    for call in (adapter.check_installed, lambda: adapter.load(META, {}, "cpu", lambda _: None)):
        with pytest.raises(MissingPackage, match="uv sync --extra xtts"):
            call()


def test_settings_of_the_entry_are_refused_before_anything_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for key, value, error in (("sped", "1", UnknownName), ("max_streams", "0", InvalidArgument)):
        meta = META.model_copy(update={"settings": {key: value}})
        with pytest.raises(error):
            adapter_for("xtts").load(meta, {}, "cpu", lambda _: None)


def test_it_says_what_a_session_may_set() -> None:
    capabilities = adapter_for("xtts").capabilities
    assert capabilities.zero_shot
    assert capabilities.streams
    assert not capabilities.incremental_text
    settings = {"speed", "temperature", "top_k", "top_p", "repetition_penalty", "seed"}
    assert set(capabilities.settings) == settings


# --- packs ---


def test_the_first_missing_file_is_named() -> None:
    with pytest.raises(CorruptModel, match=r"model\.pth is missing"):
        needed_files("xtts-v2-en", {"config.json": Path("config.json")})


def test_voices_are_all_or_those_that_are_listed() -> None:
    known = {"default": 1, "Ana": 2, "Ben": 3}
    assert list(pick_voices("m", known, [])) == ["default", "Ana", "Ben"]
    assert list(pick_voices("m", known, ["Ben", "default"])) == ["Ben", "default"]
    with pytest.raises(UnknownName, match=r"'Anna'.*Ana"):
        pick_voices("m", known, ["Anna"])
    with pytest.raises(CorruptModel, match=r"ref/seed\.wav"):
        pick_voices("m", {}, [])


# --- text ---


def test_a_short_text_is_one_piece_and_read_in_small_letters() -> None:
    tokenizer = FakeTokenizer()
    (piece,) = pieces("  Hello There ", tokenizer)
    assert (piece.text, piece.char_start) == ("  Hello There ", 100)
    assert tokenizer.read == [("hello there", "en")]


LONG = "One two three, four five six; seven eight nine ten, eleven twelve thirteen fourteen."


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        (LONG, {}),
        (LONG, {"max_tokens": 20}),
        (LONG, {"longest_ms": 3_000}),
        ("x" * 200, {}),
        ("word " * 60, {"max_tokens": 8}),
        ("7" * 90, {"longest_ms": 6_000}),
        (" \n " * 30 + "end", {}),
    ],
)
def test_pieces_are_the_text_and_each_is_below_every_limit(
    text: str, limits: dict[str, Any]
) -> None:
    found = pieces(text, **limits)
    for piece in found:
        assert len(piece.text) <= 40
        assert len(piece.ids) < limits.get("max_tokens", 400)
        assert spoken_ms(piece.text) < limits.get("longest_ms", 28_000)
        at = piece.char_start - 100
        assert text[at : at + len(piece.text)] == piece.text
    assert re.sub(r"\s", "", "".join(p.text for p in found)) == re.sub(r"\s", "", text)


def test_a_text_is_cut_after_a_clause_rather_than_a_word_and_never_within_one() -> None:
    assert [piece.text for piece in pieces(LONG)] == [
        "One two three, four five six; ",
        "seven eight nine ten, ",
        "eleven twelve thirteen fourteen.",
    ]
    words = {word for piece in pieces("alpha beta gamma " * 9) for word in piece.text.split()}
    assert words == {"alpha", "beta", "gamma"}


def test_without_spaces_it_is_cut_at_its_marks_or_anywhere() -> None:
    found = [piece.text for piece in pieces("今天天气很好，我们去公园散步吧", language="zh-cn")]
    assert found[0] == "今天天气很好，"
    assert all(len(text) <= 10 for text in found)


def test_a_number_is_not_cut_at_its_point() -> None:
    found = [piece.text for piece in pieces("It is exactly 3.141592653589793 and more so")]
    assert any("3.141592653589793" in text for text in found)


@pytest.mark.parametrize("text", ["", "  ", "?!", "…\n"])
def test_what_cannot_be_said_is_no_piece(text: str) -> None:
    assert pieces(text) == []


def test_marks_of_the_vocabulary_are_not_for_the_text_to_give() -> None:
    tokenizer = FakeTokenizer()
    pieces("a [STOP] [de] b", tokenizer)
    assert tokenizer.read == [("a  stop   de  b", "en")]


def test_a_number_that_the_package_cannot_spell_is_read_digit_by_digit() -> None:
    tokenizer = FakeTokenizer(lambda text: OverflowError(text) if "123" in text else None)
    pieces("call 123.45 now", tokenizer)
    assert tokenizer.read == [("call  1 2 3 4 5  now", "en")]


def test_hindi_has_no_numbers_in_the_package_so_its_digits_have_names() -> None:
    assert digit_by_digit("42", "hi") == " चार दो "
    assert digit_by_digit("1. $20 ٣", "cs") == " 1 .  2 0   3 "


def test_what_cannot_be_read_at_all_is_an_error_without_the_text() -> None:
    tokenizer = FakeTokenizer(lambda text: KeyError(text))
    with pytest.raises(Internal, match="KeyError") as error:
        pieces("secret words", tokenizer)
    assert "secret" not in error.value.message
    assert error.value.__context__ is None
    assert error.value.__cause__ is None


# --- languages ---


def test_a_language_is_offered_with_its_packages_only(monkeypatch: pytest.MonkeyPatch) -> None:
    there: set[str] = {"pypinyin", "cutlet"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if name in there else None
    )
    assert speaks(["en", "zh-cn", "ja"]) == ("en", "zh-cn")
    check_extras("zh-cn")
    with pytest.raises(Unavailable) as error:
        check_extras("ja")
    install = f"uv pip install --python {sys.executable} cutlet 'fugashi[unidic-lite]'"
    assert error.value.message.endswith(install)


def test_a_package_that_fails_to_import_says_the_same() -> None:
    tokenizer = FakeTokenizer(lambda _: ImportError("Chinese requires: pypinyin"))
    with pytest.raises(Unavailable, match="pypinyin"):
        pieces("你好", tokenizer, language="zh-cn")


# --- chunks and their end ---


def test_a_growing_size_is_its_first_one_until_that_is_reached() -> None:
    size = Growing((2, 3, 5))
    reached = []
    codes = 0
    for _ in range(17):
        codes += 1
        if codes >= size:
            reached.append(codes)
            codes = 0
    assert reached == [2, 3, 5, 5]
    assert int(size) == 2
    assert size > 0


def test_the_guard_is_in_proportion_to_the_text() -> None:
    assert most_codes(0) == int(3_000 / CODE_MS)
    assert most_codes(10_000) == int(33_000 / CODE_MS)


def test_cancelled_it_is_left_at_the_next_code() -> None:
    cancel = CancelToken()
    cancel.cancel()
    with pytest.raises(Cancelled):
        Watch(cancel, 10)([[1]], None)


def test_every_language_with_needs_says_what_brings_them() -> None:
    for modules, packages in xtts_text.NEEDS.values():
        assert modules
        assert packages
