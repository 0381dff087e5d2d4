"""What the guard against the agent's own echo costs an interruption, and what it keeps out.

Called by `benchmarks.vad`. The agent's voice is Piper's (eSpeak's where that is not installed), its
echo goes through a room; with the gate fixed, and as it is by default: relaxed by what it measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product

import numpy as np

from src.audio.pcm import Float32, level_dbfs, to_int16
from src.orchestrator.ports import MIC_STEP_MS, MIC_STEP_SAMPLES
from src.orchestrator.vad import VadEvent, VadPhase, VadSettings, VoiceActivityDetector
from tests import audio_fixtures as audio

FIXED = VadSettings(playback_relaxed_db=VadSettings().playback_gate_db)
GATES = {"fixed": FIXED, "default": VadSettings()}
WORDS = ("Wait", "Stop", "Excuse me", "Hold on", "Yes", "No")
AGENT_DBFS = (-20.0, -18.0, -16.0, -14.0)
ROOM_DBFS = -65.0
INTERRUPTED_MS = (1300, 5000)
"""After the agent began: before it can have measured its echo, and after."""
PHASES_MS = (0, 3, 7)
RETURNS_DB = (-10.0, -15.0, -20.0, -30.0, -40.0)
DELAYS_MS = (0, 50, 100, 200)
STORY = (
    "Once upon a time there was a lighthouse keeper, who counted the ships every evening. He wrote "
    "their names into a blue book. The book grew heavier with every year, and so did he."
)
_SENT_STEPS = 10
"""The level of a playback is the loudest 20 ms frame of the last 100 ms."""
_FRAME_STEPS = 2


def agent(dbfs: float, voice: str) -> Float32:
    speech = audio.piper_speech(STORY) if voice == "piper" else audio.espeak_speech(STORY)
    return audio.gain(speech, dbfs - audio.active_dbfs(speech))


def voices() -> list[str]:
    return ["piper", "espeak"] if audio.has_piper() else ["espeak"]


def echo(playback: Float32, return_db: float, delay_ms: int, seed: int = 4) -> Float32:
    late = np.concatenate((audio.silence(delay_ms), playback))[: playback.size]
    return audio.gain(audio.room(late, np.random.default_rng(seed)), return_db)


def quiet_room(samples: Float32, seed: int = 5) -> Float32:
    noise = audio.pink(samples.size * 1000 // audio.RATE + 1, np.random.default_rng(seed))
    out: Float32 = samples + audio.at_level(noise, ROOM_DBFS)[: samples.size]
    return out


def played_dbfs(playback: Float32) -> Iterator[float]:
    """What `Track.sent_dbfs` says at each mic step."""
    frame = MIC_STEP_SAMPLES * _FRAME_STEPS
    pcm = to_int16(playback)
    levels = [
        level_dbfs(pcm[start : start + frame])
        for start in range(0, pcm.size - frame + 1, frame)
        for _ in range(_FRAME_STEPS)
    ]
    for step in range(len(levels)):
        yield max(levels[max(0, step + 1 - _SENT_STEPS) : step + 1])


def listen(mic: Float32, playback: Float32, settings: VadSettings) -> list[VadEvent]:
    vad = VoiceActivityDetector(settings)
    heard = to_int16(np.concatenate((quiet_room(audio.silence(500), seed=6), mic)))
    lead = [-120.0] * (500 // MIC_STEP_MS)
    events: list[VadEvent] = []
    for step, dbfs in enumerate([*lead, *played_dbfs(playback)]):
        samples = heard[step * MIC_STEP_SAMPLES : (step + 1) * MIC_STEP_SAMPLES]
        events += vad.step(samples, playing=dbfs > -120.0, playback_dbfs=dbfs)
    return events


def edge_ms(word: str, at_ms: int, playback: Float32, settings: VadSettings) -> list[float]:
    """From a word's onset to its edge; at several phases of the 10 ms step. 1000: not heard."""
    speech = audio.espeak_speech(word)
    speech = audio.gain(speech, audio.SPEECH_DBFS - audio.active_dbfs(speech))
    found = []
    for phase_ms in PHASES_MS:
        start = (at_ms + phase_ms) * audio.RATE // 1000
        mic = np.zeros_like(playback)
        mic[start : start + speech.size] += speech
        onset_ms = 500 + (start + audio.onset_sample(speech)) * 1000 / audio.RATE
        edges = [e for e in listen(quiet_room(mic), playback, settings) if e.phase is VadPhase.EDGE]
        found.append(next((e.at_ms - onset_ms for e in edges if e.at_ms > onset_ms), 1000.0))
    return found


def interruption_table() -> Iterable[str]:
    yield "| onset → edge, ms | agent silent | " + " | ".join(
        f"{dbfs:.0f} dBFS" for dbfs in AGENT_DBFS
    ) + " |"  # fmt: skip
    yield "|---" * (2 + len(AGENT_DBFS)) + "|"
    for word in WORDS:
        playback = agent(AGENT_DBFS[0], voices()[0])
        cells = [_median(edge_ms(word, INTERRUPTED_MS[1], playback * np.float32(0), FIXED))]
        for dbfs in AGENT_DBFS:
            playback = agent(dbfs, voices()[0])
            cells.append(
                " / ".join(
                    [_median(edge_ms(word, INTERRUPTED_MS[1], playback, FIXED))]
                    + [_median(edge_ms(word, at, playback, VadSettings())) for at in INTERRUPTED_MS]
                )
            )
        yield f"| {word} | " + " | ".join(cells) + " |"
    yield ""
    yield "Fixed, 5 s after the agent began / default after 1.3 s / after 5 s. No echo comes back."


def _columns() -> str:
    return " | ".join(f"{db:.0f} dB" for db in RETURNS_DB) + " |"


def _median(values: list[float]) -> str:
    return f"{np.median(values):.0f}"


def echo_table() -> Iterable[str]:
    yield "| false edges per minute, echo at | " + _columns()
    yield "|---" * (1 + len(RETURNS_DB)) + "|"
    for (name, settings), voice in product(GATES.items(), voices()):
        playback = agent(-20.0, voice)
        minutes = playback.size / audio.RATE / 60 * len(DELAYS_MS)
        cells = [
            sum(_edges(echo(playback, db, delay), playback, settings) for delay in DELAYS_MS)
            / minutes
            for db in RETURNS_DB
        ]
        yield f"| {name}, {voice} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |"


def sudden_echo_table() -> Iterable[str]:
    """Headphones for a story, then a loudspeaker for two."""
    yield "| an echo from one moment on, at | " + _columns()
    yield "|---" * (1 + len(RETURNS_DB)) + "|"
    for (name, settings), voice in product(GATES.items(), voices()):
        story = agent(-20.0, voice)
        playback = np.tile(story, 3)
        cells = []
        for db in RETURNS_DB:
            back = echo(playback, db, 100)
            back[: story.size] = 0
            cells.append(f"{_edges(back, playback, settings)}")
        yield f"| {name}, {voice} | " + " | ".join(cells) + " |"
    yield ""
    yield "Edges in 20 to 30 s; the playback goes on, whatever is heard."


def _edges(back: Float32, playback: Float32, settings: VadSettings) -> int:
    return sum(e.phase is VadPhase.EDGE for e in listen(quiet_room(back), playback, settings))


def tables() -> Iterable[str]:
    for table in (interruption_table, echo_table, sudden_echo_table):
        yield from table()
        yield ""
