"""How to say an English word that no dictionary has: eSpeak NG's reading, in ARPAbet."""

from __future__ import annotations

import re
import threading

from src.tts.families.espeak.engine import EspeakEngine

_VOICE = "gmw/en-US"

# IPA as eSpeak's American voice writes it; the longest that fits is taken.
_VOWELS = {
    "iː": "IY", "i": "IY", "ɪ": "IH", "ᵻ": "IH", "eɪ": "EY", "e": "EH", "ɛ": "EH", "æ": "AE",
    "a": "AE", "ɑː": "AA", "ɑ": "AA", "ɒ": "AA", "ɔː": "AO", "ɔ": "AO", "oː": "AO", "oʊ": "OW",
    "o": "OW", "ʊ": "UH", "uː": "UW", "u": "UW", "ʌ": "AH", "ə": "AH", "ɐ": "AH", "ɜː": "ER",
    "ɚ": "ER", "ɝ": "ER", "aɪ": "AY", "aʊ": "AW", "ɔɪ": "OY",
}  # fmt: skip
_CONSONANTS = {
    "p": "P", "b": "B", "t": "T", "d": "D", "k": "K", "ɡ": "G", "g": "G", "f": "F", "v": "V",
    "θ": "TH", "ð": "DH", "s": "S", "z": "Z", "ʃ": "SH", "ʒ": "ZH", "h": "HH", "m": "M", "n": "N",
    "ŋ": "NG", "l": "L", "ɫ": "L", "ɹ": "R", "r": "R", "j": "Y", "w": "W", "tʃ": "CH", "dʒ": "JH",
    "ɾ": "T", "ʔ": "T", "x": "K", "n̩": "AH0 N", "l̩": "AH0 L", "m̩": "AH0 M",
}  # fmt: skip
_STRESS = {"ˈ": "1", "ˌ": "2"}
_PIECE = re.compile("|".join(sorted((*_VOWELS, *_CONSONANTS, *_STRESS), key=len, reverse=True)))


def arpabet(ipa: str) -> list[str]:
    """The stress mark before a syllable becomes the digit of its vowel; other marks are dropped."""
    stress = "0"
    phones: list[str] = []
    for piece in _PIECE.findall(ipa):
        if piece in _STRESS:
            stress = _STRESS[piece]
        elif piece in _VOWELS:
            phones.append(_VOWELS[piece] + stress)
            stress = "0"
        else:
            phones += _CONSONANTS[piece].split()
    return phones


class EspeakGuess:
    """One engine for all threads of a model: a word takes it some microseconds."""

    def __init__(self) -> None:
        """Raises EngineUnavailable where the library is not there."""
        self._engine = EspeakEngine()
        self._lock = threading.Lock()

    def __call__(self, word: str) -> list[str]:
        with self._lock:
            return arpabet(self._engine.phonemes(word, _VOICE))

    def close(self) -> None:
        self._engine.close()
