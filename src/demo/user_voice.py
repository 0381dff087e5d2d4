"""The scripted user: a second speaker made from the worker's own voice.

The worker speaks the line 15 % slower, and the result is played 1.18 times as fast: another pitch
at nearly the same pace. Whisper tiny.en understands it as well as it does the voice itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any
from uuid import uuid4

import grpc
import numpy as np

from src.audio.pcm import SAMPLE_RATE, Int16, from_bytes, to_float32, to_int16
from src.audio.resample import StreamResampler
from src.demo.recording import MIC_RATE
from src.rpc.generated import tts_pb2, tts_pb2_grpc

SLOWER = 1 / 1.15
REPITCH = 1.18
LEVEL_DBFS = -23.0


async def speak_lines(target: str, lines: Sequence[str], model_id: str) -> list[Int16]:
    """16 kHz mono clips, one for each line, without silence around them."""
    async with grpc.aio.insecure_channel(target) as channel:
        stub: Any = tts_pb2_grpc.TTSStub(channel)  # type: ignore[no-untyped-call]
        # The worker paces to real time, so the lines are spoken side by side.
        return list(await asyncio.gather(*(_speak(stub, line, model_id) for line in lines)))


async def _speak(stub: Any, line: str, model_id: str) -> Int16:
    session_id = f"user-{uuid4().hex[:8]}"
    await stub.StartSession(
        tts_pb2.StartSessionReq(
            session_id=session_id, model_id=model_id, settings={"speed": f"{SLOWER:.3f}"}
        )
    )
    try:
        frames = [frame.pcm async for frame in stub.Synthesize(_text(session_id, line))]
    finally:
        await stub.EndSession(tts_pb2.EndSessionReq(session_id=session_id))
    return _second_speaker(from_bytes(b"".join(frames)))


async def _text(session_id: str, line: str) -> AsyncIterator[tts_pb2.TextChunk]:
    yield tts_pb2.TextChunk(session_id=session_id, utterance_id="line", text=line, is_final=True)


def _second_speaker(pcm: Int16) -> Int16:
    resampler = StreamResampler(round(SAMPLE_RATE * REPITCH), MIC_RATE)
    voice = trim(resampler.push(to_float32(pcm), last=True))
    rms = float(np.sqrt(np.mean(np.square(voice)))) or 1.0
    return to_int16(voice * np.float32(10 ** (LEVEL_DBFS / 20) / rms))


def trim(samples: np.ndarray, floor_dbfs: float = -45.0) -> np.ndarray:
    """Without what is quieter than `floor_dbfs` at both ends."""
    loud = np.flatnonzero(np.abs(samples) > 10 ** (floor_dbfs / 20))
    return samples[loud[0] : loud[-1] + 1] if loud.size else samples


def cough(rng: np.random.Generator) -> Int16:
    """A burst of shaped noise, 280 ms, as loud as speech: what must not stop the agent."""
    time = np.arange(int(0.28 * MIC_RATE)) / MIC_RATE
    noise = np.convolve(rng.standard_normal(time.size), np.ones(5) / 5, mode="same")
    envelope = np.minimum(time / 0.008, 1.0) * np.exp(-time / 0.07)
    burst = (noise * envelope).astype(np.float32)
    return to_int16(burst / np.abs(burst).max() * np.float32(0.5))
