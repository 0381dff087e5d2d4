"""One worker over gRPC: leases that are kept alive, utterances whose frames are pulled."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

import grpc
from grpc.aio import AioRpcError

from src.common.tasks import cancel_and_wait
from src.orchestrator.ports import ControlAction, SpeechFrame, VoiceInfo, Word
from src.rpc.errors import (
    CODE_KEY,
    DuplexError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
    from_rpc_error,
)
from src.rpc.generated import tts_pb2 as pb
from src.rpc.generated.tts_pb2_grpc import TTSStub
from src.rpc.tls import ClientTls

log = logging.getLogger(__name__)

QUICK_MS = 5_000
CONTROL_MS = 2_000
LOAD_MS = 300_000
MAX_UNSENT_CHARS = 1_000_000

_ACTIONS = {
    ControlAction.PAUSE: pb.PAUSE,
    ControlAction.RESUME: pb.RESUME,
    ControlAction.STOP: pb.STOP,
}
_CHANNEL = (
    # Otherwise two channels to one address share one connection.
    ("grpc.use_local_subchannel_pool", 1),
    # A worker that restarts is reachable again within a quarantine.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A peer that vanished without a word is noticed on an open stream.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
)
# Without our code in the trailer these come from gRPC itself: nobody at the other end answered.
_LOST = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,
    }
)

ResponseT = TypeVar("ResponseT")


class WorkerClient:
    """Two connections to one worker, so that Control never waits behind audio or a slow load.

    `on_lost` is told when the worker does not answer at all. `tls` None: in plain text.
    """

    def __init__(
        self,
        name: str,
        target: str,
        on_lost: Callable[[], None] = lambda: None,
        tls: ClientTls | None = None,
    ) -> None:
        self.name = name
        self.target = target
        self.tls = tls
        self._on_lost = on_lost
        self._channels = [_channel(target, tls) for _ in range(2)]
        self.in_flight = 0
        audio, control = self._channels
        # The first call on it may be a pause, which should not wait for a connection.
        control.get_state(try_to_connect=True)
        self._stub = TTSStub(audio)  # type: ignore[no-untyped-call]
        self._control_stub = TTSStub(control)  # type: ignore[no-untyped-call]

    async def start_session(
        self, request: pb.StartSessionReq, timeout_ms: int
    ) -> pb.StartSessionResp:
        return await self._explained(self._stub.StartSession, request, timeout_ms)

    async def renew_session(self, request: pb.StartSessionReq) -> None:
        await self._call(self._control_stub.StartSession, request, QUICK_MS)

    async def end_session(self, session_id: str) -> None:
        request = pb.EndSessionReq(session_id=session_id)
        await self._call(self._control_stub.EndSession, request, CONTROL_MS)

    async def control(self, request: pb.ControlReq) -> pb.ControlResp:
        return await self._call(self._control_stub.Control, request, CONTROL_MS)

    async def list_models(self) -> list[pb.ModelInfo]:
        response: pb.ListModelsResp = await self._call(
            self._control_stub.ListModels, pb.ListModelsReq(), CONTROL_MS
        )
        return list(response.models)

    async def load_model(self, model_id: str, *, wait: bool) -> pb.LoadModelResp:
        request = pb.LoadModelReq(model_id=model_id, wait=wait)
        return await self._explained(self._stub.LoadModel, request, LOAD_MS if wait else QUICK_MS)

    async def unload_model(self, model_id: str, *, ignore_ttl: bool) -> pb.UnloadModelResp:
        request = pb.UnloadModelReq(model_id=model_id, ignore_ttl=ignore_ttl)
        return await self._explained(self._stub.UnloadModel, request, QUICK_MS)

    def synthesize(self, chunks: AsyncIterator[pb.TextChunk]) -> Any:
        """No deadline: an utterance lasts as long as it is spoken."""
        return self._stub.Synthesize(chunks)

    async def _explained(
        self, method: Callable[..., Awaitable[ResponseT]], request: object, timeout_ms: int
    ) -> ResponseT:
        """For the calls whose error is read by people: gRPC cannot say what TLS did not like."""
        try:
            return await self._call(method, request, timeout_ms)
        except Unavailable as error:
            cause = error.__cause__
            if self.tls is None or not isinstance(cause, AioRpcError) or _answered(cause):
                raise
            complaint = await self.tls.complaint(self.target)
            if not complaint:
                raise
            log.warning("no TLS", extra={"worker": self.name, "reason": complaint})
            raise Unavailable(f"worker {self.name} at {self.target}: {complaint}") from cause

    async def _call(
        self, method: Callable[..., Awaitable[ResponseT]], request: object, timeout_ms: int
    ) -> ResponseT:
        self.in_flight += 1
        try:
            return await method(request, timeout=timeout_ms / 1000)
        except AioRpcError as error:
            raise self.fault(error) from error
        finally:
            self.in_flight -= 1

    def fault(self, error: AioRpcError) -> DuplexError:
        """The worker's own error, or Unavailable when it did not get to say one."""
        if _answered(error) or error.code() not in _LOST:
            return from_rpc_error(error)
        self._on_lost()
        return Unavailable(f"worker {self.name} at {self.target} is lost: {error.details()}")

    async def aclose(self) -> None:
        for channel in self._channels:
            await channel.close()


def _answered(error: AioRpcError) -> bool:
    return any(key == CODE_KEY for key, _ in error.trailing_metadata() or ())


def _channel(target: str, tls: ClientTls | None) -> grpc.aio.Channel:
    if tls is None:
        return grpc.aio.insecure_channel(target, options=_CHANNEL)
    return grpc.aio.secure_channel(target, tls.credentials, options=_CHANNEL)


class WorkerSession:
    """A lease on one model of one worker, renewed by a task of its own until `aclose`."""

    def __init__(
        self,
        client: WorkerClient,
        request: pb.StartSessionReq,
        started: pb.StartSessionResp,
        info: VoiceInfo,
        on_closed: Callable[[WorkerSession], Awaitable[None]],
    ) -> None:
        self.info = info
        self.client = client
        self.session_id = started.session_id
        self._on_closed = on_closed
        self._closed = False
        # Renewing is starting again: what the worker settled on, not what was asked.
        self._renewal = pb.StartSessionReq()
        self._renewal.CopyFrom(request)
        self._renewal.session_id = started.session_id
        self._renewal.model_id = started.model_id
        self._keeper = asyncio.create_task(
            self._keep_alive(started.lease_ttl_ms / 3000), name=f"keep alive {self.session_id}"
        )

    def utterance(self, utterance_id: str) -> WorkerUtterance:
        return WorkerUtterance(self.client, self.session_id, utterance_id)

    async def _keep_alive(self, interval_s: float) -> None:
        while interval_s > 0:
            await asyncio.sleep(interval_s)
            try:
                await self.client.renew_session(self._renewal)
            except Unavailable:
                log.info("lease not renewed", extra={"worker": self.client.name})
            except DuplexError as error:
                log.warning("lease lost", extra={"worker": self.client.name, "code": error.code})
                return

    async def aclose(self) -> None:
        """End the session and give its place back. A worker that is gone is no error."""
        if self._closed:
            return
        self._closed = True
        try:
            await cancel_and_wait(self._keeper)
            with suppress(NotFound, Unavailable):
                await self.client.end_session(self.session_id)
        finally:
            await self._on_closed(self)


class WorkerUtterance:
    """One Synthesize call, made when there is something to say.

    Frames are pulled from the call as they are asked for, so they are bounded by HTTP/2 flow
    control and the worker's pacing. Text that waits to be sent is joined into one chunk.
    """

    def __init__(self, client: WorkerClient, session_id: str, utterance_id: str) -> None:
        self.utterance_id = utterance_id
        self._client = client
        self._session_id = session_id
        # Bounded by MAX_UNSENT_CHARS; more is refused with an error.
        self._unsent: list[str] = []
        self._unsent_chars = 0
        self._finished = False
        self._wake = asyncio.Event()
        self._call: Any = None
        self._last_seq = -1
        self._stopped = False
        self._ended = False

    def write(self, text: str) -> None:
        """After the end nothing is sent. Raises FailedPrecondition after `finish`."""
        if self._ended or not text:
            return
        if self._finished:
            raise FailedPrecondition(f"utterance {self.utterance_id!r} was finished already")
        if self._unsent_chars + len(text) > MAX_UNSENT_CHARS:
            raise InvalidArgument(f"an utterance takes at most {MAX_UNSENT_CHARS} characters")
        self._unsent.append(text)
        self._unsent_chars += len(text)
        self._send()

    def finish(self) -> None:
        if not self._finished and not self._ended:
            self._finished = True
            self._send()

    def _send(self) -> None:
        self._wake.set()
        if self._call is None:
            self._call = self._client.synthesize(self._chunks())

    async def _chunks(self) -> AsyncIterator[pb.TextChunk]:
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._ended:
                return
            text, final = "".join(self._unsent), self._finished
            self._unsent, self._unsent_chars = [], 0
            yield pb.TextChunk(
                text=text,
                is_final=final,
                session_id=self._session_id,
                utterance_id=self.utterance_id,
            )
            if final:
                return

    async def frames(self) -> AsyncIterator[SpeechFrame]:
        if self._call is None:
            self._call = self._client.synthesize(self._chunks())
        try:
            async for frame in self._call:
                if not frame.last:
                    self._last_seq = frame.seq
                    yield _speech_frame(frame)
        except AioRpcError as error:
            if not self._ended:
                raise self._fault(error) from error
        except asyncio.CancelledError:
            # gRPC raises this in the reader also when another task ended the call.
            if not self._ended or _being_cancelled():
                raise
        finally:
            self._end()

    def _fault(self, error: AioRpcError) -> DuplexError:
        fault = self._client.fault(error)
        if isinstance(fault, NotFound):
            return Unavailable(f"worker {self._client.name} lost this session: {fault.message}")
        return fault

    async def control(self, action: ControlAction) -> int:
        """Raises Unavailable when the worker is gone."""
        if self._ended:
            return self._last_seq
        request = pb.ControlReq(
            session_id=self._session_id, action=_ACTIONS[action], utterance_id=self.utterance_id
        )
        try:
            answer = await self._client.control(request)
        except NotFound as error:
            raise Unavailable(error.message) from error
        self._stopped = self._stopped or action is ControlAction.STOP
        return answer.last_seq

    async def aclose(self) -> None:
        if self._call is not None and not (self._ended or self._stopped):
            # By the time it has answered, the session is free for its next utterance.
            with suppress(DuplexError):
                await self.control(ControlAction.STOP)
        self._end()

    def _end(self) -> None:
        self._ended = True
        self._wake.set()
        if self._call is not None and not self._call.done():
            self._call.cancel()


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    cancelling = getattr(task, "cancelling", None)  # Python 3.11
    return cancelling is not None and cancelling() > 0


def _speech_frame(frame: pb.AudioFrame) -> SpeechFrame:
    return SpeechFrame(
        utterance_id=frame.utterance_id,
        seq=frame.seq,
        media_time_ms=frame.media_time_ms,
        pcm=frame.pcm,
        words=tuple(map(_word, frame.words)) if frame.words else (),
    )


def _word(mark: pb.WordMark) -> Word:
    return Word(
        text=mark.text,
        start_ms=mark.start_ms,
        end_ms=mark.end_ms,
        char_start=mark.char_start,
        char_end=mark.char_end,
        estimated=mark.estimated,
    )
