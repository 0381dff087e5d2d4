"""All that a session tells in its room, except by voice: one queue and its one writer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any

from livekit import rtc

from src.common.tasks import TaskGroup, timeout
from src.orchestrator.ports import SpeechFrame
from src.orchestrator.rooms.captions import AgentState, Captions
from src.orchestrator.rooms.outgoing import Item, Outgoing, Packet
from src.orchestrator.rooms.room_writer import SEND_ERRORS, RoomWriter
from src.rpc.ws_events import ServerEvent

log = logging.getLogger(__name__)

STALLED = "client_stalled"
_MAX_WAITING = 500
_ATTEMPTS = 2
# While the SDK reconnects, it holds a send back for seconds and then calls it done.
_SEND_S = 10.0
_FLUSH_S = 2.0


class RoomEvents:
    """The agent's state, the captions and, with `events`, every session event for the user.

    The room must be connected and the user in it. While either is lost, what is told waits: the
    state until we are back, the rest until the user is. Of more events than the queue holds, the
    oldest are dropped then; otherwise the visit cannot go on, and `failed` says so.
    """

    def __init__(
        self,
        room: rtc.Room,
        identity: str,
        *,
        events: bool,
        mic_track_sid: Callable[[], str],
        agent_track_sid: Callable[[], str],
        max_waiting: int = _MAX_WAITING,
    ) -> None:
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Its result is the reason for which the visit has to end."""
        self.dropped = 0
        """What could not be told. Nothing goes wrong but what the user sees."""
        self._room = room
        self._identity = identity
        self._events = events
        self._captions = Captions()
        self._outgoing = Outgoing(max_waiting)
        self._state = AgentState("initializing")
        self._writer = RoomWriter(
            room, identity, mic_track_sid=mic_track_sid, agent_track_sid=agent_track_sid
        )
        self._wake = asyncio.Event()
        self._finishing = asyncio.Event()
        self._tell([self._state])

    # --- what the session does; none of it waits ---

    def send(self, event: ServerEvent) -> None:
        told = self._captions.on_event(event)
        self._tell([*told, Packet(event)] if self._events else told)

    def on_words(self, frame: SpeechFrame) -> None:
        """A frame was handed to the speaker."""
        self._captions.on_words(frame)

    def on_heard(self, utterance_id: str, heard_ms: int) -> None:
        self._tell(self._captions.on_heard(utterance_id, heard_ms))

    def on_chat(self, text: str) -> None:
        """The user typed this in a front end that shows it by itself; call it before the session
        is told."""
        self._captions.on_chat(text)

    def finish(self) -> None:
        """Let `run` return once what waits is written, or cannot be soon."""
        self._tell(self._captions.end())
        self._finishing.set()
        self._wake.set()

    # --- the writer ---

    async def run(self) -> None:
        """Write until `finish`."""
        handlers: dict[rtc.room.EventTypes, Callable[..., Any]] = {
            "reconnected": self._on_reconnected,
            "participant_connected": self._on_change,
            "participant_disconnected": self._on_change,
        }
        for name, handler in handlers.items():
            self._room.on(name, handler)
        try:
            async with TaskGroup() as group:
                writing = group.create_task(self._write(), name="room events")
                await self._finishing.wait()
                await asyncio.wait([writing], timeout=_FLUSH_S)
                writing.cancel()
        finally:
            for name, handler in handlers.items():
                self._room.off(name, handler)

    async def _write(self) -> None:
        while True:
            item = self._next()
            if item is not None:
                await self._send(item)
            elif self._finishing.is_set() and not self._outgoing:
                return
            else:
                await self._change()

    def _next(self) -> Item | None:
        if not self._connected:
            return None
        return self._outgoing.pop(states_only=not self._reachable)

    async def _send(self, item: Item) -> None:
        attempt = self._writer.prepare(item)
        for _ in range(_ATTEMPTS):
            try:
                async with timeout(_SEND_S):
                    await attempt()
                return
            except SEND_ERRORS as error:
                # Not its message: the SDK's may carry tokens.
                log.info("not told", extra={"error": type(error).__name__})
            while not (self._reachable or (self._connected and isinstance(item, AgentState))):
                await self._change()
        self.dropped += 1

    async def _change(self) -> None:
        self._wake.clear()
        await self._wake.wait()

    # --- the room ---

    @property
    def _connected(self) -> bool:
        return self._room.connection_state == rtc.ConnectionState.CONN_CONNECTED

    @property
    def _reachable(self) -> bool:
        return self._connected and self._identity in self._room.remote_participants

    def _on_reconnected(self) -> None:
        self._writer.renew()
        # A change that was sent while the connection broke may have got lost.
        self._tell([self._state])

    def _on_change(self, _: rtc.RemoteParticipant) -> None:
        self._wake.set()

    # --- the queue ---

    def _tell(self, items: Iterable[Item]) -> None:
        for item in items:
            if isinstance(item, AgentState):
                self._state = item
            if not (self.failed.done() or self._outgoing.put(item)):
                self._overflow(item)
        self._wake.set()

    def _overflow(self, item: Item) -> None:
        if self._reachable:
            self.failed.set_result(STALLED)
            return
        self.dropped += 1
        if self._outgoing.drop_packet():
            self._outgoing.put(item)
