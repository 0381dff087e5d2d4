"""How a session takes turns: the section `duplex` of configs/orchestrator.yaml."""

from __future__ import annotations

from pydantic import Field

from src.common.config import StrictModel
from src.orchestrator.phrases import BACK_CHANNELS, INTERRUPTIONS, UNFINISHED


class DuplexSettings(StrictModel):
    """How a session takes turns. Times are milliseconds unless the name says otherwise."""

    verdict_window_ms: int = Field(
        600, ge=100, le=3000, description="after a speech edge, the verdict falls by then"
    )
    sustained_ms: int = Field(
        500, ge=100, le=3000, description="confirmed speech this long is an interruption"
    )
    flush_ack_ms: int = Field(
        150, ge=0, le=1000, description="a resume waits this long for the client to say what it had"
        " played, so that nothing is heard twice",
    )  # fmt: skip
    back_channels: tuple[str, ...] = Field(
        BACK_CHANNELS, description="words that say 'go on' and never take the turn"
    )
    interruptions: tuple[str, ...] = Field(
        INTERRUPTIONS, description="words that take the turn however short they are"
    )
    unfinished: tuple[str, ...] = Field(
        UNFINISHED, description="words after which more must come, whatever mark they end with"
    )
    speculative_llm: bool = Field(
        True, description="answer the words known at the first silence; dropped if they change"
    )
    greeting: str = Field("", max_length=2000, description="the agent's first words")
    preroll_ms: int = Field(
        300, ge=0, le=2000, description="audio before the edge that the recogniser gets too"
    )
    lead_ms: int = Field(
        160, ge=40, le=1000, description="how far ahead of its playing a frame may be sent"
    )
    ack_margin_ms: int = Field(
        1000, ge=100, le=10_000, description="a frame counts as heard this long after it was due,"
        " for clients that do not say what they played",
    )  # fmt: skip
    kept_ms: int = Field(
        3000, ge=500, le=30_000, description="audio kept until heard; beyond it the worker waits"
    )
    max_reply_chars: int = Field(8000, ge=100, description="a reply is cut off beyond this")
    max_reply_s: int = Field(180, ge=5, description="a reply's audio is cut off beyond this")
    max_queued_says: int = Field(8, ge=1, description="`speak` texts that may wait for their turn")
