"""The host's messages: JSON on /v1/llm, the same ones in src/rpc/llm_bridge.proto over gRPC.

`type` in the JSON is the name of the field in the proto's `oneof`; the other names are the same.
"""

from __future__ import annotations

from typing import Annotated, Literal, Union

from google.protobuf import json_format
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from src.rpc.errors import InvalidArgument
from src.rpc.generated import llm_bridge_pb2 as pb

MAX_TEXT = 20_000


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# --- host to orchestrator ---


class Hello(_Message):
    type: Literal["hello"] = "hello"
    name: str = Field("", max_length=100)
    api_key: str = Field("", max_length=1_000, repr=False)


class Reply(_Message):
    """More of a reply; an empty text only says that the host is still at it."""

    type: Literal["reply"] = "reply"
    session_id: str
    turn_id: str
    text: str = Field("", max_length=MAX_TEXT)
    is_final: bool = False


HostMessage = Annotated[Union[Hello, Reply], Field(discriminator="type")]  # noqa: UP007

# --- orchestrator to host ---


class Welcome(_Message):
    type: Literal["welcome"] = "welcome"
    bridge_id: str


class Turn(_Message):
    type: Literal["turn"] = "turn"
    session_id: str
    turn_id: str
    text: str
    speculative: bool = False


class Hold(_Message):
    type: Literal["hold"] = "hold"
    session_id: str
    turn_id: str


class Go(_Message):
    type: Literal["go"] = "go"
    session_id: str
    turn_id: str


class Cut(_Message):
    type: Literal["cut"] = "cut"
    session_id: str
    turn_id: str
    heard_text: str = ""
    completed: bool = False


class Closed(_Message):
    type: Literal["closed"] = "closed"
    session_id: str


BridgeMessage = Annotated[
    Union[Welcome, Turn, Hold, Go, Cut, Closed],  # noqa: UP007
    Field(discriminator="type"),
]

_HOST: TypeAdapter[HostMessage] = TypeAdapter(HostMessage)
_BRIDGE: TypeAdapter[BridgeMessage] = TypeAdapter(BridgeMessage)


def parse_host(text: str | bytes) -> HostMessage:
    """Raises InvalidArgument."""
    try:
        return _HOST.validate_json(text)
    except ValidationError as error:
        raise _invalid(error) from None


def parse_bridge(text: str | bytes) -> BridgeMessage:
    """For hosts written in Python. Raises pydantic.ValidationError."""
    return _BRIDGE.validate_json(text)


def host_from_proto(message: pb.HostMessage) -> HostMessage:
    """Raises InvalidArgument."""
    kind = message.WhichOneof("message")
    fields = json_format.MessageToDict(message, preserving_proto_field_name=True)
    try:
        return _HOST.validate_python({"type": kind, **fields.get(kind or "", {})})
    except ValidationError as error:
        raise _invalid(error) from None


def bridge_to_proto(message: BridgeMessage) -> pb.BridgeMessage:
    return pb.BridgeMessage(**{message.type: message.model_dump(exclude={"type"})})


def _invalid(error: ValidationError) -> InvalidArgument:
    """Names the field and the fault, never the value: it may be what somebody said."""
    first = error.errors(include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "message"
    return InvalidArgument(f"not a message of a language model host: {where}: {first['msg']}")
