"""Bytes of sound as they come over the network, to mono float32. Pure: no I/O.

Raw s16le or WAV, told apart by its first bytes. A server that streams does not know how long its
WAV will be and writes a size of 0, 0xFFFFFFFF or something else that is too long to be meant.
Source of the layout: "Multimedia Programming Interface and Data Specifications 1.0" (1991), RIFF
WAVE, with WAVE_FORMAT_EXTENSIBLE of mmreg.h.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from src.audio.pcm import Float32
from src.rpc.errors import Internal

MIN_RATE, MAX_RATE = 8_000, 192_000

_EMPTY: Float32 = np.empty(0, dtype=np.float32)
# Pieces of this length are worth handing on; a frame is 20 ms.
_PIECE_MS = 20
# 3.1 hours at 24 kHz: whoever writes this does not know the length.
_ENDLESS = 0x20000000
_MAX_HEADER = 1 << 16
_MAX_CHANNELS = 8
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_SAMPLES = {(_PCM, 16): "<i2", (_FLOAT, 32): "<f4"}
_OTHERS = {b"ID3": "MP3", b"OggS": "Ogg", b"fLaC": "FLAC", b"\x1aE\xdf\xa3": "WebM"}


@dataclass(frozen=True, slots=True)
class _Layout:
    rate: int
    channels: int
    dtype: str

    @property
    def frame_bytes(self) -> int:
        return self.channels * np.dtype(self.dtype).itemsize


class SpeechDecoder:
    """One answer's bytes in, samples out. Holds back less than 20 ms.

    `rate` is that of raw PCM, until a WAV header says another. Channels are mixed to one.
    """

    def __init__(self, rate: int, *, wav: bool) -> None:
        self._wav_promised = wav
        self._buffer = bytearray()
        self._layout = _Layout(rate, 1, "<i2")
        self._format_known = False
        self._read = self._sniff
        self._left: int | None = None
        """Bytes of sound still to come; None: until the answer ends."""

    @property
    def rate(self) -> int:
        return self._layout.rate

    @property
    def broken_off(self) -> bool:
        """Has the answer promised more than has come?"""
        return bool(self._left)

    def push(self, data: bytes) -> Float32:
        """What `data` completes. Raises Internal for what is no sound, in words."""
        self._buffer += data
        return self._drain(last=False)

    def finish(self) -> Float32:
        """What was held back; half a sample is dropped."""
        return self._drain(last=True)

    def _drain(self, *, last: bool) -> Float32:
        pieces: list[Float32] = []
        before = None
        while before != (len(self._buffer), self._read):
            before = (len(self._buffer), self._read)
            piece = self._read(last=last)
            if piece.size:
                pieces.append(piece)
        return np.concatenate(pieces) if pieces else _EMPTY

    # --- what comes next: each reads as much as it can ---

    def _sniff(self, *, last: bool) -> Float32:
        """Raw or WAV?"""
        if len(self._buffer) < 4 and not last:
            return _EMPTY
        head = bytes(self._buffer[:4])
        if head == b"RIFF":
            self._read = self._riff
            return _EMPTY
        other = next((name for magic, name in _OTHERS.items() if head.startswith(magic)), "")
        if other or (self._wav_promised and self._buffer):
            raise Internal(
                f"the speech server answers with {other or 'something'} that is not "
                f"{'WAV' if self._wav_promised else 'raw PCM or WAV'}; see its response_format"
            )
        self._read = self._sound
        return _EMPTY

    def _riff(self, *, last: bool) -> Float32:
        if len(self._buffer) >= 12:
            if self._buffer[8:12] != b"WAVE":
                raise Internal("the speech server answers with a RIFF file that is not WAVE")
            del self._buffer[:12]
            self._read = self._chunk
        return _EMPTY

    def _chunk(self, *, last: bool) -> Float32:
        """A chunk's head; what is no sound is read whole, so that a format is never cut."""
        if len(self._buffer) < 8:
            return _EMPTY
        name, size = struct.unpack_from("<4sI", self._buffer)
        if name == b"data":
            self._begin_data(size)
        elif size > _MAX_HEADER:
            raise Internal("the speech server's WAV header is longer than 64 KiB")
        elif len(self._buffer) >= 8 + size + size % 2:
            if name == b"fmt ":
                self._set_layout(bytes(self._buffer[8 : 8 + size]))
            del self._buffer[: 8 + size + size % 2]
        return _EMPTY

    def _begin_data(self, size: int) -> None:
        if not self._format_known:
            raise Internal("the speech server's WAV has no format before its data")
        del self._buffer[:8]
        self._left = None if size == 0 or size >= _ENDLESS else size
        self._read = self._sound

    def _set_layout(self, chunk: bytes) -> None:
        layout = _layout(chunk)
        if self._format_known and layout.rate != self._layout.rate:
            raise Internal("the speech server changes its sample rate in mid-answer")
        self._layout, self._format_known = layout, True

    def _sound(self, *, last: bool) -> Float32:
        layout = self._layout
        size = len(self._buffer) if self._left is None else min(len(self._buffer), self._left)
        whole = size - size % layout.frame_bytes
        ends = last or size == self._left
        if not ends and whole * 1000 < _PIECE_MS * layout.rate * layout.frame_bytes:
            return _EMPTY
        # The last chunk's half sample goes too, and the byte that pads it to an even length.
        taken = size + size % 2 if ends else whole
        samples = _samples(bytes(self._buffer[:whole]), layout)
        del self._buffer[:taken]
        if self._left is not None:
            self._left -= size if ends else whole
            if not self._left:
                self._read = self._after
        return samples

    def _after(self, *, last: bool) -> Float32:
        """Another WAV, from a server that sends one for each sentence; else nothing that sounds."""
        if self._buffer[:4] == b"RIFF":
            self._read = self._riff
        elif len(self._buffer) >= 4:
            self._buffer.clear()
        return _EMPTY


def _layout(chunk: bytes) -> _Layout:
    """A `fmt ` chunk. Raises Internal for what we cannot play."""
    if len(chunk) < 16:
        raise Internal("the speech server's WAV header is damaged")
    tag, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", chunk)
    if tag == _EXTENSIBLE and len(chunk) >= 26:
        (tag,) = struct.unpack_from("<H", chunk, 24)
    dtype = _SAMPLES.get((tag, bits))
    if dtype is None:
        raise Internal(
            f"the speech server's WAV holds samples of {bits} bits in format {tag}; "
            "16-bit PCM and 32-bit float can be played"
        )
    if not 1 <= channels <= _MAX_CHANNELS:
        raise Internal(f"the speech server's WAV has {channels} channels; it should have one")
    if not MIN_RATE <= rate <= MAX_RATE:
        raise Internal(f"the speech server's WAV has a sample rate of {rate} Hz")
    return _Layout(rate, channels, dtype)


def _samples(data: bytes, layout: _Layout) -> Float32:
    raw = np.frombuffer(data, dtype=layout.dtype)
    if layout.dtype == "<i2":
        samples: Float32 = raw.astype(np.float32) / np.float32(32768.0)
    else:
        samples = np.clip(np.nan_to_num(raw, nan=0.0), -1.0, 1.0).astype(np.float32)
    if layout.channels == 1:
        return samples
    mixed: Float32 = samples.reshape(-1, layout.channels).mean(axis=1, dtype=np.float32)
    return mixed
