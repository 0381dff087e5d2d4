"""What a session tells its client, in the protocol's words."""

from __future__ import annotations

from src.orchestrator.asr_turn import Partial
from src.orchestrator.duplex_state import DuplexState
from src.orchestrator.heard import HeardText
from src.orchestrator.phrases import joined
from src.orchestrator.ports import MIC_STEP_MS, Transport, VoiceInfo
from src.orchestrator.reply import Reply
from src.orchestrator.vad import VadEvent, VadPhase
from src.rpc.errors import DuplexError
from src.rpc.ws_events import (
    BargeIn,
    Error,
    Heard,
    Latency,
    SessionEnded,
    SessionStarted,
    Speech,
    State,
    TranscriptEvent,
    VerdictName,
)


class Announcer:
    """Counts the audio time (`at_ms`) that its events carry."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.at_ms = 0

    def tick(self) -> None:
        """10 ms of microphone audio arrived."""
        self.at_ms += MIC_STEP_MS

    def started(
        self, session_id: str, info: VoiceInfo, *, recogniser: str, llm: str, codec: str
    ) -> None:
        self._transport.send_event(
            SessionStarted(
                session_id=session_id,
                model=info.model,
                voice=info.voice,
                language=info.language,
                worker=info.worker,
                recogniser=recogniser,
                llm=llm,
                codec="opus" if codec == "opus" else "pcm_s16le",
                fallback=info.fallback,
                fallback_reason=info.fallback_reason,
            )
        )

    def ended(self, reason: str) -> None:
        self._transport.send_event(SessionEnded(reason=reason))

    def state(self, state: DuplexState, reply: Reply | None) -> None:
        turn_id = reply.turn_id if reply is not None else state.turn_id
        self._transport.send_event(State(state=state.mode, turn_id=turn_id, at_ms=self.at_ms))

    def speech(self, event: VadEvent) -> None:
        """Pauses inside speech are nobody's business."""
        if event.phase not in (VadPhase.QUIET, VadPhase.VOICED_AGAIN):
            self._transport.send_event(Speech(phase=event.phase.value, at_ms=event.at_ms))

    def partial(self, state: DuplexState, partial: Partial) -> None:
        before = len(joined(state.carried, "x")) - 1
        self._transport.send_event(
            TranscriptEvent(
                turn_id=state.turn_id,
                text=joined(state.carried, partial.text),
                final=False,
                stable_chars=before + partial.stable_chars,
                at_ms=self.at_ms,
            )
        )

    def final(self, state: DuplexState, text: str) -> None:
        self._transport.send_event(
            TranscriptEvent(
                turn_id=state.turn_id,
                text=text,
                final=True,
                stable_chars=len(text),
                at_ms=self.at_ms,
            )
        )

    def barge_in(self, reply: Reply | None, verdict: VerdictName, reason: str = "") -> None:
        utterance_id = reply.utterance_id if reply is not None else ""
        self._transport.send_event(
            BargeIn(utterance_id=utterance_id, verdict=verdict, reason=reason, at_ms=self.at_ms)
        )

    def heard(self, reply: Reply, heard: HeardText, *, completed: bool) -> None:
        self._transport.send_event(
            Heard(
                turn_id=reply.turn_id,
                utterance_id=reply.utterance_id,
                heard=heard.heard.strip(),
                cut=heard.cut.strip(),
                estimated=heard.estimated,
                completed=completed,
            )
        )

    def latency(self, latency: Latency) -> None:
        self._transport.send_event(latency)

    def error(self, error: DuplexError) -> None:
        """The session goes on after it."""
        self._transport.send_event(
            Error(
                code=error.code,
                message=error.message,
                retry_after_ms=error.retry_after_ms,
                queue_position=error.queue_position,
            )
        )
