"""The WebSocket protocol's events (docs/protocol.md; its JSON schema is made from these models).

Text messages are JSON events with a `type`. Binary messages are audio, headerless: client to server
mic PCM s16le mono (or one Opus packet), server to client 20 ms of 48 kHz mono. The server's
`audio.begin` names the utterance and the sequence number of the next binary message; each one after
it counts up by one. After `flush` no audio arrives until the next `audio.begin`, so a client never
has to guess what is stale.

`at_ms` is audio time: milliseconds of microphone audio received in this session.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

PROTOCOL_VERSION = 1

Codec = Literal["pcm_s16le", "opus"]
StateName = Literal["listening", "speaking", "barged_in"]
VerdictName = Literal["pending", "real", "false"]


class _Event(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# --- client to server ---


class SessionStart(_Event):
    """First message. Nothing else is accepted before it."""

    type: Literal["session.start"] = "session.start"
    protocol: int = PROTOCOL_VERSION
    sample_rate: Literal[8000, 16000, 24000, 32000, 44100, 48000] = 16000
    codec: Codec = "pcm_s16le"
    language: str = ""
    mode: str = "default"
    model: str = ""
    voice: str = ""
    settings: dict[str, str] = Field(default_factory=dict)


class Playback(_Event):
    """What the user has heard: every frame up to and including `seq` (-1: none yet).

    Sent every 40-100 ms while audio plays, and at once in answer to `flush` with `flushed` set.
    """

    type: Literal["playback"] = "playback"
    utterance_id: str
    seq: int = Field(ge=-1)
    flushed: bool = False


class TextInput(_Event):
    """Typed instead of spoken: the user's turn, or with `speak` the agent's own words, verbatim."""

    type: Literal["text"] = "text"
    text: str = Field(min_length=1, max_length=20_000)
    speak: bool = False


class ModelSwitch(_Event):
    """Speak with another model from the next utterance on; it is loaded behind the current one."""

    type: Literal["model.switch"] = "model.switch"
    model: str
    voice: str = ""


class SessionEnd(_Event):
    type: Literal["session.end"] = "session.end"


ClientEvent = Annotated[
    Union[SessionStart, Playback, TextInput, ModelSwitch, SessionEnd],  # noqa: UP007
    Field(discriminator="type"),
]

# --- server to client ---


class SessionStarted(_Event):
    type: Literal["session.started"] = "session.started"
    session_id: str
    protocol: int = PROTOCOL_VERSION
    model: str
    voice: str
    language: str = ""
    worker: str = ""
    recogniser: str = ""
    llm: str = ""
    codec: Codec = "pcm_s16le"
    sample_rate: int = 48_000
    frame_ms: int = 20
    fallback: bool = False
    fallback_reason: str = ""


class State(_Event):
    type: Literal["state"] = "state"
    state: StateName
    turn_id: str = ""
    at_ms: int


class Speech(_Event):
    """Voice activity as the detector saw it: the edge, its second opinion, the end."""

    type: Literal["speech"] = "speech"
    phase: Literal["edge", "confirmed", "rejected", "ended"]
    at_ms: int


class TranscriptEvent(_Event):
    type: Literal["transcript"] = "transcript"
    turn_id: str
    text: str
    final: bool
    stable_chars: int = Field(0, description="how much of a partial will not change any more")
    at_ms: int


class ReplyText(_Event):
    """The reply as the language model writes it; `text` is what is new."""

    type: Literal["reply.text"] = "reply.text"
    turn_id: str
    utterance_id: str
    text: str
    final: bool = False


class AudioBegin(_Event):
    type: Literal["audio.begin"] = "audio.begin"
    utterance_id: str
    seq: int
    resumed: bool = False


class AudioEnd(_Event):
    """No frame of this utterance follows; it had `frames` of them."""

    type: Literal["audio.end"] = "audio.end"
    utterance_id: str
    frames: int


class Flush(_Event):
    """Silence now: drop what is buffered, fade out over 5-10 ms, answer with `playback`."""

    type: Literal["flush"] = "flush"
    utterance_id: str
    at_ms: int


class BargeIn(_Event):
    type: Literal["barge_in"] = "barge_in"
    utterance_id: str
    verdict: VerdictName
    reason: str = ""
    at_ms: int


class Heard(_Event):
    """How much of an utterance reached the ear; `cut` is what the context forgets."""

    type: Literal["heard"] = "heard"
    turn_id: str
    utterance_id: str
    heard: str
    cut: str = ""
    estimated: bool = True
    completed: bool


class Latency(_Event):
    """One turn's waterfall; each figure counts from the end of the user's speech."""

    type: Literal["latency"] = "latency"
    turn_id: str
    endpoint_ms: int = Field(description="the detector called the end")
    transcript_ms: int
    first_token_ms: int
    first_clause_ms: int = Field(description="the first text went to the worker")
    first_audio_ms: int = Field(description="the first frame left for the client")
    speculative: bool = False


class ModelStatus(_Event):
    type: Literal["model"] = "model"
    model: str
    voice: str = ""
    state: Literal["loading", "ready", "failed"]
    message: str = ""


class Error(_Event):
    """`fatal`: the socket closes after this. Otherwise the session goes on."""

    type: Literal["error"] = "error"
    code: str
    message: str
    retry_after_ms: int | None = None
    queue_position: int | None = None
    fatal: bool = False


class SessionEnded(_Event):
    type: Literal["session.ended"] = "session.ended"
    reason: str


ServerEvent = Annotated[
    Union[  # noqa: UP007
        SessionStarted,
        State,
        Speech,
        TranscriptEvent,
        ReplyText,
        AudioBegin,
        AudioEnd,
        Flush,
        BargeIn,
        Heard,
        Latency,
        ModelStatus,
        Error,
        SessionEnded,
    ],
    Field(discriminator="type"),
]

_CLIENT: TypeAdapter[ClientEvent] = TypeAdapter(ClientEvent)
_SERVER: TypeAdapter[ServerEvent] = TypeAdapter(ServerEvent)


def parse_client(text: str | bytes) -> ClientEvent:
    """Raises pydantic.ValidationError."""
    return _CLIENT.validate_json(text)


def parse_server(text: str | bytes) -> ServerEvent:
    """Raises pydantic.ValidationError."""
    return _SERVER.validate_json(text)


def json_schema() -> dict[str, Any]:
    """Both directions as one JSON schema document (draft 2020-12)."""
    client, client_defs = _split(_CLIENT.json_schema(ref_template="#/$defs/{model}"))
    server, server_defs = _split(_SERVER.json_schema(ref_template="#/$defs/{model}"))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Realtime duplex voice over WebSocket, protocol {PROTOCOL_VERSION}",
        "$defs": {**client_defs, **server_defs, "ClientEvent": client, "ServerEvent": server},
        "anyOf": [{"$ref": "#/$defs/ClientEvent"}, {"$ref": "#/$defs/ServerEvent"}],
    }


def _split(schema: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    defs = schema.pop("$defs", {})
    return schema, defs
