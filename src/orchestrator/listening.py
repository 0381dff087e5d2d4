"""The listening half of a session: one turn of the user after another, and what speaks for a
barge-in. Reports words; decides nothing."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from src.audio.pcm import Int16
from src.common.clock import Clock
from src.common.tasks import TaskGroup
from src.orchestrator.asr import AsrSettings
from src.orchestrator.asr_turn import Partial, TurnRecognizer
from src.orchestrator.judge import Evidence, Opinion
from src.orchestrator.phrases import is_sentence, joined
from src.orchestrator.ports import MIC_STEP_MS, Recognizer, Transcript
from src.orchestrator.vad import VadEvent, VadPhase, VoiceActivityDetector
from src.orchestrator.waterfall import Waterfall, trailing_silence_ms
from src.rpc.errors import DuplexError

# Long enough for a pause to lie in it: the detector's own history is no longer either.
_ARRIVALS = 100
_TAIL_MS = 400


@dataclass(slots=True)
class Suspicion:
    """What is known about the speech that may be an interruption."""

    edge_ms: float = 0.0
    voiced_ms: int = 0
    opinion: Opinion = Opinion.NONE
    talking: bool = False
    words: str | None = None

    def evidence(self, now_ms: float, *, playback_known: bool) -> Evidence:
        return Evidence(
            since_edge_ms=round(now_ms - self.edge_ms),
            voiced_ms=self.voiced_ms,
            opinion=self.opinion,
            talking=self.talking,
            words=self.words,
            playback_known=playback_known,
        )


class Listener:
    """Owns the turn recogniser. `on_words(text, final)` and `on_partial` are called on the loop.

    `unfinished`: what a whole sentence does not end with.
    """

    def __init__(
        self,
        recognizer: Recognizer,
        *,
        session_id: str,
        language: str,
        settings: AsrSettings,
        vad: VoiceActivityDetector,
        clock: Clock,
        unfinished: Iterable[str],
        on_partial: Callable[[Partial], None],
        on_words: Callable[[str, bool], None],
        on_error: Callable[[DuplexError], None],
    ) -> None:
        self._turn = TurnRecognizer(
            recognizer,
            session_id=session_id,
            language=language,
            settings=settings,
            on_partial=self._hear_partial,
            clock=clock,
        )
        self._vad = vad
        self._clock = clock
        self._unfinished = tuple(unfinished)
        self._on_partial = on_partial
        self._on_words = on_words
        self._on_error = on_error
        self._arrivals: deque[float] = deque(maxlen=_ARRIVALS)
        self._final: asyncio.Task[str] | None = None
        self.suspicion = Suspicion()
        self.waterfall = Waterfall(0.0)

    async def run(self) -> None:
        await self._turn.run()

    # --- audio ---

    def arrived(self) -> None:
        """A 10 ms step is here."""
        self._arrivals.append(self._clock.now_ms())
        if self.suspicion.talking:
            self.suspicion.voiced_ms += MIC_STEP_MS

    def feed(self, samples: Int16) -> None:
        self._turn.feed(samples)

    def observe(self, event: VadEvent, *, interrupting: bool) -> None:
        """`interrupting`: it begins while the agent speaks, and is judged from here on."""
        suspicion = self.suspicion
        match event.phase:
            case VadPhase.EDGE:
                voiced_ms = event.at_ms - event.onset_ms
                self.suspicion = Suspicion(self._clock.now_ms(), voiced_ms, talking=True)
            case VadPhase.VOICED_AGAIN if interrupting:
                self.suspicion = Suspicion(self._clock.now_ms(), 0, Opinion.CONFIRMED, talking=True)
            case VadPhase.VOICED_AGAIN:
                suspicion.talking = True
            case VadPhase.CONFIRMED:
                suspicion.opinion = Opinion.CONFIRMED
            case VadPhase.REJECTED:
                suspicion.opinion, suspicion.talking = Opinion.REJECTED, False
            case VadPhase.QUIET:
                self._note_quiet()
            case VadPhase.ENDED:
                suspicion.talking = False
                self.waterfall.endpoint = self._clock.now_ms()

    def _note_quiet(self) -> None:
        silence_ms = trailing_silence_ms(self._vad.preroll(_TAIL_MS))
        self.suspicion.talking = False
        self.suspicion.voiced_ms = max(0, self.suspicion.voiced_ms - silence_ms)
        # A partial lags: what was said since may change its meaning. The guess comes soon.
        self.suspicion.words = None
        back = min(len(self._arrivals), silence_ms // MIC_STEP_MS + 1)
        self.waterfall = Waterfall(self._arrivals[-back] if back else self._clock.now_ms())

    # --- the turn ---

    def begin(self, preroll_ms: int) -> None:
        self._turn.begin(self._vad.preroll(preroll_ms + self.suspicion.voiced_ms))

    def speculate(self) -> None:
        self._turn.speculate()
        guess = self._turn.speculative()
        if guess is not None:
            guess.add_done_callback(self._hear_guess)

    def revoke(self) -> None:
        self._turn.invalidate()

    def drop(self) -> None:
        self._turn.cancel()

    def finish(self, group: TaskGroup) -> None:
        """Ask for the final words. Those of a turn whose words are still awaited come with them."""
        before, self._final = self._final, None
        self._final = group.create_task(self._finish(before), name="final words")
        self._final.add_done_callback(self._hear_final)

    def forget(self) -> None:
        """The final words are not wanted any more."""
        final, self._final = self._final, None
        if final is not None:
            final.cancel()

    async def _finish(self, before: asyncio.Task[str] | None) -> str:
        try:
            text = (await self._turn.finish()).text
        except DuplexError as error:
            self._on_error(error)
            text = ""
        return joined(await before, text) if before is not None else text

    # --- what the recogniser says ---

    def _hear_partial(self, partial: Partial) -> None:
        self.suspicion.words = partial.text
        self._on_partial(partial)

    def _hear_guess(self, guess: asyncio.Future[Transcript]) -> None:
        stale = guess is not self._turn.speculative()
        if stale or guess.cancelled() or guess.exception() is not None:
            return
        text = guess.result().text
        if is_sentence(text, self._unfinished):
            self._vad.whole_sentence()
        self._hear_words(text, final=False)

    def _hear_final(self, task: asyncio.Task[str]) -> None:
        if task is self._final and not task.cancelled() and task.exception() is None:
            self._final = None
            self._hear_words(task.result(), final=True)

    def _hear_words(self, text: str, *, final: bool) -> None:
        text = text.strip()
        if self.waterfall.transcript is None or text != self.suspicion.words:
            self.waterfall.transcript = self._clock.now_ms()
        self.suspicion.words = text
        self._on_words(text, final)
