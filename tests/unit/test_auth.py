from __future__ import annotations

import hmac

import pytest

from src.common.config import ConfigError
from src.orchestrator.auth import (
    ANONYMOUS,
    ApiKeys,
    SessionSlots,
    check_fetch_site,
    check_origin,
    is_loopback,
    presented_key,
    refuse_open_door,
)
from src.rpc.errors import Exhausted, Unauthenticated


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert is_loopback(host)
    refuse_open_door(host, [])


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "192.168.1.4", "voice.example.org"])  # noqa: S104
def test_anything_else_refuses_to_start_without_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match="DUPLEX_API_KEY"):
        refuse_open_door(host, [])
    with pytest.raises(ConfigError):
        refuse_open_door(host, [""])
    refuse_open_door(host, ["k1"])


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ({"Authorization": "Bearer k1"}, "k1"),
        ({"Authorization": "bearer  k1"}, "k1"),
        ({"X-API-Key": "k1"}, "k1"),
        ({"Sec-WebSocket-Protocol": "duplex.v1, bearer.k1"}, "k1"),
        ({"Authorization": "Basic abc", "X-API-Key": "k1"}, "k1"),
        ({"Sec-WebSocket-Protocol": "duplex.v1"}, ""),
        ({}, ""),
    ],
)
def test_a_key_comes_by_header_or_subprotocol(headers: dict[str, str], key: str) -> None:
    assert presented_key(headers) == key


def test_keys_are_told_apart_without_being_shown() -> None:
    keys = ApiKeys(["alpha-key", "beta-key"])
    assert keys.required
    first, second = keys.check("alpha-key"), keys.check("beta-key")
    assert first != second
    assert "alpha" not in first


@pytest.mark.parametrize("key", ["", "alpha", "alpha-key ", "ALPHA-KEY", "\udcff"])
def test_a_wrong_key_is_refused(key: str) -> None:
    with pytest.raises(Unauthenticated) as caught:
        ApiKeys(["alpha-key"]).check(key)
    assert "alpha-key" not in caught.value.message


def test_every_known_key_is_compared_even_after_a_match(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    compare_digest = hmac.compare_digest

    def spy(a: bytes, b: bytes) -> bool:
        compared.append(b)
        return compare_digest(a, b)

    monkeypatch.setattr("src.orchestrator.auth.hmac.compare_digest", spy)
    ApiKeys(["one", "two", "three"]).check("one")
    assert len(compared) == 3


def test_without_keys_everybody_is_anonymous() -> None:
    assert ApiKeys([""]).check("whatever") == ANONYMOUS


@pytest.mark.parametrize("origin", ["", "http://localhost:3000", "http://127.0.0.1:8080"])
def test_local_pages_and_programs_may_connect_without_a_key(origin: str) -> None:
    check_origin(origin, [], key_required=False)


def test_a_strange_page_may_not_use_a_keyless_server() -> None:
    with pytest.raises(Unauthenticated, match="allowed_origins"):
        check_origin("https://evil.example", [], key_required=False)
    check_origin("https://mine.example", ["https://mine.example"], key_required=False)


def test_with_keys_the_origin_matters_only_when_a_list_is_given() -> None:
    check_origin("https://any.example", [], key_required=True)
    with pytest.raises(Unauthenticated):
        check_origin("https://any.example", ["https://mine.example"], key_required=True)


def test_a_strange_page_may_not_fetch_without_an_origin_either() -> None:
    image = {"Sec-Fetch-Site": "cross-site"}
    with pytest.raises(Unauthenticated, match="another site"):
        check_fetch_site(image, key_required=False)
    check_fetch_site(image, key_required=True)
    check_fetch_site({**image, "Origin": "https://allowed.example"}, key_required=False)
    check_fetch_site({"Sec-Fetch-Site": "same-origin"}, key_required=False)
    check_fetch_site({}, key_required=False)


def test_slots_are_counted_in_all_and_per_key() -> None:
    slots = SessionSlots(max_sessions=3, max_sessions_per_key=2)
    slots.take("a")
    slots.take("a")
    with pytest.raises(Exhausted, match="this key") as caught:
        slots.take("a")
    assert caught.value.retry_after_ms
    slots.take("b")
    with pytest.raises(Exhausted, match="all 3"):
        slots.take("c")
    slots.give_back("a")
    slots.take("a")
    assert slots.held == 3
