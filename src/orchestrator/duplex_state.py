"""What the duplex machine knows, hears of and orders: its state, its events and its actions."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from src.orchestrator.vad import VadPhase
from src.rpc.ws_events import StateName


class Phase(Enum):
    IDLE = "idle"
    DRAFTING = "drafting"
    """A reply is made from words that may still change; nobody hears it."""
    PREPARING = "preparing"
    """The turn is over; the reply begins with its first frame unless the user goes on."""
    SPEAKING = "speaking"
    BARGED_IN = "barged_in"


class User(Enum):
    SILENT = "silent"
    TALKING = "talking"
    PAUSING = "pausing"
    ENDED = "ended"
    """The turn's end was called; its final words are on their way."""
    AGAIN = "again"
    """As ENDED, but they talk again already, before those words came."""


_MODES: dict[Phase, StateName] = {Phase.SPEAKING: "speaking", Phase.BARGED_IN: "barged_in"}


@dataclass(frozen=True, slots=True)
class DuplexState:
    phase: Phase = Phase.IDLE
    user: User = User.SILENT
    reply_id: str = ""
    ready: bool = False
    """The reply's first frame is here."""
    asked: str = ""
    """The user's words that the reply in hand answers; empty for the agent's own words."""
    words: str | None = None
    """What the open turn is known to say so far; None until the recogniser has said."""
    carried: str = ""
    """What the user had said before a pause that was not the end."""
    queued: tuple[str, ...] = ()
    away: bool = False
    """The user cannot hear now: what is being said waits."""
    replies: int = 0
    turns: int = 0

    @property
    def mode(self) -> StateName:
        return _MODES.get(self.phase, "listening")

    @property
    def gate(self) -> str:
        """The one reply whose frames may leave now; empty: none may."""
        return self.reply_id if self.phase is Phase.SPEAKING and not self.away else ""

    @property
    def turn_id(self) -> str:
        return f"t{self.turns}"


# --- events ---


@dataclass(frozen=True, slots=True)
class Voice:
    phase: VadPhase


@dataclass(frozen=True, slots=True)
class Judged:
    """`unheard`: not a word of the reply had reached the ear."""

    real: bool
    unheard: bool = False


@dataclass(frozen=True, slots=True)
class Words:
    """The recogniser's text of the open turn: speculative, or final once the turn has ended."""

    text: str
    final: bool
    back_channel: bool = False


@dataclass(frozen=True, slots=True)
class Typed:
    text: str


@dataclass(frozen=True, slots=True)
class Say:
    text: str


@dataclass(frozen=True, slots=True)
class Ready:
    reply_id: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The reply is over: heard to its end, or `ok` is False and it cannot go on."""

    reply_id: str
    ok: bool = True


@dataclass(frozen=True, slots=True)
class Presence:
    """Whether the user can hear. Lost with the connection, and found again with it."""

    here: bool


Event = Voice | Judged | Words | Typed | Say | Ready | Finished | Presence


# --- actions ---


class Act(Enum):
    BEGIN_TURN = "begin_turn"
    SPECULATE = "speculate"
    REVOKE = "revoke"
    """What was speculated on is void: the user goes on."""
    FINISH_TURN = "finish_turn"
    DROP_TURN = "drop_turn"
    FORGET_WORDS = "forget_words"
    """The final words that are still on their way are not wanted any more."""

    DRAFT = "draft"
    PROMOTE = "promote"
    """The draft answers the final words: it is the reply now."""
    REPLY = "reply"
    SAY = "say"
    PLAY = "play"
    """The gate is open: send from the first frame that was not heard."""
    SHUT = "shut"
    """The gate has closed: silence at the listener, now."""
    PAUSE = "pause"
    RESUME = "resume"
    STOP = "stop"
    CUT = "cut"
    """The context keeps what was heard of the reply."""
    COMPLETE = "complete"
    """The reply was heard to its end."""


@dataclass(frozen=True, slots=True)
class Do:
    act: Act
    reply_id: str = ""
    text: str = ""


Step = tuple[DuplexState, list[Do]]
