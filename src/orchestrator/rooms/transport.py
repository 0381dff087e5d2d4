"""A room as a session sees it: the voice goes to the speaker, all the rest to the room's events."""

from __future__ import annotations

import asyncio
from typing import Protocol

from src.audio.pcm import FRAME_MS
from src.common.clock import Clock
from src.orchestrator.ports import MicSink, SpeechFrame
from src.orchestrator.rooms.speaker import RoomSpeaker, SampleSink
from src.orchestrator.ws_transport import error_event
from src.rpc.errors import DuplexError
from src.rpc.ws_events import AudioBegin, AudioEnd, Flush, ServerEvent, SessionStarted


class Announcements(Protocol):
    """`RoomEvents` in production."""

    def send(self, event: ServerEvent) -> None: ...

    def on_words(self, frame: SpeechFrame) -> None: ...

    def on_heard(self, utterance_id: str, heard_ms: int) -> None: ...

    def on_chat(self, text: str) -> None: ...


class RoomTransport:
    """`ports.Transport` over one room. The speaker knows what was heard: nobody has to say it."""

    def __init__(
        self, sink: SampleSink, events: Announcements, clock: Clock, *, lead_ms: int
    ) -> None:
        self.speaker = RoomSpeaker(sink, clock, lead_ms=lead_ms, on_played=self._on_played)
        self.opened = asyncio.Event()
        """`session.started` was sent: the session takes audio and texts."""
        self._events = events
        self._session: MicSink | None = None

    def attach(self, session: MicSink) -> None:
        """Who is told what was played."""
        self._session = session

    @property
    def started(self) -> bool:
        return self.opened.is_set()

    # --- ports.Transport ---

    def send_event(self, event: ServerEvent) -> None:
        self._events.send(event)
        if isinstance(event, SessionStarted):
            self.opened.set()

    def begin_audio(self, utterance_id: str, seq: int, *, resumed: bool) -> None:
        self.speaker.begin(utterance_id, seq)
        self._events.send(AudioBegin(utterance_id=utterance_id, seq=seq, resumed=resumed))

    def send_frame(self, frame: SpeechFrame) -> None:
        self.speaker.send(frame)
        self._events.on_words(frame)

    def end_audio(self, utterance_id: str, frames: int) -> None:
        self.speaker.end(utterance_id)
        self._events.send(AudioEnd(utterance_id=utterance_id, frames=frames))

    def flush(self, utterance_id: str, at_ms: int) -> None:
        seq = self.speaker.flush(utterance_id)
        self._events.on_heard(utterance_id, (seq + 1) * FRAME_MS)
        self._events.send(Flush(utterance_id=utterance_id, at_ms=at_ms))
        # The session is in the middle of its own step, and waits for the answer after it.
        asyncio.get_running_loop().call_soon(self._on_flushed, utterance_id, seq)

    def heard_seq(self, utterance_id: str) -> int:
        return self.speaker.heard_seq(utterance_id)

    # --- the room's side ---

    def send_error(self, error: DuplexError, *, fatal: bool) -> None:
        self.send_event(error_event(error, fatal=fatal))

    def on_chat(self, text: str) -> None:
        """The user typed this where it is shown already."""
        self._events.on_chat(text)

    def _on_played(self, utterance_id: str, seq: int) -> None:
        self._events.on_heard(utterance_id, (seq + 1) * FRAME_MS)
        if self._session is not None:
            self._session.on_playback(utterance_id, seq, flushed=False)

    def _on_flushed(self, utterance_id: str, seq: int) -> None:
        if self._session is not None:
            self._session.on_playback(utterance_id, seq, flushed=True)
