"""The page's test sounds: `src/client/web/sounds/{cough,mm-hmm,stop}.wav`, 16 kHz mono.

uv run python -m scripts.make_sounds
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import soundfile

from src.audio.pcm import Float32, Int16, to_float32, to_int16
from src.audio.resample import StreamResampler
from src.demo.recording import MIC_RATE
from src.demo.user_voice import cough, trim
from src.tts.families.espeak.engine import EspeakEngine

FOLDER = Path(__file__).resolve().parents[1] / "src" / "client" / "web" / "sounds"
VOICE = "gmw/en-US"
LEVEL_DBFS = -20.0
# Silence around a sound, so that it does not begin or end with a click.
MARGIN_MS = 20


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    for name, samples in sounds().items():
        path = FOLDER / f"{name}.wav"
        soundfile.write(path, samples, MIC_RATE, subtype="PCM_16")
        print(f"{path.relative_to(Path.cwd())}: {samples.size * 1000 // MIC_RATE} ms")
    return 0


def sounds() -> dict[str, Int16]:
    """Name to samples, 16 kHz mono."""
    random = np.random.default_rng(1)
    return {
        "cough": padded(to_float32(cough(random))),
        "mm-hmm": padded(at_speech_level(mm_hmm(random))),
        "stop": padded(at_speech_level(spoken("Stop!", rate_wpm=150))),
    }


def spoken(text: str, rate_wpm: int) -> Float32:
    engine = EspeakEngine()
    speech = engine.speak(text, VOICE, rate_wpm=rate_wpm)
    return trim(StreamResampler(engine.sample_rate, MIC_RATE).push(speech.samples, last=True))


def mm_hmm(random: np.random.Generator, pitch_hz: float = 160.0) -> Float32:
    """Two hums with a breath between them, the second one higher. eSpeak cannot say it so that a
    recogniser understands it; this it does.
    """
    low = hum([1.05 * pitch_hz, pitch_hz], ms=110)
    high = hum([1.1 * pitch_hz, 1.45 * pitch_hz, 1.3 * pitch_hz], ms=170)
    air = np.convolve(random.standard_normal(_samples(100)), np.ones(4) / 4, mode="same")
    out = np.zeros(_samples(320), np.float32)
    out[: low.size] += low
    out[-high.size :] += high
    begin = low.size - _samples(30)
    out[begin : begin + air.size] += 0.12 * air * np.hanning(air.size)
    return out


def hum(pitch_hz: list[float], ms: int) -> Float32:
    """A closed mouth: harmonics under the murmur's resonances at 250, 1000 and 2200 Hz."""
    progress = np.linspace(0, 1, _samples(ms))
    pitch = np.interp(progress, np.linspace(0, 1, len(pitch_hz)), pitch_hz)
    phase = 2 * np.pi * np.cumsum(pitch) / MIC_RATE
    out = np.zeros(progress.size)
    for harmonic in range(1, 20):
        frequency = harmonic * pitch
        gain = sum(
            peak / (1 + ((frequency - centre) / width) ** 2)
            for peak, centre, width in ((1.0, 250, 120), (0.12, 1000, 150), (0.06, 2200, 250))
        )
        out += gain * np.sin(harmonic * phase)
    rise_and_fall = np.clip(np.minimum(progress * ms / 40, (1 - progress) * ms / 80), 0, 1)
    murmur: Float32 = (out * rise_and_fall).astype(np.float32)
    return murmur


def at_speech_level(voice: Float32) -> Float32:
    rms = float(np.sqrt(np.mean(np.square(voice))))
    out: Float32 = (voice * np.float32(10 ** (LEVEL_DBFS / 20) / rms)).astype(np.float32)
    return out


def padded(samples: Float32) -> Int16:
    return to_int16(np.pad(samples, MIC_RATE * MARGIN_MS // 1000))


def _samples(ms: int) -> int:
    return MIC_RATE * ms // 1000


if __name__ == "__main__":
    sys.exit(main())
