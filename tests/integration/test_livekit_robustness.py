"""What happens in a room when something dies: the server, the user, their process, our token."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from livekit import api

from src.common.clock import MonotonicClock
from src.common.livekit_server import LiveKitServer
from src.common.processes import free_port
from src.demo.room_user import room_user
from src.orchestrator.rooms.settings import LiveKitSettings
from src.rpc.errors import Unauthenticated, Unavailable
from src.rpc.ws_events import Error, Heard, SessionStarted
from tests.audio_fixtures import espeak_speech
from tests.integration.conftest import ROOT
from tests.integration.rooms import Host, host

ROOM = "a-room"
# Somebody who talks once and stays, in a process that can be killed.
LONELY_USER = """
import asyncio, sys
from src.demo.room_user import room_user
from tests.audio_fixtures import espeak_speech

async def main():
    async with room_user(sys.argv[1], sys.argv[2]) as user:
        await user.until(lambda: user.agent_state == "listening")
        spoken = await user.said(espeak_speech("what is this"))
        await user.first_sound_ms(spoken.end_ms)
        print("hears", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("away_s", [0.3, 3.0])
async def test_a_session_outlives_the_livekit_server(livekit: LiveKitServer, away_s: float) -> None:
    orchestrator = host(livekit)
    async with orchestrator.talking(ROOM) as (user, visit):
        spoken = await user.said(espeak_speech("what is this"))
        await user.first_sound_ms(spoken.end_ms)
        await livekit.kill()
        await asyncio.sleep(away_s)
        await livekit.restart()
        restarted_ms = MonotonicClock().now_ms()
        await user.until(lambda: "reconnected" in [c.what for c in user.connection], "its return")
        await user.first_sound_ms(restarted_ms)
        heard = await user.until_event(Heard, completed=True)
        assert heard.heard == orchestrator.answer
        await user.until(lambda: user.agent_state == "listening", "the floor")
        again = await user.said(espeak_speech("what is this"))
        await user.first_sound_ms(again.end_ms)
        assert not visit.done()
        assert len(user.got(SessionStarted)) == len(orchestrator.sessions) == 1
        assert len(user.agents) == 1


async def test_a_user_whose_process_dies_is_not_talked_to_for_long(
    livekit: LiveKitServer,
) -> None:
    orchestrator = host(livekit, user_gone_ms=1_000, reconnect_grace_ms=2_000)
    async with orchestrator.hosted(ROOM) as visit:
        with lonely_user(orchestrator) as process:
            await asyncio.to_thread(process.stdout.readline)  # type: ignore[union-attr]
            utterance = orchestrator.speech.utterances[-1]
            process.kill()
        await until(lambda: orchestrator.sessions[0]._state.away)
        said = len(utterance.emitted)
        await asyncio.sleep(0.5)
        assert len(utterance.emitted) - said < 10
        assert await asyncio.wait_for(visit, 10) == "user_gone"
    assert orchestrator.observer.closed == ["user_gone"]


@contextmanager
def lonely_user(orchestrator: Host) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-c", LONELY_USER, orchestrator.server.url, orchestrator.token(ROOM)]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def until(true: object, patience_s: float = 10.0) -> None:
    assert callable(true)
    deadline_ms = MonotonicClock().now_ms() + patience_s * 1000
    while not true():
        assert MonotonicClock().now_ms() < deadline_ms, "waited in vain"
        await asyncio.sleep(0.02)


async def test_a_refused_token_is_said_without_the_token(livekit: LiveKitServer) -> None:
    orchestrator = host(livekit)
    grants = api.VideoGrants(room_join=True, room=ROOM)
    forged = api.AccessToken(livekit.api_key, "x" * 40).with_identity("agent").with_grants(grants)
    token = forged.to_jwt()
    with pytest.raises(Unauthenticated) as refusal:
        await orchestrator.visit(ROOM, token=token).run()
    assert "api_secret" in refusal.value.message
    assert not any(part in str(refusal.value) for part in token.split("."))


async def test_a_server_that_is_not_there_is_said() -> None:
    nowhere = LiveKitSettings(
        url=f"ws://127.0.0.1:{free_port()}", api_key="devkey", api_secret="s" * 40
    )
    server = type("NoServer", (), {"url": nowhere.url})
    with pytest.raises(Unavailable, match="cannot be reached"):
        await Host(server, nowhere).visit(ROOM).run()  # type: ignore[arg-type]


async def test_a_visit_that_is_cancelled_leaves_the_room(livekit: LiveKitServer) -> None:
    orchestrator = host(livekit)
    visit = asyncio.create_task(orchestrator.visit(ROOM).run())
    async with room_user(livekit.url, orchestrator.token(ROOM)) as user:
        await user.until(lambda: user.agent_state == "listening", "the agent")
        before = asyncio.all_tasks()
        visit.cancel()
        with pytest.raises(asyncio.CancelledError):
            await visit
        await user.until(lambda: not user.agents, "the agent to leave")
        named = [task.get_name() for task in asyncio.all_tasks() - before]
        assert not [name for name in named if not name.startswith("Task-")]
    assert orchestrator.speech.opened[0].closed


async def test_one_cancelled_while_it_connects_leaves_no_ghost(livekit: LiveKitServer) -> None:
    orchestrator = host(livekit)
    async with room_user(livekit.url, orchestrator.token(ROOM)) as user:
        for delay_s in (0.0, 0.01, 0.04, 0.08):
            visit = asyncio.create_task(orchestrator.visit(ROOM).run())
            await asyncio.sleep(delay_s)
            visit.cancel()
            await asyncio.wait([visit])
        await user.until(lambda: not user.agents, "an empty room")
        await asyncio.sleep(1)
        assert not user.agents


async def test_a_warning_reaches_the_user_and_changes_nothing(livekit: LiveKitServer) -> None:
    orchestrator = host(livekit)
    visit = orchestrator.visit(ROOM)
    running = asyncio.create_task(visit.run())
    async with room_user(livekit.url, orchestrator.token(ROOM)) as user:
        await user.until_event(SessionStarted)
        visit.warn(Unavailable("the server is going down", retry_after_ms=2_000))
        error = await user.until_event(Error)
        assert (error.fatal, error.retry_after_ms) == (False, 2_000)
        assert not running.done()
        visit.close("draining")
        visit.close("something else")
        assert await running == "draining"
