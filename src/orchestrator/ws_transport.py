"""A WebSocket as a session sees it: a bounded queue that a flush overtakes, and its one writer."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import NoReturn, Protocol

from src.common.clock import Clock
from src.orchestrator.ports import SpeechFrame
from src.rpc.errors import DuplexError, Exhausted
from src.rpc.ws_events import AudioBegin, AudioEnd, Error, Flush, ServerEvent, SessionStarted

_REMEMBERED_UTTERANCES = 16
_WATCH_S = 0.25


class Socket(Protocol):
    async def send_str(self, data: str) -> None: ...

    async def send_bytes(self, data: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class OutboundLimits:
    max_queue_bytes: int = 512 * 1024
    """About five seconds of audio; a client that is further behind will not catch up."""
    stall_ms: int = 10_000
    """How long one message may wait for the socket to take it."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message on its way out. `utterance_id` is set on what a flush of it takes back."""

    data: str | bytes
    utterance_id: str = ""
    seq: int = -1


class SendQueue:
    """Messages not yet written, in order. Overflow: no more are taken, the client is cut off."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._queue: deque[Message] = deque()
        self._urgent: deque[Message] = deque()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._urgent) + len(self._queue)

    def put(self, message: Message) -> bool:
        """False: it is full, and the message was not taken."""
        size = len(message.data)
        if self._bytes + size > self._max_bytes:
            return False
        self._bytes += size
        self._queue.append(message)
        return True

    def overtake(self, message: Message, utterance_id: str) -> int:
        """Take back all that is queued of the utterance, and go first. Returns frames dropped."""
        kept = deque(m for m in self._queue if m.utterance_id != utterance_id)
        dropped = sum(m.seq >= 0 for m in self._queue) - sum(m.seq >= 0 for m in kept)
        self._queue = kept
        self._urgent.append(message)
        self._bytes = sum(len(m.data) for m in (*kept, *self._urgent))
        return dropped

    def pop(self) -> Message | None:
        queue = self._urgent or self._queue
        if not queue:
            return None
        message = queue.popleft()
        self._bytes -= len(message.data)
        return message


class WsTransport:
    """`ports.Transport` over one WebSocket. Sends never block; `write_to` is the only writer."""

    def __init__(self, clock: Clock, limits: OutboundLimits) -> None:
        self._clock = clock
        self._limits = limits
        self._queue = SendQueue(limits.max_queue_bytes)
        self._wake = asyncio.Event()
        self.started = False
        self._finishing = False
        self._overflown = False
        self._writing_since: float | None = None
        self._speaking = ""
        self._next_seq = -1
        self._written: OrderedDict[str, int] = OrderedDict()
        self._heard: OrderedDict[str, int] = OrderedDict()

    # --- ports.Transport ---

    def send_event(self, event: ServerEvent) -> None:
        self.started = self.started or isinstance(event, SessionStarted)
        self._put(Message(event.model_dump_json()))

    def begin_audio(self, utterance_id: str, seq: int, *, resumed: bool) -> None:
        event = AudioBegin(utterance_id=utterance_id, seq=seq, resumed=resumed)
        self._speaking, self._next_seq = utterance_id, seq
        self._put(Message(event.model_dump_json(), utterance_id))

    def send_frame(self, frame: SpeechFrame) -> None:
        """Dropped unless its utterance was begun and not flushed since."""
        if frame.utterance_id != self._speaking:
            return
        if frame.seq != self._next_seq:
            # Binary messages carry no number: after a gap the client has to be told where we are.
            self.begin_audio(frame.utterance_id, frame.seq, resumed=True)
        self._next_seq = frame.seq + 1
        self._put(Message(frame.pcm, frame.utterance_id, frame.seq))

    def end_audio(self, utterance_id: str, frames: int) -> None:
        event = AudioEnd(utterance_id=utterance_id, frames=frames)
        self._put(Message(event.model_dump_json(), utterance_id))

    def flush(self, utterance_id: str, at_ms: int) -> None:
        if self._speaking == utterance_id:
            self._speaking = ""
        event = Flush(utterance_id=utterance_id, at_ms=at_ms)
        self._queue.overtake(Message(event.model_dump_json()), utterance_id)
        self._wake.set()

    def heard_seq(self, utterance_id: str) -> int:
        return self._heard.get(utterance_id, -1)

    # --- the connection's side ---

    def acknowledge(self, utterance_id: str, seq: int) -> int:
        """Note what a client says it played; never more than was sent, never going back."""
        sent = self._written.get(utterance_id, -1)
        heard = max(self.heard_seq(utterance_id), min(seq, sent))
        if sent >= 0:
            _remember(self._heard, utterance_id, heard)
        return heard

    def send_error(self, error: DuplexError, *, fatal: bool) -> None:
        self.send_event(error_event(error, fatal=fatal))

    def finish(self) -> None:
        """Let the writer return once everything queued is written."""
        self._finishing = True
        self._wake.set()

    async def write_to(self, socket: Socket) -> None:
        """Write until `finish`. Ends early when the socket breaks (its error is raised)."""
        while True:
            message = self._queue.pop()
            if message is not None:
                await self._write(socket, message)
            elif self._finishing:
                return
            else:
                self._wake.clear()
                await self._wake.wait()

    async def watch(self) -> NoReturn:
        """Raises Exhausted when the client does not read what it is sent."""
        while not (self._overflown or self._stalled()):  # noqa: ASYNC110  (a clock, not a flag)
            await asyncio.sleep(_WATCH_S)
        raise Exhausted("the client does not read what it is sent", retry_after_ms=1_000)

    @property
    def queued(self) -> int:
        return len(self._queue)

    def _put(self, message: Message) -> None:
        if self._overflown:
            return
        self._overflown = not self._queue.put(message)
        self._wake.set()

    async def _write(self, socket: Socket, message: Message) -> None:
        self._writing_since = self._clock.now_ms()
        if isinstance(message.data, str):
            await socket.send_str(message.data)
        else:
            _remember(self._written, message.utterance_id, message.seq)
            await socket.send_bytes(message.data)
        self._writing_since = None

    def _stalled(self) -> bool:
        since = self._writing_since
        return since is not None and self._clock.now_ms() - since > self._limits.stall_ms


def error_event(error: DuplexError, *, fatal: bool) -> Error:
    return Error(
        code=error.code,
        message=error.message,
        retry_after_ms=error.retry_after_ms,
        queue_position=error.queue_position,
        fatal=fatal,
    )


def _remember(seqs: OrderedDict[str, int], utterance_id: str, seq: int) -> None:
    """Keep the newest utterances; acknowledgements of older ones are of no use to anybody."""
    if utterance_id not in seqs and len(seqs) >= _REMEMBERED_UTTERANCES:
        seqs.popitem(last=False)
    seqs[utterance_id] = seq
