"""A session: a lease on one model, at most one utterance at a time, and control over it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

from src.common.tasks import timeout
from src.rpc.errors import FailedPrecondition, NotFound
from src.rpc.generated import tts_pb2 as pb
from src.tts.leases import Lease
from src.tts.segmenter import limits_for
from src.tts.synthesis import Voicing
from src.tts.tts_base import VoiceSpec
from src.tts.utterance import Stage, Utterance, Write

_REMEMBERED = 32
_TOUCH_EVERY_FRAMES = 50
_CLOSE_WAIT_S = 0.5


@dataclass(frozen=True, slots=True)
class Spoken:
    """What a control applied to, and where it stands."""

    state: pb.SessionState
    utterance_id: str
    last_seq: int


class Session:
    """All calls are made on the event loop. Everything but `close` and `synthesize` is instant."""

    def __init__(
        self,
        session_id: str,
        lease: Lease,
        spec: VoiceSpec,
        codec: pb.Codec,
        stage: Stage,
        lead_ms: int = 0,
    ) -> None:
        self.session_id = session_id
        self.lease = lease
        self.spec = spec
        self.codec = codec
        self.lead_ms = lead_ms
        self.frames = 0
        self._stage = stage
        self._closed = False
        self._abandoned = False
        # The calls under way: one that speaks, and for a moment the one before it.
        self._calls: dict[Utterance, asyncio.Task[object] | None] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        # last_seq by id, of those that are over; a control for one of them comes too late.
        self._over: deque[tuple[str, int]] = deque(maxlen=_REMEMBERED)
        # Controls travel on their own call and may overtake the text of the utterance they name.
        self._early: tuple[str, pb.ControlAction] | None = None

    @property
    def speaking(self) -> bool:
        return bool(self._calls)

    @property
    def current(self) -> Utterance | None:
        return next((utterance for utterance in self._calls if not utterance.ended), None)

    # --- speaking ---

    async def synthesize(
        self, utterance_id: str, chunks: AsyncIterator[pb.TextChunk], write: Write
    ) -> None:
        """One utterance, to its end marker. Raises DuplexError."""
        if self._closed:
            raise self._gone()
        if self.current is not None:
            raise FailedPrecondition(
                f"session {self.session_id!r} is speaking {self.current.utterance_id!r}; "
                "STOP it or wait for its end"
            )
        self.lease.touch()
        voicing = self._voicing()
        utterance = Utterance(utterance_id, self.lease, voicing, self._stage, self.lead_ms)
        self._calls[utterance] = asyncio.current_task()
        self._idle.clear()
        self._apply_early(utterance)
        try:
            await utterance.run(self._touching(chunks), self._counting(write))
        except asyncio.CancelledError:
            if self._abandoned:
                raise self._gone() from None
            raise
        finally:
            self._part_with(utterance)

    def _voicing(self) -> Voicing:
        lease = self.lease
        return Voicing(
            model_id=lease.meta.model_id,
            family=lease.family,
            model=lease.model,
            spec=self.spec,
            codec=self.codec,
            limits=limits_for(lease.capabilities),
            own_engine=lease.capabilities.own_engine,
        )

    async def _touching(self, chunks: AsyncIterator[pb.TextChunk]) -> AsyncIterator[pb.TextChunk]:
        async for chunk in chunks:
            self._touch()
            yield chunk

    def _counting(self, write: Write) -> Write:
        async def counted(frame: pb.AudioFrame) -> None:
            if not frame.last:
                self.frames += 1
            if frame.seq % _TOUCH_EVERY_FRAMES == 0:
                self._touch()
            await write(frame)

        return counted

    def _touch(self) -> None:
        if self.lease.held:
            self.lease.touch()

    def _part_with(self, utterance: Utterance) -> None:
        self._over.append((utterance.utterance_id, utterance.last_seq))
        del self._calls[utterance]
        if not self._calls:
            self._idle.set()

    # --- control ---

    def control(self, action: pb.ControlAction, utterance_id: str) -> Spoken:
        """PAUSE, RESUME or STOP. One that comes too late, or again, changes nothing."""
        self._touch()
        utterance = self.current
        if utterance is None or utterance_id not in ("", utterance.utterance_id):
            self._keep_for_later(action, utterance_id)
            return Spoken(self._state(), "", self._last_seq_of(utterance_id))
        _apply(action, utterance)
        return self.where

    @property
    def where(self) -> Spoken:
        if self.current is None:
            return Spoken(pb.IDLE, "", -1)
        return Spoken(self._state(), self.current.utterance_id, self.current.last_seq)

    def _state(self) -> pb.SessionState:
        if self.current is None or self.current.stopped:
            return pb.IDLE
        return pb.PAUSED if self.current.paused else pb.SPEAKING

    def _keep_for_later(self, action: pb.ControlAction, utterance_id: str) -> None:
        if utterance_id and all(utterance_id != over for over, _ in self._over):
            self._early = (utterance_id, action)

    def _apply_early(self, utterance: Utterance) -> None:
        if self._early is not None and self._early[0] == utterance.utterance_id:
            _apply(self._early[1], utterance)
        self._early = None

    def _last_seq_of(self, utterance_id: str) -> int:
        return next((seq for over, seq in self._over if over == utterance_id), -1)

    # --- the end ---

    async def close(self) -> None:
        """Stop speaking and give the lease back. A thread in mid-step keeps the model till then."""
        self._closed = True
        for utterance in self._calls:
            utterance.stop()
        try:
            async with timeout(_CLOSE_WAIT_S):
                await self._idle.wait()
        except asyncio.TimeoutError:
            # The client reads nothing: not even the end marker gets through to it.
            self.abandon()
            await self._idle.wait()
        await self.lease.release()

    def abandon(self) -> None:
        """The client is gone, or reads nothing: end its calls with an error."""
        self._closed = self._abandoned = True
        for call in self._calls.values():
            if call is not None:
                call.cancel()

    def _gone(self) -> NotFound:
        return NotFound(f"session {self.session_id!r} has ended; start a new one")

    async def until_idle(self) -> None:
        await self._idle.wait()


def _apply(action: pb.ControlAction, utterance: Utterance) -> None:
    if action == pb.PAUSE:
        utterance.pause()
    elif action == pb.RESUME:
        utterance.resume()
    elif action == pb.STOP:
        utterance.stop()
