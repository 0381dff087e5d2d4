"""Samples into and out of livekit.rtc, for many rooms in one process.

The SDK hands every audio event to every stream and to every waiting `capture_frame` of the process:
N rooms cost N² wakeups. Here an event goes to the one stream it is for, by its handle, and a push
does not wait for its acknowledgement. That needs names the SDK keeps to itself; this is the only
file that knows them. A version that lacks them is served by its public classes, with one warning.
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from livekit import rtc

from src.audio.pcm import SAMPLE_RATE, Int16, from_bytes
from src.orchestrator.ports import MIC_RATE, MIC_STEP_MS

log = logging.getLogger(__name__)

BACKLOG_MS = 2_000
_BACKLOG_STEPS = BACKLOG_MS // MIC_STEP_MS
# The native side echoes the id a push was given; its own count from 1 never gets here.
_OUR_PUSHES = 1 << 62
_MAX_STOCK_PUSHES = 50

Deliver = Callable[[bytes | None], None]
"""10 ms of s16le mono, or None: the track has ended. Called on any thread, one call at a time."""


class MicStream:
    """What a remote track sounds like, whatever its own rate and channels.

    `on_samples` gets 10 ms of mono int16 at `sample_rate` Hz per call, on the event loop that made
    the stream. `on_end` is called once when the track has ended, not when the stream was closed
    from here. The SDK ends a track only when nobody holds it any more: whoever does should go by
    the room's `track_unsubscribed`.

    What the loop has not taken is bounded to 2 s: the oldest step is dropped and counted in
    `dropped`. Close it, unless it has ended. Raises RuntimeError without a running loop.
    """

    def __init__(
        self,
        track: rtc.RemoteAudioTrack,
        on_samples: Callable[[Int16], None],
        on_end: Callable[[], None] | None = None,
        *,
        sample_rate: int = MIC_RATE,
    ) -> None:
        self.dropped = 0
        self._loop = asyncio.get_running_loop()
        self._on_samples = on_samples
        self._on_end = on_end
        self._lock = threading.Lock()
        self._backlog: deque[bytes] = deque()
        self._ended = False
        self._closed = False
        self._woken = False
        self._tap = _door().listen(track, sample_rate, self._deliver)

    def close(self) -> None:
        """No callback is made after this. Idempotent; the loop may be gone."""
        if self._closed:
            return
        with self._lock:
            self._closed = True
            self._backlog.clear()
        self._tap.close()

    def _deliver(self, pcm: bytes | None) -> None:
        with self._lock:
            if self._closed:
                return
            if pcm is None:
                self._ended = True
            else:
                self._keep(pcm)
            woken, self._woken = self._woken, True
        if not woken:
            try:
                self._loop.call_soon_threadsafe(self._drain)
            except RuntimeError:
                # The loop is closed: nobody will ever listen again.
                self.close()

    def _keep(self, pcm: bytes) -> None:
        if len(self._backlog) >= _BACKLOG_STEPS:
            self._backlog.popleft()
            self.dropped += 1
        self._backlog.append(pcm)

    def _drain(self) -> None:
        """One wakeup for all that has come. A callback may close the stream in mid-batch."""
        with self._lock:
            batch, self._backlog = self._backlog, deque()
            ended, self._woken = self._ended, False
        for pcm in batch:
            if self._closed:
                return
            self._on_samples(from_bytes(pcm))
        if ended and not self._closed:
            self.close()
            if self._on_end is not None:
                self._on_end()


def push(source: rtc.AudioSource, pcm: bytes) -> None:
    """Queue 48 kHz mono s16le of any length for playback; returns at once, on the event loop.

    The caller paces: what does not fit into the source's queue is lost. Of a closed source, nothing
    happens.
    """
    if pcm:
        _door().push(source, pcm)


def clear(source: rtc.AudioSource) -> None:
    """Forget what was not played yet. Of a closed source, nothing happens."""
    _door().clear(source)


class Tap(Protocol):
    def close(self) -> None:
        """Idempotent."""
        ...


class Door(Protocol):
    """How samples pass between us and the SDK."""

    def listen(self, track: rtc.Track, sample_rate: int, deliver: Deliver) -> Tap: ...

    def push(self, source: rtc.AudioSource, pcm: bytes) -> None: ...

    def clear(self, source: rtc.AudioSource) -> None: ...


_the_door: Door | None = None


def _door() -> Door:
    global _the_door
    if _the_door is None:
        _the_door = _open_door()
    return _the_door


def _open_door() -> Door:
    try:
        return ByHandle()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        log.warning(
            "livekit %s is not built as this program knows it (made for 1.1): audio goes by its"
            " public classes, which cost more with many rooms in one process",
            rtc.__version__,
            extra={"missing": str(error)},
        )
        return Stock()


# --- by handle ---


class ByHandle:
    """Takes the place of the SDK queue's `put` and passes on all that is not for us.

    Raises ImportError, AttributeError, ValueError or TypeError if a private name is not there.
    """

    def __init__(self) -> None:
        from livekit.rtc._ffi_client import FfiClient, FfiHandle
        from livekit.rtc._proto import audio_frame_pb2, ffi_pb2

        self._client = FfiClient.instance
        self._handle: Callable[[int], Any] = FfiHandle
        self._request = ffi_pb2.FfiRequest
        self._native = audio_frame_pb2.AudioStreamType.AUDIO_STREAM_NATIVE
        self._ids = itertools.count(_OUR_PUSHES)
        self._routes: dict[int, Deliver] = {}
        # Held while a stream is made, so that its first frame finds its route.
        self._making = threading.Lock()
        _check(ffi_pb2, FfiHandle, rtc.AudioSource, rtc.Track)
        queue = self._client.queue
        self._pass_on: Callable[[Any], None] = queue.put
        queue.put = self._put

    def listen(self, track: rtc.Track, sample_rate: int, deliver: Deliver) -> Tap:
        request = self._request()
        wanted = request.new_audio_stream
        wanted.track_handle = track._ffi_handle.handle
        wanted.type = self._native
        wanted.sample_rate = sample_rate
        wanted.num_channels = 1
        wanted.frame_size_ms = MIC_STEP_MS
        wanted.queue_size_frames = _BACKLOG_STEPS
        with self._making:
            answer = self._client.request(request)
            stream_id = answer.new_audio_stream.stream.handle.id
            self._routes[stream_id] = deliver
        return _Handle(self._handle(stream_id))

    def push(self, source: rtc.AudioSource, pcm: bytes) -> None:
        if source._ffi_handle.disposed:
            return
        # The native side copies the samples before the call returns.
        samples = ctypes.create_string_buffer(pcm, len(pcm))
        request = self._request()
        capture = request.capture_audio_frame
        capture.source_handle = source._ffi_handle.handle
        capture.request_async_id = next(self._ids)
        capture.buffer.data_ptr = ctypes.addressof(samples)
        capture.buffer.sample_rate = SAMPLE_RATE
        capture.buffer.num_channels = 1
        capture.buffer.samples_per_channel = len(pcm) // 2
        self._client.request(request)

    def clear(self, source: rtc.AudioSource) -> None:
        if not source._ffi_handle.disposed:
            source.clear_queue()

    def _put(self, event: Any) -> None:
        """On one of the SDK's threads, for every event of the process."""
        kind = event.WhichOneof("message")
        if kind == "audio_stream_event":
            with self._making:
                route = self._routes.get(event.audio_stream_event.stream_handle)
            if route is not None:
                self._deliver(route, event.audio_stream_event)
                return
        if kind == "capture_audio_frame" and event.capture_audio_frame.async_id >= _OUR_PUSHES:
            return
        self._pass_on(event)

    def _deliver(self, route: Deliver, event: Any) -> None:
        if event.HasField("frame_received"):
            frame = event.frame_received.frame
            info = frame.info
            pcm = ctypes.string_at(info.data_ptr, info.samples_per_channel * info.num_channels * 2)
            self._handle(frame.handle.id).dispose()
            route(pcm)
        elif event.HasField("eos"):
            # It comes after a close, too; until then the frames under way are let go of here.
            with self._making:
                self._routes.pop(event.stream_handle, None)
            route(None)


class _Handle:
    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def close(self) -> None:
        self._handle.dispose()


def _check(ffi_pb2: Any, handle: Any, source: Any, track: Any) -> None:
    """Every private name and message field this file uses. Raises when one is not there."""
    request, event = ffi_pb2.FfiRequest(), ffi_pb2.FfiEvent()
    fields = (
        (request.new_audio_stream, "track_handle type sample_rate num_channels frame_size_ms"),
        (request.new_audio_stream, "queue_size_frames"),
        (request.capture_audio_frame, "source_handle request_async_id"),
        (
            request.capture_audio_frame.buffer,
            "data_ptr sample_rate num_channels samples_per_channel",
        ),
        (event.audio_stream_event, "stream_handle frame_received eos"),
        (event.audio_stream_event.frame_received.frame, "handle info"),
        (event.capture_audio_frame, "async_id"),
    )
    for message, names in fields:
        for name in names.split():
            getattr(message, name)
    handle.dispose  # noqa: B018
    # Both are set in `__init__`: their code is where they are named.
    for made in (source, track):
        if "_ffi_handle" not in made.__init__.__code__.co_names:
            raise AttributeError(f"{made.__name__}._ffi_handle")


# --- by the public classes ---


class Stock:
    """The same through `rtc.AudioStream` and `capture_frame`."""

    def __init__(self) -> None:
        self._pushes: set[asyncio.Task[None]] = set()

    def listen(self, track: rtc.Track, sample_rate: int, deliver: Deliver) -> Tap:
        stream = rtc.AudioStream.from_track(
            track=track,
            sample_rate=sample_rate,
            num_channels=1,
            frame_size_ms=MIC_STEP_MS,
            capacity=_BACKLOG_STEPS,
        )
        return _StockTap(stream, deliver)

    def push(self, source: rtc.AudioSource, pcm: bytes) -> None:
        """Of pushes that the SDK has not answered, 50 are kept; what comes on top is dropped."""
        if len(self._pushes) >= _MAX_STOCK_PUSHES:
            return
        frame = rtc.AudioFrame(pcm, SAMPLE_RATE, 1, len(pcm) // 2)
        # Tasks begin in the order they were made in, and each hands its frame over at its first
        # step: the order is kept.
        task = asyncio.get_running_loop().create_task(source.capture_frame(frame), name="push")
        self._pushes.add(task)
        task.add_done_callback(self._pushed)

    def clear(self, source: rtc.AudioSource) -> None:
        # That is how the SDK says that the source is closed.
        with suppress(AssertionError):
            source.clear_queue()

    def _pushed(self, task: asyncio.Task[None]) -> None:
        self._pushes.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("a push was refused", extra={"error": str(error)})


class _StockTap:
    def __init__(self, stream: rtc.AudioStream, deliver: Deliver) -> None:
        self._loop = asyncio.get_running_loop()
        self._stream = stream
        self._deliver = deliver
        self._closing = False
        self._task = self._loop.create_task(self._listen(), name="microphone")

    async def _listen(self) -> None:
        try:
            async for event in self._stream:
                self._deliver(bytes(event.frame.data))
            self._deliver(None)
        finally:
            await self._stream.aclose()

    def close(self) -> None:
        # It ends by itself after the `None` that it delivered, which may be who is calling.
        if not self._closing and not self._loop.is_closed():
            self._closing = True
            self._task.cancel()
