"""How fast the voice detector hears a person, and how often it hears one where there is none.

    uv run python -m benchmarks.vad [--clips 60] [--noise-seconds 60]

Onset: the first 5 ms within 25 dB of the speech's own level. Delays count from there to the end of
the 10 ms step that decided. Half of the phrases are spoken by Piper, half by five eSpeak voices.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from benchmarks import vad_echo
from src.audio.pcm import Float32, Int16, to_int16
from src.orchestrator.vad import VadEvent, VadPhase, VadSettings, VoiceActivityDetector
from tests import audio_fixtures as audio

CONDITIONS: tuple[tuple[str, float | None], ...] = (
    ("quiet", None),
    ("20 dB", 20.0),
    ("10 dB", 10.0),
    ("5 dB", 5.0),
)


@dataclass(frozen=True, slots=True)
class Heard:
    events: list[VadEvent]
    cpu_ms: float
    audio_ms: int

    def at(self, phase: VadPhase, after_ms: float = 0.0) -> list[int]:
        return [e.at_ms for e in self.events if e.phase is phase and e.at_ms >= after_ms]


def listen(samples: Int16, *, playing: bool) -> Heard:
    vad = VoiceActivityDetector(VadSettings())
    events: list[VadEvent] = []
    begun = time.process_time()
    for start in range(0, samples.size - 159, 160):
        events += vad.step(samples[start : start + 160], playing=playing)
    cpu_ms = (time.process_time() - begun) * 1000
    return Heard(events, cpu_ms, samples.size // 16)


def clips(count: int, snr_db: float | None, seed: int = 3) -> list[audio.Clip]:
    random = np.random.default_rng(seed)
    return [audio.speech_clip(_phrase(number), random, snr_db=snr_db) for number in range(count)]


def _phrase(number: int) -> Float32:
    text = audio.PHRASES[number % len(audio.PHRASES)]
    if number % 2 == 0 and audio.has_piper():
        return audio.user_speech(text)
    return audio.espeak_speech(text, audio.ESPEAK_VOICES[number // 2 % len(audio.ESPEAK_VOICES)])


def spread(values: Iterable[float]) -> str:
    found = list(values)
    if not found:
        return "–"
    return " / ".join(f"{value:.0f}" for value in np.percentile(found, [50, 95, 99]))


def speech_table(count: int) -> Iterable[str]:
    yield "| speech in | onset → edge ms | onset → confirmed ms | end → quiet ms | end → ended ms |"
    yield "|---|---|---|---|---|"
    for name, snr_db in CONDITIONS:
        yield f"| {name} | " + " | ".join(_delays(clips(count, snr_db))) + " |"
    yield ""
    yield "p50 / p95 / p99; “missed” never confirmed, “early” edges before the onset, of all clips."


def _delays(recordings: list[audio.Clip]) -> list[str]:
    edges, confirms, quiets, ends = [], [], [], []
    missed = early = 0
    for clip in recordings:
        heard = listen(clip.samples, playing=True)
        early += len(heard.at(VadPhase.EDGE)) - len(heard.at(VadPhase.EDGE, clip.onset_ms))
        confirmed = heard.at(VadPhase.CONFIRMED, clip.onset_ms)
        if not confirmed:
            missed += 1
            continue
        edges.append(heard.at(VadPhase.EDGE, clip.onset_ms)[0] - clip.onset_ms)
        confirms.append(confirmed[0] - clip.onset_ms)
        quiets += [at - clip.offset_ms for at in heard.at(VadPhase.QUIET)[-1:]]
        ends += [at - clip.offset_ms for at in heard.at(VadPhase.ENDED)[-1:]]
    count = len(recordings)
    return [
        f"{spread(edges)} ({early} early)",
        f"{spread(confirms)} ({missed} missed of {count})",
        spread(quiets),
        spread(ends),
    ]


def noise_table(seconds: int) -> Iterable[str]:
    yield "| noise | false edges /min | false confirms /min | CPU ms per second |"
    yield "|---|---|---|---|"
    for name, sound in audio.noise_set(seconds * 1000).items():
        heard = listen(sound, playing=True)
        minutes = heard.audio_ms / 60_000
        edges = len(heard.at(VadPhase.EDGE)) / minutes
        confirms = len(heard.at(VadPhase.CONFIRMED)) / minutes
        cpu = heard.cpu_ms / heard.audio_ms * 1000
        yield f"| {name} | {edges:.0f} | {confirms:.0f} | {cpu:.1f} |"


def speech_cost() -> str:
    talk = np.concatenate([clip.samples for clip in clips(20, None)])
    heard = listen(talk, playing=False)
    per_second = heard.cpu_ms / heard.audio_ms * 1000
    return f"CPU while people talk (phrases and pauses): {per_second:.1f} ms per second."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=60)
    parser.add_argument("--noise-seconds", type=int, default=60)
    args = parser.parse_args()
    listen(to_int16(audio.silence(500)), playing=False)
    for line in (
        *speech_table(args.clips), "", *noise_table(args.noise_seconds), "", speech_cost(), "",
        *vad_echo.tables(),
    ):  # fmt: skip
        print(line, flush=True)


if __name__ == "__main__":
    main()
