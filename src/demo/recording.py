"""What a conversation left behind: both voices on one time line, and every event with its time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from src.audio.pcm import SAMPLE_RATE, Int16
from src.client.session import Flushed
from src.rpc.ws_events import BargeIn, Heard, Latency, ServerEvent, Speech, TranscriptEvent

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
    """One pause of the agent and the verdict that followed it."""

    flush: Flushed
    verdict: str
    verdict_ms: float

    @property
    def edge_ms(self) -> float:
        return float(self.flush.edge_ms)

    @property
    def silence_ms(self) -> float:
        """When the client's buffer had fallen silent."""
        return self.flush.silent_ms or self.flush.received_ms


@dataclass
class Recording:
    """`mic` is 16 kHz, `agent` 48 kHz; both begin at 0 ms, and so do the events' times."""

    mic: Int16
    agent: Int16
    events: list[Timed] = field(default_factory=list)
    said: list[Said] = field(default_factory=list)
    flushes: list[Flushed] = field(default_factory=list)

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
        """The last word on each turn: a turn that went on after a pause is transcribed again."""
        by_turn = {event.turn_id: event for _, event in self.of(TranscriptEvent) if event.final}
        return list(by_turn.values())

    def latency_of(self, turn_id: str) -> Latency | None:
        found = [event for _, event in self.of(Latency) if event.turn_id == turn_id]
        return found[-1] if found else None

    def heard(self) -> list[Heard]:
        return [event for _, event in self.of(Heard)]

    def cuts(self) -> list[Cut]:
        """Every pause of the agent with the verdict that followed it."""
        verdicts = [(at, event) for at, event in self.of(BargeIn) if event.verdict != "pending"]
        return [
            Cut(flush, verdict.verdict, at)
            for flush, (at, verdict) in zip(self.flushes, verdicts, strict=False)
        ]

    def stereo(self) -> Int16:
        """48 kHz, two columns: the user left, the agent right."""
        from src.audio.resample import StreamResampler

        up = StreamResampler(MIC_RATE).push(self.mic.astype(np.float32) / 32768.0, last=True)
        left = np.rint(np.clip(up, -1, 1) * 32767).astype(np.int16)
        out: Int16 = np.zeros((max(left.size, self.agent.size), 2), dtype=np.int16)
        out[: left.size, 0] = left
        out[: self.agent.size, 1] = self.agent
        return out
