"""What the benchmarks' user says: five short questions in a second speaker's voice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from src.audio.pcm import Float32, Int16, to_int16
from tests import audio_fixtures as audio

QUESTIONS = (
    "What is the capital of France?",
    "How many days are there in a week?",
    "What color is the sky?",
    "How many legs does a spider have?",
    "What is the weather like today?",
)
PEAK = 0.6


def questions(cache: Path) -> list[Int16]:
    """16 kHz clips, spoken once and kept: by Piper's Joe, slower and re-pitched; else by eSpeak."""
    voice = "piper" if audio.has_piper() else "espeak"
    path = cache / f"questions-{voice}.npz"
    if path.exists():
        stored = np.load(path)
        return [stored[f"q{index}"] for index in range(len(QUESTIONS))]
    speak = audio.user_speech if voice == "piper" else audio.espeak_speech
    clips = [_levelled(speak(text)) for text in QUESTIONS]
    save(path, clips)
    return clips


def save(path: Path, clips: Sequence[Int16]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {f"q{index}": clip for index, clip in enumerate(clips)}
    np.savez(path, **arrays)


def _levelled(speech: Float32) -> Int16:
    return to_int16(speech / np.abs(speech).max() * np.float32(PEAK))
