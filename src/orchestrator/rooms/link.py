"""Who is listened to in a room, and what of theirs. Tells it in the words of presence.py.

The first ordinary participant, or the one whose identity was named; agents, recorders and phones
are not. A second user is not heard. Of the user's tracks only the microphone is subscribed to.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from livekit import rtc

from src.audio.pcm import Int16
from src.common.tasks import timeout
from src.orchestrator.rooms.intake import Intake
from src.orchestrator.rooms.presence import (
    Came,
    Dropped,
    Event,
    Left,
    Mic,
    Reconnected,
    Reconnecting,
    Subscribed,
    Unheard,
)
from src.orchestrator.rooms.sdk_audio import MicStream

log = logging.getLogger(__name__)

_STATS_S = 1.0
_NAME = "lk.agent.name"
# AudioTrackFeature.TF_PRECONNECT_BUFFER of livekit_models.proto, which rtc does not export.
_RECORDS_BEFOREHAND = 6
_Why = rtc.DisconnectReason

_LEFT = {
    _Why.CLIENT_INITIATED: "user_left",
    _Why.PARTICIPANT_REMOVED: "user_removed",
    _Why.ROOM_DELETED: "room_deleted",
    _Why.ROOM_CLOSED: "room_closed",
    _Why.USER_UNAVAILABLE: "user_left",
    _Why.USER_REJECTED: "user_left",
}
_DROPPED = {
    _Why.DUPLICATE_IDENTITY: "duplicate_identity",
    _Why.SERVER_SHUTDOWN: "server_shutdown",
    _Why.PARTICIPANT_REMOVED: "removed",
    _Why.ROOM_DELETED: "room_deleted",
    _Why.ROOM_CLOSED: "room_closed",
}


def is_user(participant: rtc.RemoteParticipant, wanted: str) -> bool:
    """`wanted`: the one identity that counts; empty: anybody's."""
    standard = participant.kind == rtc.ParticipantKind.PARTICIPANT_KIND_STANDARD
    return standard and wanted in ("", participant.identity)


def is_senior(other: rtc.RemoteParticipant, own: rtc.LocalParticipant, agent_name: str) -> bool:
    """An agent of our name that was in the room before us. Of two, exactly one is the senior."""
    agent = other.kind == rtc.ParticipantKind.PARTICIPANT_KIND_AGENT
    ours = agent_name in (other.name, other.attributes.get(_NAME))
    return agent and ours and _seniority(other) < _seniority(own)


def _seniority(participant: rtc.Participant) -> tuple[float, str]:
    joined = participant.joined_at
    return (joined.timestamp() if joined else float("inf"), participant.sid)


class Link:
    """Made before the room is connected, so that it misses nothing; `look_around` after."""

    def __init__(
        self,
        room: rtc.Room,
        *,
        wanted: str,
        agent_name: str,
        intake: Intake,
        tell: Callable[[Event], None],
    ) -> None:
        self.identity = ""
        self._room = room
        self._wanted = wanted
        self._agent_name = agent_name
        self._intake = intake
        self._tell = tell
        self._stream: MicStream | None = None
        self._mic: rtc.RemoteTrackPublication | None = None
        self._track: rtc.RemoteAudioTrack | None = None
        self._sounded = False
        self._listen_to_events()

    @property
    def user(self) -> rtc.RemoteParticipant | None:
        return self._room.remote_participants.get(self.identity) if self.identity else None

    @property
    def attributes(self) -> dict[str, str]:
        """The user's own; empty while they are not there."""
        return dict(self.user.attributes) if self.user is not None else {}

    @property
    def mic_track_sid(self) -> str:
        return self._mic.sid if self._mic is not None else ""

    def look_around(self) -> None:
        """Who and what is in the room already."""
        for participant in self._room.remote_participants.values():
            self._on_participant(participant)

    def close(self) -> None:
        stream, self._stream, self._mic, self._track = self._stream, None, None, None
        if stream is not None:
            stream.close()

    async def packet_age_ms(self) -> float | None:
        """Since the microphone's last packet; None if that is not known.

        The SDK makes audio out of nothing when none arrives (measured: 100 frames a second of
        zeros for a muted microphone and for a user whose process was killed), so only sound, or a
        look at the statistics, shows that somebody is there. The look costs 1.4 ms.
        """
        sounded, self._sounded = self._sounded, False
        if sounded:
            return 0.0
        return await _packet_age_ms(self._track) if self._track is not None else None

    # --- what the room says ---

    def _listen_to_events(self) -> None:
        on: Callable[..., Any] = self._room.on
        on("participant_connected", self._on_participant)
        on("participant_disconnected", self._on_participant_gone)
        on("participant_attributes_changed", lambda _, who: self._look_for_senior(who))
        on("track_published", self._on_published)
        on("track_subscribed", self._on_subscribed)
        on("track_unsubscribed", lambda _, publication, who: self._on_track_gone(publication))
        on("track_unpublished", lambda publication, who: self._on_track_gone(publication))
        on("track_muted", lambda who, publication: self._on_muted(publication))
        on("track_unmuted", lambda who, publication: self._on_muted(publication))
        on("local_track_republished", lambda *_: self._tell(Unheard()))
        on("local_track_subscribed", lambda _: self._tell(Subscribed()))
        on("reconnecting", lambda: self._tell(Reconnecting()))
        on("reconnected", self._on_reconnected)
        on("disconnected", self._on_disconnected)

    def _on_participant(self, participant: rtc.RemoteParticipant) -> None:
        self._look_for_senior(participant)
        if self.identity and participant.identity != self.identity:
            return
        if not is_user(participant, self._wanted):
            return
        self.identity = participant.identity
        self._tell(Came())
        for publication in participant.track_publications.values():
            self._on_published(publication, participant)

    def _on_participant_gone(self, participant: rtc.RemoteParticipant) -> None:
        if participant.identity != self.identity:
            return
        self.close()
        self._tell(Left(_LEFT.get(participant.disconnect_reason or _Why.UNKNOWN_REASON, "")))

    def _look_for_senior(self, participant: rtc.Participant) -> None:
        if not isinstance(participant, rtc.RemoteParticipant):
            return
        if is_senior(participant, self._room.local_participant, self._agent_name):
            log.warning(
                "two agents dispatched to one room; this one, the later one, leaves",
                extra={"other": participant.identity},
            )
            self._tell(Dropped("another_agent"))

    def _on_reconnected(self) -> None:
        self._tell(Reconnected())
        user = self.user
        for publication in user.track_publications.values() if user is not None else ():
            if self._is_mic(publication, user) and not publication.subscribed:
                # Asked for in mid-reconnect, the request is lost, and asking again changes nothing.
                publication.set_subscribed(False)
                publication.set_subscribed(True)

    def _on_disconnected(self, reason: rtc.DisconnectReason.ValueType) -> None:
        self._tell(Dropped(_DROPPED.get(reason, "connection_lost")))

    # --- the user's microphone ---

    def _is_mic(
        self, publication: rtc.RemoteTrackPublication, participant: rtc.RemoteParticipant | None
    ) -> bool:
        return (
            participant is not None
            and participant.identity == self.identity
            and publication.kind == rtc.TrackKind.KIND_AUDIO
            and publication.source == rtc.TrackSource.SOURCE_MICROPHONE
        )

    def _on_published(
        self, publication: rtc.RemoteTrackPublication, participant: rtc.RemoteParticipant
    ) -> None:
        if self._is_mic(publication, participant):
            publication.set_subscribed(True)

    def _on_subscribed(
        self,
        track: rtc.Track,
        publication: rtc.RemoteTrackPublication,
        participant: rtc.RemoteParticipant,
    ) -> None:
        if not self._is_mic(publication, participant):
            return
        if not isinstance(track, rtc.RemoteAudioTrack) or track is self._track:
            return
        self.close()
        self._track, self._mic = track, publication
        if _RECORDS_BEFOREHAND in publication.audio_features:
            self._intake.expect_recording()
        self._stream = MicStream(track, self._on_samples)
        self._tell(Mic(live=not publication.muted))

    def _on_samples(self, samples: Int16) -> None:
        if not self._sounded and samples.any():
            self._sounded = True
        self._intake.on_mic(samples)

    def _on_track_gone(self, publication: rtc.RemoteTrackPublication) -> None:
        if self._mic is not None and publication.sid == self._mic.sid:
            self.close()
            self._tell(Mic(live=False))

    def _on_muted(self, publication: rtc.TrackPublication) -> None:
        if self._mic is not None and publication.sid == self._mic.sid:
            self._tell(Mic(live=not publication.muted))


async def _packet_age_ms(track: rtc.RemoteAudioTrack) -> float | None:
    try:
        async with timeout(_STATS_S):
            stats = await track.get_stats()
    except asyncio.TimeoutError:
        return None
    except Exception as error:  # the SDK raises nothing more precise
        log.debug("no statistics: %s", type(error).__name__)
        return None
    for one in stats:
        if one.WhichOneof("stats") == "inbound_rtp":
            last_ms = one.inbound_rtp.inbound.last_packet_received_timestamp
            # The one is in milliseconds, the other in microseconds of the same clock.
            return one.inbound_rtp.rtc.timestamp / 1000 - last_ms if last_ms else None
    return None
