"""The speaking half of a session: one reply, from the model's text to the listener's ear."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from src.audio.pcm import FRAME_MS, from_bytes, level_dbfs
from src.common.clock import Clock
from src.common.tasks import TaskGroup, timeout
from src.orchestrator.duplex import DuplexSettings
from src.orchestrator.heard import HeardText, split_heard
from src.orchestrator.outbox import Grid, Outbox
from src.orchestrator.ports import (
    ControlAction,
    SessionObserver,
    SpeechFrame,
    SpeechSession,
    Transport,
    Utterance,
    Word,
)
from src.orchestrator.waterfall import Waterfall
from src.rpc.errors import DuplexError
from src.rpc.ws_events import ReplyText

log = logging.getLogger(__name__)

_STOP_S = 1.0
_LEVEL_FRAMES = 5
# Opus packets are not measured; a voice at this level is what the worker's loudness aims for.
_OPUS_DBFS = -20.0


@dataclass(frozen=True, slots=True)
class Subject:
    """What a reply is about. `texts` is closed by the reply."""

    reply_id: str
    turn_id: str
    user_text: str
    texts: AsyncIterator[str]
    waterfall: Waterfall | None = None


class Stage(Protocol):
    """What a reply needs of its session."""

    transport: Transport
    clock: Clock
    observer: SessionObserver
    settings: DuplexSettings
    codec: str

    def gate_open(self, reply_id: str) -> bool: ...

    def take_speech(self) -> SpeechSession:
        """The voice for the utterance that begins now."""
        ...

    async def reopen_speech(self) -> None:
        """The worker died: find another one. Raises DuplexError."""
        ...

    def on_ready(self, reply: Reply) -> None: ...

    def on_first_audio(self, reply: Reply) -> None: ...

    def on_finished(self, reply: Reply, *, ok: bool) -> None: ...

    def report(self, error: DuplexError) -> None: ...


class Track:
    """One utterance at a worker: the whole reply, or what another worker speaks of the rest."""

    def __init__(self, utterance: Utterance, base: int, capacity: int) -> None:
        self.utterance = utterance
        self.utterance_id = utterance.utterance_id
        self.base = base
        self.outbox = Outbox(utterance.utterance_id, capacity)
        self.grid: Grid | None = None
        self.words: list[Word] = []
        self.total_ms: int | None = None
        self.next_seq = -1
        self.read_to_end = False
        self.end_told = False
        self.closed = False

    def take(self, frame: SpeechFrame) -> bool:
        if not self.outbox.push(frame):
            return False
        self.words += frame.words
        return True

    def heard(self, text: str) -> HeardText:
        """Of the whole reply's text."""
        part = split_heard(text[self.base :], self.words, self.outbox.heard_ms, self.total_ms)
        return HeardText(text[: self.base] + part.heard, part.cut, part.estimated)


class Reply:
    """`run` writes, reads and steers until everything was heard; the gate is the session's."""

    def __init__(self, subject: Subject, stage: Stage, *, draft: bool) -> None:
        self.subject = subject
        self.reply_id = subject.reply_id
        self.turn_id = subject.turn_id
        self.user_text = subject.user_text
        self.draft = draft
        self.speculative = draft
        self.complete = True
        self.text = ""
        self.flushed = True
        self._stage = stage
        self._announced = 0
        self._base = 0
        self._track: Track | None = None
        self._written = asyncio.Event()
        self._text_done = False
        self._kick = asyncio.Event()
        self._order: tuple[ControlAction, float] | None = None
        self._ordered = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._levels: deque[float] = deque(maxlen=_LEVEL_FRAMES)
        self._recovered = False
        self._ready = False

    # --- orders of the session; all of them take effect in the call ---

    def promote(self, user_text: str) -> None:
        self.draft = False
        self.user_text = user_text
        self._announce(final=self._text_done)

    def play(self) -> None:
        """The gate is open: send from the first frame that was not heard."""
        self._kick.set()
        self.pump()

    def shut(self, at_ms: int) -> None:
        """The gate has closed. Silence at the listener comes first, bookkeeping after."""
        track = self._track
        if track is None:
            return
        self._stage.transport.flush(track.utterance_id, at_ms)
        self._cancel_timer()
        self._note_heard(track)
        track.grid = None
        track.end_told = False
        self.flushed = track.outbox.rewind() == 0
        self._levels.clear()
        self._stage.observer.frames_kept(track.outbox.kept)

    def order(self, action: ControlAction) -> None:
        """To the worker, from a task of its own. Of two orders that wait, the later one counts."""
        self._order = (action, self._stage.clock.now_ms())
        self._ordered.set()

    def on_playback(self, utterance_id: str, *, flushed: bool) -> None:
        track = self._track
        if track is None or track.utterance_id != utterance_id:
            return
        self.flushed = self.flushed or flushed
        self._note_heard(track)
        self._kick.set()

    def heard(self) -> HeardText:
        track = self._track
        if track is None:
            return HeardText(self.text[: self._base], self.text[self._base :], estimated=False)
        self._note_heard(track)
        return track.heard(self.text)

    @property
    def utterance_id(self) -> str:
        return self._track.utterance_id if self._track else self.reply_id

    @property
    def playback_dbfs(self) -> float:
        """Level of the last ~100 ms sent."""
        return max(self._levels, default=-120.0)

    # --- the reply's life ---

    async def run(self, after: asyncio.Task[None] | None) -> None:
        """A worker speaks one utterance of a session at a time: `after` is the one before."""
        try:
            if after is not None:
                await asyncio.wait([after])
            del after
            async with TaskGroup() as group:
                helpers = (
                    group.create_task(self._write(), name=f"text {self.reply_id}"),
                    group.create_task(self._steer(), name=f"control {self.reply_id}"),
                )
                ok = await self._speak()
                for task in helpers:
                    task.cancel()
        finally:
            self._cancel_timer()
            await self._close_track()
        self._stage.on_finished(self, ok=ok)

    async def _write(self) -> None:
        texts = self.subject.texts
        try:
            async for text in texts:
                if not self._append(text):
                    log.warning("reply cut off: too long", extra={"reply_id": self.reply_id})
                    break
        except DuplexError as error:
            self.complete = False
            self._stage.report(error)
        finally:
            await _close(texts)
        self._text_done = True
        self._written.set()
        if self._track is not None:
            self._track.utterance.finish()
        self._announce(final=True)

    def _append(self, text: str) -> bool:
        room = self._stage.settings.max_reply_chars - len(self.text)
        text, fits = text[:room], len(text) <= room
        waterfall, now_ms = self.subject.waterfall, self._stage.clock.now_ms()
        if waterfall is not None and text and waterfall.first_token is None:
            waterfall.first_token = now_ms
        self.text += text
        if self._track is not None and text:
            self._track.utterance.write(text)
        if self.text.strip():
            self._written.set()
        self._announce(final=False)
        return fits

    def _announce(self, *, final: bool) -> None:
        text = self.text[self._announced :]
        if self.draft or not (text or final):
            return
        self._announced = len(self.text)
        self._stage.transport.send_event(
            ReplyText(turn_id=self.turn_id, utterance_id=self.reply_id, text=text, final=final)
        )

    async def _steer(self) -> None:
        while True:
            await self._ordered.wait()
            self._ordered.clear()
            if self._order is None or self._track is None:
                continue
            action, since_ms = self._order
            try:
                await self._track.utterance.control(action)
            except DuplexError as error:
                # A worker that died says so on its frame stream too, and that is where it is dealt
                # with.
                log.info("control failed", extra={"action": action.value, "code": error.code})
                continue
            if action is ControlAction.PAUSE:
                self._stage.observer.edge_to_worker_paused(self._stage.clock.now_ms() - since_ms)

    async def _speak(self) -> bool:
        while await self._something_to_say():
            track = self._open_track()
            try:
                await self._read(track)
            except DuplexError as error:
                if not await self._recover(error):
                    self.complete = False
                    return False
            await self._played(track)
            if track.read_to_end:
                return True
            self._stage.transport.end_audio(track.utterance_id, track.outbox.last_seq + 1)
            self._base = len(track.heard(self.text).heard)
            await self._close_track()
        return True

    async def _something_to_say(self) -> bool:
        await self._written.wait()
        while not self.text[self._base :].strip() and not self._text_done:
            self._written.clear()
            await self._written.wait()
        return bool(self.text[self._base :].strip())

    def _open_track(self) -> Track:
        settings = self._stage.settings
        name = f"{self.reply_id}.2" if self._recovered else self.reply_id
        utterance = self._stage.take_speech().utterance(name)
        track = Track(utterance, self._base, settings.kept_ms // FRAME_MS)
        self._track = track
        utterance.write(self.text[self._base :])
        if self._text_done:
            utterance.finish()
        waterfall = self.subject.waterfall
        if waterfall is not None and waterfall.first_clause is None:
            waterfall.first_clause = self._stage.clock.now_ms()
        return track

    async def _read(self, track: Track) -> None:
        longest_ms = self._stage.settings.max_reply_s * 1000
        async for frame in track.utterance.frames():
            while track.outbox.full:
                self.pump()
                await self._wait(FRAME_MS)
            if not track.take(frame):
                continue
            if not self._ready:
                self._ready = True
                self._stage.on_ready(self)
            self.pump()
            if frame.media_time_ms + FRAME_MS >= longest_ms:
                log.warning("reply cut off: too long", extra={"reply_id": self.reply_id})
                await track.utterance.control(ControlAction.STOP)
                break
        else:
            if self._text_done:
                track.total_ms = (track.outbox.last_seq + 1) * FRAME_MS
        track.read_to_end = True

    async def _recover(self, error: DuplexError) -> bool:
        """Once: another worker goes on with the first word that will not be heard from this one."""
        if self._recovered:
            self._stage.report(error)
            return False
        self._recovered = True
        log.warning("worker lost in mid-utterance", extra={"code": error.code})
        try:
            await self._stage.reopen_speech()
        except DuplexError as failure:
            self._stage.report(failure)
            return False
        return True

    async def _played(self, track: Track) -> None:
        """Until every frame of the track was heard."""
        while track.outbox.produced and not self._done(track):
            self.pump()
            if self._done(track):
                return
            await self._wait(FRAME_MS if self._stage.gate_open(self.reply_id) else None)

    def _done(self, track: Track) -> bool:
        return track.outbox.all_heard and self._stage.gate_open(self.reply_id)

    # --- frames ---

    def pump(self) -> None:
        """Send what may leave now: the gate is open and the frame is not too far ahead."""
        track = self._track
        if track is None:
            return
        self._note_heard(track)
        if not self._stage.gate_open(self.reply_id):
            return
        now_ms, lead_ms = self._stage.clock.now_ms(), self._stage.settings.lead_ms
        while (frame := track.outbox.peek()) is not None:
            if track.grid is None:
                self._begin_audio(track, frame.seq, resumed=track.next_seq >= 0)
                track.grid = Grid(frame.seq, now_ms)
            early_ms = track.grid.due_ms(frame.seq) - now_ms - lead_ms
            if early_ms > 0:
                self._pump_in(early_ms)
                return
            self._send(track, track.grid, now_ms)
        if track.read_to_end and not track.end_told:
            track.end_told = True
            self._stage.transport.end_audio(track.utterance_id, track.outbox.last_seq + 1)

    def _send(self, track: Track, grid: Grid, now_ms: float) -> None:
        frame = track.outbox.sent()
        if frame.seq != track.next_seq:
            self._begin_audio(track, frame.seq, resumed=True)
        track.next_seq = frame.seq + 1
        self._stage.transport.send_frame(frame)
        self._stage.observer.frame_sent(grid.leave(frame.seq, now_ms))
        opus = self._stage.codec == "opus"
        self._levels.append(_OPUS_DBFS if opus else level_dbfs(from_bytes(frame.pcm)))
        waterfall = self.subject.waterfall
        if waterfall is not None and waterfall.first_audio is None:
            waterfall.first_audio = now_ms
            self._stage.on_first_audio(self)

    def _begin_audio(self, track: Track, seq: int, *, resumed: bool) -> None:
        track.next_seq = seq
        self._stage.transport.begin_audio(track.utterance_id, seq, resumed=resumed)

    def _note_heard(self, track: Track) -> None:
        heard = self._stage.transport.heard_seq(track.utterance_id)
        if track.grid is not None:
            now_ms = self._stage.clock.now_ms()
            margin_ms = self._stage.settings.ack_margin_ms
            heard = max(heard, track.grid.played_seq(now_ms - margin_ms))
        track.outbox.heard(heard)

    def _pump_in(self, ms: float) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(ms / 1000, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.pump()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _wait(self, at_most_ms: int | None) -> None:
        """Until something was heard or the gate has opened, or for so long."""
        self._kick.clear()
        with suppress(asyncio.TimeoutError):
            async with timeout(None if at_most_ms is None else at_most_ms / 1000):
                await self._kick.wait()

    async def _close_track(self) -> None:
        track = self._track
        if track is None or track.closed:
            return
        track.closed = True
        with suppress(DuplexError, asyncio.TimeoutError):
            async with timeout(_STOP_S):
                if not track.read_to_end:
                    await track.utterance.control(ControlAction.STOP)
        with suppress(DuplexError):
            await track.utterance.aclose()


async def _close(texts: AsyncIterator[str]) -> None:
    """An iterator of ours is a generator, and generators hold sockets until they are closed."""
    aclose = getattr(texts, "aclose", None)
    if aclose is not None:
        await aclose()
