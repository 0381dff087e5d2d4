"""The two detectors behind `vad.py`: WebRTC's (microseconds, jumpy) and Silero's (a small network).

Silero's ONNX file ships inside the faster-whisper wheel; its own package would pull torch.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from src.audio.pcm import Float32, Int16, to_float32
from src.orchestrator.ports import MIC_RATE
from src.rpc.errors import Unavailable

SILERO_WINDOW = 512
SILERO_CONTEXT = 64
_SILERO_FILE = "assets/silero_vad_v6.onnx"
_DOZE_WINDOWS = 16
_SILENT_PEAK = 0.0056
"""-45 dBFS: the peaks of a quiet room, under which nothing is that an edge could come from."""


class WebRtcEdge:
    """WebRTC's detector on 10 ms steps. `aggressiveness` 0 (lets most through) to 3."""

    def __init__(self, aggressiveness: int) -> None:
        import webrtcvad

        self._vad = webrtcvad.Vad(aggressiveness)

    def voiced(self, samples: Int16) -> bool:
        return bool(self._vad.is_speech(samples.tobytes(), MIC_RATE, samples.size))


class SileroOpinion:
    """Silero, dozing until somebody wants to know.

    Its memory must not be cold when an edge comes: a fresh state takes the attack of a chord for a
    voice. So while it dozes it still reads everything, but half a second at a time, which costs
    less than half; and of a silence only the beginning. On waking it catches up at once.
    """

    def __init__(self) -> None:
        self._session = silero_session()
        self._pending: list[Int16] = []
        self._pending_samples = 0
        self._context: Float32 = np.zeros(SILERO_CONTEXT, dtype=np.float32)
        self._state = _fresh_state()
        self._in_silence = False

    def listen(self, samples: Int16, *, awake: bool) -> float | None:
        """Take one 10 ms step; while awake, the probability of speech when a window is complete."""
        self._pending.append(samples)
        self._pending_samples += samples.size
        windows = self._pending_samples // SILERO_WINDOW
        if windows < (1 if awake else _DOZE_WINDOWS):
            return None
        heard = np.concatenate(self._pending)
        whole, rest = np.split(heard, [windows * SILERO_WINDOW])
        self._pending, self._pending_samples = [rest], rest.size
        return self._judge(to_float32(whole), awake)

    def _judge(self, whole: Float32, awake: bool) -> float | None:
        was_silent, self._in_silence = self._in_silence, float(np.abs(whole).max()) < _SILENT_PEAK
        context, self._context = self._context, whole[-SILERO_CONTEXT:]
        if not awake and was_silent and self._in_silence:
            return None
        probabilities, self._state = _run(self._session, context, whole, self._state)
        return float(probabilities[-1]) if awake else None


def speech_probabilities(samples: Float32) -> Float32:
    """Silero over a whole clip (16 kHz): one probability per 512 samples, the rest padded."""
    padded = np.pad(samples, (0, -samples.size % SILERO_WINDOW))
    if not padded.size:
        return padded
    context = np.zeros(SILERO_CONTEXT, dtype=np.float32)
    return _run(silero_session(), context, padded, _fresh_state())[0]


def speech_ms(samples: Float32, threshold: float = 0.5) -> int:
    """How much of a clip Silero takes for speech."""
    heard = int(np.count_nonzero(speech_probabilities(samples) >= threshold))
    return heard * SILERO_WINDOW * 1000 // MIC_RATE


_State = tuple[Float32, Float32]


def _fresh_state() -> _State:
    return np.zeros((1, 1, 128), dtype=np.float32), np.zeros((1, 1, 128), dtype=np.float32)


def _run(session: Any, context: Float32, windows: Float32, state: _State) -> tuple[Float32, _State]:
    """`context` is the 64 samples before `windows`, whose length is a multiple of 512."""
    joined = np.concatenate((context, windows))
    width = SILERO_CONTEXT + SILERO_WINDOW
    batch = np.ascontiguousarray(
        np.lib.stride_tricks.sliding_window_view(joined, width)[::SILERO_WINDOW]
    )
    h, c = state
    probabilities, h, c = session.run(None, {"input": batch, "h": h, "c": c})
    return np.asarray(probabilities, dtype=np.float32).reshape(-1), (h, c)


@functools.cache
def silero_session() -> Any:
    """One session for the process: it keeps no state, and running it is thread-safe."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        str(_silero_path()), options, providers=["CPUExecutionProvider"]
    )


def _silero_path() -> Path:
    spec = importlib.util.find_spec("faster_whisper")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / _SILERO_FILE
        if path.is_file():
            return path
    raise Unavailable(
        f"the voice detector's model is missing: {_SILERO_FILE} of the faster-whisper package; "
        "reinstall with `uv sync`"
    )
