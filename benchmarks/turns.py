"""End of speech to first audio, turn by turn, the way the comparison with others was measured.

Five questions of 1.5 to 1.9 s in a second speaker's voice, 650 to 750 ms of quiet before each, room
noise of -60 dBFS always, 10 ms microphone frames. Two blocks of ten turns, the first turn of each
block dropped, a new conversation every five turns. The clock runs from the hand-over of the frame
with the last sample over -40 dBFS to the first frame at the client's socket that is not silence.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import aiohttp

from benchmarks.caller import Caller, DidNotHappen, on_call
from benchmarks.clips import QUESTIONS, questions
from benchmarks.engine import EngineClock
from benchmarks.figures import Aim, Result, Row, Spread, table
from benchmarks.machine import now_ms
from benchmarks.stacks import Bench, Lab, real_stack, scripted_stack
from src.audio.pcm import Int16
from src.demo.wer import word_errors
from src.rpc.ws_events import Heard, Latency, TranscriptEvent

BLOCKS = 2
TURNS_PER_BLOCK = 11
TURNS_PER_CONVERSATION = 5
AUDIBLE = int(32768 * 10 ** (-40 / 20))
STAGES = ("endpoint", "transcript", "first_token", "first_clause", "first_audio")
AFTER_REPLY_S = 0.4


@dataclass(frozen=True)
class Turn:
    """Times count from the end of speech, in ms."""

    question: str
    first_audio_ms: float
    audible_ms: float
    stages_ms: dict[str, int]
    """The server's own waterfall, from where it takes the end of speech to be."""
    engine_ms: float
    """The voice's own time for the first chunk."""
    speculative: bool
    cpu_s: dict[str, float]
    word_errors: int
    words: int


async def take_turn(
    caller: Caller, lab: Lab, engine: EngineClock, clip: Int16, question: str
) -> Turn:
    """Raises DidNotHappen."""
    await engine.lap()
    lab.meter.lap()
    await asyncio.sleep(random.uniform(0.65, 0.75))
    began_ms = now_ms()
    spoken = await caller.microphone.say(clip)
    sound = await caller.until_sound(spoken.end_ms)
    cpu_s = lab.meter.lap()
    early = caller.ear.first(began_ms, peak=1)
    if early is not None and early.at_ms < spoken.end_ms:
        raise DidNotHappen("an answer after the end of the question: it came before")
    latency = await caller.until(Latency, "the turn's latency", began_ms)
    final = await caller.until(
        TranscriptEvent, "the words", began_ms, lambda event: event.final and bool(event.text)
    )
    wrong = word_errors(question, final.text)
    await asyncio.sleep(0.1)
    audible = caller.ear.first(spoken.end_ms, AUDIBLE) or sound
    return Turn(
        question=question,
        first_audio_ms=sound.at_ms - spoken.end_ms,
        audible_ms=audible.at_ms - spoken.end_ms,
        stages_ms={stage: getattr(latency, f"{stage}_ms") for stage in STAGES},
        engine_ms=await engine.lap(),
        speculative=latency.speculative,
        cpu_s=cpu_s,
        word_errors=wrong.errors,
        words=wrong.words,
    )


async def conversation(
    bench: Bench, lab: Lab, clips: list[Int16], numbers: Sequence[int], *, patient: bool
) -> list[Turn]:
    """`patient`: hear every answer to its end; else hang up as soon as it is measured."""
    turns = []
    async with (
        on_call(lab.stack.ws_url, frame_ms=10) as caller,
        aiohttp.ClientSession() as http,
    ):
        engine = EngineClock(http, lab.worker_metrics_port)
        for index in numbers:
            question = QUESTIONS[index % len(QUESTIONS)]
            began_ms = now_ms()
            try:
                turn = await take_turn(caller, lab, engine, clips[index % len(clips)], question)
                turns.append(turn)
                bench.report(f"  {question:36} {turn.first_audio_ms:5.0f} ms")
                if patient:
                    await caller.until(Heard, "the end of the answer", began_ms)
                    await asyncio.sleep(AFTER_REPLY_S)
            except DidNotHappen as error:
                bench.report(f"  a turn was lost: {error}")
    return turns


@dataclass
class Measured:
    turns: list[Turn]
    asked: int
    rss_mb: dict[str, float]


async def measure(bench: Bench, lab: Lab, *, patient: bool) -> Measured:
    clips = questions(bench.out / "clips")
    blocks, per_block = (1, 6) if bench.quick else (BLOCKS, TURNS_PER_BLOCK)
    turns: list[Turn] = []
    for block in range(blocks):
        step = TURNS_PER_CONVERSATION if patient else 1
        for first in range(0, per_block, step):
            numbers = range(first, min(first + step, per_block))
            found = await conversation(bench, lab, clips, numbers, patient=patient)
            turns += found[1:] if first == 0 else found
        bench.report(f"  block {block + 1} of {blocks}: {len(turns)} turns")
    return Measured(turns, blocks * (per_block - 1), lab.meter.rss_mb())


async def real(bench: Bench) -> Result:
    async with real_stack(bench, "turns-real") as lab:
        measured = await measure(bench, lab, patient=True)
    what = "end of speech → first audio, whole real stack"
    result = _result("real", what, measured, Aim(p50=450, p95=650))
    errors, words = (sum(getattr(t, n) for t in measured.turns) for n in ("word_errors", "words"))
    result.tables["Where a turn's time goes (real)"] += ["", f"Word errors: {errors} of {words}."]
    return result


async def scripted(bench: Bench) -> Result:
    async with scripted_stack(bench, "turns-scripted") as lab:
        measured = await measure(bench, lab, patient=False)
    what = "end of speech → first audio, scripted words and replies, eSpeak"
    return _result("scripted", what, measured, Aim(p50=250, p95=350))


def _result(name: str, what: str, measured: Measured, aim: Aim) -> Result:
    turns = measured.turns
    rows = [
        Row(what=what, sessions=1, aim=aim, spread=Spread.of(t.first_audio_ms for t in turns)),
        Row(
            what="– the same, to the first frame over -40 dBFS",
            sessions=1,
            spread=Spread.of(t.audible_ms for t in turns),
        ),
    ]
    raw = {"turns": [asdict(turn) for turn in turns], "rss_mb": measured.rss_mb}
    return Result(rows, {f"Where a turn's time goes ({name})": waterfall(measured)}, raw)


def waterfall(measured: Measured) -> list[str]:
    turns = measured.turns
    if not turns:
        return ["No turn was answered."]
    rows = [
        [stage.replace("_", " "), Spread.of(t.stages_ms[stage] for t in turns).text()]
        for stage in STAGES
    ]
    rows.append(
        ["– of which the voice's first chunk took", Spread.of(t.engine_ms for t in turns).text()]
    )
    rows.append(["first frame at the client", Spread.of(t.first_audio_ms for t in turns).text()])
    lines = table(("reached, ms after the end of speech", "p50 / p95 / p99"), rows)
    guessed = sum(turn.speculative for turn in turns)
    cpu_s = {name: sum(t.cpu_s[name] for t in turns) / len(turns) for name in turns[0].cpu_s}
    each = ", ".join(f"{name} {seconds:.2f}" for name, seconds in cpu_s.items())
    memory = ", ".join(f"{name} {mb:.0f}" for name, mb in measured.rss_mb.items())
    return [
        *lines,
        "",
        f"{len(turns)} of {measured.asked} turns answered; {guessed} of the answers had been begun "
        f"before the end of the turn was certain. "
        "The orchestrator's own idea of the end of speech lies up to 20 ms before the one at the "
        f"client. CPU-seconds a turn, from the quiet before it to first audio: {each} "
        f"(together {sum(cpu_s.values()):.2f}). RSS in MB: {memory}.",
    ]
