"""Into a room, a voice in it, and out again. The SDK's errors carry our token: ours do not."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass

from livekit import rtc
from livekit.rtc.participant import PublishTrackError

from src.common.tasks import timeout
from src.orchestrator.rooms.room_input import MAX_STREAM_BYTES
from src.orchestrator.rooms.settings import LiveKitSettings
from src.orchestrator.rooms.speaker import speech_source
from src.orchestrator.rooms.tokens import redact
from src.rpc.errors import DuplexError, Unauthenticated, Unavailable

log = logging.getLogger(__name__)

TRACK_NAME = "agent"
_JOIN_S = 15.0
_LEAVE_S = 5.0
# All that the SDK says of a refused token is a sentence.
_REFUSALS = ("401", "403", "unauthorized", "permission", "invalid token", "invalid API key")


@dataclass(frozen=True, slots=True)
class Voice:
    """Our track in the room. It keeps its source, and changes its sid, at a reconnect."""

    source: rtc.AudioSource
    publication: rtc.LocalTrackPublication


async def join(room: rtc.Room, url: str, token: str) -> None:
    """Subscribed to nothing. Raises Unauthenticated, Unavailable."""
    streams = rtc.DataStreamOptions(max_payload_byte_length=MAX_STREAM_BYTES)
    options = rtc.RoomOptions(auto_subscribe=False, data_stream=streams)
    connecting = asyncio.ensure_future(room.connect(url, token, options))
    try:
        async with timeout(_JOIN_S):
            await asyncio.shield(connecting)
    except rtc.ConnectError as error:
        raise _refusal(error.message) from None
    except asyncio.TimeoutError:
        raise Unavailable("the LiveKit server does not let us in; it is slow or far away") from None
    finally:
        # What the native side has begun it completes: it would stay in the room as a ghost.
        if not connecting.done():
            await asyncio.wait([connecting], timeout=_LEAVE_S)
        if not connecting.done():
            connecting.cancel()


async def speak_up(room: rtc.Room, settings: LiveKitSettings) -> Voice:
    """Publish the agent's track and its first state. Raises Unavailable."""
    source = speech_source()
    track = rtc.LocalAudioTrack.create_audio_track(TRACK_NAME, source)
    options = rtc.TrackPublishOptions(
        source=rtc.TrackSource.SOURCE_MICROPHONE, red=settings.red, dtx=settings.dtx
    )
    try:
        async with timeout(_JOIN_S):
            publication = await room.local_participant.publish_track(track, options)
            await say_who(room, settings)
    except PublishTrackError as error:
        raise Unavailable(f"the room does not take our track: {redact(error.message)}") from None
    except asyncio.TimeoutError:
        raise Unavailable("the LiveKit server does not take our track") from None
    return Voice(source, publication)


async def say_who(room: rtc.Room, settings: LiveKitSettings) -> None:
    attributes = {"lk.agent.state": "initializing", "lk.agent.name": settings.agent_name}
    await room.local_participant.set_attributes(attributes)


async def leave(room: rtc.Room) -> None:
    """Idempotent; a server that does not answer is not waited for."""
    with suppress(asyncio.TimeoutError):
        async with timeout(_LEAVE_S):
            await room.disconnect()
            return
    log.warning("the LiveKit server did not take our leave")


def _refusal(message: str) -> DuplexError:
    why = redact(message)
    if any(sign in message for sign in _REFUSALS):
        return Unauthenticated(
            f"the LiveKit server refuses our token; check livekit.api_key and api_secret: {why}"
        )
    return Unavailable(f"the LiveKit server cannot be reached: {why}", retry_after_ms=2_000)
