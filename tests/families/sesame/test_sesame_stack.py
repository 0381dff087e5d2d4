"""Sesame through the whole installation, on random weights: what speaks is noise, all else is real.

No test waits for a wall clock: this machine may be slower than the sound that it makes.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio

from src.rpc.errors import Exhausted, from_rpc_error
from src.rpc.generated import tts_pb2 as pb
from src.rpc.generated import tts_pb2_grpc
from src.tts.catalog import ROOT
from tests.audio_fixtures import at_level, espeak_speech, pink
from tests.integration import live
from tests.integration.live import Frame, Installation, Talker, installation, talker

pytestmark = pytest.mark.timeout(400)
together = pytest.mark.asyncio(loop_scope="module")

MODEL, OTHER = "tiny-csm-random", "espeak-en"
SLOTS = 8
SHORT = "Once upon a time."
STORY = (
    "Once upon a time there was a lighthouse keeper who counted the ships every evening. "
    "He wrote their names into a blue book, and the book grew heavier with every year. "
    "One night a ship came that had no name at all."
)


@pytest.fixture(scope="module", autouse=True)
def _patience() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live, "PATIENCE_S", 150.0)
        patch.setattr(live, "READY_S", 300.0)
        yield


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(
    _patience: None, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Installation]:
    logs = tmp_path_factory.mktemp("sesame")
    args = ["--preload_models", OTHER, "--log_level", "info"]
    async with installation(
        logs, model=MODEL, worker_args=args, env={"OMP_NUM_THREADS": "1"}
    ) as one:
        yield one
    assert "RANDOM WEIGHTS" in (logs / "worker.log").read_text()


# --- a conversation ---


async def in_mid_story(client: Talker, text: str = STORY) -> None:
    await client.say(text)
    await client.until(lambda: client.played.get("u1", -1) >= 15, "the story to be under way")


@together
async def test_speech_silences_the_voice_and_cuts_it_at_an_estimated_word(
    running: Installation,
) -> None:
    speech = at_level(espeak_speech("Stop please, I have heard enough of that."), -22.0)
    async with talker(running, model=MODEL) as client:
        (started,) = client.events("session.started")
        assert started["model"] == MODEL
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
        assert not [item for item in silent if isinstance(item, Frame)], "no frame after a flush"
        assert heard["completed"] is False
        assert heard["estimated"] is True
        assert STORY.startswith(heard["heard"])
        assert heard["heard"].strip()
        assert heard["cut"].split()[0] == STORY[len(heard["heard"]) :].split()[0]

        # The slot is free again, and the session goes on.
        await client.say("And now?")
        await client.until(
            lambda: [f for f in client.frames() if f.utterance_id not in ("", "u1")], "an answer"
        )


@together
async def test_a_noise_only_pauses_the_voice_and_not_a_frame_is_lost(
    running: Installation,
) -> None:
    noise = at_level(pink(80, np.random.default_rng(3)), -20.0)
    async with talker(running, model=MODEL) as client:
        await in_mid_story(client, SHORT)
        client.talk(noise)
        await client.until_event("flush", utterance_id="u1")
        await client.until_event("barge_in", verdict="false")
        resumed = await client.until_event("audio.begin", resumed=True)
        end = await client.until_event("audio.end", utterance_id="u1")
        heard = await client.until_event("heard", utterance_id="u1")
        assert resumed["seq"] == client.flushed_at["u1"] + 1, "the first frame that was not heard"

        by_seq: dict[int, set[bytes]] = {}
        for frame in client.frames("u1"):
            by_seq.setdefault(frame.seq, set()).add(frame.data)
        assert sorted(by_seq) == list(range(end["frames"])), "every frame came"
        assert {len(copies) for copies in by_seq.values()} == {1}, "a repeated frame is the same"
        assert (heard["heard"], heard["completed"]) == (SHORT, True)


@together
async def test_a_session_switches_to_another_family_and_back(running: Installation) -> None:
    async with talker(running, model=MODEL) as client:
        for model, estimated in ((OTHER, False), (MODEL, True)):
            await client.socket.send_json({"type": "model.switch", "model": model, "voice": ""})
            await client.until_event("model", model=model, state="ready")
            utterance = await spoken(client, STORY)
            await client.say("Go on.", speak=False)
            heard = await client.until_event("heard", utterance_id=utterance)
            assert not heard["completed"]
            assert heard["estimated"] is estimated, "only one of the two knows its words' times"
            await client.until(lambda: client.events("audio.end"), "the answer's end")
            client.log.clear()


async def spoken(client: Talker, text: str) -> str:
    """The utterance that speaks this text, once half a second of it is there."""
    wanted = len(client.frames()) + 25
    await client.say(text)
    await client.until(lambda: len(client.frames()) > wanted, "the voice")
    return client.frames()[-1].utterance_id


# --- the worker itself ---


@asynccontextmanager
async def worker(running: Installation) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(running.worker) as channel:
        yield tts_pb2_grpc.TTSStub(channel)  # type: ignore[no-untyped-call]


@asynccontextmanager
async def session(stub: Any, name: str, **asked: Any) -> AsyncIterator[str]:
    await stub.StartSession(pb.StartSessionReq(session_id=name, model_id=MODEL, **asked))
    yield name
    await stub.EndSession(pb.EndSessionReq(session_id=name))


def speak(stub: Any, name: str, text: str, utterance: str = "u1") -> Any:
    chunk = pb.TextChunk(text=text, is_final=True, session_id=name, utterance_id=utterance)
    return stub.Synthesize(iter([chunk]))


@together
async def test_it_is_listed_as_what_it_is(running: Installation) -> None:
    async with worker(running) as stub:
        can = await stub.GetCapabilities(pb.GetCapReq())
        assert (can.adapter, can.default_model_id, can.lora) == ("sesame", MODEL, False)
        listed = {m.model_id: m for m in (await stub.ListModels(pb.ListModelsReq())).models}
        assert "random-weights" in listed[MODEL].tags
        assert (listed[MODEL].max_streams, listed[MODEL].native_sample_rate) == (SLOTS, 24_000)


@together
async def test_a_pause_stops_what_leaves_and_a_stop_ends_it(running: Installation) -> None:
    async with worker(running) as stub, session(stub, "pausing") as name:
        call = speak(stub, name, STORY)
        seqs = [(await call.read()).seq for _ in range(5)]
        paused = await stub.Control(pb.ControlReq(session_id=name, action=pb.PAUSE))
        while seqs[-1] < paused.last_seq:
            seqs.append((await call.read()).seq)
        following = asyncio.ensure_future(call.read())
        await asyncio.sleep(0.3)
        assert not following.done()
        await stub.Control(pb.ControlReq(session_id=name, action=pb.RESUME))
        seqs.append((await following).seq)
        assert seqs == list(range(len(seqs)))
        await stub.Control(pb.ControlReq(session_id=name, action=pb.STOP))
        assert (await rest_of(call))[-1].last


@together
@pytest.mark.parametrize("text", ["", "…?!", "x", "word " * 1000], ids=["0", "marks", "1", "5000"])
async def test_text_of_any_length_is_spoken_and_the_session_lives(
    running: Installation, text: str
) -> None:
    async with worker(running) as stub, session(stub, "texts") as name:
        call = speak(stub, name, text)
        first = await call.read()
        if text.strip("…?! "):
            assert not first.last
            await stub.Control(pb.ControlReq(session_id=name, action=pb.STOP))
            assert (await rest_of(call))[-1].last
        else:
            assert first.last
            assert first.seq == 0


async def rest_of(call: Any) -> list[pb.AudioFrame]:
    frames = []
    while (frame := await call.read()) is not grpc.aio.EOF:
        frames.append(frame)
    return frames


@together
async def test_the_words_of_an_utterance_come_in_order_each_once(running: Installation) -> None:
    async with worker(running) as stub, session(stub, "words", lead_ms=10_000) as name:
        frames = await rest_of(speak(stub, name, SHORT))
        words = [word for frame in frames for word in frame.words]
        assert [SHORT[w.char_start : w.char_end] for w in words] == SHORT.split()
        assert all(word.estimated for word in words)
        length_ms = frames[-1].seq * 20
        assert all(0 <= word.start_ms <= length_ms for word in words)


@together
async def test_who_finds_no_slot_learns_where_he_stands(running: Installation) -> None:
    """And the others speak on, all of them: one that waits for the engine holds up nobody."""
    async with worker(running) as stub:
        names = [f"many-{number}" for number in range(SLOTS + 1)]
        for name in names:
            await stub.StartSession(pb.StartSessionReq(session_id=name, model_id=MODEL))
        calls = [speak(stub, name, STORY) for name in names[:SLOTS]]
        for call in calls:
            await call.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rest_of(speak(stub, names[SLOTS], STORY))
        refused = from_rpc_error(caught.value)
        assert isinstance(refused, Exhausted)
        assert refused.queue_position == 1
        assert refused.retry_after_ms
        calls.pop().cancel()
        again = speak(stub, names[SLOTS], "Now me.", "u2")
        assert not (await again.read()).last
        for call in (*calls, again):
            call.cancel()
        for name in names:
            await stub.EndSession(pb.EndSessionReq(session_id=name))


def test_without_weights_the_worker_says_what_to_download_and_where_to_put_it(
    tmp_path: Path,
) -> None:
    flags = ["--adapter", "sesame", "--port", "0", "--redis_url", ""]
    result = subprocess.run(
        [sys.executable, "-m", "src.tts.worker", *flags, "--voicepacks_dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 1
    assert "hf download sesame/csm-1b --local-dir voicepacks/sesame/csm-1b" in result.stderr
    assert "tiny-csm-random" in result.stderr
