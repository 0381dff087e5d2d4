"""Who may come in: API keys, compared in constant time, and where a browser's page came from."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from src.common.config import ConfigError
from src.rpc.errors import Exhausted, Unauthenticated

SUBPROTOCOL = "duplex.v1"
KEY_SUBPROTOCOL = "bearer."
ANONYMOUS = "anonymous"

_HOW_TO_SET = "set DUPLEX_API_KEY (or server.api_keys in the configuration), or listen on 127.0.0.1"


def is_loopback(host: str) -> bool:
    """True for localhost, 127.0.0.0/8 and ::1; an empty host means every interface, so False."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def refuse_open_door(host: str, keys: Iterable[str]) -> None:
    """Raises ConfigError when others could reach this host and no key is asked of them."""
    if not is_loopback(host) and not any(keys):
        where = host or "every interface"
        raise ConfigError(f"refusing to listen on {where} without an API key: {_HOW_TO_SET}")


def presented_key(headers: Mapping[str, str]) -> str:
    """The key a request carries, or "". Header first; browsers can only set a subprotocol."""
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token:
        return token.strip()
    if key := headers.get("X-API-Key", ""):
        return key
    for offered in headers.get("Sec-WebSocket-Protocol", "").split(","):
        if offered.strip().startswith(KEY_SUBPROTOCOL):
            return offered.strip().removeprefix(KEY_SUBPROTOCOL)
    return ""


class ApiKeys:
    """The known keys. Only digests are kept, and every one is compared, whatever matched before."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = tuple(_digest(key) for key in keys if key)

    @property
    def required(self) -> bool:
        return bool(self._digests)

    def check(self, key: str) -> str:
        """Who this is: a short id to count by, safe to log. Raises Unauthenticated."""
        if not self._digests:
            return ANONYMOUS
        presented = _digest(key)
        matches = [hmac.compare_digest(presented, known) for known in self._digests]
        if not any(matches):
            raise Unauthenticated(
                "wrong API key"
                if key
                else "an API key is required: send it as "
                "'Authorization: Bearer KEY', 'X-API-Key: KEY' or the WebSocket "
                f"subprotocols '{SUBPROTOCOL}, {KEY_SUBPROTOCOL}KEY'"
            )
        return presented.hex()[:8]

    def accepts(self, key: str) -> bool:
        try:
            self.check(key)
        except Unauthenticated:
            return False
        return True


def check_origin(origin: str, allowed: Iterable[str], *, key_required: bool) -> None:
    """Keep other people's web pages out of a server on loopback, where no key is asked.

    Without a key only pages served from loopback, and the allowed origins, may connect; programs
    send no Origin. With a key the key decides, unless a list was given. Raises Unauthenticated.
    """
    origins = tuple(allowed)
    if not origin or origin in origins or (key_required and not origins):
        return
    if not key_required and is_loopback(urlsplit(origin).hostname or ""):
        return
    raise Unauthenticated(f"origin {origin} is not allowed; add it to server.allowed_origins")


def check_fetch_site(headers: Mapping[str, str], *, key_required: bool) -> None:
    """Without a key, refuse what another site's page makes a browser fetch.

    An image or a script is fetched without an Origin, but a browser says where the wish came from.
    Raises Unauthenticated.
    """
    foreign = headers.get("Sec-Fetch-Site", "") == "cross-site"
    if foreign and not key_required and not headers.get("Origin"):
        raise Unauthenticated("a page of another site may not use this server without an API key")


class SessionSlots:
    """How many sessions there may be, in all and per key."""

    def __init__(self, max_sessions: int, max_sessions_per_key: int) -> None:
        self.max_sessions = max_sessions
        self._max_per_key = max_sessions_per_key
        self._held: dict[str, int] = {}

    @property
    def held(self) -> int:
        return sum(self._held.values())

    def take(self, who: str, *, retry_after_ms: int = 5_000) -> None:
        """Raises Exhausted."""
        if self.held >= self.max_sessions:
            raise Exhausted(
                f"all {self.max_sessions} sessions are taken; try again later",
                retry_after_ms=retry_after_ms,
            )
        mine = self._held.get(who, 0)
        if who != ANONYMOUS and mine >= self._max_per_key:
            raise Exhausted(
                f"this key has {mine} sessions open, its limit is {self._max_per_key}; "
                "end one first",
                retry_after_ms=retry_after_ms,
            )
        self._held[who] = mine + 1

    def give_back(self, who: str) -> None:
        left = self._held[who] - 1
        if left:
            self._held[who] = left
        else:
            del self._held[who]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
