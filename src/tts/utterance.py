"""One Synthesize call: text in, paced frames out, one synthesis thread in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

from src.audio.loudness import Loudness
from src.audio.pcm import FRAME_MS, SAMPLE_RATE
from src.common.clock import Clock
from src.common.tasks import TaskGroup
from src.common.timers import Alarm
from src.rpc.generated import tts_pb2 as pb
from src.tts.handover import FrameQueue
from src.tts.intake import TextIntake
from src.tts.leases import Lease
from src.tts.metrics import WorkerMetrics
from src.tts.playout import Frame, Playout, PlayoutPolicy
from src.tts.pool import StreamGate, SynthesisPool
from src.tts.synthesis import Synthesis, Voicing
from src.tts.tts_base import WordMark

Write = Callable[[pb.AudioFrame], Awaitable[None]]


@dataclass
class Stage:
    """What all utterances of a worker share. RELOAD may change `policy` and `loudness_dbfs`."""

    pool: SynthesisPool
    clock: Clock
    metrics: WorkerMetrics
    policy: PlayoutPolicy
    loudness_dbfs: float | None
    # (model, voice) → the gain at which its last utterance ended, where its next one starts.
    gains: dict[tuple[str, str], float] = field(default_factory=dict)


class Utterance:
    """Made when its first chunk arrives; `run` lasts as long as the call. Controls never wait."""

    def __init__(
        self, utterance_id: str, lease: Lease, voicing: Voicing, stage: Stage, lead_ms: int = 0
    ) -> None:
        self.utterance_id = utterance_id
        self.ended = False
        """The end marker is on its way, so the session is free for the next utterance."""
        self._lease = lease
        self._voicing = voicing
        self._stage = stage
        self._alarm = Alarm()
        self._playout = Playout(stage.policy.ahead(lead_ms))
        self._frames = FrameQueue(self._playout, stage.clock, self._alarm)
        self._intake = TextIntake(lease.session_id, utterance_id, voicing.limits)
        self._loudness = self._leveller()
        self._synthesis = Synthesis(
            voicing, self._frames, self._loudness, stage.pool.compute, stage.clock
        )
        self._feed = self._synthesis.feed
        self._turn: asyncio.Task[None] | None = None
        self._thread: asyncio.Future[None] | None = None
        self._asked_at_ms: float | None = None

    # --- control: returns at once, and again is no harm ---

    @property
    def paused(self) -> bool:
        return self._playout.paused

    @property
    def stopped(self) -> bool:
        return self._playout.stopped

    @property
    def last_seq(self) -> int:
        return self._playout.last_seq

    @property
    def emitted(self) -> int:
        return self._playout.emitted

    def pause(self) -> None:
        self._frames.pause()

    def resume(self) -> None:
        self._frames.resume()

    def stop(self) -> None:
        """Nothing more leaves but the end marker. The thread ends at its engine's next step."""
        self._frames.stop()
        self._synthesis.cancel.cancel()
        self._feed.abandon()
        if self._turn is not None:
            self._turn.cancel()

    # --- the call ---

    async def run(self, chunks: AsyncIterator[pb.TextChunk], write: Write) -> None:
        """Until the end marker is written. Raises DuplexError; cancelling it stops everything."""
        outcome = "cancelled"
        try:
            async with TaskGroup() as group:
                reader = group.create_task(self._read(chunks), name="read-text")
                if await self._take_turn(group):
                    self._start_thread()
                await self._emit(write)
                reader.cancel()
            outcome = "stopped" if self._playout.stopped else "done"
        except Exception:
            outcome = "failed"
            raise
        finally:
            self.ended = True
            self.stop()
            if self._has_turn and self._thread is None:
                self._gate.leave()
            self._report_end(outcome)

    async def _read(self, chunks: AsyncIterator[pb.TextChunk]) -> None:
        async for chunk in chunks:
            if self._asked_at_ms is None and chunk.text:
                self._asked_at_ms = self._stage.clock.now_ms()
            for segment in self._intake.take(chunk):
                await self._feed.put(segment)
            if self._intake.final:
                self._feed.close()
        if not self._intake.final:
            for segment in self._intake.end():
                await self._feed.put(segment)
            self._feed.close()

    async def _take_turn(self, group: TaskGroup) -> bool:
        """Wait for a free stream of the model; False if stopped meanwhile."""
        if self._playout.stopped:
            return False
        self._turn = group.create_task(self._gate.enter(), name="wait-for-stream")
        await asyncio.wait([self._turn])
        return self._has_turn

    async def _emit(self, write: Write) -> None:
        while not self._frames.done:
            frame = self._frames.pull()
            if frame is None:
                await self._alarm.wait(self._frames.delay_ms())
                continue
            if self._playout.emitted == 1:
                self._report_first_audio()
            await write(self._message(frame))
        if self._frames.error is not None and not self._playout.stopped:
            raise self._frames.error
        self.ended = True
        await write(self._end_marker())

    def _message(self, frame: Frame) -> pb.AudioFrame:
        return pb.AudioFrame(
            pcm=frame.payload,
            sample_rate=SAMPLE_RATE,
            frame_ms=FRAME_MS,
            utterance_id=self.utterance_id,
            seq=frame.seq,
            media_time_ms=frame.media_time_ms,
            words=map(_word, frame.words),
            codec=self._voicing.codec,
        )

    def _end_marker(self) -> pb.AudioFrame:
        return pb.AudioFrame(
            sample_rate=SAMPLE_RATE,
            frame_ms=FRAME_MS,
            utterance_id=self.utterance_id,
            seq=self._playout.emitted,
            media_time_ms=(self._playout.last_seq + 1) * FRAME_MS,
            words=map(_word, self._playout.words_left),
            last=True,
            codec=self._voicing.codec,
        )

    # --- the thread ---

    @property
    def _gate(self) -> StreamGate:
        return self._stage.pool.gate(self._voicing.model_id, self._voicing.model.max_streams)

    @property
    def _has_turn(self) -> bool:
        turn = self._turn
        if turn is None or not turn.done() or turn.cancelled():
            return False
        return turn.exception() is None

    def _start_thread(self) -> None:
        # Held not until the call ends but until the thread does: an interrupted engine is busy, and
        # its model must stay, until its step is done.
        held = ExitStack()
        held.callback(self._gate.leave)
        held.enter_context(self._lease.streaming())
        self._thread = self._stage.pool.start(self._synthesis.run)
        self._thread.add_done_callback(lambda _: held.close())

    def _leveller(self) -> Loudness | None:
        if self._stage.loudness_dbfs is None:
            return None
        return Loudness(self._stage.loudness_dbfs, self._stage.gains.get(self._voice_key, 0.0))

    # --- measurements ---

    @property
    def _voice_key(self) -> tuple[str, str]:
        return self._voicing.model_id, self._voicing.spec.voice

    def _report_first_audio(self) -> None:
        metrics, model_id = self._stage.metrics, self._voicing.model_id
        if self._asked_at_ms is not None:
            metrics.first_audio(model_id, self._stage.clock.now_ms() - self._asked_at_ms)
        metrics.engine_first_chunk(model_id, self._synthesis.first_chunk_ms)

    def _report_end(self, outcome: str) -> None:
        if self._loudness is not None:
            self._stage.gains[self._voice_key] = self._loudness.gain_db
        self._stage.metrics.utterance_ended(
            self._voicing.model_id,
            outcome,
            self._playout.emitted,
            self._playout.dropped,
            self._synthesis.rtf,
        )


def _word(word: WordMark) -> pb.WordMark:
    return pb.WordMark(
        text=word.text,
        start_ms=word.start_ms,
        end_ms=word.end_ms,
        estimated=word.estimated,
        char_start=word.char_start,
        char_end=word.char_end,
    )
