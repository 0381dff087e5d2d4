"""One Synthesize call: text goes out as it is pushed, frames and words go to LiveKit's emitter."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from grpc.aio import AioRpcError
from livekit.agents import APITimeoutError, tts
from livekit.agents.utils import aio

from src.audio.pcm import FRAME_BYTES
from src.livekit_plugin.errors import api_error
from src.livekit_plugin.fleet import Lease
from src.livekit_plugin.transcript import Transcript
from src.rpc.generated import tts_pb2 as pb

Text = aio.Chan[Any]
"""Strings, and flush marks between them; closed when the text is complete."""


class Utterance:
    """What is read ahead is bounded by the worker, which paces its frames to real time."""

    def __init__(
        self,
        utterance_id: str,
        lease: Lease,
        text: Text,
        emitter: tts.AudioEmitter,
        on_first_text: Callable[[], None],
    ) -> None:
        self._utterance_id = utterance_id
        self._lease = lease
        self._text = text
        self._emitter = emitter
        self._on_first_text = on_first_text
        self._transcript = Transcript()
        self._text_complete = False
        self._frames = 0

    async def run(self, stall_s: float) -> None:
        """Until all is spoken. Raises APIError; APITimeoutError if frames that are due stay away.

        Cancelling it cancels the call, which stops the worker.
        """
        call = self._lease.synthesize(self._chunks())
        reader = asyncio.create_task(self._read(call), name="read frames")
        try:
            await self._watch(reader, stall_s)
        finally:
            await aio.cancel_and_wait(reader)
            call.cancel()

    async def _chunks(self) -> AsyncIterator[pb.TextChunk]:
        async for data in self._text:
            if isinstance(data, str):
                self._on_first_text()
                self._transcript.write(data)
                yield self._chunk(text=data)
            else:
                yield self._chunk(flush=True)
        self._text_complete = True
        yield self._chunk(is_final=True)

    def _chunk(
        self, *, text: str = "", flush: bool = False, is_final: bool = False
    ) -> pb.TextChunk:
        return pb.TextChunk(
            text=text,
            flush=flush,
            is_final=is_final,
            session_id=self._lease.session_id,
            utterance_id=self._utterance_id,
        )

    async def _read(self, call: Any) -> None:
        try:
            async for frame in call:
                self._on_frame(frame)
        except AioRpcError as error:
            raise api_error(error, self._lease.target) from error

    async def _watch(self, reader: asyncio.Task[None], stall_s: float) -> None:
        """While text may still come, silence is no fault; after that it is."""
        while not reader.done():
            before = (self._text_complete, self._frames)
            await asyncio.wait([reader], timeout=stall_s)
            if not reader.done() and before == (True, self._frames):
                raise APITimeoutError(f"worker {self._lease.target} stopped in mid-utterance")
        reader.result()

    def _on_frame(self, frame: pb.AudioFrame) -> None:
        pieces = [self._transcript.word(mark) for mark in frame.words]
        if frame.last:
            pieces.append(self._transcript.rest())
        self._emitter.push_timed_transcript([piece for piece in pieces if piece is not None])
        if frame.pcm:
            self._frames += 1
            self._emitter.push(frame.pcm)
        elif frame.last and not self._frames and self._transcript.text.strip():
            # Nothing in it can be spoken ("…", an emoji), which LiveKit would take for a failure.
            self._emitter.push(bytes(FRAME_BYTES))
