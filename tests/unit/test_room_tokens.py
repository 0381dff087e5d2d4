"""Tokens open one room for one identity, and never reach a log."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator

import jwt
import pytest
from livekit import rtc

from src.common.logging import JsonFormatter, TextFormatter
from src.orchestrator.rooms import tokens
from src.orchestrator.rooms.settings import LiveKitSettings
from src.orchestrator.rooms.tokens import TokenMint, install_redaction, redact

SECRET = "a-secret-of-more-than-thirty-two-characters"


def settings(**changed: object) -> LiveKitSettings:
    given = {"url": "ws://127.0.0.1:7880", "api_key": "devkey", "api_secret": SECRET, **changed}
    return LiveKitSettings.model_validate(given)


def claims(token: str) -> dict[str, object]:
    # The deadline is judged by the server's clock, not by this machine's.
    read: dict[str, object] = jwt.decode(
        token, SECRET, algorithms=["HS256"], options={"verify_nbf": False}
    )
    return read


JWT = TokenMint(settings()).user("kitchen", "ada")


def test_a_user_may_talk_and_listen_in_one_room_only() -> None:
    mint = TokenMint(settings(token_ttl_ms=60_000))
    read = claims(mint.user("kitchen", "ada", "Ada", {"duplex.voice": "joe"}, "note"))
    assert (read["sub"], read["name"], read["metadata"]) == ("ada", "Ada", "note")
    assert read["attributes"] == {"duplex.voice": "joe"}
    assert read["exp"] - read["nbf"] == 60  # type: ignore[operator]
    assert read["video"] == {
        "roomJoin": True,
        "room": "kitchen",
        "canPublish": True,
        "canPublishData": True,
        "canPublishSources": ["microphone"],
        "canSubscribe": True,
        "canUpdateOwnMetadata": True,
    }
    assert "roomConfig" not in read


def test_an_agent_is_seen_as_one_and_never_twice_the_same() -> None:
    mint = TokenMint(settings())
    first, second = claims(mint.agent("kitchen")), claims(mint.agent("kitchen"))
    assert first["kind"] == "agent"
    video = first["video"]
    assert isinstance(video, dict)
    assert (video["agent"], video["hidden"], video["room"]) == (True, False, "kitchen")
    assert str(first["sub"]).startswith("agent-")
    assert first["sub"] != second["sub"]


@pytest.mark.parametrize(
    ("dispatch", "config"),
    [("explicit", {"agents": [{"agentName": "duplex"}]}), ("automatic", None)],
)
def test_a_registered_agent_is_asked_for_in_the_token(dispatch: str, config: object) -> None:
    mint = TokenMint(settings(entry="agentserver", dispatch=dispatch))
    assert claims(mint.user("kitchen", "ada")).get("roomConfig") == config


def test_tokens_are_taken_out_of_any_text() -> None:
    for text in (
        f"401 Unauthorized - invalid token: {JWT}, error: token signature is invalid",
        f"ws://127.0.0.1:7880/rtc?access_token={JWT}&auto_subscribe=1",
        f"ws://127.0.0.1:7880/rtc?access_token={JWT[:40]}",
        f"'{JWT[: JWT.rindex('.')]}'",
    ):
        assert "eyJ" not in redact(text)
    assert redact(f"a?access_token={JWT}&b=1") == "a?access_token=[token]&b=1"
    assert redact("?access_token=opaque-thing&b=1") == "?access_token=[token]&b=1"


@pytest.mark.parametrize(
    "text", ["src.orchestrator.rooms.tokens", "eyeJack.of.all", "10.0.0.1:7880", "eye", ""]
)
def test_other_words_are_left_alone(text: str) -> None:
    assert redact(text) == text


@pytest.fixture(params=[JsonFormatter, TextFormatter, logging.Formatter])
def output(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    """The root logger's output, guarded."""
    sink = io.StringIO()
    handler = logging.StreamHandler(sink)
    handler.setFormatter(request.param())
    root = logging.getLogger()
    root.addHandler(handler)
    install_redaction()
    yield sink
    root.removeHandler(handler)
    for found in (*root.handlers, *map(logging.getLogger, tokens._LOGGERS)):
        for each in [one for one in found.filters if isinstance(one, tokens._WithoutTokens)]:
            found.removeFilter(each)


def test_the_sdks_error_reaches_no_log(output: io.StringIO) -> None:
    log = logging.getLogger("livekit.rtc.room")
    try:
        raise rtc.ConnectError(f"invalid token: {JWT}, error: signature is invalid")
    except rtc.ConnectError as error:
        log.exception("cannot join: %s", error, extra={"url": f"?access_token={JWT}", "seen": 3})
        log.warning("as an object", extra={"error": error})
        log.error(f"in a list {[JWT]}", stack_info=True)
    written = output.getvalue()
    assert "eyJ" not in written
    assert "signature is invalid" in written
    assert "in test_the_sdks_error_reaches_no_log" in written, "the traceback is kept"
    assert written.count("[token]") >= 3


def test_other_lines_and_exceptions_pass_unchanged(output: io.StringIO) -> None:
    error = ValueError("plain")
    record = logging.LogRecord("x", 30, __file__, 1, "n=%d", (3,), (ValueError, error, None))
    logging.getLogger().handle(record)
    assert (record.args, record.exc_info and record.exc_info[1]) == ((3,), error)
    assert "plain" in output.getvalue()


def test_a_short_secret_is_one_sentence_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    weak = settings(api_secret="secret")
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        TokenMint(weak).user("kitchen", "ada")
    assert [str(one.message) for one in raised] == []
    tokens.warn_of_short_secret(weak)
    tokens.warn_of_short_secret(settings())
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "api_secret has 6 characters" in caplog.text
