"""What is said in the trials, and when it counts as begun and ended.

The agent's line is nothing but vowels, nasals and glides: it has no silence of more than a few
10 ms in it, so that a cut is heard as a cut and not as the gap before a consonant. The first piece
that the worker speaks is the "Yes"; nobody interrupts before the long one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from src.audio.pcm import Float32
from tests import audio_fixtures as audio

LINE = (
    "Yes, we will now allow our one lawyer in a yellow limo a new line in an old melon a year ago "
    "now you know why we mourn all winter."
)
SHORT = "Okay."
QUESTION = "Are you alone in Rome now?"
"""Without a pause, in which the hasty would answer."""
INTERRUPTION = "Wait, stop please."
EDGE_DBFS = -35.0
"""Speech begins and ends with the first and last 5 ms over this."""
PEAK = 0.6
_BLOCK = audio.RATE // 200


def clips(path: Path) -> Path:
    """Both, made once: the question by Piper where it is installed, since a turn detector that was
    trained on people is misled by eSpeak's melody."""
    if not path.exists():
        speak = audio.user_speech if audio.has_piper() else audio.espeak_speech
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            path,
            question=trimmed(speak(QUESTION)),
            interruption=trimmed(audio.espeak_speech(INTERRUPTION)),
        )
    return path


def trimmed(speech: Float32) -> Float32:
    """At a peak of 0.6, from its onset to its end."""
    loud = speech / np.abs(speech).max() * np.float32(PEAK)
    blocks = loud[: loud.size // _BLOCK * _BLOCK].reshape(-1, _BLOCK)
    power = np.mean(np.square(blocks, dtype=np.float64), axis=1)
    over = np.flatnonzero(power > 10 ** (EDGE_DBFS / 10))
    out: Float32 = blocks[over[0] : over[-1] + 1].reshape(-1).astype(np.float32)
    return out


def after_silence(speech: Float32, silence_ms: float) -> Float32:
    """Where in a packet the onset falls is chance, and must stay so."""
    silence = np.zeros(round(silence_ms * audio.RATE / 1000), dtype=np.float32)
    return np.concatenate((silence, speech))
