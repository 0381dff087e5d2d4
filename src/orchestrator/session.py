"""One spoken conversation: feeds the duplex machine and carries out what it decides.

Everything that decides is in duplex.py and judge.py; listening.py and reply.py are the two halves
that wait. A callback of the transport runs to its end without waiting, so a speech edge has closed
the gate and flushed the listener before `on_mic` returns.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from typing import Any

from src.audio.framing import Framer
from src.audio.pcm import Int16
from src.common.clock import Clock
from src.common.logging import log_context
from src.common.nvtx import nvtx_stream
from src.common.tasks import TaskGroup, timeout
from src.orchestrator.announce import Announcer
from src.orchestrator.asr import AsrSettings
from src.orchestrator.asr_turn import Partial
from src.orchestrator.duplex import step
from src.orchestrator.duplex_settings import DuplexSettings
from src.orchestrator.duplex_state import (
    Act,
    Do,
    DuplexState,
    Event,
    Finished,
    Judged,
    Phase,
    Presence,
    Ready,
    Say,
    Typed,
    User,
    Voice,
    Words,
)
from src.orchestrator.heard import HeardText
from src.orchestrator.judge import Judgement, Verdict, is_back_channel, judge
from src.orchestrator.listening import Listener
from src.orchestrator.ports import (
    MIC_STEP_SAMPLES,
    Bridge,
    BridgeSession,
    ControlAction,
    Recognizer,
    SessionObserver,
    SpeechProvider,
    SpeechSession,
    Transport,
    VoiceRequest,
)
from src.orchestrator.reply import Reply, Subject
from src.orchestrator.vad import VadEvent, VoiceActivityDetector
from src.orchestrator.voices import Voices
from src.orchestrator.waterfall import Waterfall
from src.rpc.errors import DuplexError, Exhausted, InvalidArgument
from src.rpc.ws_events import VerdictName

log = logging.getLogger(__name__)

_CLOSE_S = 2.0
_MAX_TEXT_CHARS = 20_000


class DuplexSession:
    """A `MicSink` for its transport, a `Stage` for its replies. Runs once."""

    def __init__(
        self,
        *,
        session_id: str,
        transport: Transport,
        speech: SpeechProvider,
        request: VoiceRequest,
        recognizer: Recognizer,
        asr: AsrSettings,
        bridge: Bridge,
        vad: VoiceActivityDetector,
        settings: DuplexSettings,
        clock: Clock,
        observer: SessionObserver,
    ) -> None:
        self.session_id = session_id
        self.transport = transport
        self.settings = settings
        self.clock = clock
        self.observer = observer
        self.codec = request.codec
        self._recognizer_name = recognizer.name
        self._voices = Voices(speech, request, transport, self._spawn)
        self._bridges = bridge
        self._bridge: BridgeSession | None = None
        self._vad = vad
        self._listener = Listener(
            recognizer,
            session_id=session_id,
            language=request.language,
            settings=asr,
            vad=vad,
            clock=clock,
            unfinished=settings.unfinished,
            on_partial=self._on_partial,
            on_words=self._on_words,
            on_error=self.report,
        )
        self._steps = Framer(MIC_STEP_SAMPLES)
        self._state = DuplexState()
        self._reply: Reply | None = None
        self._speaking: asyncio.Task[None] | None = None
        self._switching: asyncio.Task[None] | None = None
        self._verdict_timer: asyncio.TimerHandle | None = None
        self._announce = Announcer(transport)
        self._group: TaskGroup | None = None
        self._main: asyncio.Task[None] | None = None
        self._reason = ""
        self._open = False

    # --- life ---

    async def run(self) -> None:
        """Open the voice and the language model, then live until `close`.

        Raises DuplexError when either cannot be had. Leaves no task behind, however it ends.
        """
        failure: list[DuplexError] = []
        with log_context(session_id=self.session_id):
            async with TaskGroup() as group:
                self._group = group
                if not self._reason:
                    self._main = group.create_task(self._live(failure), name="session")
        if failure:
            raise failure[0]

    def close(self, reason: str) -> None:
        """Idempotent. `run` returns once everything is let go of."""
        if self._reason:
            return
        self._reason = reason or "closed"
        if self._main is not None:
            self._main.cancel()

    async def _live(self, failure: list[DuplexError]) -> None:
        listening: asyncio.Task[None] | None = None
        try:
            await self._open_ports()
            listening = self._spawn(self._listener.run(), "recogniser")
            self._begin()
            # Only `close` ends a session: it cancels this task.
            await asyncio.get_running_loop().create_future()
        except DuplexError as error:
            failure.append(error)
        finally:
            was_open, self._open = self._open, False
            await self._let_go(listening)
            if was_open:
                self._announce.ended(self._reason or "cancelled")
                self.observer.session_closed(self._reason or "cancelled")

    async def _open_ports(self) -> None:
        await self._voices.open()
        self._bridge = await self._bridges.open(self.session_id)

    def _begin(self) -> None:
        self._open = True
        self.observer.session_opened()
        self._announce.started(
            self.session_id,
            self._voices.current.info,
            recogniser=self._recognizer_name,
            llm=self._bridge.name if self._bridge else "",
            codec=self.codec,
        )
        self._announce.state(self._state, None)
        if self.settings.greeting.strip():
            self._apply(Say(self.settings.greeting))

    async def _let_go(self, listening: asyncio.Task[None] | None) -> None:
        self._disarm()
        self._listener.forget()
        tasks = [t for t in (self._speaking, self._switching, listening) if t is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        with suppress(DuplexError, asyncio.TimeoutError):
            async with timeout(_CLOSE_S):
                if self._bridge is not None:
                    await self._bridge.aclose()
        await self._voices.aclose()

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        if self._group is None:
            raise RuntimeError("the session is not running")
        task: asyncio.Task[None] = self._group.create_task(work, name=name)
        return task

    # --- MicSink ---

    def on_mic(self, samples: Int16) -> None:
        for samples_10ms in self._steps.push(samples):
            # Audio time counts from the client's first sample, so that both ends mean the same.
            self._announce.tick()
            if self._open:
                self._hear(samples_10ms)

    def on_playback(self, utterance_id: str, seq: int, *, flushed: bool) -> None:
        if self._reply is not None:
            self._reply.on_playback(utterance_id, flushed=flushed)
            self._consider()

    def on_text(self, text: str, *, speak: bool) -> None:
        if not self._open:
            return
        text = text.strip()
        if not text or len(text) > _MAX_TEXT_CHARS:
            self.report(
                InvalidArgument(
                    f"text must have 1 to {_MAX_TEXT_CHARS} characters that are not space"
                )
            )
        elif not speak:
            self._typed(text)
        elif len(self._state.queued) >= self.settings.max_queued_says:
            self.report(
                Exhausted(
                    "too many texts wait to be spoken; send more as they are", retry_after_ms=2000
                )
            )
        else:
            self._apply(Say(text))

    def on_model_switch(self, model: str, voice: str) -> None:
        if not self._open:
            return
        if self._switching is not None:
            self._switching.cancel()
        self._switching = self._spawn(self._switch(model, voice), f"switch to {model}")

    def on_presence(self, *, here: bool) -> None:
        """Not here: the agent falls silent, and goes on with the word that was not heard yet once
        the user is back. Idempotent."""
        if self._open:
            self._apply(Presence(here))
        else:
            self._state, _ = step(self._state, Presence(here))

    # --- listening ---

    def _hear(self, samples: Int16) -> None:
        state, listener, reply = self._state, self._listener, self._reply
        playing = bool(state.gate)
        level = reply.playback_dbfs if playing and reply is not None else -120.0
        listener.arrived()
        events = self._vad.step(samples, playing=playing, playback_dbfs=level)
        # `begin` takes the step of the edge with its preroll.
        listener.feed(samples)
        for event in events:
            self._on_voice(event)
        self._consider()

    def _on_voice(self, event: VadEvent) -> None:
        began_ms = self.clock.now_ms()
        before = self._state.phase
        self._listener.observe(event, interrupting=before is Phase.SPEAKING)
        self._apply(Voice(event.phase))
        if before is Phase.SPEAKING and self._state.phase is Phase.BARGED_IN:
            self.observer.edge_to_last_frame(self.clock.now_ms() - began_ms)
            self._arm()
            self._announce.barge_in(self._reply, "pending")
        self._announce.speech(event)

    def _on_partial(self, partial: Partial) -> None:
        state = self._state
        if state.mode == "listening" and state.user is User.TALKING:
            self._announce.partial(state, partial)
        self._consider()

    def _on_words(self, text: str, final: bool) -> None:
        back_channel = is_back_channel(text, self.settings)
        state = self._state
        if final and state.phase is Phase.SPEAKING and text and not back_channel:
            self._send_verdict(Judgement(Verdict.REAL, "words"))
        if final or self.settings.speculative_llm:
            self._apply(Words(text, final, back_channel))
        self._consider()

    def _typed(self, text: str) -> None:
        now_ms = self.clock.now_ms()
        self._listener.waterfall = Waterfall(now_ms, endpoint=now_ms, transcript=now_ms)
        if self._state.phase is Phase.BARGED_IN:
            self._disarm()
            self._send_verdict(Judgement(Verdict.REAL, "typed"))
        self._apply(Typed(text))

    async def _switch(self, model: str, voice: str) -> None:
        try:
            await self._voices.prepare(model, voice)
        except DuplexError as error:
            self.report(error)
            return
        if self._speaking is None or self._speaking.done():
            self.take_speech()

    # --- verdicts ---

    def _consider(self) -> None:
        """Judge what is known, if there is anything to be judged."""
        state, reply = self._state, self._reply
        late = state.phase is Phase.SPEAKING and state.user is User.TALKING
        if reply is None or not (late or state.phase is Phase.BARGED_IN):
            return
        evidence = self._listener.suspicion.evidence(
            self.clock.now_ms(), playback_known=reply.playback_known
        )
        judgement = judge(evidence, self.settings)
        real = judgement.verdict is Verdict.REAL
        if judgement.verdict is Verdict.PENDING or (late and not real):
            return
        self._disarm()
        self._send_verdict(judgement)
        # "Stop" is not the rest of a question, however early it comes.
        unheard = judgement.reason != "stop_word" and not reply.heard().heard.strip()
        self._apply(Judged(real, unheard=unheard))

    def _arm(self) -> None:
        """The verdict falls in time even when the microphone falls silent."""
        self._disarm()
        self._verdict_timer = asyncio.get_running_loop().call_later(
            self.settings.verdict_window_ms / 1000, self._on_deadline
        )

    def _on_deadline(self) -> None:
        self._verdict_timer = None
        self._consider()
        if self._state.phase is Phase.BARGED_IN:
            # A second edge came meanwhile, with a window of its own.
            self._arm()

    def _disarm(self) -> None:
        if self._verdict_timer is not None:
            self._verdict_timer.cancel()
            self._verdict_timer = None

    def _send_verdict(self, judgement: Judgement) -> None:
        verdict: VerdictName = "real" if judgement.verdict is Verdict.REAL else "false"
        self.observer.barge_in(verdict)
        self._announce.barge_in(self._reply, verdict, judgement.reason)

    # --- what the machine decides ---

    def _apply(self, event: Event) -> None:
        if not self._open:
            return  # what ends with the session must not start anything new
        before = self._state.mode
        self._state, actions = step(self._state, event)
        for action in actions:
            self._do(action)
        if not self._state.reply_id:
            self._reply = None
        if self._state.mode != before:
            self._announce.state(self._state, self._reply)

    def _do(self, action: Do) -> None:
        listener = self._listener
        match action.act:
            case Act.BEGIN_TURN:
                listener.begin(self.settings.preroll_ms)
            case Act.SPECULATE:
                listener.speculate()
            case Act.REVOKE:
                listener.revoke()
            case Act.FINISH_TURN:
                if self._group is not None:
                    listener.finish(self._group)
            case Act.DROP_TURN:
                listener.drop()
            case Act.FORGET_WORDS:
                listener.forget()
            case Act.DRAFT | Act.REPLY | Act.SAY:
                self._start(action)
            case _ if self._reply is not None:
                self._direct(action, self._reply)

    def _direct(self, action: Do, reply: Reply) -> None:
        bridge = self._bridge
        match action.act:
            case Act.SHUT:
                reply.shut(self._announce.at_ms)
            case Act.PAUSE:
                reply.order(ControlAction.PAUSE)
                if bridge is not None:
                    bridge.hold(reply.turn_id)
            case Act.RESUME:
                reply.order(ControlAction.RESUME)
                if bridge is not None:
                    bridge.go(reply.turn_id)
            case Act.PLAY:
                reply.play()
            case Act.PROMOTE:
                reply.promote(action.text)
                self._announce.final(self._state, action.text)
            case Act.CUT | Act.COMPLETE:
                self._conclude(reply, to_the_end=action.act is Act.COMPLETE)
            case Act.STOP if self._speaking is not None:
                self._speaking.cancel()

    def _start(self, action: Do) -> None:
        bridge, draft, said = self._bridge, action.act is Act.DRAFT, action.act is Act.SAY
        if bridge is None:
            return
        turn_id = action.reply_id if said else self._state.turn_id
        texts = (
            _verbatim(action.text)
            if said
            else nvtx_stream("llm", bridge.respond(turn_id, action.text, speculative=draft))
        )
        waterfall = None if said else self._fresh_waterfall(draft=draft)
        subject = Subject(action.reply_id, turn_id, "" if said else action.text, texts, waterfall)
        if action.act is Act.REPLY:
            self._announce.final(self._state, action.text)
        self._reply = Reply(subject, self, draft=draft)
        self._speaking = self._spawn(self._reply.run(self._speaking), f"reply {action.reply_id}")

    def _fresh_waterfall(self, *, draft: bool) -> Waterfall:
        """A draft's is filled in while the user's turn comes to its end."""
        if draft:
            return self._listener.waterfall
        before = self._listener.waterfall
        return Waterfall(before.speech_end, before.endpoint, before.transcript)

    def _conclude(self, reply: Reply, *, to_the_end: bool) -> None:
        """Tell the client and the context what was heard of a reply that is over."""
        heard = HeardText(reply.text, "", estimated=False) if to_the_end else reply.heard()
        completed = reply.complete and bool(heard.heard) and not heard.cut.strip()
        if reply.text:
            self._announce.heard(reply, heard, completed=completed)
        if self._bridge is not None:
            self._bridge.commit(
                reply.turn_id, reply.user_text, heard.heard.strip(), completed=completed
            )

    # --- Stage ---

    def gate_open(self, reply_id: str) -> bool:
        return self._state.gate == reply_id

    def take_speech(self) -> SpeechSession:
        return self._voices.take()

    async def reopen_speech(self) -> None:
        await self._voices.reopen()

    def on_ready(self, reply: Reply) -> None:
        self._apply(Ready(reply.reply_id))

    def on_first_audio(self, reply: Reply) -> None:
        waterfall = reply.subject.waterfall
        if waterfall is not None:
            latency = waterfall.to_event(reply.turn_id, speculative=reply.speculative)
            self._announce.latency(latency)
            self.observer.turn_finished(latency)

    def on_finished(self, reply: Reply, *, ok: bool) -> None:
        self._apply(Finished(reply.reply_id, ok))

    def report(self, error: DuplexError) -> None:
        log.warning("session goes on after an error", extra={"code": error.code})
        self._announce.error(error)


async def _verbatim(text: str) -> AsyncIterator[str]:
    yield text
