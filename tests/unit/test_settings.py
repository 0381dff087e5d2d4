"""What a session or a catalog entry may set, and what it is told when it cannot."""

from __future__ import annotations

import pytest

from src.rpc.errors import InvalidArgument, UnknownName
from src.tts.families.settings import (
    Choice,
    Range,
    Setting,
    Words,
    helps,
    known_language,
    known_voice,
    match_language,
    read_settings,
    require_modules,
)
from src.tts.tts_base import MissingPackage

SPEED = Range(0.5, 2.0, 1.0, "rate of speech")
MOOD = Choice(("calm", "glad"), "calm", "how it sounds")
STYLE = Words(20, "what the voice is like", "a plain voice")


@pytest.mark.parametrize(("raw", "value"), [("0.5", 0.5), ("2", 2.0), (" 1e0 ", 1.0)])
def test_a_number_in_range_is_read(raw: str, value: float) -> None:
    assert SPEED.read("speed", raw) == value


@pytest.mark.parametrize("raw", ["0.49", "2.01", "nan", "inf", "-inf", "", "fast", "1,5", "0x1"])
def test_a_number_out_of_range_is_refused_with_the_range(raw: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        SPEED.read("speed", raw)
    assert refused.value.message == (f"setting 'speed' must be a number from 0.5 to 2, got {raw!r}")


@pytest.mark.parametrize("raw", ["glad", "GLAD", " Glad\n"])
def test_a_choice_is_read_in_any_case(raw: str) -> None:
    assert MOOD.read("mood", raw) == "glad"


def test_another_choice_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"'mood'.*'glat'; did you mean 'glad'"):
        MOOD.read("mood", "glat")
    with pytest.raises(UnknownName, match="known: calm, glad"):
        MOOD.read("mood", "")


def test_words_are_read_as_one_line() -> None:
    assert STYLE.read("style", " a  deep\n\tvoice ") == "a deep voice"
    assert STYLE.read("style", "") == ""


def test_words_are_counted_after_they_are_on_one_line() -> None:
    assert STYLE.read("style", "a" * 20) == "a" * 20
    assert STYLE.read("style", "a" + " " * 90 + "b") == "a b"
    with pytest.raises(InvalidArgument, match="'style' takes up to 20 characters, got 21"):
        STYLE.read("style", "a" * 21)


def test_a_refusal_does_not_repeat_a_long_text() -> None:
    with pytest.raises(InvalidArgument) as refused:
        STYLE.read("style", "secret" * 20)
    assert "secret" not in refused.value.message


def test_helps_say_what_each_takes() -> None:
    known: dict[str, Setting[object]] = {"speed": SPEED, "mood": MOOD, "style": STYLE}
    assert helps(known) == {
        "speed": "rate of speech, 0.5 to 2 (default 1)",
        "mood": "how it sounds: calm, glad (default calm)",
        "style": "what the voice is like, up to 20 characters (default 'a plain voice')",
    }
    assert Words(5, "words").help == "words, up to 5 characters"


def test_the_last_layer_that_names_a_setting_wins() -> None:
    known = {"speed": SPEED, "pitch": Range(0, 9, 5, "pitch")}
    assert read_settings(known) == {"speed": 1.0, "pitch": 5}
    assert read_settings(known, {"speed": "2"}, {}) == {"speed": 2.0, "pitch": 5}
    assert read_settings(known, {"speed": "2", "pitch": "1"}, {"speed": "0.5"}) == {
        "speed": 0.5,
        "pitch": 1.0,
    }


def test_every_layer_is_checked_also_where_another_wins() -> None:
    known = {"speed": SPEED}
    with pytest.raises(InvalidArgument, match="speed"):
        read_settings(known, {"speed": "9"}, {"speed": "1"})
    with pytest.raises(UnknownName, match="unknown setting 'sped'; did you mean 'speed'"):
        read_settings(known, {"sped": "1"}, {"speed": "1"})
    with pytest.raises(UnknownName, match="there are none"):
        read_settings({}, {"speed": "1"})


@pytest.mark.parametrize(
    ("wanted", "known", "matched"),
    [
        ("en-GB", ["en-US", "en-GB"], "en-GB"),
        ("EN_gb", ["en-US", "en-GB"], "en-GB"),
        ("en", ["de", "en-US", "en-GB"], "en-US"),
        ("en", ["en-US", "en"], "en"),
        ("en-AU", ["en-US", "en"], "en"),
        ("en-AU", ["en-US", "en-GB"], None),
        ("de", ["en"], None),
        ("e", ["en"], None),
        ("", ["en"], None),
        ("en", [], None),
        ("zh-cn", ["zh-CN"], "zh-CN"),
    ],
)
def test_a_language_is_matched_by_its_tag(
    wanted: str, known: list[str], matched: str | None
) -> None:
    assert match_language(wanted, known) == matched
    assert match_language(wanted, iter(known)) == matched


def test_missing_modules_are_told_with_the_command_that_brings_them() -> None:
    require_modules("x", (), "pip install x")
    require_modules("x", ("json", "email"), "pip install x")
    with pytest.raises(MissingPackage) as missing:
        require_modules("x", ("json", "no_such_module"), "pip install x")
    assert str(missing.value) == "x is not installed; run: pip install x"
    assert (missing.value.family, missing.value.install) == ("x", "pip install x")


def test_looking_for_modules_imports_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "this", raising=False)
    require_modules("x", ("this",), "pip install x")
    assert "this" not in sys.modules


def test_a_voice_and_a_language_are_known_or_the_first() -> None:
    assert known_voice("", ["anna", "joe"]) == "anna"
    assert known_voice("joe", ["anna", "joe"]) == "joe"
    with pytest.raises(UnknownName, match="did you mean 'joe'"):
        known_voice("jo", ["anna", "joe"])
    assert known_language("", ["en-US", "de"]) == "en-US"
    assert known_language("en", ["de", "en-US"]) == "en-US"
    with pytest.raises(UnknownName, match="'fr'"):
        known_language("fr", ["de", "en-US"])
