"""Is the user there, and can they hear? Pure: what happened in a room -> talk on, wait, or leave.

What a LiveKit server says about a user comes late (21 s after their process died) and can be wrong
(while our own connection is being made again, everybody is reported as gone). So:

- While we reconnect nobody has left; how long they may take to come back counts from our return.
- Somebody who said goodbye is gone. Anybody else has `grace_ms` to come back.
- A live microphone sends packets, in silence too: none for `gone_ms` means that the user vanished.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class PresenceLimits:
    join_ms: int = 30_000
    """Nobody came to talk: leave."""
    gone_ms: int = 3_000
    """No packet from a live microphone: the user has vanished."""
    grace_ms: int = 20_000
    """How long somebody who was lost may take to come back."""
    subscribe_ms: int = 5_000
    """Somebody who has not asked for our track by then wants none of it: they read."""


# --- events ---


@dataclass(frozen=True, slots=True)
class Came:
    """The user whom we listen to is in the room, for the first time or again."""


@dataclass(frozen=True, slots=True)
class Left:
    """`end`: what it is called that they hung up, or were shown out; empty: they were lost."""

    end: str = ""


@dataclass(frozen=True, slots=True)
class Reconnecting:
    """Our own connection is lost, and is being made again."""


@dataclass(frozen=True, slots=True)
class Reconnected:
    pass


@dataclass(frozen=True, slots=True)
class Dropped:
    """Our own connection is over."""

    reason: str


@dataclass(frozen=True, slots=True)
class Unheard:
    """The agent's track is published anew: nobody is subscribed to it yet."""


@dataclass(frozen=True, slots=True)
class Subscribed:
    """Somebody receives the agent's track."""


@dataclass(frozen=True, slots=True)
class Mic:
    """`live`: the user's microphone is subscribed to and not muted."""

    live: bool


@dataclass(frozen=True, slots=True)
class Packets:
    """The microphone's last packet came `age_ms` ago."""

    age_ms: float = 0.0


Event = Came | Left | Reconnecting | Reconnected | Dropped | Unheard | Subscribed | Mic | Packets


# --- the state ---


@dataclass(frozen=True, slots=True)
class Presence:
    """What is known. `since_ms`: our connection stands since then."""

    since_ms: float
    connected: bool = True
    came: bool = False
    lost_ms: float | None = None
    """The user is not in the room since then."""
    unheard_ms: float | None = None
    """Nobody receives the agent's track; waited for since then. None: somebody does."""
    packet_ms: float | None = None
    """The last sign of life of a live microphone; None: there is none that is live."""
    end: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """`here`: the user is there and hears. `end`: leave, for that reason. `at_ms`: when to decide
    again if nothing happens until then; None: never."""

    here: bool
    end: str = ""
    at_ms: float | None = None


def entered(now_ms: float) -> Presence:
    """We are in the room, and our track is published in it."""
    return Presence(since_ms=now_ms, unheard_ms=now_ms)


def observe(presence: Presence, event: Event, now_ms: float) -> Presence:
    """Total: an event that means nothing now changes nothing."""
    if presence.end:
        return presence
    match event:
        case Came():
            return _came(presence, now_ms)
        case Left(end):
            return _left(presence, end, now_ms)
        case Reconnecting():
            return replace(presence, connected=False)
        case Reconnected():
            return _reconnected(presence, now_ms)
        case Dropped(reason):
            return replace(presence, end=reason)
        case Unheard():
            return replace(presence, unheard_ms=now_ms)
        case Subscribed():
            return replace(presence, unheard_ms=None)
        case Mic(live):
            return replace(presence, packet_ms=now_ms if live else None)
        case Packets(age_ms) if presence.packet_ms is not None:
            return replace(presence, packet_ms=max(presence.packet_ms, now_ms - age_ms))
    return presence


def _came(presence: Presence, now_ms: float) -> Presence:
    # Waiting for the subscription begins with the one who could subscribe.
    waiting = None if presence.unheard_ms is None else now_ms
    return replace(presence, came=True, lost_ms=None, unheard_ms=waiting)


def _left(presence: Presence, end: str, now_ms: float) -> Presence:
    if not presence.came or presence.lost_ms is not None:
        return presence
    if end and presence.connected:
        return replace(presence, end=end)
    # The server says so late: they are lost since their microphone fell silent.
    silent_ms = now_ms if presence.packet_ms is None else presence.packet_ms
    return replace(presence, lost_ms=min(now_ms, silent_ms), packet_ms=None)


def _reconnected(presence: Presence, now_ms: float) -> Presence:
    waiting = None if presence.unheard_ms is None else now_ms
    packet_ms = None if presence.packet_ms is None else now_ms
    return replace(
        presence, connected=True, since_ms=now_ms, unheard_ms=waiting, packet_ms=packet_ms
    )


def decide(presence: Presence, now_ms: float, limits: PresenceLimits) -> Decision:
    if presence.end:
        return Decision(False, presence.end)
    if not presence.connected:
        # The SDK tries for as long as it sees sense in it, and then says `Dropped`.
        return Decision(False)
    if not presence.came:
        return _until(presence.since_ms + limits.join_ms, "nobody_came", now_ms)
    if presence.lost_ms is not None:
        since_ms = max(presence.lost_ms, presence.since_ms)
        return _until(since_ms + limits.grace_ms, "user_gone", now_ms)
    return _by_signs_of_life(presence, now_ms, limits)


def _by_signs_of_life(presence: Presence, now_ms: float, limits: PresenceLimits) -> Decision:
    gone_ms = None if presence.packet_ms is None else presence.packet_ms + limits.gone_ms
    if gone_ms is not None and now_ms >= gone_ms:
        return _until(gone_ms + limits.grace_ms, "user_gone", now_ms)
    if presence.unheard_ms is not None:
        reads_ms = presence.unheard_ms + limits.subscribe_ms
        if now_ms < reads_ms:
            return Decision(False, at_ms=reads_ms if gone_ms is None else min(reads_ms, gone_ms))
    return Decision(True, at_ms=gone_ms)


def _until(deadline_ms: float, end: str, now_ms: float) -> Decision:
    """Wait, and leave at the deadline."""
    if now_ms >= deadline_ms:
        return Decision(False, end)
    return Decision(False, at_ms=deadline_ms)
