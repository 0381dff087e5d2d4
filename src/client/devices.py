"""Where the user's sound comes from and the agent's goes to: devices, files, nothing."""

from __future__ import annotations

import asyncio
import wave
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from src.audio.framing import Framer
from src.audio.pcm import SAMPLE_RATE, Float32, Int16, to_float32, to_int16
from src.audio.resample import StreamResampler
from src.rpc.errors import InvalidArgument, Unavailable

MIC_RATE = 16_000
MIC_FRAME_MS = 20
MIC_FRAME = MIC_RATE * MIC_FRAME_MS // 1000
# Kept short: what waits in front of the speaker is heard even after a flush.
SPEAKER_QUEUE_SAMPLES = SAMPLE_RATE * 40 // 1000
MIC_QUEUE_FRAMES = 10


class Microphone(Protocol):
    """20 ms of 16 kHz mono whenever it is asked; asked for in real time."""

    @property
    def exhausted(self) -> bool:
        """Only silence follows."""
        ...

    def read(self) -> Int16: ...

    def close(self) -> None: ...


class Silence:
    """No microphone: the user types."""

    exhausted = False

    def read(self) -> Int16:
        return np.zeros(MIC_FRAME, dtype=np.int16)

    def close(self) -> None:
        pass


class FileMicrophone:
    """A clip, then silence for as long as anybody listens."""

    def __init__(self, clip: Int16) -> None:
        framer = Framer(MIC_FRAME)
        self._frames = deque([*framer.push(clip), *framer.flush()])

    @property
    def exhausted(self) -> bool:
        return not self._frames

    def read(self) -> Int16:
        return self._frames.popleft() if self._frames else np.zeros(MIC_FRAME, dtype=np.int16)

    def close(self) -> None:
        self._frames.clear()


def read_clip(path: Path) -> Int16:
    """Any rate and any number of channels, as 16 kHz mono. Raises InvalidArgument."""
    import soundfile

    try:
        samples, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (OSError, soundfile.LibsndfileError) as error:
        raise InvalidArgument(f"cannot read {path}: {error}") from None
    if not samples.size:
        raise InvalidArgument(f"{path} holds no sound")
    mono: Float32 = np.ascontiguousarray(samples.mean(axis=1), dtype=np.float32)
    return to_int16(StreamResampler(rate, MIC_RATE).push(mono, last=True))


class Recorder(Protocol):
    def user(self, samples: Int16) -> None:
        """16 kHz mono, gapless since the session began."""
        ...

    def agent(self, samples: Int16) -> None:
        """48 kHz mono, gapless since the session began."""
        ...

    def close(self) -> None: ...


class WavRecorder:
    """The session as a file, written while it lasts: the agent, or the user left of the agent."""

    def __init__(self, path: Path, *, stereo: bool) -> None:
        try:
            self._raw = path.open("wb")
        except OSError as error:
            raise InvalidArgument(f"cannot write {path}: {error.strerror}") from None
        self._file = wave.open(self._raw, "wb")  # noqa: SIM115 - open as long as the session
        self._file.setnchannels(2 if stereo else 1)
        self._file.setsampwidth(2)
        self._file.setframerate(SAMPLE_RATE)
        self._stereo = stereo
        self._resampler = StreamResampler(MIC_RATE, SAMPLE_RATE)
        self._left: Int16 = np.empty(0, dtype=np.int16)
        self._right: Int16 = np.empty(0, dtype=np.int16)

    def user(self, samples: Int16) -> None:
        if self._stereo:
            resampled = to_int16(self._resampler.push(to_float32(samples)))
            self._left = np.concatenate((self._left, resampled))
            self._interleave()

    def agent(self, samples: Int16) -> None:
        if self._stereo:
            self._right = np.concatenate((self._right, samples))
            self._interleave()
        else:
            self._file.writeframes(samples.tobytes())

    def _interleave(self) -> None:
        both = min(self._left.size, self._right.size)
        if both:
            pair = np.stack((self._left[:both], self._right[:both]), axis=1)
            self._file.writeframes(pair.tobytes())
            self._left, self._right = self._left[both:], self._right[both:]

    def close(self) -> None:
        self._file.close()
        self._raw.close()


class NoRecorder:
    def user(self, samples: Int16) -> None:
        pass

    def agent(self, samples: Int16) -> None:
        pass

    def close(self) -> None:
        pass


# --- real devices, through sounddevice ---


def load_sounddevice() -> ModuleType:
    """Raises Unavailable with what is missing."""
    try:
        import sounddevice
    except ImportError:
        raise Unavailable("sounddevice is not installed: uv sync --extra mic") from None
    except OSError as error:
        raise Unavailable(f"PortAudio is missing ({error}): apt install libportaudio2") from None
    module: ModuleType = sounddevice
    try:
        sounddevice.check_input_settings(samplerate=MIC_RATE, channels=1, dtype="int16")
        sounddevice.check_output_settings(samplerate=SAMPLE_RATE, channels=1, dtype="int16")
    except (sounddevice.PortAudioError, ValueError) as error:
        raise Unavailable(f"no usable microphone and speaker: {error}") from None
    return module


class DeviceMicrophone:
    exhausted = False

    def __init__(self, sounddevice: Any, loop: asyncio.AbstractEventLoop) -> None:
        # Bounded: when the loop is late the oldest sound goes, so that the delay does not stay.
        self._frames: deque[Int16] = deque(maxlen=MIC_QUEUE_FRAMES)
        self._stream = sounddevice.InputStream(
            samplerate=MIC_RATE,
            channels=1,
            dtype="int16",
            blocksize=MIC_FRAME,
            callback=_from_device(loop, self._frames.append),
        )
        self._stream.start()

    def read(self) -> Int16:
        return self._frames.popleft() if self._frames else np.zeros(MIC_FRAME, dtype=np.int16)

    def close(self) -> None:
        self._stream.close()


def _from_device(
    loop: asyncio.AbstractEventLoop, append: Callable[[Int16], None]
) -> Callable[..., None]:
    """PortAudio calls from its own thread; only the loop's thread touches the queue."""

    def callback(data: Int16, _frames: int, _time: object, _status: object) -> None:
        loop.call_soon_threadsafe(append, data[:, 0].copy())

    return callback


class SpeakerQueue:
    """Between the session's clock and the speaker's: as little as keeps the sound whole."""

    def __init__(self, max_samples: int = SPEAKER_QUEUE_SAMPLES) -> None:
        self._max = max_samples
        self._samples: Int16 = np.empty(0, dtype=np.int16)

    def put(self, samples: Int16) -> None:
        """Overflow: the oldest go, which is how a slower speaker catches up."""
        joined = np.concatenate((self._samples, samples))
        self._samples = joined[max(0, joined.size - self._max) :]

    def take(self, count: int) -> Int16:
        out = np.zeros(count, dtype=np.int16)
        piece = self._samples[:count]
        out[: piece.size] = piece
        self._samples = self._samples[piece.size :]
        return out


class DeviceSpeaker:
    def __init__(self, sounddevice: Any) -> None:
        import threading

        self._queue = SpeakerQueue()
        self._lock = threading.Lock()
        self._stream = sounddevice.OutputStream(
            samplerate=SAMPLE_RATE,
            channels=1,
            dtype="int16",
            blocksize=SAMPLE_RATE // 100,
            latency="low",
            callback=self._fill,
        )
        self._stream.start()

    def play(self, samples: Int16) -> None:
        with self._lock:
            self._queue.put(samples)

    def _fill(self, out: Int16, count: int, _time: object, _status: object) -> None:
        with self._lock:
            out[:, 0] = self._queue.take(count)

    def close(self) -> None:
        self._stream.close()
