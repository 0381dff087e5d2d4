"""From the SDK's threads to the event loop: bounded, one wakeup per batch, never after a close."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable

import numpy as np
import pytest
from livekit import rtc

from src.audio.pcm import Int16
from src.orchestrator.rooms import sdk_audio
from src.orchestrator.rooms.sdk_audio import BACKLOG_MS, Deliver, MicStream, Stock, clear, push


class HandMadeDoor:
    """Delivers what the test says, from wherever the test is."""

    def __init__(self) -> None:
        self.delivers: list[Deliver] = []
        self.closed = 0

    def listen(self, track: rtc.Track, sample_rate: int, deliver: Deliver) -> HandMadeDoor:
        self.delivers.append(deliver)
        return self

    def close(self) -> None:
        self.closed += 1

    def push(self, source: rtc.AudioSource, pcm: bytes) -> None: ...

    def clear(self, source: rtc.AudioSource) -> None: ...


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> HandMadeDoor:
    door = HandMadeDoor()
    monkeypatch.setattr(sdk_audio, "_the_door", door)
    return door


def listening(
    on_samples: Callable[[Int16], None], on_end: Callable[[], None] | None = None
) -> MicStream:
    track: rtc.RemoteAudioTrack = object()  # type: ignore[assignment]
    return MicStream(track, on_samples, on_end)


def step(level: int) -> bytes:
    return np.full(160, level, dtype=np.int16).tobytes()


async def test_a_batch_costs_one_wakeup(
    door: HandMadeDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[int] = []
    wakeups = []
    loop = asyncio.get_running_loop()
    wake = loop.call_soon_threadsafe

    def counted(callback: Callable[[], None]) -> asyncio.Handle:
        wakeups.append(1)
        return wake(callback)

    listening(lambda samples: heard.append(int(samples[0])))
    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    for level in range(20):
        door.delivers[0](step(level))
    await asyncio.sleep(0)
    assert heard == list(range(20))
    door.delivers[0](step(20))
    await asyncio.sleep(0)
    assert (heard[-1], len(wakeups)) == (20, 2)


async def test_steps_from_another_thread_arrive_in_order(door: HandMadeDoor) -> None:
    heard: list[int] = []
    listening(lambda samples: heard.append(int(samples[0])))
    thread = threading.Thread(
        target=lambda: [door.delivers[0](step(level)) for level in range(150)]
    )
    thread.start()
    while len(heard) < 150:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    thread.join()
    assert heard == list(range(150))


async def test_a_loop_that_does_not_listen_loses_the_oldest(door: HandMadeDoor) -> None:
    heard: list[int] = []
    stream = listening(lambda samples: heard.append(int(samples[0])))
    room = BACKLOG_MS // 10
    for level in range(room + 30):
        door.delivers[0](step(level))
    await asyncio.sleep(0)
    assert heard == list(range(30, room + 30))
    assert stream.dropped == 30


async def test_a_callback_may_close_its_stream_and_then_there_is_no_other(
    door: HandMadeDoor,
) -> None:
    heard: list[int] = []

    def once(samples: Int16) -> None:
        heard.append(int(samples[0]))
        stream.close()

    ended: list[bool] = []
    stream = listening(once, lambda: ended.append(True))
    for level in range(3):
        door.delivers[0](step(level))
    door.delivers[0](None)
    await asyncio.sleep(0)
    assert (heard, ended, door.closed) == ([0], [], 1)


async def test_the_end_comes_once_after_the_last_step_and_may_close(door: HandMadeDoor) -> None:
    seen: list[object] = []

    def end() -> None:
        seen.append("end")
        stream.close()

    stream = listening(lambda samples: seen.append(int(samples[0])), end)
    door.delivers[0](step(1))
    door.delivers[0](None)
    door.delivers[0](None)
    await asyncio.sleep(0)
    assert seen == [1, "end"]
    assert door.closed == 1


async def test_a_callback_that_fails_does_not_end_the_listening(door: HandMadeDoor) -> None:
    heard: list[int] = []
    failures: list[dict[str, object]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: failures.append(context))

    def fail(samples: Int16) -> None:
        if samples[0] == 1:
            raise ValueError("one is too many")
        heard.append(int(samples[0]))

    listening(fail)
    for level in range(2):
        door.delivers[0](step(level))
    await asyncio.sleep(0)
    door.delivers[0](step(2))
    await asyncio.sleep(0)
    assert heard == [0, 2]
    assert [type(failure["exception"]) for failure in failures] == [ValueError]


def test_a_loop_that_is_gone_closes_the_stream(door: HandMadeDoor) -> None:
    async def scenario() -> MicStream:
        return listening(lambda samples: None)

    stream = asyncio.run(scenario())
    door.delivers[0](step(1))
    door.delivers[0](step(2))
    assert door.closed == 1
    stream.close()
    assert door.closed == 1


@pytest.mark.parametrize(
    "missing", ["_ffi_client.FfiHandle", "_proto.ffi_pb2.FfiRequest", "Track.__init__"]
)
def test_an_sdk_that_was_rebuilt_is_used_by_its_public_classes_with_one_warning(
    missing: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sdk_audio, "_the_door", None)
    if missing == "Track.__init__":
        monkeypatch.setattr("livekit.rtc.Track.__init__", lambda self: None)
    else:
        monkeypatch.delattr(f"livekit.rtc.{missing}")
    with caplog.at_level(logging.WARNING):
        doors = [sdk_audio._door() for _ in range(3)]
    assert isinstance(doors[0], Stock)
    assert doors[0] is doors[1] is doors[2]
    assert [record.getMessage().split(" is not")[0] for record in caplog.records] == [
        f"livekit {rtc.__version__}"
    ]


@pytest.mark.parametrize("how", ["by handle", "stock"])
async def test_a_closed_source_takes_nothing_and_says_nothing(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "stock":
        monkeypatch.setattr(sdk_audio, "_the_door", Stock())
    source = rtc.AudioSource(48_000, 1, queue_size_ms=200)
    push(source, bytes(1920))
    clear(source)
    await source.aclose()
    push(source, bytes(1920))
    clear(source)
    await asyncio.sleep(0.05)
