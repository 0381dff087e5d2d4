"""The text of an utterance, cut into one piece per word at the times at which it is spoken."""

from __future__ import annotations

from livekit.agents.types import TimedString

from src.rpc.generated import tts_pb2 as pb


class Transcript:
    """The pieces of a whole utterance, joined, are its text: nothing lost, nothing twice.

    A piece is what stands before the word, the word, and the punctuation that hangs on to it.
    """

    def __init__(self) -> None:
        self.text = ""
        self._said = 0
        self._end_s = 0.0

    def write(self, text: str) -> None:
        self.text += text

    def word(self, mark: pb.WordMark) -> TimedString | None:
        """None: the mark is for text that was said already, or never written."""
        if not self._said < mark.char_end <= len(self.text):
            return None
        self._end_s = mark.end_ms / 1000
        return self._piece(self._with_punctuation(mark.char_end), mark.start_ms / 1000)

    def rest(self) -> TimedString | None:
        """What follows the last word, once all has been spoken."""
        if self._said == len(self.text):
            return None
        return self._piece(len(self.text), self._end_s)

    def _piece(self, end: int, start_s: float) -> TimedString:
        text = self.text[self._said : end]
        self._said = end
        return TimedString(text, start_time=start_s, end_time=self._end_s)

    def _with_punctuation(self, end: int) -> int:
        while end < len(self.text) and not (self.text[end].isalnum() or self.text[end].isspace()):
            end += 1
        return end
