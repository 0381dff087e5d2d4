"""What is told in a room, put on LiveKit's wire: attributes, text streams and data packets.

For a client that asks for them, the session's events go to topic `duplex.events` as JSON, the same
as on the WebSocket (src/rpc/ws_events.py): one event is one reliable data packet, or, if it has
more than MAX_PACKET_BYTES, one text stream on the same topic. A client listens to both and parses
what it gets; a stream is complete when it ends, so it may be overtaken by the packets after it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from livekit import rtc
from livekit.rtc.participant import PublishDataError

from src.orchestrator.rooms.captions import AgentCaption, AgentState, UserCaption
from src.orchestrator.rooms.outgoing import Item
from src.rpc.ws_events import ServerEvent

EVENTS_TOPIC = "duplex.events"
# LiveKit's own limit for reliable data is 15 KiB, with room for its envelope.
MAX_PACKET_BYTES = 14_000
SEND_ERRORS = (rtc.StreamError, PublishDataError, asyncio.TimeoutError, RuntimeError)

_CAPTIONS_TOPIC = "lk.transcription"
_STATE = "lk.agent.state"
_SEGMENT = "lk.segment_id"
_FINAL = "lk.transcription_final"
_TRACK = "lk.transcribed_track_id"

Attempt = Callable[[], Awaitable[None]]
"""Raises one of SEND_ERRORS; may be made again."""


class RoomWriter:
    """One agent's in a connected room. One attempt at a time."""

    def __init__(
        self,
        room: rtc.Room,
        identity: str,
        *,
        mic_track_sid: Callable[[], str],
        agent_track_sid: Callable[[], str],
    ) -> None:
        self._room = room
        self._identity = identity
        self._mic_track_sid = mic_track_sid
        self._agent_track_sid = agent_track_sid
        self._segments: dict[str, _Segment] = {}

    def prepare(self, item: Item) -> Attempt:
        match item:
            case AgentState(state):
                return lambda: self._room.local_participant.set_attributes({_STATE: state})
            case UserCaption():
                return lambda: self._tell_all(item)
            case AgentCaption():
                segment = self._noted(item)
                return lambda: self._tell_more(segment)
            case _:
                return lambda: self._send(item.event)

    def renew(self) -> None:
        """Streams do not outlive a connection: what is open is told again from its beginning, in
        a new stream of the same segment."""
        for segment in self._segments.values():
            segment.stream = None

    def _noted(self, caption: AgentCaption) -> _Segment:
        name = caption.segment_id
        segment = self._segments.setdefault(name, _Segment(name))
        segment.text += caption.text
        segment.final = caption.final
        if caption.final:
            del self._segments[name]
        return segment

    async def _tell_all(self, caption: UserCaption) -> None:
        attributes = _attributes(caption.segment_id, caption.final, self._mic_track_sid())
        stream = await self._room.local_participant.stream_text(
            topic=_CAPTIONS_TOPIC, attributes=attributes, sender_identity=self._identity
        )
        await stream.write(caption.text)
        await stream.aclose()

    async def _tell_more(self, segment: _Segment) -> None:
        stream, segment.stream = segment.stream, None
        if stream is None:
            stream = await self._room.local_participant.stream_text(
                topic=_CAPTIONS_TOPIC, attributes=self._agent_attributes(segment.name, final=False)
            )
            segment.told = 0
        if more := segment.text[segment.told :]:
            await stream.write(more)
        if segment.final:
            await stream.aclose(attributes=self._agent_attributes(segment.name, final=True))
            return
        # Only a stream that took everything is used again.
        segment.stream, segment.told = stream, len(segment.text)

    def _agent_attributes(self, segment_id: str, *, final: bool) -> dict[str, str]:
        return _attributes(segment_id, final, self._agent_track_sid())

    async def _send(self, event: ServerEvent) -> None:
        payload, to = event.model_dump_json(), [self._identity]
        if len(payload.encode()) <= MAX_PACKET_BYTES:
            await self._room.local_participant.publish_data(
                payload, reliable=True, topic=EVENTS_TOPIC, destination_identities=to
            )
            return
        stream = await self._room.local_participant.stream_text(
            topic=EVENTS_TOPIC, destination_identities=to
        )
        await stream.write(payload)
        await stream.aclose()


class _Segment:
    """An agent's caption that is not closed: `told` characters of `text` are in `stream`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.text = ""
        self.final = False
        self.stream: rtc.TextStreamWriter | None = None
        self.told = 0


def _attributes(segment_id: str, final: bool, track_sid: str) -> dict[str, str]:
    attributes = {_SEGMENT: segment_id, _FINAL: "true" if final else "false"}
    return attributes | {_TRACK: track_sid} if track_sid else attributes
