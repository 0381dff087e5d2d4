"""Opus, one packet for every 20 ms frame, by the libopus that PyAV (optional) carries."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np

from src.audio.pcm import FRAME_MS, SAMPLE_RATE, Int16

INSTALL = "pip install 'realtime-duplex-voice[opus]'"
_BIT_RATE = 32_000


class OpusMissing(RuntimeError):
    """PyAV is not installed; the message is the command that brings it."""

    def __init__(self) -> None:
        super().__init__(f"Opus needs the package av; run: {INSTALL}")


def opus_available() -> bool:
    return importlib.util.find_spec("av") is not None


class OpusEncoder:
    """960 samples of 48 kHz mono to one packet. Looks 6.5 ms ahead. Raises OpusMissing."""

    def __init__(self, bit_rate: int = _BIT_RATE) -> None:
        self._av = _import_av()
        self._codec = self._av.CodecContext.create("libopus", "w")
        self._codec.sample_rate = SAMPLE_RATE
        self._codec.layout = "mono"
        self._codec.format = "s16"
        self._codec.bit_rate = bit_rate
        self._codec.options = {"application": "voip", "frame_duration": str(FRAME_MS)}
        self._pts = 0

    def encode(self, frame: Int16) -> bytes:
        audio = self._av.AudioFrame.from_ndarray(frame[np.newaxis, :], "s16", "mono")
        audio.sample_rate = SAMPLE_RATE
        audio.pts = self._pts
        self._pts += frame.size
        (packet,) = self._codec.encode(audio)
        return bytes(packet)


class OpusDecoder:
    """One packet to 960 samples. Raises OpusMissing, and ValueError for what is not Opus."""

    def __init__(self) -> None:
        self._av = _import_av()
        self._codec = self._av.CodecContext.create("libopus", "r")
        self._codec.sample_rate = SAMPLE_RATE
        self._codec.layout = "mono"

    def decode(self, packet: bytes) -> Int16:
        try:
            frames = self._codec.decode(self._av.Packet(packet))
        except self._av.FFmpegError as error:
            raise ValueError(f"not an Opus packet: {error}") from error
        blocks = [frame.to_ndarray().reshape(-1) for frame in frames]
        out: Int16 = np.concatenate([np.empty(0, dtype=np.int16), *blocks]).astype(np.int16)
        return out


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise OpusMissing from error
    return av
