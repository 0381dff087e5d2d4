"""What a stock LiveKit front end shows: the agent's state, and who said what. Pure.

Session events and heard progress come in; what is to be told to the front end comes out.

A word of the agent's is written once its end was heard, never at its beginning: that is the rule
of `heard.py`, by which the session later says what a cut reply had said, and a caption cannot be
taken back. So words stand in the caption as much later than they begin as they are long, and
whenever a reply is cut the caption holds exactly the words of its `heard` event.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Literal

from src.audio.pcm import FRAME_MS
from src.orchestrator.heard import past_punctuation, split_heard
from src.orchestrator.ports import SpeechFrame, Word
from src.rpc.ws_events import (
    AudioEnd,
    Heard,
    ReplyText,
    ServerEvent,
    SessionEnded,
    SessionStarted,
    Speech,
    State,
    StateName,
    TranscriptEvent,
)

AgentStateName = Literal["initializing", "listening", "thinking", "speaking"]
_REMEMBERED_REPLIES = 4


@dataclass(frozen=True, slots=True)
class AgentState:
    """The agent's state has become this."""

    state: AgentStateName


@dataclass(frozen=True, slots=True)
class UserCaption:
    """All that the user has said in a turn; it takes the place of what was told before."""

    segment_id: str
    text: str
    final: bool


@dataclass(frozen=True, slots=True)
class AgentCaption:
    """`text` is what was heard of a reply since the last time; with `final` its caption closes."""

    segment_id: str
    text: str
    final: bool = False


Telling = AgentState | UserCaption | AgentCaption


class Captions:
    """One session's. Events and frames in the order in which the session sends them."""

    def __init__(self) -> None:
        self._state = _Status()
        self._replies: OrderedDict[str, _Spoken] = OrderedDict()
        self._done: deque[str] = deque(maxlen=_REMEMBERED_REPLIES)
        self._session_id = ""
        self._chat = ""

    def on_event(self, event: ServerEvent) -> list[Telling]:
        told: list[Telling] = []
        match event:
            case SessionStarted():
                self._session_id = event.session_id
            case TranscriptEvent():
                told += self._said(event)
            case ReplyText():
                told += self._written(event)
            case AudioEnd():
                if spoken := self._spoken(event.utterance_id):
                    spoken.ended(event.utterance_id)
            case Heard():
                told += self._close(event.utterance_id, event.heard)
            case SessionEnded():
                told += self.end()
            case _:
                pass
        state = self._state.after(event)
        return [*told, AgentState(state)] if state else told

    def on_chat(self, text: str) -> None:
        """The user's front end shows what was typed there: its transcript is no caption."""
        self._chat = text.strip()

    def on_words(self, frame: SpeechFrame) -> None:
        """A frame is on its way to the listener. One that comes again after a pause is known."""
        if spoken := self._spoken(frame.utterance_id):
            spoken.take(frame)

    def on_heard(self, utterance_id: str, heard_ms: int) -> list[Telling]:
        """So much of the utterance was played."""
        spoken = self._spoken(utterance_id)
        text = spoken.heard(utterance_id, heard_ms) if spoken else ""
        return [AgentCaption(self._name(utterance_id), text)] if text else []

    def end(self) -> list[Telling]:
        """Nothing more will be heard: close what is open, with the words it has. Idempotent."""
        return [told for reply_id in tuple(self._replies) for told in self._close(reply_id, "")]

    def _said(self, event: TranscriptEvent) -> list[Telling]:
        typed = event.final and event.text == self._chat
        if event.final:
            self._chat = ""
        if typed or not event.text:
            return []
        return [UserCaption(self._name(event.turn_id), event.text, event.final)]

    def _written(self, event: ReplyText) -> list[Telling]:
        if event.utterance_id in self._done:
            return []
        told: list[Telling] = []
        if event.utterance_id not in self._replies:
            self._replies[event.utterance_id] = _Spoken()
            if len(self._replies) > _REMEMBERED_REPLIES:
                told = self._close(next(iter(self._replies)), "")
        self._replies[event.utterance_id].text += event.text
        return told

    def _close(self, utterance_id: str, heard: str) -> list[Telling]:
        reply_id = self._reply_id(utterance_id)
        spoken = self._replies.pop(reply_id, None)
        if spoken is None:
            return []
        self._done.append(reply_id)
        rest = spoken.advance(heard)
        return [AgentCaption(self._name(reply_id), rest, final=True)] if spoken.told else []

    def _spoken(self, utterance_id: str) -> _Spoken | None:
        return self._replies.get(self._reply_id(utterance_id))

    def _reply_id(self, utterance_id: str) -> str:
        """What a second worker says of a reply is named `<reply>.2` (reply.py)."""
        return utterance_id if utterance_id in self._replies else utterance_id.partition(".")[0]

    def _name(self, name: str) -> str:
        """Turns and replies are counted within a session; a room may see several of them."""
        name = self._reply_id(name)
        return f"{self._session_id}.{name}" if self._session_id else name


class _Spoken:
    """A reply's text and how far the ear has come in it."""

    def __init__(self) -> None:
        self.text = ""
        self.told = ""
        self._base = 0
        self._utterance_id = ""
        self._words: list[Word] = []
        self._next_seq = 0
        self._end_ms = 0
        self._next_base: int | None = None

    def take(self, frame: SpeechFrame) -> None:
        if frame.utterance_id != self._utterance_id:
            self._begin(frame.utterance_id)
        if frame.seq < self._next_seq:
            return
        self._next_seq = frame.seq + 1
        self._end_ms = frame.media_time_ms + FRAME_MS
        self._words += frame.words

    def ended(self, utterance_id: str) -> None:
        """If another worker goes on, it begins where this one's last frame leaves off. That is
        reckoned now, like the session does: later there may be more text."""
        if utterance_id == self._utterance_id:
            rest = split_heard(self.text[self._base :], self._words, self._end_ms)
            self._next_base = self._base + len(rest.heard)

    def heard(self, utterance_id: str, heard_ms: int) -> str:
        """What that adds to the caption."""
        if utterance_id != self._utterance_id:
            return ""
        known = split_heard(self._marked(), self._words, heard_ms)
        return self.advance(self.text[: self._base] + known.heard)

    def advance(self, heard: str) -> str:
        """What the reply's beginning `heard` has more than was told."""
        heard = heard.strip()
        if not heard.startswith(self.told):
            return ""
        more, self.told = heard[len(self.told) :], heard
        return more

    def _begin(self, utterance_id: str) -> None:
        if self._utterance_id and self._next_base is None:
            self.ended(self._utterance_id)
        self._base = self._next_base or 0
        self._utterance_id = utterance_id
        self._words, self._next_seq, self._end_ms, self._next_base = [], 0, 0, None

    def _marked(self) -> str:
        """The utterance's text as far as its words are known. Beyond it only the pace could be
        guessed, and by a guess a caption might run ahead of the `heard` event."""
        text = self.text[self._base :]
        return text[: past_punctuation(text, self._words[-1].char_end)] if self._words else ""


class _Status:
    """`thinking` is what the session has no word for: the user's turn is over, and no answer is
    heard yet."""

    def __init__(self) -> None:
        self._mode: StateName | None = None
        self._awaited = False
        self._worded = ""
        self._told: AgentStateName = "initializing"

    def after(self, event: ServerEvent) -> AgentStateName | None:
        """The new state, if it is another one."""
        match event:
            case State():
                self._mode = event.state
                self._awaited = self._awaited and event.state == "listening"
            case TranscriptEvent(final=True):
                self._awaited = True
            case Speech(phase="confirmed") | Heard() | SessionEnded():
                # The user goes on, or that answer is over.
                self._awaited = False
            case ReplyText() if event.text:
                self._worded = event.utterance_id
            case ReplyText(final=True) if event.utterance_id != self._worded:
                # The model had nothing to say, or could not.
                self._awaited = False
            case _:
                pass
        before, self._told = self._told, self._now()
        return self._told if self._told != before else None

    def _now(self) -> AgentStateName:
        if self._mode is None:
            return "initializing"
        if self._mode == "speaking":
            return "speaking"
        return "thinking" if self._awaited else "listening"
