"""The text of one utterance as it comes over the wire: checked, and cut into segments. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from src.rpc.errors import InvalidArgument
from src.rpc.generated.tts_pb2 import TextChunk
from src.tts.segmenter import Segmenter, SegmenterLimits
from src.tts.tts_base import Segment

MAX_TEXT_CHARS = 100_000
# A long text is cut piece by piece, so that the caller may let others run in between.
_PIECE_CHARS = 2_000


class TextIntake:
    """Chunks in, segments out; straight through without `limits`, for a family that takes text as
    it is written."""

    def __init__(self, session_id: str, utterance_id: str, limits: SegmenterLimits | None) -> None:
        self._ids = {"session_id": session_id, "utterance_id": utterance_id}
        self._segmenter = Segmenter(limits) if limits else None
        self._chars = 0
        self.final = False

    def take(self, chunk: TextChunk) -> Iterator[Segment]:
        """The segments that this chunk completes. Raises InvalidArgument."""
        self._check(chunk)
        for start in range(0, len(chunk.text), _PIECE_CHARS):
            yield from self._cut(chunk.text[start : start + _PIECE_CHARS])
        if chunk.flush or chunk.is_final:
            yield from self._rest()
        self.final = chunk.is_final

    def end(self) -> list[Segment]:
        """The writer went away without `is_final`: what was written is spoken."""
        self.final = True
        return self._rest()

    def _check(self, chunk: TextChunk) -> None:
        for name, known in self._ids.items():
            if getattr(chunk, name) not in ("", known):
                raise InvalidArgument(
                    f"{name} changed from {known!r} to {getattr(chunk, name)!r} in mid-utterance; "
                    "open another Synthesize call for another utterance"
                )
        if self.final:
            raise InvalidArgument(
                "text after is_final; open another Synthesize call for another utterance"
            )
        if self._chars + len(chunk.text) > MAX_TEXT_CHARS:
            raise InvalidArgument(
                f"an utterance may be at most {MAX_TEXT_CHARS} characters long; split the text"
            )

    def _cut(self, text: str) -> list[Segment]:
        start = self._chars
        self._chars += len(text)
        return [Segment(text, start)] if self._segmenter is None else self._segmenter.push(text)

    def _rest(self) -> list[Segment]:
        return [] if self._segmenter is None else self._segmenter.flush()
