"""The speaking half of a session: one reply, from the model's text to the listener's ear."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from src.audio.pcm import FRAME_MS
from src.common.tasks import TaskGroup, timeout
from src.orchestrator.heard import HeardText
from src.orchestrator.ports import ControlAction, SpeechSession
from src.orchestrator.track import Booth, Track
from src.orchestrator.waterfall import Waterfall
from src.rpc.errors import DuplexError
from src.rpc.ws_events import ReplyText

log = logging.getLogger(__name__)

_STOP_S = 1.0


@dataclass(frozen=True, slots=True)
class Subject:
    """What a reply is about. `texts` is closed by the reply."""

    reply_id: str
    turn_id: str
    user_text: str
    texts: AsyncIterator[str]
    waterfall: Waterfall | None = None


class Stage(Booth, Protocol):
    """What a reply needs of its session."""

    def gate_open(self, reply_id: str) -> bool: ...

    def take_speech(self) -> SpeechSession:
        """The voice for the utterance that begins now."""
        ...

    async def reopen_speech(self) -> None:
        """The worker died: find another one. Raises DuplexError."""
        ...

    def on_ready(self, reply: Reply) -> None:
        """Its first frame is here."""
        ...

    def on_first_audio(self, reply: Reply) -> None: ...

    def on_finished(self, reply: Reply, *, ok: bool) -> None: ...

    def report(self, error: DuplexError) -> None: ...


class Reply:
    """`run` writes, reads and steers until everything was heard; the gate is the session's."""

    def __init__(self, subject: Subject, stage: Stage, *, draft: bool) -> None:
        self.subject = subject
        self.reply_id = subject.reply_id
        self.turn_id = subject.turn_id
        self.user_text = subject.user_text
        self.speculative = draft
        self.complete = True
        """False: the model or the voice failed before the end."""
        self.text = ""
        self.playback_known = True
        """The client has said what it had played when it was flushed."""
        self._stage = stage
        self._draft = draft
        self._failure: DuplexError | None = None
        self._announced = 0
        self._base = 0
        self._track: Track | None = None
        self._written = asyncio.Event()
        self._text_done = False
        self._kick = asyncio.Event()
        self._order: tuple[ControlAction, float] | None = None
        self._ordered = asyncio.Event()
        self._recovered = False
        self._ready = False

    # --- orders of the session; all of them take effect in the call ---

    def promote(self, user_text: str) -> None:
        """It is no draft any more."""
        self._draft = False
        self.user_text = user_text
        if self._failure is not None:
            self._stage.report(self._failure)
        self._announce(final=self._text_done)

    def play(self) -> None:
        """The gate is open: send from the first frame that was not heard."""
        self._kick.set()
        if self._track is not None:
            self._track.pump()

    def shut(self, at_ms: int) -> None:
        """The gate has closed: silence at the listener."""
        if self._track is not None:
            self.playback_known = not self._track.shut(at_ms)

    def order(self, action: ControlAction) -> None:
        """To the worker, from a task of its own. Of two orders that wait, the later one counts."""
        self._order = (action, self._stage.clock.now_ms())
        self._ordered.set()

    def on_playback(self, utterance_id: str, *, flushed: bool) -> None:
        if self._track is None or self._track.utterance_id != utterance_id:
            return
        self.playback_known = self.playback_known or flushed
        self._track.note_heard()
        self._kick.set()

    def heard(self) -> HeardText:
        if self._track is None:
            return HeardText("", self.text, estimated=False)
        return self._track.heard(self.text)

    @property
    def utterance_id(self) -> str:
        return self._track.utterance_id if self._track else self.reply_id

    @property
    def playback_dbfs(self) -> float:
        return self._track.sent_dbfs if self._track else -120.0

    # --- the reply's life ---

    async def run(self, after: asyncio.Task[None] | None) -> None:
        """A worker speaks one utterance of a session at a time: `after` is the one before."""
        try:
            if after is not None:
                await asyncio.wait([after])
            # A chain of finished replies would keep them all.
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
            await self._close_track()
        self._stage.on_finished(self, ok=ok)

    # --- text ---

    async def _write(self) -> None:
        texts = self.subject.texts
        try:
            async for text in texts:
                if not self._append(text):
                    log.warning("reply cut off: too long", extra={"reply_id": self.reply_id})
                    break
        except DuplexError as error:
            self.complete = False
            self._failure = error
            # A draft may fail in silence: with the final words it is tried again.
            if not self._draft:
                self._stage.report(error)
        finally:
            await _close(texts)
        self._text_done = True
        self._written.set()
        if self._track is not None:
            self._track.utterance.finish()
        self._announce(final=True)

    def _append(self, text: str) -> bool:
        """False when there was no room for all of it."""
        room = self._stage.settings.max_reply_chars - len(self.text)
        text, fits = text[:room], len(text) <= room
        waterfall = self.subject.waterfall
        if waterfall is not None and text and waterfall.first_token is None:
            waterfall.first_token = self._stage.clock.now_ms()
        self.text += text
        if self._track is not None and text:
            self._track.utterance.write(text)
        self._written.set()
        self._announce(final=False)
        return fits

    def _announce(self, *, final: bool) -> None:
        text = self.text[self._announced :]
        if self._draft or not (text or final):
            return
        self._announced = len(self.text)
        self._stage.transport.send_event(
            ReplyText(turn_id=self.turn_id, utterance_id=self.reply_id, text=text, final=final)
        )

    # --- the worker ---

    async def _steer(self) -> None:
        while True:
            await self._ordered.wait()
            self._ordered.clear()
            if self._order is None or self._track is None or self._track.closed:
                continue
            action, since_ms = self._order
            try:
                await self._track.utterance.control(action)
            except DuplexError as error:
                # A worker that died says so on its frame stream, and there it is dealt with.
                log.info("control failed", extra={"action": action.value, "code": error.code})
                continue
            if action is ControlAction.PAUSE:
                self._stage.observer.edge_to_worker_paused(self._stage.clock.now_ms() - since_ms)

    async def _speak(self) -> bool:
        """False when the voice was lost for good."""
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
            # What the lost worker's frames said is said; the next one begins with the word after.
            track.tell_end()
            self._base = len(track.heard(self.text).heard)
            await self._close_track()
        return True

    async def _something_to_say(self) -> bool:
        while not self.text[self._base :].strip() and not self._text_done:
            self._written.clear()
            await self._written.wait()
        return bool(self.text[self._base :].strip())

    def _open_track(self) -> Track:
        stage = self._stage
        name = f"{self.reply_id}.2" if self._recovered else self.reply_id
        utterance = stage.take_speech().utterance(name)
        utterance.write(self.text[self._base :])
        if self._text_done:
            utterance.finish()
        waterfall = self.subject.waterfall
        if waterfall is not None and waterfall.first_clause is None:
            waterfall.first_clause = stage.clock.now_ms()
        self._track = Track(
            utterance, self._base, stage, lambda: stage.gate_open(self.reply_id), self._on_sent
        )
        return self._track

    async def _read(self, track: Track) -> None:
        longest_ms = self._stage.settings.max_reply_s * 1000
        async for frame in track.utterance.frames():
            while track.outbox.full:
                track.pump()
                await self._wait(FRAME_MS)
            if not track.take(frame):
                continue
            if not self._ready:
                self._ready = True
                self._stage.on_ready(self)
            track.pump()
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
        while track.outbox.produced:
            track.pump()
            gate_open = self._stage.gate_open(self.reply_id)
            if track.outbox.all_heard and gate_open:
                return
            await self._wait(FRAME_MS if gate_open else None)

    async def _wait(self, at_most_ms: int | None) -> None:
        """Until something was heard or the gate has opened, or for so long."""
        self._kick.clear()
        with suppress(asyncio.TimeoutError):
            async with timeout(None if at_most_ms is None else at_most_ms / 1000):
                await self._kick.wait()

    def _on_sent(self, now_ms: float) -> None:
        waterfall = self.subject.waterfall
        if waterfall is not None and waterfall.first_audio is None:
            waterfall.first_audio = now_ms
            self._stage.on_first_audio(self)

    async def _close_track(self) -> None:
        track = self._track
        if track is None or track.closed:
            return
        track.closed = True
        track.cancel_timer()
        with suppress(DuplexError, asyncio.TimeoutError):
            async with timeout(_STOP_S):
                if not track.read_to_end:
                    await track.utterance.control(ControlAction.STOP)
        with suppress(DuplexError):
            await track.utterance.aclose()


async def _close(texts: AsyncIterator[str]) -> None:
    """A generator holds its socket until it is closed."""
    aclose = getattr(texts, "aclose", None)
    if aclose is not None:
        await aclose()
