"""The workers, over channels of one event loop: a lease on one of them for every utterance."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from grpc.aio import AioRpcError
from livekit.agents import APIConnectionError, APIError, APITimeoutError
from livekit.agents.utils import aio

from src.common.clock import Clock, MonotonicClock
from src.livekit_plugin.errors import another_may_help, api_error, rest_ms
from src.livekit_plugin.rota import Rota
from src.rpc.generated import tts_pb2 as pb
from src.rpc.generated.tts_pb2_grpc import TTSStub
from src.rpc.tls import ClientTls

log = logging.getLogger(__name__)

REST_MS = 5_000
END_S = 2.0
# An agent that was killed gives its place back after this.
LEASE_TTL_MS = 20_000
_CHANNEL = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A worker that vanished without a word is noticed on an open stream.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
)


@dataclass(frozen=True)
class Lease:
    """A session on one worker, renewed for as long as it is held."""

    target: str
    stub: TTSStub
    started: pb.StartSessionResp

    @property
    def session_id(self) -> str:
        return self.started.session_id

    def synthesize(self, chunks: AsyncIterator[pb.TextChunk]) -> Any:
        """No deadline: an utterance lasts as long as it is spoken."""
        return self.stub.Synthesize(chunks)


class Fleet:
    """Made and used on one event loop. Connects when the first lease is asked for.

    `credentials` win over those of `tls`; both None: plain text.
    """

    def __init__(
        self,
        targets: Sequence[str],
        credentials: grpc.ChannelCredentials | None,
        clock: Clock | None = None,
        tls: ClientTls | None = None,
    ) -> None:
        self._tls = tls
        self._credentials = credentials or (tls.credentials if tls else None)
        self._clock = clock or MonotonicClock()
        self._rota = Rota(targets)
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._stubs: dict[str, TTSStub] = {}
        # Sessions that are being ended; each is over within END_S.
        self._endings: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def lease(self, asked: pb.StartSessionReq, timeout_s: float) -> AsyncIterator[Lease]:
        """On the first worker that takes it. Raises APIError when none does.

        Leaving it waits for nothing, because LiveKit clears its audio only after a cancelled
        utterance is gone: the session is ended behind it.
        """
        lease = await self._first_to_take(asked, timeout_s)
        keeper = asyncio.create_task(self._keep_alive(lease), name=f"keep {lease.session_id}")
        try:
            yield lease
        finally:
            self._end_soon(lease.target, lease.session_id)
            await aio.cancel_and_wait(keeper)

    def failed(self, target: str, error: APIError) -> None:
        """The next utterances start on other workers."""
        if for_ms := rest_ms(error, REST_MS):
            self._rota.rest(target, self._clock.now_ms(), for_ms)

    async def aclose(self) -> None:
        """After this all sessions have ended, and all connections are closed."""
        await asyncio.gather(*self._endings)
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()
        self._stubs.clear()

    async def _first_to_take(self, asked: pb.StartSessionReq, timeout_s: float) -> Lease:
        errors: list[APIError] = []
        for target in self._rota.order(self._clock.now_ms()):
            try:
                return await self._start(target, asked, timeout_s)
            except APIError as error:
                self.failed(target, error)
                if not another_may_help(error):
                    raise
                log.info("asking the next worker", extra={"worker": target, "reason": repr(error)})
                errors.append(error)
        # One that may yet take it says more than one that never will.
        raise next((error for error in errors if error.retryable), errors[0])

    async def _start(self, target: str, asked: pb.StartSessionReq, timeout_s: float) -> Lease:
        request = pb.StartSessionReq(lease_ttl_ms=LEASE_TTL_MS)
        request.MergeFrom(asked)
        # Chosen here, so that it can be ended even if the answer never comes.
        request.session_id = f"livekit-{uuid.uuid4().hex[:12]}"
        stub = self._stub(target)
        try:
            started = await stub.StartSession(request, timeout=timeout_s)
        except AioRpcError as error:
            fault = api_error(error, target)
            if isinstance(fault, APIConnectionError):
                self._end_soon(target, request.session_id)
                fault = await self._explained(fault, target)
            raise fault from error
        except BaseException:
            self._end_soon(target, request.session_id)
            raise
        self._rota.worked(target)
        return Lease(target, stub, started)

    async def _explained(self, fault: APIConnectionError, target: str) -> APIConnectionError:
        """gRPC cannot say what TLS did not like."""
        if self._tls is None or isinstance(fault, APITimeoutError):
            return fault
        complaint = await self._tls.complaint(target)
        return APIConnectionError(f"worker {target}: {complaint}") if complaint else fault

    def _stub(self, target: str) -> TTSStub:
        if target not in self._stubs:
            channel = self._channels[target] = self._channel(target)
            self._stubs[target] = TTSStub(channel)  # type: ignore[no-untyped-call]
        return self._stubs[target]

    def _channel(self, target: str) -> grpc.aio.Channel:
        if self._credentials is None:
            return grpc.aio.insecure_channel(target, options=_CHANNEL)
        return grpc.aio.secure_channel(target, self._credentials, options=_CHANNEL)

    async def _keep_alive(self, lease: Lease) -> None:
        """Text may take long to come, and a lease that nobody touches ends."""
        renewal = pb.StartSessionReq(session_id=lease.session_id, model_id=lease.started.model_id)
        interval_s = lease.started.lease_ttl_ms / 3000
        while interval_s > 0:
            await asyncio.sleep(interval_s)
            # A worker that is gone is noticed by the utterance.
            with contextlib.suppress(AioRpcError):
                await lease.stub.StartSession(renewal, timeout=interval_s)

    def _end_soon(self, target: str, session_id: str) -> None:
        ending = asyncio.create_task(self._end(target, session_id), name=f"end {session_id}")
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)

    async def _end(self, target: str, session_id: str) -> None:
        # Gone already, or its worker is: the lease ends by itself.
        with contextlib.suppress(AioRpcError):
            request = pb.EndSessionReq(session_id=session_id)
            await self._stub(target).EndSession(request, timeout=END_S)
