"""The play: what the scripted user says and does, in order."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np

from src.audio.pcm import Int16
from src.demo.actor import Actor
from src.demo.user_voice import cough
from src.rpc.ws_events import AudioBegin, BargeIn, ModelStatus

QUESTION = "What is the capital of France?"
STORY = "Tell me a short story about a lighthouse keeper."
INTERRUPTION = "Wait, stop. How many days are there in a week?"
LAST = "Thank you. What color is the sky?"
LINES = (QUESTION, STORY, INTERRUPTION, LAST)
OTHER_VOICE = "espeak-en"

# Long enough for the endpoint of one turn to be over before the next begins.
BREATH_S = 0.7
INTO_THE_STORY_S = 1.6
AFTER_THE_COUGH_S = 2.2


@dataclass
class Happened:
    """What the play saw; the report checks it against the recording."""

    cough_utterance: str = ""
    interrupted_utterance: str = ""
    switched_to: str = ""
    spoke_after_switch: str = ""


async def play(actor: Actor, clips: dict[str, Int16], other_voice: str) -> Happened:
    happened = Happened()
    await asyncio.sleep(BREATH_S)
    await ask(actor, clips, QUESTION)
    await interrupted_story(actor, clips, happened)
    await other_speaker(actor, clips, other_voice, happened)
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


async def interrupted_story(actor: Actor, clips: dict[str, Int16], happened: Happened) -> None:
    began = actor.now_ms
    await actor.say(clips[STORY], STORY)
    story = await actor.reply_begins(began)
    await asyncio.sleep(INTO_THE_STORY_S)

    coughed = actor.now_ms
    await actor.say(cough(np.random.default_rng(3)))
    await _verdict(actor, "false", coughed)
    happened.cough_utterance = story.utterance_id
    await asyncio.sleep(AFTER_THE_COUGH_S)

    began = actor.now_ms
    await actor.say(clips[INTERRUPTION], INTERRUPTION)
    await _verdict(actor, "real", began)
    happened.interrupted_utterance = story.utterance_id
    reply = await actor.until(
        AudioBegin, lambda event: event.utterance_id != story.utterance_id, began, "the answer"
    )
    await actor.reply_was_heard(reply.utterance_id)
    await asyncio.sleep(BREATH_S)


async def other_speaker(
    actor: Actor, clips: dict[str, Int16], voice: str, happened: Happened
) -> None:
    began = actor.now_ms
    assert actor.client is not None  # noqa: S101  (on stage)
    await actor.client.switch_model(voice)
    ready = await actor.until(
        ModelStatus, lambda event: event.state != "loading", began, "the other voice"
    )
    if ready.state == "ready":
        happened.switched_to = ready.model
    happened.spoke_after_switch = await ask(actor, clips, LAST)


async def _verdict(actor: Actor, verdict: str, since_ms: float) -> BargeIn:
    return await actor.until(
        BargeIn, lambda event: event.verdict == verdict, since_ms, f"the verdict {verdict!r}"
    )
