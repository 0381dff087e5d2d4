"""A spoken question to the services that images_check has started, and whether it was a turn."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from src.audio.pcm import level_dbfs
from src.demo.play import QUESTION
from src.demo.recording import MIC_RATE
from src.demo.user_voice import speak_lines
from src.demo.wer import word_errors

VOICE = "piper-en-joe"
MAX_WER = 0.35
AUDIBLE_DBFS = -50.0


class Failed(Exception):
    """Something that users would run does not do what it should."""


def judge(events: list[dict[str, Any]], reply: Path) -> dict[str, Any]:
    """The turn as it was. Raises Failed when it was none."""
    finals = [e["text"] for e in events if e["type"] == "transcript" and e["final"]]
    understood = " ".join(finals)
    if word_errors(QUESTION, understood).rate > MAX_WER:
        raise Failed(f"asked {QUESTION!r}, understood {understood!r}")
    answered = "".join(e["text"] for e in events if e["type"] == "reply.text").strip()
    samples, rate = soundfile.read(reply, dtype="int16")
    if not answered or level_dbfs(samples) < AUDIBLE_DBFS:
        raise Failed(f"the reply is {answered!r} at {level_dbfs(samples):.0f} dBFS")
    latency = next((e for e in events if e["type"] == "latency"), None)
    if latency is None:
        raise Failed("no latency was told of the turn")
    return {
        "understood": understood,
        "answered": answered,
        "first_audio_ms": latency["first_audio_ms"],
        "reply_s": round(len(samples) / rate, 1),
    }


def speak_question(path: Path) -> None:
    """Inside the containers' network: the question, in the worker's own voice."""
    [clip] = asyncio.run(speak_lines("127.0.0.1:7001", [QUESTION], VOICE))
    # A moment of silence: nobody begins to speak in the first instant of a call.
    soundfile.write(path, np.concatenate([np.zeros(MIC_RATE, np.int16), clip]), MIC_RATE)
