"""A stock AgentSession in a room, in a process of its own: `python -m benchmarks.rooms.stock`.

LiveKit Agents as it is installed, room input and output as it makes them, our plugin as its voice,
so that its words come from the same worker. Its language model answers at once, in this process;
its recogniser is told by the benchmark when to have understood. Both are faster than what our own
orchestrator gets.
"""

from __future__ import annotations

import argparse
import asyncio
from contextlib import AsyncExitStack
from typing import Any

from livekit import rtc
from livekit.agents import (
    DEFAULT_API_CONNECT_OPTIONS,
    NOT_GIVEN,
    Agent,
    AgentSession,
    APIConnectOptions,
    NotGivenOr,
    TurnHandlingOptions,
    UserStateChangedEvent,
    inference,
    llm,
    stt,
)
from livekit.agents.utils import AudioBuffer

from benchmarks.caller import DidNotHappen
from benchmarks.machine import now_ms
from benchmarks.rooms.puppet import obey
from benchmarks.rooms.speech import LINE
from src.livekit_plugin import TTS

WARM_UP_S = 3.5
"""By default nothing interrupts the first 3 s that the agent speaks."""
TUNED: TurnHandlingOptions = {
    "turn_detection": "vad",
    "interruption": {
        "mode": "vad",
        # Not 0: then silence is an interruption, too.
        "min_duration": 0.001,
        "min_words": 0,
        "resume_false_interruption": False,
        "false_interruption_timeout": None,
    },
    "endpointing": {"mode": "fixed", "min_delay": 0.0, "max_delay": 0.0},
    "preemptive_generation": {"enabled": True, "preemptive_tts": True},
}
"""As quick as its options make it: every cough cuts the agent off, every pause is an end."""


class ToldStt(stt.STT[str]):
    """Streaming, and silent until it is told what it understood."""

    def __init__(self) -> None:
        super().__init__(
            capabilities=stt.STTCapabilities(
                streaming=True, interim_results=True, offline_recognize=False
            )
        )
        self._newest: _ToldStream | None = None

    async def _recognize_impl(
        self,
        buffer: AudioBuffer,
        *,
        language: NotGivenOr[str] = NOT_GIVEN,
        conn_options: APIConnectOptions,
    ) -> stt.SpeechEvent:
        raise NotImplementedError

    def stream(
        self,
        *,
        language: NotGivenOr[str] = NOT_GIVEN,
        conn_options: APIConnectOptions = DEFAULT_API_CONNECT_OPTIONS,
    ) -> stt.RecognizeStream:
        self._newest = _ToldStream(stt=self, conn_options=conn_options)
        return self._newest

    def understand(self, text: str) -> None:
        if self._newest is None:
            raise DidNotHappen("a recogniser's stream")
        self._newest.understand(text)


class _ToldStream(stt.RecognizeStream):
    async def _run(self) -> None:
        async for _ in self._input_ch:
            pass

    def understand(self, text: str) -> None:
        words = stt.SpeechData(language="en", text=text, confidence=0.95)  # type: ignore[arg-type]
        kind = stt.SpeechEventType.FINAL_TRANSCRIPT
        self._event_ch.send_nowait(stt.SpeechEvent(type=kind, alternatives=[words]))


class InstantLlm(llm.LLM[str]):
    """Says the line."""

    def chat(
        self,
        *,
        chat_ctx: llm.ChatContext,
        tools: list[llm.Tool] | None = None,
        conn_options: APIConnectOptions = DEFAULT_API_CONNECT_OPTIONS,
        **_: Any,
    ) -> llm.LLMStream:
        return _Line(self, chat_ctx=chat_ctx, tools=tools or [], conn_options=conn_options)


class _Line(llm.LLMStream):
    async def _run(self) -> None:
        delta = llm.ChoiceDelta(role="assistant", content=LINE)
        self._event_ch.send_nowait(llm.ChatChunk(id="line", delta=delta))


class Stock:
    """One room at a time."""

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self._stt = ToldStt()
        self._around = AsyncExitStack()
        self._session: AgentSession[None] | None = None
        self._marks: dict[str, float] = {}
        self._telling: asyncio.TimerHandle | None = None

    async def join(self, url: str, token: str, tuned: bool) -> None:
        await self.leave()
        room, speaker = rtc.Room(), TTS(target=self._worker)
        self._around.push_async_callback(speaker.aclose)
        self._around.push_async_callback(room.disconnect)
        await room.connect(url, token)
        self._session = session = self._made(speaker, tuned)
        self._around.push_async_callback(session.aclose)
        session.on("user_state_changed", self._on_user)
        await session.start(Agent(instructions=""), room=room)
        self._tap(session)

    async def warm_up(self) -> None:
        """Once the user is there."""
        session = self._here()
        speech = session.say(LINE)
        await asyncio.sleep(WARM_UP_S)
        await speech.interrupt(force=True)

    def _made(self, speaker: TTS, tuned: bool) -> AgentSession[None]:
        if not tuned:
            return AgentSession(stt=self._stt, llm=InstantLlm(), tts=speaker)
        return AgentSession(
            stt=self._stt,
            llm=InstantLlm(),
            tts=speaker,
            vad=inference.VAD(
                min_speech_duration=0.01, min_silence_duration=0.1, activation_threshold=0.3
            ),
            turn_handling=TUNED,
            aec_warmup_duration=None,
        )

    def _on_user(self, event: UserStateChangedEvent) -> None:
        if event.new_state == "speaking":
            self._mark("noticed_ms")

    def _tap(self, session: AgentSession[None]) -> None:
        """Both of its ways to stop the voice."""
        output = session.output.audio
        assert output is not None
        pause, clear = output.pause, output.clear_buffer

        def paused() -> None:
            self._mark("stop_ms")
            pause()

        def cleared() -> None:
            self._mark("stop_ms")
            clear()

        output.pause, output.clear_buffer = paused, cleared  # type: ignore[method-assign]

    def _mark(self, name: str) -> None:
        self._marks.setdefault(name, now_ms())

    def _here(self) -> AgentSession[None]:
        if self._session is None:
            raise DidNotHappen("no room")
        return self._session

    async def understand(self, text: str, at_ms: float) -> None:
        delay_s = max(0.0, at_ms - now_ms()) / 1000
        loop = asyncio.get_running_loop()
        self._telling = loop.call_later(delay_s, self._stt.understand, text)

    async def listen(self) -> None:
        """What happens from now on is marked."""
        self._marks = {}

    async def reset(self) -> dict[str, float]:
        """Stop what is left of the answer, forget what was said; returns the marks."""
        session, marks = self._here(), dict(self._marks)
        await session.interrupt(force=True)
        session.clear_user_turn()
        return marks

    async def leave(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
        self._session = None
        await self._around.aclose()

    def commands(self) -> dict[str, Any]:
        names = ("join", "warm_up", "understand", "listen", "reset", "leave")
        return {name: getattr(self, name) for name in names}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--worker", required=True)
    args = parser.parse_args()
    await obey(args.port, Stock(args.worker).commands())


if __name__ == "__main__":
    asyncio.run(main())
