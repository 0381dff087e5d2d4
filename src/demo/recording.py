"""What a conversation left behind: both voices on one time line, and every event with its time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from src.audio.pcm import SAMPLE_RATE, Int16
from src.rpc.ws_events import BargeIn, Flush, Heard, ServerEvent, Speech, TranscriptEvent

MIC_RATE = 16_000
EventT = TypeVar("EventT")


@dataclass(frozen=True)
class Timed:
    at_ms: float
    event: ServerEvent


@dataclass(frozen=True)
class Said:
    """One clip that the scripted user spoke. `text` is empty for a noise."""

    start_ms: float
    end_ms: float
    text: str


@dataclass(frozen=True)
class Span:
    start_ms: float
    end_ms: float


@dataclass(frozen=True)
class Cut:
    """One edge in the agent's speech: when the detector called it, when the client fell silent."""

    utterance_id: str
    edge_ms: float
    flushed_ms: float
    silence_ms: float
    verdict: str
    verdict_ms: float


@dataclass
class Recording:
    """`mic` is 16 kHz, `agent` 48 kHz; both begin at 0 ms, and so do the events' times."""

    mic: Int16
    agent: Int16
    events: list[Timed] = field(default_factory=list)
    said: list[Said] = field(default_factory=list)
    silences_ms: dict[str, float] = field(default_factory=dict)

    def of(self, kind: type[EventT]) -> Iterator[tuple[float, EventT]]:
        for timed in self.events:
            if isinstance(timed.event, kind):
                yield timed.at_ms, timed.event

    @property
    def length_ms(self) -> float:
        return max(self.mic.size * 1000 / MIC_RATE, self.agent.size * 1000 / SAMPLE_RATE)

    def voice_spans(self) -> list[Span]:
        """Confirmed speech of the user, in the detector's own audio time."""
        spans, began = [], None
        for _, event in self.of(Speech):
            if event.phase == "edge":
                began = float(event.at_ms)
            elif event.phase == "rejected":
                began = None
            elif event.phase == "ended" and began is not None:
                spans.append(Span(began, float(event.at_ms)))
                began = None
        return spans

    def finals(self) -> list[TranscriptEvent]:
        return [event for _, event in self.of(TranscriptEvent) if event.final]

    def heard(self) -> list[Heard]:
        return [event for _, event in self.of(Heard)]

    def cuts(self) -> list[Cut]:
        """Every pause of the agent with the verdict that followed it."""
        out = []
        flushes = list(self.of(Flush))
        verdicts = [(at, event) for at, event in self.of(BargeIn) if event.verdict != "pending"]
        for (at, flush), (verdict_at, verdict) in zip(flushes, verdicts, strict=False):
            silence = self.silences_ms.get(f"{flush.utterance_id}@{flush.at_ms}", at)
            out.append(
                Cut(flush.utterance_id, flush.at_ms, at, silence, verdict.verdict, verdict_at)
            )
        return out

    def stereo(self) -> Int16:
        """48 kHz, two columns: the user left, the agent right."""
        from src.audio.resample import StreamResampler

        up = StreamResampler(MIC_RATE).push(self.mic.astype(np.float32) / 32768.0, last=True)
        left = np.rint(np.clip(up, -1, 1) * 32767).astype(np.int16)
        out: Int16 = np.zeros((max(left.size, self.agent.size), 2), dtype=np.int16)
        out[: left.size, 0] = left
        out[: self.agent.size, 1] = self.agent
        return out
