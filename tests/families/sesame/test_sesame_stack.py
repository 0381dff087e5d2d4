"""Sesame through the whole installation, on random weights: what speaks is noise, all else is real.

No test waits for a wall clock: this machine may be slower than the sound that it makes.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from src.rpc.errors import Exhausted, from_rpc_error
from src.rpc.generated import tts_pb2 as pb
from src.tts.catalog import ROOT
from tests.families.stack import (
    STORY,
    Conversations,
    Family,
    listed,
    rest_of,
    session,
    speak,
    together,
    worker,
)
from tests.integration.live import Installation

pytestmark = pytest.mark.timeout(400)

MODEL = "tiny-csm-random"
FAMILY = Family(MODEL)
SLOTS = 8


class TestSesame(Conversations):
    pass


def test_the_worker_says_that_it_speaks_noise(running: Installation) -> None:
    assert "RANDOM WEIGHTS" in running.orchestrator.log.with_name("worker.log").read_text()


@together
async def test_it_is_listed_as_what_it_is(running: Installation) -> None:
    async with worker(running) as stub:
        can = await stub.GetCapabilities(pb.GetCapReq())
        assert (can.adapter, can.default_model_id, can.lora) == ("sesame", MODEL, False)
        found = await listed(stub, MODEL)
        assert "random-weights" in found.tags
        assert (found.max_streams, found.native_sample_rate) == (SLOTS, 24_000)


@together
async def test_a_pause_stops_what_leaves_and_a_stop_ends_it(running: Installation) -> None:
    async with worker(running) as stub, session(stub, "pausing", MODEL) as name:
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
