"""What runs on an utterance's own thread: the engine, and the rendering of what it says."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from src.audio.loudness import Loudness
from src.common.clock import Clock
from src.common.nvtx import nvtx_range
from src.rpc.errors import DuplexError, Internal
from src.rpc.generated import tts_pb2 as pb
from src.tts.handover import ComputeTurn, FrameQueue, SegmentFeed
from src.tts.render import Renderer
from src.tts.run_gate import RunGate
from src.tts.segmenter import SegmenterLimits
from src.tts.tts_base import CancelToken, Model, PcmChunk, VoiceSpec, WordMark

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Voicing:
    """Who speaks, and how it is sent."""

    model_id: str
    family: str
    model: Model
    spec: VoiceSpec
    codec: pb.Codec
    limits: SegmenterLimits | None
    """How its text is cut; None: not at all, the family takes it as it is written."""
    own_engine: bool = False


class Synthesis:
    """`run` is the thread; the rest may be read once it has ended."""

    def __init__(
        self,
        voicing: Voicing,
        frames: FrameQueue,
        loudness: Loudness | None,
        compute: RunGate,
        clock: Clock,
    ) -> None:
        self.cancel = CancelToken()
        # Whoever only waits for an engine must not keep others from computing.
        self._turn = ComputeTurn(None if voicing.own_engine else compute, self.cancel)
        self.feed = SegmentFeed(self._turn, clock)
        self.first_chunk_ms = 0.0
        """What the engine took for its first chunk, without waiting for text."""
        self._voicing = voicing
        self._step_name = f"tts.{voicing.family}"
        self._frames = frames
        self._loudness = loudness
        self._clock = clock
        self._compute_ms = 0.0
        self._audio_ms = 0

    @property
    def rtf(self) -> float | None:
        return self._compute_ms / self._audio_ms if self._audio_ms else None

    def run(self) -> None:
        """Never raises: what goes wrong is raised to the stream."""
        try:
            words = self._speak()
        except DuplexError as error:
            self._frames.finish(error=error)
        except Exception as error:
            self._frames.finish(error=self._failure(error))
        else:
            self._frames.finish(words)

    def _speak(self) -> tuple[WordMark, ...]:
        opus = self._voicing.codec == pb.CODEC_OPUS
        renderer = Renderer(self._voicing.model.native_sample_rate, self._loudness, opus=opus)
        with contextlib.closing(self._chunks()) as chunks:
            for chunk in chunks:
                frames = renderer.push(chunk)
                self._audio_ms = renderer.audio_ms
                if not self._frames.put(frames):
                    return ()
        frames, words = renderer.finish()
        self._audio_ms = renderer.audio_ms
        self._frames.put(frames)
        return words

    def _chunks(self) -> Generator[PcmChunk, None, None]:
        """The engine's chunks, with the time that each took."""
        voicing = self._voicing
        stream = voicing.model.stream(self.feed, voicing.spec, self.cancel)
        try:
            while (chunk := self._timed_next(stream)) is not None and not self.cancel.cancelled:
                yield chunk
        finally:
            _close(stream)

    def _timed_next(self, stream: Iterator[PcmChunk]) -> PcmChunk | None:
        self._turn.take()
        started, waited = self._clock.now_ms(), self.feed.waited_ms
        try:
            with nvtx_range(self._step_name):
                chunk = next(stream, None)
        finally:
            self._turn.give()
        took = self._clock.now_ms() - started - (self.feed.waited_ms - waited)
        if not self._compute_ms:
            self.first_chunk_ms = took
        self._compute_ms += took
        if chunk is not None:
            self._turn.produced(chunk.samples.size / self._voicing.model.native_sample_rate)
        return chunk

    def _failure(self, error: Exception) -> DuplexError:
        # The message of a foreign exception may quote the text, so it is neither logged nor sent.
        kind, where = type(error).__name__, traceback.format_tb(error.__traceback__)
        log.error("the engine failed", extra={"error": kind, "where": "".join(where)})
        return Internal(f"the {self._voicing.family} engine failed while speaking ({kind})")


def _close(stream: Iterator[PcmChunk]) -> None:
    if isinstance(stream, Generator):
        stream.close()
