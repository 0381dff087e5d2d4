"""What a client may ask of the token endpoint: our own GET, and LiveKit's standard POST."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.functional_validators import AfterValidator

from src.common.names import nearest_hint
from src.orchestrator.rooms.tokens import AGENT_PREFIX
from src.rpc.errors import InvalidArgument, UnknownName

MAX_NAME = 128
MAX_METADATA = 4096
MAX_ATTRIBUTES = 32
MAX_ATTRIBUTE = 512
_WISHES = ("mode", "model", "voice", "language", "events")
_QUERY = ("room", "identity", "name", *_WISHES)
_NAME = re.compile(rf"[\w.:@+=~#-]{{1,{MAX_NAME}}}")


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """Checked. `named`: the client chose the room's name, so it may exist already."""

    room: str
    identity: str
    name: str = ""
    metadata: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    named: bool = True


def from_query(pairs: Iterable[tuple[str, str]]) -> TokenRequest:
    """GET /v1/livekit/token?room=…&identity=…. Raises InvalidArgument, UnknownName."""
    query: dict[str, str] = {}
    for key, value in pairs:
        if key not in _QUERY:
            raise UnknownName.among("parameter", key, _QUERY)
        if key in query:
            raise InvalidArgument(f"{key} is given twice")
        query[key] = value
    if query.get("events", "0") not in ("", "0", "1"):
        raise InvalidArgument("events is 1 (send the session's events as data) or 0")
    wishes = {f"duplex.{key}": query[key] for key in _WISHES if query.get(key)}
    return _request(query.get("room"), query.get("identity"), query.get("name"), "", wishes)


def from_json(body: bytes, agent_name: str) -> TokenRequest:
    """LiveKit's standard request. Raises InvalidArgument, UnknownName.

    Fields that we do not know are passed over: newer SDKs may send more. Of `room_config` only
    `agents` matters here, and it may ask for nobody but us.
    """
    try:
        asked = _Standard.model_validate_json(body or b"{}")
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InvalidArgument(f"{place}: {first['msg']}" if place else first["msg"]) from None
    for agent in asked.room_config.agents if asked.room_config else ():
        if agent.agent_name and agent.agent_name != agent_name:
            raise UnknownName.among("agent", agent.agent_name, [agent_name])
    return _request(
        asked.room_name,
        asked.participant_identity,
        asked.participant_name,
        asked.participant_metadata or "",
        asked.participant_attributes or {},
    )


class _Dispatch(BaseModel):
    model_config = ConfigDict(extra="ignore")
    agent_name: Annotated[str, Field(max_length=MAX_NAME)] = ""


class _RoomConfig(BaseModel):
    model_config = ConfigDict(extra="ignore")
    agents: Annotated[list[_Dispatch], Field(max_length=8)] = []


def _few(attributes: dict[str, str]) -> dict[str, str]:
    if len(attributes) > MAX_ATTRIBUTES:
        raise ValueError(f"more than {MAX_ATTRIBUTES} attributes")
    return attributes


class _Standard(BaseModel):
    """https://docs.livekit.io/frontends/authentication/tokens/endpoint/ names the fields."""

    model_config = ConfigDict(extra="ignore")
    room_name: str | None = None
    participant_identity: str | None = None
    participant_name: str | None = None
    participant_metadata: Annotated[str, Field(max_length=MAX_METADATA)] | None = None
    participant_attributes: Annotated[dict[str, str], AfterValidator(_few)] | None = None
    room_config: _RoomConfig | None = None


def _request(
    room: str | None,
    identity: str | None,
    name: str | None,
    metadata: str,
    attributes: Mapping[str, str],
) -> TokenRequest:
    for key, value in attributes.items():
        _check_attribute(key, value)
    if identity and identity.startswith(AGENT_PREFIX):
        raise InvalidArgument(f"identity may not begin with {AGENT_PREFIX!r}: that is how we do")
    return TokenRequest(
        room=_name("room", room) if room else f"room-{secrets.token_hex(8)}",
        identity=_name("identity", identity) if identity else f"user-{secrets.token_hex(6)}",
        name=_printable("name", name or "", MAX_NAME),
        metadata=metadata,
        attributes=dict(attributes),
        named=bool(room),
    )


def _name(what: str, value: str) -> str:
    if not _NAME.fullmatch(value):
        raise InvalidArgument(
            f"{what}: 1 to {MAX_NAME} letters, digits and . : @ + = ~ # _ - are allowed"
        )
    return value


def _printable(what: str, value: str, longest: int) -> str:
    if len(value) > longest or not value.isprintable():
        raise InvalidArgument(f"{what}: at most {longest} printable characters")
    return value


def _check_attribute(key: str, value: str) -> None:
    if key.startswith("lk."):
        raise InvalidArgument(f"attribute {key[:MAX_NAME]!r}: names in lk. are LiveKit's own")
    known = [f"duplex.{wish}" for wish in _WISHES]
    if key.startswith("duplex.") and key not in known:
        raise InvalidArgument(f"unknown attribute {key[:MAX_NAME]!r}{nearest_hint(key, known)}")
    _printable("an attribute's name", key, MAX_NAME)
    _printable(f"attribute {key!r}", value, MAX_ATTRIBUTE)
