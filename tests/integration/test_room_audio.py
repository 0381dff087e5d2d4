"""The agent's voice and the user's microphone in real rooms."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest
from livekit import api, rtc

from src.audio.pcm import FRAME_MS, FRAME_SAMPLES, SAMPLE_RATE, Float32, Int16
from src.common.clock import MonotonicClock
from src.common.livekit_server import LiveKitServer
from src.common.tasks import cancel_and_wait, timeout
from src.demo.room_audio import Ear, Mouth
from src.orchestrator.ports import SpeechFrame
from src.orchestrator.rooms import sdk_audio
from src.orchestrator.rooms.sdk_audio import MicStream, Stock, push
from src.orchestrator.rooms.speaker import RoomSpeaker, RtcSink, speech_source

PATIENCE_S = 20.0
# A jitter buffer that stretches or squeezes under load moves a tone by a few Hz.
NEAR_HZ = 30


def token_for(server: LiveKitServer, identity: str, room: str = "lab") -> str:
    grants = api.VideoGrants(room_join=True, room=room)
    made = api.AccessToken(server.api_key, server.api_secret)
    return made.with_identity(identity).with_grants(grants).to_jwt()


@asynccontextmanager
async def joined(
    server: LiveKitServer, identity: str, room: str = "lab"
) -> AsyncIterator[rtc.Room]:
    here = rtc.Room()
    await here.connect(server.url, token_for(server, identity, room))
    try:
        yield here
    finally:
        await here.disconnect()


async def until(true: Callable[[], object]) -> None:
    async with timeout(PATIENCE_S):
        while not true():  # noqa: ASYNC110  (real audio, real time)
            await asyncio.sleep(0.01)


def tone(hz: float, ms: int, rate: int, amplitude: float = 0.3) -> Float32:
    time = np.arange(rate * ms // 1000) / rate
    return (amplitude * np.sin(2 * np.pi * hz * time)).astype(np.float32)


def pitch_hz(samples: Int16, rate: int) -> float:
    """The strongest frequency, to about 1 Hz at a second of sound."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(samples.size)))
    return float(np.argmax(spectrum)) * rate / samples.size


async def published(room: rtc.Room, rate: int, channels: int) -> rtc.AudioSource:
    source = rtc.AudioSource(rate, channels, queue_size_ms=200)
    track = rtc.LocalAudioTrack.create_audio_track("sound", source)
    options = rtc.TrackPublishOptions(source=rtc.TrackSource.SOURCE_MICROPHONE)
    await room.local_participant.publish_track(track, options)
    return source


async def sound(source: rtc.AudioSource, hz: float) -> None:
    """A tone without end, through the SDK's own `capture_frame`."""
    rate, channels = source.sample_rate, source.num_channels
    mouth = Mouth(0.0, rate)
    second = tone(hz, 1000, 16_000)
    while True:
        if not mouth.talking:
            mouth.talk(second)
        step = mouth.next_step()
        pcm = np.repeat(step, channels).tobytes()
        await source.capture_frame(rtc.AudioFrame(pcm, rate, channels, step.size))


class Listener:
    """The first audio track of a room, heard by handle."""

    def __init__(self, room: rtc.Room, sample_rate: int = 16_000) -> None:
        self.steps: list[Int16] = []
        self.ends = 0
        self.stream: MicStream | None = None
        self._rate = sample_rate
        room.on("track_subscribed", lambda track, *_: self._listen(track))

    def _listen(self, track: rtc.Track) -> None:
        if self.stream is None and isinstance(track, rtc.RemoteAudioTrack):
            self.stream = MicStream(track, self.hear, self.end, sample_rate=self._rate)

    def hear(self, samples: Int16) -> None:
        self.steps.append(samples)

    def end(self) -> None:
        self.ends += 1

    async def second(self) -> Int16:
        """A second of it, once it is loud."""
        await until(lambda: self.steps and np.abs(self.steps[-1]).max() > 3000)
        begin = len(self.steps) + 20
        await until(lambda: len(self.steps) >= begin + 100)
        return np.concatenate(self.steps[begin : begin + 100])


@pytest.mark.parametrize(("rate", "channels"), [(48_000, 1), (44_100, 1), (8_000, 1), (48_000, 2)])
async def test_a_microphone_of_any_kind_arrives_as_16_khz_mono(
    livekit: LiveKitServer, rate: int, channels: int
) -> None:
    async with joined(livekit, "user") as user, joined(livekit, "agent") as agent:
        listener = Listener(agent)
        speaking = asyncio.create_task(sound(await published(user, rate, channels), 440.0))
        heard = await listener.second()
        assert listener.stream is not None
        listener.stream.close()
        listener.stream.close()
        count = len(listener.steps)
        await asyncio.sleep(0.1)
        await cancel_and_wait(speaking)

    assert {step.size for step in listener.steps} == {160}
    assert pitch_hz(heard, 16_000) == pytest.approx(440, abs=NEAR_HZ)
    assert len(listener.steps) == count
    assert (listener.ends, listener.stream.dropped) == (0, 0)


async def test_a_track_that_is_gone_ends_its_stream_once(livekit: LiveKitServer) -> None:
    async with joined(livekit, "agent") as agent:
        listener = Listener(agent)
        async with joined(livekit, "user") as user:
            speaking = asyncio.create_task(sound(await published(user, 48_000, 1), 440.0))
            await until(lambda: listener.steps)
            await cancel_and_wait(speaking)
        await until(lambda: listener.ends)
        assert listener.stream is not None
        listener.stream.close()
        await asyncio.sleep(0.1)
        assert listener.ends == 1


@pytest.mark.parametrize("door", ["by handle", "stock"])
async def test_what_is_pushed_is_heard_and_stock_code_goes_on_beside_it(
    livekit: LiveKitServer, door: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`rtc.AudioStream` and `await capture_frame` in the same process get what is theirs."""
    if door == "stock":
        monkeypatch.setattr(sdk_audio, "_the_door", Stock())
    async with joined(livekit, "user") as user, joined(livekit, "agent") as agent:
        listener = Listener(agent)
        tracks: list[rtc.Track] = []
        user.on("track_subscribed", lambda track, *_: tracks.append(track))
        ours = await published(agent, SAMPLE_RATE, 1)
        speaking = asyncio.create_task(sound(await published(user, SAMPLE_RATE, 1), 440.0))
        await until(lambda: tracks)
        stock = rtc.AudioStream.from_track(track=tracks[0], sample_rate=16_000, num_channels=1)
        pushing = asyncio.create_task(push_tone(ours, 700.0))
        by_handle = await listener.second()
        by_stock = await stock_second(stock)
        for task in (speaking, pushing):
            await cancel_and_wait(task)
        await stock.aclose()
        assert listener.stream is not None
        listener.stream.close()

    assert pitch_hz(by_handle, 16_000) == pytest.approx(440, abs=NEAR_HZ)
    assert pitch_hz(by_stock, 16_000) == pytest.approx(700, abs=NEAR_HZ)


async def push_tone(source: rtc.AudioSource, hz: float) -> None:
    pcm = (tone(hz, 1000, SAMPLE_RATE) * 32767).astype(np.int16).tobytes()
    loop, frame = asyncio.get_running_loop(), 1920
    began, count = loop.time(), 0
    while True:
        place = count * frame % len(pcm)
        push(source, pcm[place : place + frame])
        count += 1
        await asyncio.sleep(began + count * 0.02 - loop.time())


async def stock_second(stream: rtc.AudioStream) -> Int16:
    parts: list[Int16] = []
    async for event in stream:
        samples = np.frombuffer(event.frame.data, dtype=np.int16)
        if parts or np.abs(samples).max() > 3000:
            parts.append(samples)
        if len(parts) >= 120:
            break
    return np.concatenate(parts[20:])


async def test_every_room_of_a_process_hears_only_its_own(livekit: LiveKitServer) -> None:
    pitches = [300.0 + 110.0 * place for place in range(5)]
    async with rooms(livekit, len(pitches)) as pairs:
        listeners = [Listener(agent) for _, agent in pairs]
        speaking = [
            asyncio.create_task(sound(await published(user, 48_000, 1), hz))
            for (user, _), hz in zip(pairs, pitches, strict=True)
        ]
        heard = await asyncio.gather(*(listener.second() for listener in listeners))
        for listener in listeners:
            assert listener.stream is not None
            listener.stream.close()
        for task in speaking:
            await cancel_and_wait(task)
    assert [pitch_hz(sound, 16_000) for sound in heard] == [
        pytest.approx(hz, abs=NEAR_HZ) for hz in pitches
    ]


@asynccontextmanager
async def rooms(
    server: LiveKitServer, count: int
) -> AsyncIterator[list[tuple[rtc.Room, rtc.Room]]]:
    pairs = [(rtc.Room(), rtc.Room()) for _ in range(count)]
    for place, (user, agent) in enumerate(pairs):
        await user.connect(server.url, token_for(server, "user", f"lab{place}"))
        await agent.connect(server.url, token_for(server, "agent", f"lab{place}"))
    try:
        yield pairs
    finally:
        for pair in pairs:
            for room in pair:
                await room.disconnect()


# --- the agent's voice ---


class Stage:
    """An agent that speaks through `RoomSpeaker`, and one user's ear. Times are of one clock."""

    def __init__(self, speaker: RoomSpeaker, ear: Ear, clock: MonotonicClock) -> None:
        self.speaker = speaker
        self.ear = ear
        self.clock = clock
        self.reports: list[tuple[float, str, int]] = []

    def on_played(self, utterance_id: str, seq: int) -> None:
        self.reports.append((self.clock.now_ms(), utterance_id, seq))

    async def say(self, utterance_id: str, sound: Int16, seq: int = 0) -> None:
        """From frame `seq` on, 160 ms ahead of real time, as a session does."""
        frames = sound.size // FRAME_SAMPLES
        began_ms = self.clock.now_ms()
        self.speaker.begin(utterance_id, seq)
        for place in range(seq, frames):
            due_ms = began_ms + (place - seq) * FRAME_MS - 160
            await asyncio.sleep(max(0.0, due_ms - self.clock.now_ms()) / 1000)
            pcm = sound[place * FRAME_SAMPLES : (place + 1) * FRAME_SAMPLES].tobytes()
            self.speaker.send(SpeechFrame(utterance_id, place, place * FRAME_MS, pcm))
        self.speaker.end(utterance_id)

    async def until_reported(self, utterance_id: str, seq: int) -> None:
        await until(lambda: any(r[1] == utterance_id and r[2] >= seq for r in self.reports))


@asynccontextmanager
async def on_stage(server: LiveKitServer) -> AsyncIterator[Stage]:
    clock, ear = MonotonicClock(), Ear()
    async with joined(server, "user") as user, joined(server, "agent") as agent:
        source = speech_source()
        stage: Stage
        speaker = RoomSpeaker(
            RtcSink(source), clock, lead_ms=20, on_played=lambda u, seq: stage.on_played(u, seq)
        )
        stage = Stage(speaker, ear, clock)
        streams: list[MicStream] = []

        def listen(track: rtc.RemoteAudioTrack, *_: object) -> None:
            def hear(samples: Int16) -> None:
                ear.hear(clock.now_ms(), samples)

            streams.append(MicStream(track, hear, sample_rate=SAMPLE_RATE))

        user.on("track_subscribed", listen)
        track = rtc.LocalAudioTrack.create_audio_track("voice", source)
        options = rtc.TrackPublishOptions(source=rtc.TrackSource.SOURCE_MICROPHONE)
        await agent.local_participant.publish_track(track, options)
        running = asyncio.create_task(speaker.run())
        await until(lambda: ear.heard)
        try:
            yield stage
        finally:
            await cancel_and_wait(running)
            for stream in streams:
                stream.close()
            await source.aclose()


def voice(hz: float, ms: int) -> Int16:
    return (tone(hz, ms, SAMPLE_RATE) * 32767).astype(np.int16)


def chirp(ms: int) -> Int16:
    """1 Hz higher every millisecond, from 300 Hz: its pitch says where in it one is."""
    time = np.arange(SAMPLE_RATE * ms // 1000) / SAMPLE_RATE
    return (9000 * np.sin(2 * np.pi * (300 * time + 500 * time**2))).astype(np.int16)


async def test_what_is_said_is_heard_in_order_without_gaps(livekit: LiveKitServer) -> None:
    async with on_stage(livekit) as stage:
        began_ms = stage.clock.now_ms()
        # Back to back: the second one is begun while the first one still plays.
        await stage.say("u1", voice(400, 600))
        await stage.say("u2", voice(800, 600))
        await stage.until_reported("u2", 29)
        await asyncio.sleep(0.5)
        await stage.say("u3", voice(1200, 600))
        await stage.until_reported("u3", 29)
        await until(lambda: stage.ear.quiet_ms() > 100)
        heard = stage.ear.since(began_ms)

    blocks = heard[: heard.size // 4800 * 4800].reshape(-1, 4800)
    loud = [block for block in blocks if level(block) > 3000]
    pitches = [round(pitch_hz(block, SAMPLE_RATE), -2) for block in loud]
    assert [hz for i, hz in enumerate(pitches) if i == 0 or pitches[i - 1] != hz] == [
        400, 800, 1200,
    ]  # fmt: skip
    reports = [(name, seq) for _, name, seq in stage.reports]
    assert reports == sorted(reports)
    assert {name: max(s for n, s in reports if n == name) for name, _ in reports} == {
        "u1": 29, "u2": 29, "u3": 29,
    }  # fmt: skip
    assert stage.speaker.dropped == 0


def level(samples: Int16) -> float:
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))


async def test_a_flush_is_silence_and_a_resume_goes_on_from_there(livekit: LiveKitServer) -> None:
    """However long the way to the ear: what is heard at a cut says where we were."""
    ends_ms, begins_ms, committed_ms = [], [], []
    async with on_stage(livekit) as stage:
        seq = -1
        for cut in (20, 33, 47, 60):
            since_ms = stage.clock.now_ms()
            saying = asyncio.create_task(stage.say("u1", chirp(2000), seq + 1))
            await stage.until_reported("u1", cut)
            seq = stage.speaker.flush("u1")
            await until(lambda: stage.ear.quiet_ms() > 300)
            await cancel_and_wait(saying)
            assert stage.speaker.heard_seq("u1") == seq
            heard = loud_part(stage.ear.since(since_ms))
            begins_ms.append(place_ms(heard[:EDGE]) - EDGE_MS / 2)
            ends_ms.append(place_ms(heard[-EDGE:]) + EDGE_MS / 2)
            committed_ms.append((seq + 1) * FRAME_MS)

    errors = np.array(ends_ms) - committed_ms
    # Without the flush it would have gone on to 2000.
    assert np.median(np.abs(errors)) < 60
    # All but the first began where the one before had ended; the frame that was cut comes again.
    assert np.array(begins_ms[1:]) == pytest.approx(np.array(committed_ms[:-1]), abs=60)


EDGE_MS = 50
EDGE = SAMPLE_RATE * EDGE_MS // 1000


def place_ms(part: Int16) -> float:
    """Where in `chirp` this is, at its middle."""
    return pitch_hz(part, SAMPLE_RATE) - 300


def loud_part(samples: Int16) -> Int16:
    loud = np.flatnonzero(np.abs(samples) > 2000)
    return samples[loud[0] : loud[-1] + 1]
