"""What must hold of any family's sound."""

from __future__ import annotations

import math
from collections.abc import Iterable

from src.audio.pcm import FRAME_SAMPLES, SAMPLE_RATE
from src.tts.render import Renderer
from src.tts.tts_base import PcmChunk


def assert_frames_hold_all(chunks: Iterable[PcmChunk], sample_rate: int) -> None:
    """Of all that was said, 20 ms frames at 48 kHz are made, and no more than that."""
    renderer = Renderer(sample_rate, None)
    samples = frames = 0
    for chunk in chunks:
        samples += chunk.samples.size
        frames += len(renderer.push(chunk))
    frames += len(renderer.finish()[0])
    assert samples
    assert frames == math.ceil(samples * SAMPLE_RATE / sample_rate / FRAME_SAMPLES)
