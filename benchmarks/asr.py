"""How long a final pass takes, how much of it the guess hides, and how many words come out right.

    uv run python -m benchmarks.asr

The user is Piper's Joe, 15 % slower and re-pitched ×1.18. Every sentence goes through the voice
detector and the turn recogniser as it would in a session; audio is fed in real time only for the
speculative tail. Word errors are counted after spelling numerals out.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from src.audio.pcm import Float32, Int16, to_float32
from src.common.clock import MonotonicClock
from src.orchestrator.asr import AsrSettings, load_backend, make_recognizer
from src.orchestrator.asr_scheduler import Backend
from src.orchestrator.asr_turn import Partial, TurnRecognizer
from src.orchestrator.vad import VadPhase, VadSettings, VoiceActivityDetector
from tests import audio_fixtures as audio

SENTENCES = (
    "What is the capital of France?",
    "How many days are there in a week?",
    "Tell me a short story about a lighthouse keeper.",
    "Stop, please. What time is it in London?",
    "Wait a moment.",
    "Yeah, go on.",
    "Please switch to the other voice.",
    "What is the weather like today?",
    "Can you count from one to ten?",
    "I would like to book a table for two people.",
    "Could you explain how a bicycle stays upright?",
    "Thank you, that is all for now.",
    "Where is the nearest train station?",
    "My sister lives in a small town near the river.",
    "Turn off the lights in the kitchen.",
    "What should I cook for dinner tonight?",
    "Read me the second message again.",
    "The meeting was moved to Thursday morning.",
    "How far is it from London to Paris?",
    "Why is the sky blue?",
    "Give me three reasons to learn a new language.",
    "No, that is not what I meant.",
    "Remind me to call the doctor tomorrow.",
    "Is there a bakery that opens before seven?",
    "Sing a song about the winter.",
    "He forgot his umbrella on the bus.",
    "Play the next chapter, please.",
    "How do you spell the word necessary?",
    "We will need more chairs for the party.",
    "Good morning, how are you today?",
)

_NUMERALS = dict(
    enumerate("zero one two three four five six seven eight nine ten".split())
)  # what Whisper writes in digits


def words(text: str) -> list[str]:
    spelled = re.sub(r"\d+", lambda m: _NUMERALS.get(int(m[0]), m[0]), text.lower())
    return re.sub(r"[^a-z0-9' ]", " ", spelled.replace("'", "")).split()


def word_errors(wanted: list[str], got: list[str]) -> int:
    """Levenshtein distance in words."""
    row = list(range(len(got) + 1))
    for i, word in enumerate(wanted, 1):
        previous, row = row, [i]
        for j, other in enumerate(got, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (word != other)))
    return row[-1]


def spread(values: Iterable[float]) -> str:
    return " / ".join(f"{value:.0f}" for value in np.percentile(list(values), [50, 95, 99]))


# --- one pass after another ---


def as_turn(text: str) -> Float32:
    """What a turn's audio is: 300 ms of preroll, the speech, 80 ms of silence; quiet room."""
    clip = audio.speech_clip(
        audio.user_speech(text), np.random.default_rng(1), snr_db=None, lead_ms=300, tail_ms=80
    )
    return to_float32(clip.samples)


@dataclass(frozen=True, slots=True)
class Accuracy:
    pass_ms: list[int]
    errors: int
    total: int
    wrong: list[str]


def accuracy(backend: Backend) -> Accuracy:
    pass_ms, errors, total, wrong = [], 0, 0, []
    for text in SENTENCES:
        result = backend.transcribe(as_turn(text), "en", draft=False, abandoned=lambda: False)
        pass_ms.append(result.compute_ms)
        missed = word_errors(words(text), words(result.text))
        errors, total = errors + missed, total + len(words(text))
        if missed:
            wrong.append(f"“{text}” → “{result.text}”")
    return Accuracy(pass_ms, errors, total, wrong)


def context_table() -> Iterable[str]:
    yield "| context | final pass ms (p50 / p95 / p99) | word errors | WER |"
    yield "|---|---|---|---|"
    wrong: dict[str, list[str]] = {}
    for name, context_s, margin_s in (
        ("6 s", 6.0, 3.0),
        ("8 s (default)", 8.0, 4.0),
        ("12 s", 12.0, 4.0),
        ("30 s", 30.0, 4.0),
    ):
        found = accuracy(load_backend(AsrSettings(context_s=context_s, context_margin_s=margin_s)))
        wrong[name] = found.wrong
        rate = 100 * found.errors / found.total
        yield (
            f"| {name} | {spread(found.pass_ms)} | {found.errors} of {found.total} | {rate:.1f} % |"
        )
    for name in ("8 s (default)", "30 s"):
        yield f"\n{name}: " + ("; ".join(wrong[name]) or "all right")


# --- through the detector, in real time ---


@dataclass(frozen=True, slots=True)
class Tail:
    """From the end of speech to the text."""

    endpoint_ms: float
    waited_ms: float
    total_ms: float
    speculative: bool
    partials: int


async def live_turn(turn: TurnRecognizer, clip: audio.Clip, partials: list[Partial]) -> list[Tail]:
    """Feed a clip in real time; one tail for every turn that the detector ends in it."""
    vad = VoiceActivityDetector(VadSettings())
    tails: list[Tail] = []
    begun = time.perf_counter()
    for start in range(0, clip.samples.size - 159, 160):
        due = begun + (start + 160) / audio.RATE
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        step: Int16 = clip.samples[start : start + 160]
        fed = False
        for event in vad.step(step, playing=False):
            if event.phase is VadPhase.EDGE:
                partials.clear()
                turn.begin(vad.preroll(300))
                fed = True
            elif event.phase is VadPhase.REJECTED:
                turn.cancel()
            elif event.phase is VadPhase.QUIET:
                turn.speculate()
            elif event.phase is VadPhase.VOICED_AGAIN:
                turn.invalidate()
            elif event.phase is VadPhase.ENDED:
                ended = time.perf_counter()
                result = await turn.finish()
                now = time.perf_counter()
                tails.append(
                    Tail(
                        event.at_ms - clip.offset_ms,
                        (now - ended) * 1000,
                        (now - begun) * 1000 - clip.offset_ms,
                        result.speculative,
                        len(partials),
                    )
                )
        if not fed:
            turn.feed(step)
    return tails


async def live_table(count: int) -> list[str]:
    settings = AsrSettings()
    recognizer = await asyncio.to_thread(make_recognizer, settings)
    partials: list[Partial] = []
    turn = TurnRecognizer(
        recognizer,
        session_id="bench",
        language="en",
        settings=settings,
        on_partial=partials.append,
        clock=MonotonicClock(),
    )
    running = asyncio.create_task(turn.run())
    await asyncio.sleep(0)
    random = np.random.default_rng(1)
    last: list[Tail] = []
    for text in SENTENCES[:count]:
        clip = audio.speech_clip(
            audio.user_speech(text), random, snr_db=None, lead_ms=400, tail_ms=700
        )
        last += (await live_turn(turn, clip, partials))[-1:]
    running.cancel()
    await asyncio.wait([running])
    await recognizer.aclose()
    return [
        "| end of speech → | ms (p50 / p95 / p99) |",
        "|---|---|",
        f"| endpoint | {spread(t.endpoint_ms for t in last)} |",
        f"| endpoint → text (guess started at the first 80 ms of silence) "
        f"| {spread(t.waited_ms for t in last)} |",
        f"| text | {spread(t.total_ms for t in last)} |",
        "",
        f"{sum(t.speculative for t in last)} of {len(last)} texts were the guess; "
        f"{np.mean([t.partials for t in last]):.1f} partials a turn.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--live", type=int, default=10, help="sentences fed in real time")
    args = parser.parse_args()
    for line in context_table():
        print(line, flush=True)
    print()
    print("\n".join(asyncio.run(live_table(args.live))))


if __name__ == "__main__":
    main()
