"""The play: what the scripted user says and does, in order."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np

from src.audio.pcm import Int16
from src.demo.actor import Actor
from src.demo.user_voice import cough
from src.rpc.ws_events import AudioBegin, BargeIn, ModelStatus

QUESTION = "How many days are there in a week?"
STORY = "Tell me a story about a farmer and his horse."
INTERRUPTION = "Wait, stop. What is the capital of France?"
LAST = "Thank you. What color is the sky?"
LINES = (QUESTION, STORY, INTERRUPTION, LAST)

# Without a recogniser there is nobody to tell a story, so the agent is given one to read. Each line
# is said in one breath, because a pause would be the end of a turn that no word can rejoin.
ONE_BREATH = "Please wait a moment and tell me the capital of France."
LAST_BREATH = "What color is the sky?"
MONOLOGUE = (
    "There is no recogniser on this machine, so I read you a story instead. Once there was a "
    "farmer who counted every cloud that passed his field, and his horse walked on while he looked "
    "up."
)
UNHEARD_LINES = (QUESTION, STORY, ONE_BREATH, LAST_BREATH)

# Long enough for the endpoint of one turn to be over before the next begins.
BREATH_S = 0.7
# Soon: the embedded model's shortest stories last five seconds.
INTO_THE_STORY_S = 1.2
AFTER_THE_COUGH_S = 1.6


@dataclass(frozen=True)
class Speaker:
    """A model and one of its voices."""

    model: str
    voice: str = ""


@dataclass
class Happened:
    """What the play saw; the report checks it against the recording."""

    cough_utterance: str = ""
    interrupted_utterance: str = ""
    switched_to: str = ""
    spoke_after_switch: str = ""


async def play(
    actor: Actor, clips: dict[str, Int16], other: Speaker, *, understood: bool
) -> Happened:
    """`clips` has LINES, or UNHEARD_LINES when nobody will understand them."""
    question, story, interruption, last = LINES if understood else UNHEARD_LINES
    happened = Happened()
    await asyncio.sleep(BREATH_S)
    await ask(actor, clips, question)
    if not understood:
        await ask(actor, clips, story)
    began = await (tell_me(actor, clips, story) if understood else read_it(actor))
    await interrupt(actor, clips, interruption, began, happened)
    await change_speaker(actor, clips, last, other, happened)
    await asyncio.sleep(BREATH_S)
    return happened


async def ask(actor: Actor, clips: dict[str, Int16], line: str) -> str:
    """Ask and listen to the end. Returns the utterance that answered."""
    began = actor.now_ms
    await actor.say(clips[line], line)
    reply = await actor.reply_begins(began)
    await actor.reply_was_heard(reply.utterance_id)
    await asyncio.sleep(BREATH_S)
    return reply.utterance_id


async def tell_me(actor: Actor, clips: dict[str, Int16], line: str) -> float:
    began = actor.now_ms
    await actor.say(clips[line], line)
    return began


async def read_it(actor: Actor) -> float:
    began = actor.now_ms
    await actor.stage.send_text(MONOLOGUE, speak=True)
    return began


async def interrupt(
    actor: Actor, clips: dict[str, Int16], line: str, began: float, happened: Happened
) -> None:
    """A cough into the reply that began at `began`, and then a real interruption."""
    story = await actor.reply_begins(began)
    await asyncio.sleep(INTO_THE_STORY_S)

    coughed = actor.now_ms
    await actor.say(cough(np.random.default_rng(3)))
    await _verdict(actor, "false", coughed)
    happened.cough_utterance = story.utterance_id
    await asyncio.sleep(AFTER_THE_COUGH_S)

    began = actor.now_ms
    await actor.say(clips[line], line)
    await _verdict(actor, "real", began)
    happened.interrupted_utterance = story.utterance_id
    reply = await actor.until(
        AudioBegin, lambda event: event.utterance_id != story.utterance_id, began, "the answer"
    )
    await actor.reply_was_heard(reply.utterance_id)
    await asyncio.sleep(BREATH_S)


async def change_speaker(
    actor: Actor, clips: dict[str, Int16], line: str, other: Speaker, happened: Happened
) -> None:
    began = actor.now_ms
    await actor.stage.switch_model(other.model, other.voice)
    ready = await actor.until(
        ModelStatus, lambda event: event.state != "loading", began, "the other voice"
    )
    if ready.state == "ready":
        happened.switched_to = f"{ready.model} {ready.voice}".strip()
    happened.spoke_after_switch = await ask(actor, clips, line)


async def _verdict(actor: Actor, verdict: str, since_ms: float) -> BargeIn:
    return await actor.until(
        BargeIn, lambda event: event.verdict == verdict, since_ms, f"the verdict {verdict!r}"
    )
