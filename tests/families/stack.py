"""The whole installation on a family's tiny voice pack: what speaks is noise, all else is real.

The worker is a process of its own in the environment that runs the tests, and finds the pack as it
would any other. No test waits for a wall clock: this machine may be slower than the sound it makes.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import soundfile
import yaml

from src.client.devices import MIC_RATE
from src.common.processes import Child
from src.rpc.generated import tts_pb2 as pb
from src.rpc.generated import tts_pb2_grpc
from src.tts.catalog import METADATA
from src.tts.tts_base import RANDOM_WEIGHTS
from tests.audio_fixtures import at_level, espeak_speech, pink
from tests.integration import live
from tests.integration.live import Frame, Installation, Talker, installation, talker

together = pytest.mark.asyncio(loop_scope="module")

OTHER = "espeak-en"
SHORT = "Once upon a time."
STORY = (
    "Once upon a time there was a lighthouse keeper who counted the ships every evening. "
    "He wrote their names into a blue book, and the book grew heavier with every year. "
    "One night a ship came that had no name at all."
)
BUSY = 0.1
"""Cores. A worker that only keeps its sessions alive takes a tenth of that."""


@dataclass(frozen=True)
class Family:
    """What a module of these tests says of its family, as FAMILY."""

    model: str
    """What a session asks for."""
    family: str = ""
    make: Callable[[Path], object] | None = None
    """Fills a folder with a voice pack of `family`, which is then called `model`; its pieces of
    text end in time, so that a test need not hear them out. None: the model is in the catalog."""
    worker: str = "src.tts.worker"
    """The module that is run as the worker."""

    def shelve(self, shelf: Path) -> None:
        """A folder of voice packs with this one in it."""
        if self.make is None:
            return
        pack = shelf / self.family / "tiny"
        pack.parent.mkdir(parents=True)
        self.make(pack)
        said = {"model_id": self.model, "tags": [RANDOM_WEIGHTS], "languages": ["en"]}
        (pack / METADATA).write_text(yaml.safe_dump(said), encoding="utf-8")


@asynccontextmanager
async def standing(family: Family, folder: Path) -> AsyncIterator[Installation]:
    """An installation with the family's model in memory, and eSpeak beside it."""
    family.shelve(folder / "voicepacks")
    args = ["--preload_models", OTHER, "--no-allow_fallback"]
    args += ["--voicepacks_dir", str(folder / "voicepacks")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live, "PATIENCE_S", 150.0)
        patch.setattr(live, "READY_S", 300.0)
        async with installation(
            folder,
            model=family.model,
            worker=family.worker,
            worker_args=args,
            env={"OMP_NUM_THREADS": "1"},
        ) as one:
            yield one


class Conversations:
    """What holds for every family: a class named Test… of these, in a module with a FAMILY."""

    @together
    async def test_speech_silences_the_voice_and_cuts_it_at_an_estimated_word(
        self, running: Installation, family: Family
    ) -> None:
        speech = at_level(espeak_speech("Stop please, I have heard enough of that."), -22.0)
        async with talker(running, model=family.model) as client:
            (started,) = client.events("session.started")
            assert (started["model"], started["fallback"]) == (family.model, False)
            await in_mid_story(client)
            client.talk(speech)
            flush = await client.until_event("flush", utterance_id="u1")
            await client.until_event("barge_in", verdict="real")
            heard = await client.until_event("heard", utterance_id="u1")

            after = client.log[client.position(flush) + 1 :]
            begins = [
                i for i, e in enumerate(after) if isinstance(e, dict) and e["type"] == "audio.begin"
            ]
            silent = after[: begins[0]] if begins else after
            assert not [item for item in silent if isinstance(item, Frame)], "no frame after it"
            assert heard["completed"] is False
            assert heard["estimated"] is True
            assert STORY.startswith(heard["heard"])
            assert heard["heard"].strip()
            assert heard["cut"].split()[0] == STORY[len(heard["heard"]) :].split()[0]

            # The stream is free again, and the session goes on.
            await client.say("And now?")
            await client.until(
                lambda: [f for f in client.frames() if f.utterance_id not in ("", "u1")],
                "an answer",
            )

    @together
    async def test_nothing_computes_for_nobody(self, running: Installation, family: Family) -> None:
        """The story would take longer than its listener stays."""
        async with talker(running, model=family.model) as client:
            await in_mid_story(client, STORY * 8)
        async with worker(running) as stub:
            await until(lambda: is_free(stub, family.model), "the stream's thread to end")
        await until_quiet(running.worker_pid)

    @together
    async def test_a_noise_only_pauses_the_voice_and_not_a_frame_is_lost(
        self, running: Installation, family: Family
    ) -> None:
        noise = at_level(pink(80, np.random.default_rng(3)), -20.0)
        async with talker(running, model=family.model) as client:
            await in_mid_story(client, SHORT)
            client.talk(noise)
            await client.until_event("flush", utterance_id="u1")
            await client.until_event("barge_in", verdict="false")
            resumed = await client.until_event("audio.begin", resumed=True)
            end = await client.until_event("audio.end", utterance_id="u1")
            heard = await client.until_event("heard", utterance_id="u1")
            assert resumed["seq"] == client.flushed_at["u1"] + 1, "the first that was not heard"

            by_seq: dict[int, set[bytes]] = {}
            for frame in client.frames("u1"):
                by_seq.setdefault(frame.seq, set()).add(frame.data)
            assert sorted(by_seq) == list(range(end["frames"])), "every frame came"
            assert {len(copies) for copies in by_seq.values()} == {1}, "a repeated one is the same"
            assert (heard["heard"], heard["completed"]) == (SHORT, True)

    @together
    async def test_a_session_switches_to_another_family_and_back(
        self, running: Installation, family: Family
    ) -> None:
        async with talker(running, model=family.model) as client:
            for model, estimated in ((OTHER, False), (family.model, True)):
                await client.socket.send_json({"type": "model.switch", "model": model, "voice": ""})
                await client.until_event("model", model=model, state="ready")
                utterance = await spoken(client, STORY)
                await client.say("Go on.", speak=False)
                heard = await client.until_event("heard", utterance_id=utterance)
                assert not heard["completed"]
                assert heard["estimated"] is estimated, "only one of the two knows its words' times"
                await client.until(lambda: client.events("audio.end"), "the answer's end")
                client.log.clear()

    @together
    @pytest.mark.parametrize(
        "text", ["", "…?!", "x", "word " * 1000], ids=["0", "marks", "1", "5000"]
    )
    async def test_text_of_any_length_is_spoken_and_the_session_lives(
        self, running: Installation, family: Family, text: str
    ) -> None:
        async with worker(running) as stub, session(stub, "texts", family.model) as name:
            call = speak(stub, name, text)
            first = await call.read()
            if text.strip("…?! "):
                assert not first.last
                await stub.Control(pb.ControlReq(session_id=name, action=pb.STOP))
                assert (await rest_of(call))[-1].last
            else:
                assert (first.last, first.seq) == (True, 0)

    @together
    async def test_the_words_of_an_utterance_come_in_order_each_once(
        self, running: Installation, family: Family
    ) -> None:
        async with (
            worker(running) as stub,
            session(stub, "words", family.model, lead_ms=10_000) as name,
        ):
            frames = await rest_of(speak(stub, name, SHORT))
            words = [word for frame in frames for word in frame.words]
            assert [SHORT[w.char_start : w.char_end] for w in words] == SHORT.split()
            assert all(word.estimated for word in words)
            length_ms = frames[-1].seq * 20
            assert all(0 <= word.start_ms <= length_ms for word in words)

    @together
    async def test_a_user_at_a_terminal_is_answered(
        self, running: Installation, family: Family, tmp_path: Path
    ) -> None:
        speech = at_level(espeak_speech("Good morning, how are you today?"), -20.0)
        soundfile.write(tmp_path / "talk.wav", speech, MIC_RATE)
        said = await cli(running, tmp_path, "--model", family.model)
        (started,) = [event for event in said if event["type"] == "session.started"]
        assert started["model"] == family.model
        heard = [event for event in said if event["type"] == "heard"]
        assert heard
        assert heard[-1]["completed"]
        reply, rate = soundfile.read(tmp_path / "reply.wav")
        assert rate == 48_000
        assert np.abs(reply).max() > 0.01


# --- a client ---


async def in_mid_story(client: Talker, text: str = STORY) -> None:
    await client.say(text)
    await client.until(lambda: client.played.get("u1", -1) >= 15, "the story to be under way")


async def spoken(client: Talker, text: str) -> str:
    """The utterance that speaks this text, once half a second of it is there."""
    wanted = len(client.frames()) + 25
    await client.say(text)
    await client.until(lambda: len(client.frames()) > wanted, "the voice")
    return client.frames()[-1].utterance_id


async def cli(running: Installation, folder: Path, *more: str) -> Sequence[dict[str, Any]]:
    """The client as people start it, with talk.wav for a microphone; what it printed."""
    files = ["--in", str(folder / "talk.wav"), "--out", str(folder / "reply.wav")]
    host = ["--host", f"ws://127.0.0.1:{running.port}", "--no_devices", "--json"]
    argv = [sys.executable, "-m", "src.client.cli_client", *host, *files, *more]
    child = await Child.start("cli", argv, log=folder / "cli.log")
    try:
        status = await asyncio.wait_for(child.wait(), live.PATIENCE_S)
    finally:
        await child.stop()
    lines = child.log.read_text(encoding="utf-8").splitlines()
    assert status == 0, lines[-5:]
    return [json.loads(line) for line in lines if line.startswith("{")]


# --- the worker itself ---


@asynccontextmanager
async def worker(running: Installation) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(running.worker) as channel:
        yield tts_pb2_grpc.TTSStub(channel)  # type: ignore[no-untyped-call]


@asynccontextmanager
async def session(stub: Any, name: str, model: str, **asked: Any) -> AsyncIterator[str]:
    await stub.StartSession(pb.StartSessionReq(session_id=name, model_id=model, **asked))
    yield name
    await stub.EndSession(pb.EndSessionReq(session_id=name))


def speak(stub: Any, name: str, text: str, utterance: str = "u1") -> Any:
    chunk = pb.TextChunk(text=text, is_final=True, session_id=name, utterance_id=utterance)
    return stub.Synthesize(iter([chunk]))


async def rest_of(call: Any) -> list[pb.AudioFrame]:
    frames = []
    while (frame := await call.read()) is not grpc.aio.EOF:
        frames.append(frame)
    return frames


async def listed(stub: Any, model: str) -> pb.ModelInfo:
    models: Iterable[pb.ModelInfo] = (await stub.ListModels(pb.ListModelsReq())).models
    return next(found for found in models if found.model_id == model)


async def is_free(stub: Any, model: str) -> bool:
    """No session and no synthesis thread holds the model."""
    return (await listed(stub, model)).refcount == 0


async def until(true: Callable[[], Awaitable[bool]], what: str) -> None:
    async def wait() -> None:
        while True:
            if await true():
                return
            await asyncio.sleep(0.1)

    try:
        await asyncio.wait_for(wait(), live.PATIENCE_S)
    except asyncio.TimeoutError:
        raise AssertionError(f"waited in vain for {what}") from None


async def until_quiet(pid: int) -> None:
    """Until a process computes nothing that is worth mentioning for a second."""
    process = psutil.Process(pid)

    async def quiet() -> bool:
        before = sum(process.cpu_times()[:2])
        await asyncio.sleep(1.0)
        return sum(process.cpu_times()[:2]) - before < BUSY

    await until(quiet, "the worker to be quiet")
