"""One user turn after another: audio in, partials while they speak, the final text at the end.

The final pass is started at the first short silence, on a guess; if the guess was right, most of
it is over when the endpoint comes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from src.audio.pcm import Float32, Int16, to_float32
from src.common.clock import Clock
from src.common.tasks import TaskGroup
from src.orchestrator.asr import AsrSettings
from src.orchestrator.asr_partials import LocalAgreement, Partial
from src.orchestrator.ports import MIC_RATE, MIC_STEP_SAMPLES, Recognizer, Transcript
from src.rpc.errors import DuplexError

__all__ = ["AsrSettings", "Partial", "TurnRecognizer"]

_LONGEST_PARTIAL_MS = 20_000
_OVERLAP_STEPS = 60


class _TurnAudio:
    """Bounded: of a turn longer than the limit only the end is kept."""

    def __init__(self, limit_samples: int) -> None:
        self._limit = limit_samples
        self._parts: deque[Int16] = deque()
        self.size = 0

    def add(self, samples: Int16) -> None:
        if not samples.size:
            return
        self._parts.append(samples)
        self.size += samples.size
        while self.size - self._parts[0].size >= self._limit:
            self.size -= self._parts.popleft().size

    def add_overlapping(self, samples: Int16) -> None:
        """Less the beginning that is already the end of what is here, in whole steps."""
        tail = np.concatenate(list(self._parts)[-_OVERLAP_STEPS:]) if self._parts else samples[:0]
        for overlap in range(min(tail.size, samples.size), 0, -MIC_STEP_SAMPLES):
            if np.array_equal(tail[-overlap:], samples[:overlap]):
                self.add(samples[overlap:])
                return
        self.add(samples)

    @property
    def ms(self) -> int:
        return self.size * 1000 // MIC_RATE

    def snapshot(self) -> Float32:
        if not self._parts:
            return np.empty(0, dtype=np.float32)
        return to_float32(np.concatenate(self._parts))


class TurnRecognizer:
    """Per session. `run` must be running: it owns every pass that is started."""

    def __init__(
        self,
        recognizer: Recognizer,
        *,
        session_id: str,
        language: str,
        settings: AsrSettings,
        on_partial: Callable[[Partial], None],
        clock: Clock,
    ) -> None:
        self._recognizer = recognizer
        self._session_id = session_id
        self._language = language
        self._settings = settings
        self._on_partial = on_partial
        self._clock = clock
        self._audio = self._fresh_audio()
        self._agreement = LocalAgreement()
        self._open = False
        self._extending = False
        self._partial_due_ms = 0
        self._more_audio = asyncio.Event()
        self._group: TaskGroup | None = None
        self._draft: asyncio.Task[str] | None = None
        self._guess: asyncio.Future[Transcript] | None = None
        self._guess_task: asyncio.Task[None] | None = None

    @property
    def audio_ms(self) -> int:
        return self._audio.ms

    async def run(self) -> None:
        """The partial loop. Runs until cancelled, and takes every pass of this session with it."""
        async with TaskGroup() as group:
            self._group = group
            try:
                await self._partials()
            finally:
                self._group = None
                self._drop_guess()

    # --- a turn's life ---

    def begin(self, preroll: Int16) -> None:
        """A speech edge. `preroll` ends with the step of the edge: do not feed that step again."""
        if not self._extending:
            self._audio = self._fresh_audio()
            self._agreement = LocalAgreement()
            self._partial_due_ms = self._settings.partial_interval_ms
        self._extending = False
        self._drop_guess()
        self._open = True
        self._audio.add_overlapping(preroll)
        self._more_audio.set()

    def feed(self, samples: Int16) -> None:
        if self._open:
            self._audio.add(samples)
            self._more_audio.set()

    def extend(self) -> None:
        """The turn that just finished was not over: the next `begin` goes on with its audio.

        Its preroll may reach back into that audio; what is there twice is taken once.
        """
        self._extending = self._audio.size > 0

    def cancel(self) -> None:
        """It was a false alarm."""
        self._close()
        self._extending = False
        self._audio = self._fresh_audio()

    # --- the final text ---

    def speculate(self) -> None:
        """A short silence: start the final pass on the audio so far. Idempotent."""
        if self._open and self._guess is None:
            self._stop_draft()
            self._start_guess()

    def invalidate(self) -> None:
        """They went on: throw the guess away."""
        self._drop_guess()

    def speculative(self) -> asyncio.Future[Transcript] | None:
        """The guess, if there is one; cancelled when it turns out wrong. Do not cancel it."""
        return self._guess

    async def finish(self) -> Transcript:
        """The end of the turn. Raises Exhausted or Unavailable when the recogniser cannot.

        A new turn may begin before this returns.
        """
        samples = self._audio.snapshot()
        guess, task = self._guess, self._guess_task
        self._guess = self._guess_task = None
        self._close()
        try:
            if guess is not None and (result := await _outcome(guess)) is not None:
                return replace(result, speculative=True)
            return await self._pass(samples, urgent=True)
        finally:
            if task is not None:
                task.cancel()

    def _start_guess(self) -> None:
        if self._group is None:
            raise RuntimeError("TurnRecognizer.run() is not running")
        guess: asyncio.Future[Transcript] = asyncio.get_running_loop().create_future()
        self._guess = guess
        self._guess_task = self._group.create_task(
            self._fulfil(guess, self._audio.snapshot()), name="asr-speculative"
        )

    async def _fulfil(self, guess: asyncio.Future[Transcript], samples: Float32) -> None:
        try:
            result = await self._pass(samples, urgent=True)
        except DuplexError as error:
            if not guess.done():
                guess.set_exception(error)
                guess.exception()  # a guess that nobody asks for may fail in silence
            return
        if not guess.done():
            guess.set_result(result)

    def _drop_guess(self) -> None:
        guess, self._guess = self._guess, None
        task, self._guess_task = self._guess_task, None
        if task is not None:
            task.cancel()
        if guess is not None and not guess.done():
            guess.cancel()

    # --- partials ---

    async def _partials(self) -> None:
        while True:
            await self._more_audio.wait()
            self._more_audio.clear()
            if self._partial_wanted():
                await self._partial()

    def _partial_wanted(self) -> bool:
        return (
            self._settings.partials
            and self._open
            and self._guess is None
            and self._partial_due_ms <= self._audio.ms <= _LONGEST_PARTIAL_MS
        )

    async def _partial(self) -> None:
        if self._group is None:
            return
        agreement, audio_ms, begun_ms = self._agreement, self._audio.ms, self._clock.now_ms()
        draft = self._group.create_task(
            self._draft_text(self._audio.snapshot()), name="asr-partial"
        )
        self._draft = draft
        await asyncio.wait([draft])
        if draft.cancelled() or self._agreement is not agreement:
            return
        self._draft = None
        # A recogniser slower than the interval may spend half its time on us, not all of it.
        cost_ms = int(self._clock.now_ms() - begun_ms)
        self._partial_due_ms = audio_ms + max(self._settings.partial_interval_ms, 2 * cost_ms)
        if self._open and (text := draft.result()):
            self._on_partial(agreement.push(text, audio_ms))

    async def _draft_text(self, samples: Float32) -> str:
        try:
            return (await self._pass(samples, urgent=False)).text
        except DuplexError:
            return ""

    def _stop_draft(self) -> None:
        draft, self._draft = self._draft, None
        if draft is not None:
            draft.cancel()

    # --- shared ---

    async def _pass(self, samples: Float32, *, urgent: bool) -> Transcript:
        return await self._recognizer.transcribe(
            samples, session_id=self._session_id, language=self._language, urgent=urgent
        )

    def _close(self) -> None:
        self._open = False
        self._stop_draft()
        self._drop_guess()

    def _fresh_audio(self) -> _TurnAudio:
        return _TurnAudio(self._settings.max_turn_s * MIC_RATE)


async def _outcome(guess: asyncio.Future[Transcript]) -> Transcript | None:
    """None if it failed or was thrown away."""
    await asyncio.wait([guess])
    return None if guess.cancelled() or guess.exception() is not None else guess.result()
