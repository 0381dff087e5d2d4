"""What a WebSocket client may say, and when: messages in, events and microphone samples out.

Pure: no socket, no clock. An error before the session has started is fatal; afterwards a bad
message is refused and the session goes on, unless the client floods or sends nothing but nonsense.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from src.audio.opus import OpusDecoder, OpusMissing
from src.audio.pcm import SAMPLE_RATE, Int16, from_bytes, to_float32, to_int16
from src.audio.polyphase import PolyphaseResampler
from src.orchestrator.ports import MIC_RATE
from src.rpc.errors import (
    DuplexError,
    Exhausted,
    FailedPrecondition,
    InvalidArgument,
    Unavailable,
    UnknownName,
)
from src.rpc.ws_events import PROTOCOL_VERSION, ClientEvent, SessionStart, parse_client

_UNION = get_args(get_args(ClientEvent)[0])
_EVENTS: dict[str, type[BaseModel]] = {str(e.model_fields["type"].default): e for e in _UNION}


class Refused(Exception):
    """A message that was not taken. `fatal`: the socket closes with `error.close`."""

    def __init__(self, error: DuplexError, *, fatal: bool) -> None:
        super().__init__(error.message)
        self.error = error
        self.fatal = fatal


@dataclass(frozen=True, slots=True)
class InboundLimits:
    max_text_bytes: int = 64 * 1024
    max_audio_ms: int = 1_000
    """Longest audio one binary message may carry."""
    mic_burst_ms: int = 5_000
    """How far a client may run ahead of real time, to catch up after a stall."""
    events_per_s: int = 100
    max_bad_messages: int = 20


class Allowance:
    """A token bucket: full at first, refilled with time, never beyond its capacity."""

    def __init__(self, capacity: float, per_ms: float, now_ms: float) -> None:
        self._capacity = capacity
        self._per_ms = per_ms
        self._left = capacity
        self._at_ms = now_ms

    def spend(self, amount: float, now_ms: float) -> bool:
        """False, and nothing spent, when there is not enough left."""
        refill = (now_ms - self._at_ms) * self._per_ms
        self._left = min(self._capacity, self._left + refill)
        self._at_ms = now_ms
        if amount > self._left:
            return False
        self._left -= amount
        return True


class MicDecoder:
    """Binary messages of one session to 16 kHz mono int16."""

    def __init__(self, start: SessionStart, max_audio_ms: int) -> None:
        self._max_audio_ms = max_audio_ms
        self._opus = _opus_decoder() if start.codec == "opus" else None
        self._rate = SAMPLE_RATE if self._opus else start.sample_rate
        self._resampler = (
            None if self._rate == MIC_RATE else PolyphaseResampler(self._rate, MIC_RATE)
        )

    def decode(self, data: bytes) -> Int16:
        """Raises InvalidArgument."""
        samples = self._packet(self._opus, data) if self._opus else self._pcm(data)
        if self._resampler is None:
            return samples
        return to_int16(self._resampler.push(to_float32(samples)))

    def _packet(self, decoder: OpusDecoder, data: bytes) -> Int16:
        try:
            return decoder.decode(data)
        except ValueError as error:
            raise InvalidArgument(f"{len(data)} bytes that are not one Opus packet") from error

    def _pcm(self, data: bytes) -> Int16:
        if len(data) % 2:
            raise InvalidArgument(
                f"audio message of {len(data)} bytes: s16le samples are two bytes each"
            )
        if len(data) // 2 > self._rate * self._max_audio_ms // 1000:
            raise InvalidArgument(
                f"audio message of {len(data)} bytes is longer than {self._max_audio_ms} ms; "
                "send 20 ms at a time"
            )
        return from_bytes(data)


class Inbound:
    """One client's messages, in order."""

    def __init__(self, limits: InboundLimits, now_ms: float) -> None:
        self._limits = limits
        self._mic: MicDecoder | None = None
        self._bad = 0
        self._events = Allowance(2 * limits.events_per_s, limits.events_per_s / 1000.0, now_ms)
        self._audio = Allowance(limits.mic_burst_ms, 1.0, now_ms)

    def text(self, data: str, now_ms: float) -> ClientEvent:
        """Raises Refused."""
        if not self._events.spend(1, now_ms):
            raise Refused(Exhausted("too many events; slow down"), fatal=True)
        try:
            event = parse_event(data, self._limits.max_text_bytes)
            return self._admit(event)
        except DuplexError as error:
            raise self._refusal(error) from error

    def binary(self, data: bytes, now_ms: float) -> Int16:
        """16 kHz mono samples. Raises Refused."""
        try:
            if self._mic is None:
                raise FailedPrecondition("audio before session.start; send session.start first")
            samples = self._mic.decode(data)
        except DuplexError as error:
            raise self._refusal(error) from error
        if not self._audio.spend(samples.size * 1000.0 / MIC_RATE, now_ms):
            ahead = self._limits.mic_burst_ms
            raise Refused(
                Exhausted(f"audio runs more than {ahead} ms ahead of real time"), fatal=True
            )
        return samples

    def _admit(self, event: ClientEvent) -> ClientEvent:
        if isinstance(event, SessionStart):
            self._begin(event)
        elif self._mic is None:
            raise FailedPrecondition(f"{event.type} before session.start")
        return event

    def _begin(self, start: SessionStart) -> None:
        if self._mic is not None:
            raise FailedPrecondition("the session has started already; open another connection")
        if start.protocol != PROTOCOL_VERSION:
            raise InvalidArgument(
                f"protocol {start.protocol} is not spoken here, only {PROTOCOL_VERSION}"
            )
        self._mic = MicDecoder(start, self._limits.max_audio_ms)

    def _refusal(self, error: DuplexError) -> Refused:
        self._bad += 1
        hopeless = self._bad >= self._limits.max_bad_messages
        return Refused(error, fatal=hopeless or self._mic is None)


def parse_event(data: str, max_bytes: int) -> ClientEvent:
    """Raises InvalidArgument or UnknownName with a sentence about the first thing that is wrong."""
    if len(data) > max_bytes:
        raise InvalidArgument(f"text message of {len(data)} characters; the limit is {max_bytes}")
    try:
        return parse_client(data)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)[0]
        raise _explain(dict(details)) from None


def _explain(details: dict[str, Any]) -> DuplexError:
    kind, loc = details["type"], [str(part) for part in details["loc"]]
    if kind == "union_tag_invalid":
        return UnknownName.among("event type", str(details["ctx"]["tag"])[:64], _EVENTS)
    if kind == "union_tag_not_found":
        return InvalidArgument("every event is a JSON object with a 'type'")
    if kind == "extra_forbidden" and loc[0] in _EVENTS:
        return UnknownName.among(f"{loc[0]} field", loc[-1][:64], _EVENTS[loc[0]].model_fields)
    return InvalidArgument(f"{': '.join([*loc, details['msg']])}")


def _opus_decoder() -> OpusDecoder:
    """Raises Unavailable."""
    try:
        return OpusDecoder()
    except OpusMissing as error:
        raise Unavailable(f"{error}; or start the session with codec pcm_s16le") from error
