"""What a front end shows of `lk.transcription`: segments, and the streams that spell them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Chunk:
    """A piece of a caption; a new `stream_id` in the same segment replaces what was there."""

    at_ms: float
    stream_id: str
    text: str


@dataclass
class Caption:
    """One transcription segment as a front end shows it. `identity`: whose words they are."""

    segment_id: str
    identity: str
    track_sid: str = ""
    final: bool = False
    closed: bool = False
    chunks: list[Chunk] = field(default_factory=list)
    stream_id: str = ""

    @property
    def text(self) -> str:
        """The newest stream's words."""
        return "".join(chunk.text for chunk in self.chunks if chunk.stream_id == self.stream_id)
