"""What a user's client recorded before the agent came: its bytes to 16 kHz mono. Pure.

LiveKit's clients send it as a byte stream whose attributes say sample rate and channels. Browsers
record Opus in WebM (Chromium) or Ogg (Firefox); native clients send raw s16le, interleaved.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from src.audio.pcm import Float32, Int16, from_bytes, to_float32, to_int16
from src.audio.resample import StreamResampler
from src.orchestrator.ports import MIC_RATE
from src.rpc.errors import InvalidArgument

MAX_RECORDING_MS = 10_000
MAX_RECORDING_BYTES = 4 * 1024 * 1024
"""Ten seconds of 96 kHz stereo."""
# Silence in Opus takes next to no bytes, but as much work as any other audio.
_MAX_DECODED_MS = 60_000
_RATES = range(8_000, 192_001)
_CHANNELS = range(1, 9)
# Of all that ffmpeg can read, the two containers that browsers write. It is told which one it is:
# left to guess, it also follows playlists to other files.
_CONTAINERS = {b"\x1a\x45\xdf\xa3": "matroska", b"OggS": "ogg"}


def decode_recording(data: bytes, attributes: Mapping[str, str]) -> Int16:
    """The newest `MAX_RECORDING_MS`, 16 kHz mono. Takes tens of ms. Raises InvalidArgument."""
    container = _CONTAINERS.get(data[:4])
    if container:
        samples, rate = _decode(data, container)
    else:
        rate = _number(attributes, "sampleRate", _RATES)
        samples = _mono(data, _number(attributes, "channels", _CHANNELS))
    newest = samples[-rate * MAX_RECORDING_MS // 1000 :]
    return to_int16(StreamResampler(rate, MIC_RATE).push(newest, last=True))


def _number(attributes: Mapping[str, str], name: str, allowed: range) -> int:
    text = attributes.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < 7 and int(text) in allowed):
        raise InvalidArgument(
            f"recording with {name} {text[:16]!r}; it must be {allowed.start} to {allowed.stop - 1}"
        )
    return int(text)


def _mono(data: bytes, channels: int) -> Float32:
    whole = len(data) - len(data) % (2 * channels)
    samples = to_float32(from_bytes(data[:whole])).reshape(-1, channels)
    mixed: Float32 = samples.mean(axis=1, dtype=np.float32)
    return mixed


def _decode(data: bytes, container: str) -> tuple[Float32, int]:
    # It comes with livekit-agents, and is slow to import.
    import av

    resampler: Any = av.AudioResampler(format="s16", layout="mono", rate=MIC_RATE)
    blocks: list[Int16] = [np.empty(0, dtype=np.int16)]
    decoded_ms = 0
    try:
        with av.open(io.BytesIO(data), format=container) as file:
            for frame in file.decode(audio=0):
                blocks += [part.to_ndarray().reshape(-1) for part in resampler.resample(frame)]
                decoded_ms += frame.samples * 1000 // frame.sample_rate
                if decoded_ms > _MAX_DECODED_MS:
                    raise InvalidArgument(f"recording of more than {_MAX_DECODED_MS} ms")
    except (av.FFmpegError, IndexError) as error:
        raise InvalidArgument(f"recording that is no audio in {container}") from error
    return to_float32(np.concatenate(blocks)), MIC_RATE
