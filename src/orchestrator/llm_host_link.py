"""A language-model host as a protocol: messages in, messages out. No I/O, no clock."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from src.orchestrator.llm_host_wire import (
    MAX_TEXT,
    BridgeMessage,
    Closed,
    Cut,
    Go,
    Hold,
    Reply,
    Turn,
)
from src.rpc.errors import DuplexError, Unavailable

log = logging.getLogger(__name__)

Wake = Callable[[], None]

MAX_OUTBOX = 1_000


class HostReply:
    """What a host has written for one turn and nobody has taken yet."""

    def __init__(self, wake: Wake) -> None:
        self._wake = wake
        self._text = ""
        self._error: DuplexError | None = None
        self.finished = False
        """Nothing more will come: the last piece, or a failure, has arrived."""

    def push(self, text: str, *, is_final: bool) -> None:
        """A piece may be empty: it still counts as a sign of life."""
        if self.finished:
            return
        # Bounded: a host that writes on while it is held loses the turn, not our memory.
        if len(self._text) + len(text) > MAX_TEXT:
            self.fail(Unavailable("the language model host wrote more than can be spoken"))
            return
        self._text += text
        self.finished = is_final
        self._wake()

    def fail(self, error: DuplexError) -> None:
        """The text before the failure is still handed out first."""
        if not self.finished:
            self.finished = True
            self._error = error
            self._wake()

    def take(self) -> str:
        """All there is; "" when there is nothing. Raises the failure once the text is out."""
        text, self._text = self._text, ""
        if not text and self._error is not None:
            raise self._error
        return text


class HostLink:
    """One connected host as a protocol. `wake` is called when there is something to send."""

    def __init__(self, name: str, wake: Wake) -> None:
        self.name = name
        self.lost = False
        self._wake = wake
        self._outbox: deque[BridgeMessage] = deque()
        self._replies: dict[tuple[str, str], HostReply] = {}
        self._sessions: set[str] = set()

    def begin(
        self, session_id: str, turn_id: str, text: str, *, speculative: bool, wake: Wake
    ) -> HostReply:
        reply = HostReply(wake)
        self._sessions.add(session_id)
        self._replies[session_id, turn_id] = reply
        self._send(Turn(session_id=session_id, turn_id=turn_id, text=text, speculative=speculative))
        if self.lost:
            reply.fail(self._gone())
        return reply

    def receive(self, message: Reply) -> None:
        """Text for a turn that was cut, or never was, is ignored."""
        key = (message.session_id, message.turn_id)
        reply = self._replies.get(key)
        if reply is None:
            return
        reply.push(message.text, is_final=message.is_final)
        if reply.finished:
            del self._replies[key]

    def hold(self, session_id: str, turn_id: str) -> None:
        if (session_id, turn_id) in self._replies:
            self._send(Hold(session_id=session_id, turn_id=turn_id))

    def go(self, session_id: str, turn_id: str) -> None:
        if (session_id, turn_id) in self._replies:
            self._send(Go(session_id=session_id, turn_id=turn_id))

    def cut(self, session_id: str, turn_id: str, heard_text: str, *, completed: bool) -> None:
        self._replies.pop((session_id, turn_id), None)
        self._send(
            Cut(session_id=session_id, turn_id=turn_id, heard_text=heard_text, completed=completed)
        )

    def close_session(self, session_id: str) -> None:
        if session_id in self._sessions:
            self._sessions.discard(session_id)
            self._replies = {k: v for k, v in self._replies.items() if k[0] != session_id}
            self._send(Closed(session_id=session_id))

    def lose(self) -> None:
        """The host is gone: every reply it owes ends in an error."""
        self.lost = True
        self._outbox.clear()
        for reply in self._replies.values():
            reply.fail(self._gone())
        self._replies.clear()
        self._wake()

    def take(self) -> list[BridgeMessage]:
        messages = list(self._outbox)
        self._outbox.clear()
        return messages

    def _send(self, message: BridgeMessage) -> None:
        if self.lost:
            return
        # Bounded: a host that does not read is as good as gone.
        if len(self._outbox) >= MAX_OUTBOX:
            log.warning("language model host does not read", extra={"host": self.name})
            self.lose()
            return
        self._outbox.append(message)
        self._wake()

    def _gone(self) -> Unavailable:
        return Unavailable(f"the language model host {self.name!r} went away")
