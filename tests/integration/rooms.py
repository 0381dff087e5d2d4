"""A room visit in the test's own process: real server, real audio, real detector; the rest fakes.

The fake voice speaks every word as 200 ms of a tone, the fake recogniser understands whatever was
said as `words`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np

from src.audio.pcm import FRAME_SAMPLES, SAMPLE_RATE, Float32
from src.common.clock import MonotonicClock
from src.common.livekit_server import LiveKitServer
from src.demo.room_user import RoomUser, room_user
from src.orchestrator.asr import AsrSettings
from src.orchestrator.duplex_settings import DuplexSettings
from src.orchestrator.metrics import Metrics
from src.orchestrator.ports import SpeechFrame, SpeechSession, Transcript, Utterance, VoiceRequest
from src.orchestrator.rooms.settings import LiveKitSettings
from src.orchestrator.rooms.tokens import TokenMint
from src.orchestrator.rooms.transport import RoomTransport
from src.orchestrator.rooms.visit import RoomAccess, RoomVisit
from src.orchestrator.session import DuplexSession
from src.orchestrator.vad import VadSettings, VoiceActivityDetector
from src.rpc.errors import DuplexError
from src.rpc.ws_events import SessionStart
from tests.fakes import FakeBridge, FakeObserver, FakeSpeech, FakeSpeechProvider, FakeUtterance

ANSWER = " ".join(f"word{n}" for n in range(60)) + "."
_TONE_HZ = 300


class ToneUtterance(FakeUtterance):
    def _frame(self, seq: int, start: int, end: int, *, marked: bool) -> SpeechFrame:
        silent = FakeUtterance._frame(self, seq, start, end, marked=marked)
        time = (np.arange(FRAME_SAMPLES) + seq * FRAME_SAMPLES) / SAMPLE_RATE
        tone = (8000 * np.sin(2 * np.pi * _TONE_HZ * time)).astype("<i2")
        return SpeechFrame(silent.utterance_id, seq, seq * 20, tone.tobytes(), silent.words)


class ToneSpeech(FakeSpeech):
    def utterance(self, utterance_id: str) -> Utterance:
        made = ToneUtterance(utterance_id, self)
        self.utterances.append(made)
        return made


class ToneProvider(FakeSpeechProvider):
    async def open(self, request: VoiceRequest) -> SpeechSession:
        await asyncio.sleep(self.open_ms / 1000)
        if self.failure is not None:
            raise self.failure
        speech = ToneSpeech(request, self.script)
        self.opened.append(speech)
        return speech


class FixedRecognizer:
    """Hears the same words in everything, and keeps what it was given."""

    name = "fixed-ears"

    def __init__(self) -> None:
        self.words = "what is this"
        self.given: list[Float32] = []

    async def transcribe(
        self, samples: Float32, *, session_id: str, language: str = "", urgent: bool = True
    ) -> Transcript:
        if urgent:
            self.given.append(samples)
        return Transcript(self.words, samples.size // 16, 1)

    async def aclose(self) -> None:
        pass


@dataclass
class Host:
    """What an orchestrator has for its rooms, and the visits made with it."""

    server: LiveKitServer
    settings: LiveKitSettings
    greeting: str = ""
    answer: str = ANSWER
    speech: ToneProvider = field(default_factory=ToneProvider)
    recognizer: FixedRecognizer = field(default_factory=FixedRecognizer)
    observer: FakeObserver = field(default_factory=FakeObserver)
    metrics: Metrics = field(default_factory=Metrics)
    requests: list[SessionStart] = field(default_factory=list)
    sessions: list[DuplexSession] = field(default_factory=list)
    refusal: DuplexError | None = None

    def __post_init__(self) -> None:
        self.bridge = FakeBridge(lambda _: self.answer)
        self.mint = TokenMint(self.settings)

    def token(self, room: str, identity: str = "user", **attributes: str) -> str:
        names = {f"duplex.{name}": value for name, value in attributes.items()}
        return self.mint.user(room, identity, identity, {"duplex.events": "1", **names})

    def visit(self, room: str, identity: str = "", token: str = "") -> RoomVisit:
        access = RoomAccess(self.server.url, token or self.mint.agent(room), room, identity)
        return RoomVisit(access, self._session, self.settings, self.metrics, MonotonicClock())

    @asynccontextmanager
    async def hosted(self, room: str, identity: str = "") -> AsyncIterator[asyncio.Task[str]]:
        """A visit that is under way; its task's result is why it ended."""
        visit = self.visit(room, identity)
        task = asyncio.create_task(visit.run(), name=f"visit {room}")
        try:
            yield task
        finally:
            visit.close("test over")
            await task

    @asynccontextmanager
    async def talking(
        self, room: str, attributes: Mapping[str, str] | None = None, **options: int | None
    ) -> AsyncIterator[tuple[RoomUser, asyncio.Task[str]]]:
        """One user with the agent, whose session has started."""
        token = self.token(room, **(attributes or {}))
        async with (
            self.hosted(room) as task,
            room_user(self.server.url, token, **options) as user,  # type: ignore[arg-type]
        ):
            await user.until(lambda: user.agent_state == "listening", "an agent that listens")
            yield user, task

    def _session(
        self, session_id: str, start: SessionStart, transport: RoomTransport
    ) -> DuplexSession:
        if self.refusal is not None:
            raise self.refusal
        self.requests.append(start)
        session = DuplexSession(
            session_id=session_id,
            transport=transport,
            speech=self.speech,
            request=VoiceRequest(session_id, start.mode, start.model, start.voice, start.language),
            recognizer=self.recognizer,
            asr=AsrSettings(),
            bridge=self.bridge,
            vad=VoiceActivityDetector(VadSettings()),
            settings=DuplexSettings(greeting=self.greeting),
            clock=MonotonicClock(),
            observer=self.observer,
        )
        self.sessions.append(session)
        return session


def host(server: LiveKitServer, **settings: int) -> Host:
    return Host(
        server,
        LiveKitSettings(
            url=server.url, api_key=server.api_key, api_secret=server.api_secret, **settings
        ),
    )
