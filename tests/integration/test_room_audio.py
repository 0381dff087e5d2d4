"""Samples in and out of real rooms, by handle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest
from livekit import api, rtc

from src.audio.pcm import SAMPLE_RATE, Float32, Int16
from src.common.livekit_server import LiveKitServer
from src.common.tasks import cancel_and_wait, timeout
from src.demo.room_audio import Mouth
from src.orchestrator.rooms.sdk_audio import MicStream, push

PATIENCE_S = 20.0


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
    assert pitch_hz(heard, 16_000) == pytest.approx(440, abs=3)
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


async def test_what_is_pushed_is_heard_and_stock_code_goes_on_beside_it(
    livekit: LiveKitServer,
) -> None:
    """`rtc.AudioStream` and `await capture_frame` in the same process get what is theirs."""
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

    assert pitch_hz(by_handle, 16_000) == pytest.approx(440, abs=3)
    assert pitch_hz(by_stock, 16_000) == pytest.approx(700, abs=3)


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
        pytest.approx(hz, abs=3) for hz in pitches
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
