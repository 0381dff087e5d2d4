"""One slot as the engine's thread sees it: what it reads, where it stands, what it may still draw.

A text goes IDLE → READING → DRAWING → IDLE, as often as it has pieces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from enum import Enum, auto

import numpy as np

from src.rpc.errors import Internal
from src.tts.families.csm.context import Context, Pace, halves
from src.tts.families.csm.outlet import Outlet
from src.tts.families.csm.ports import Codes, CsmModel, Embeddings, Row, Voice
from src.tts.segmenter import speakable


class State(Enum):
    IDLE = auto()
    READING = auto()
    """Positions are left before its first frame."""
    DRAWING = auto()


class Speaker:
    """Made by the consumer's thread, used by the engine's; only `outlet` is shared."""

    def __init__(
        self, slot: int, voice: Voice, seed: int, outlet: Outlet, context: Context
    ) -> None:
        self.slot = slot
        self.outlet = outlet
        self.state = State.IDLE
        self.turn = 0
        self.began = 0
        """When the text was begun that it reads, in the order of all; the first is read first."""
        self.drew_at = 0
        """Its last frame's number among those of all slots."""
        self.frames_left = 0
        """So many may be drawn before the segment is cut."""
        self._voice = voice
        self._seed = seed
        self._drawn = 0
        self._context = context
        self._assigned = False
        self._texts: deque[str] = deque()
        self._input: Embeddings | None = None
        """Before the first tick: what is left to read."""
        self._position = 0

    @property
    def gone(self) -> bool:
        """Nobody waits for what it would compute."""
        return self.outlet.closed or self.outlet.error is not None

    @property
    def stale(self) -> bool:
        """Its consumer has dropped the text that it is at."""
        return self.turn != self.outlet.turn

    @property
    def left(self) -> int:
        """Positions to read; the one after them is the input of the first tick."""
        return len(self._input) - 1 if self._input is not None else 0

    @property
    def over(self) -> bool:
        """The turn's text is spoken."""
        return self.state is State.IDLE and not self._texts

    def assign(self, model: CsmModel) -> bool:
        """Takes the slot over, at the first call. False: it had it."""
        if self._assigned:
            return False
        self._assigned = True
        model.assign(self.slot, self._voice)
        return True

    def take(self, texts: Iterable[str], turn: int) -> None:
        """Another turn; what is left of the last one is given up."""
        if self.state is not State.IDLE:
            self._context.cut()
        self.state = State.IDLE
        self._input = None
        self._texts = deque(texts)
        self.turn = turn

    def begin(self, model: CsmModel, pace: Pace, order: int) -> bool:
        """Start with the next piece of text; False: there is none with anything to say."""
        text, embeddings = self._next_piece(model, pace)
        if embeddings is None:
            return False
        opening = self._context.begin(embeddings, pace.most(text))
        if opening.frames < 1:
            raise Internal("the voice prompt leaves no room to speak in")
        parts = [_embedded(part, model) for part in opening.parts]
        self._input = model.join(parts) if len(parts) > 1 else parts[0]
        self._position, self.frames_left = opening.position, opening.frames
        self.began = order
        self.state = State.READING
        return True

    def read(self, model: CsmModel, positions: int) -> None:
        """Read so many positions of those left; after the last it may draw."""
        rest = self._input
        if rest is None:
            return
        end = self._position + positions
        while self._position < end:
            size = min(end - self._position, model.max_prefill)
            model.prefill(self.slot, self._position, rest[0:size])
            rest = rest[size : len(rest)]
            self._position += size
        self._input = rest
        if len(rest) == 1:
            model.set_input(self.slot, rest)
            self._input = None
            self.state = State.DRAWING

    def row(self) -> Row:
        voice = self._voice
        return Row(
            slot=self.slot,
            position=self._context.position,
            seed=self._seed,
            frame=self._drawn,
            sampling=voice.sampling,
            adapter=voice.adapter,
        )

    def drew(self, codes: Codes, at: int) -> bool:
        """[1, codebooks] of sound. True: it was the last that this segment may have."""
        self._count(at)
        self._context.drew(codes)
        self.frames_left -= 1
        if self.frames_left:
            return False
        self._context.cut()
        self.state = State.IDLE
        return True

    def ended(self, at: int) -> None:
        self._count(at)
        self._context.ended()
        self.state = State.IDLE

    def _count(self, at: int) -> None:
        self._drawn += 1
        self.drew_at = at

    def _next_piece(self, model: CsmModel, pace: Pace) -> tuple[str, Embeddings | None]:
        """A piece that the positions can hold; what cannot be held is halved."""
        while self._texts:
            text = self._texts.popleft()
            if not speakable(text):
                continue
            embeddings = model.embed_text(text, self._voice.speaker)
            if len(text) < 2 or self._context.fits(len(embeddings), pace.likely(text)):
                return text, embeddings
            self._texts.extendleft(reversed(halves(text)))
        return "", None


def _embedded(part: Embeddings | Codes, model: CsmModel) -> Embeddings:
    return model.embed_frames(part) if isinstance(part, np.ndarray) else part
