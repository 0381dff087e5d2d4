"""Both ways into a room, at a real livekit-server: who is let in, who appears, what goes wrong.

The visits here only sit in their rooms. What they say there is tested elsewhere.
"""

from __future__ import annotations

import asyncio
import io
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestServer
from livekit import api, rtc

from src.common.clock import MonotonicClock
from src.common.livekit_server import LiveKitServer
from src.common.logging import JsonFormatter
from src.common.tasks import cancel_and_wait
from src.demo.room_user import TokenRefused, fetch_token, room_user
from src.orchestrator.app import make_app
from src.orchestrator.auth import ApiKeys, SessionSlots
from src.orchestrator.http_api import HttpApi
from src.orchestrator.metrics import Metrics
from src.orchestrator.rooms.rooms import Rooms
from src.orchestrator.rooms.settings import LiveKitSettings
from src.orchestrator.rooms.visit import RoomAccess
from src.rpc.errors import DuplexError, Unavailable
from src.rpc.ws_events import SessionStarted
from tests.integration.live import Installation, installation

LIVENESS_S = 40.0
BOTH = pytest.mark.parametrize("entry", ["direct", "agentserver"])
AGENT = rtc.ParticipantKind.PARTICIPANT_KIND_AGENT


class Sitting:
    """A visit that joins, notes who is there, and leaves when the user does."""

    def __init__(self, access: RoomAccess) -> None:
        self.access = access
        self.linked = ""
        self.warned: list[DuplexError] = []
        self.ended = ""
        self.room = rtc.Room()
        self._reason: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def run(self) -> str:
        self.room.on("participant_connected", self._came)
        self.room.on("participant_disconnected", self._left)
        self.room.on("disconnected", lambda reason: self.close("disconnected"))
        try:
            await self.room.connect(self.access.url, self.access.token)
        except rtc.ConnectError as error:
            # As careless as can be: the guard has to hold nevertheless.
            logging.getLogger("livekit").warning("cannot join: %s", error, exc_info=error)
            raise Unavailable(f"cannot join: {error}") from error
        for participant in self.room.remote_participants.values():
            self._came(participant)
        try:
            self.ended = await self._reason
        finally:
            await self.room.disconnect()
        return self.ended

    def warn(self, error: DuplexError) -> None:
        self.warned.append(error)

    def close(self, reason: str) -> None:
        if not self._reason.done():
            self._reason.set_result(reason)

    def _came(self, participant: rtc.RemoteParticipant) -> None:
        wanted = self.access.identity in ("", participant.identity)
        if not self.linked and participant.kind != AGENT and wanted:
            self.linked = participant.identity

    def _left(self, participant: rtc.RemoteParticipant) -> None:
        connected = self.room.connection_state == rtc.ConnectionState.CONN_CONNECTED
        if participant.identity == self.linked and connected and participant.disconnect_reason:
            self.close("user_left")


class Desk:
    """The HTTP API with real `Rooms` behind it."""

    def __init__(
        self, server: LiveKitServer, entry: str, max_sessions: int = 8, **settings: Any
    ) -> None:
        given = {
            "url": server.url,
            "api_key": server.api_key,
            "api_secret": server.api_secret,
            "entry": entry,
            **settings,
        }
        self.slots = SessionSlots(max_sessions, max_sessions)
        self.sittings: list[Sitting] = []
        self.metrics = Metrics()
        self.rooms = Rooms(
            LiveKitSettings.model_validate(given), _no_session, self.slots, self.metrics,
            MonotonicClock(), make_visit=self._sit,
        )  # fmt: skip
        self.url = ""

    def _sit(self, access: RoomAccess) -> Sitting:
        self.sittings.append(Sitting(access))
        return self.sittings[-1]

    async def token(self, **params: str) -> dict[str, Any]:
        return await fetch_token(self.url, **params)

    async def ready(self) -> None:
        await eventually(lambda: self.rooms.check().ok, "rooms ready")

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Desk]:
        keys = ApiKeys()
        http = HttpApi(
            keys=keys, checks={"rooms": self.rooms.check}, metrics=self.metrics,
            models=_NoModels(), rooms=self.rooms, websocket=False,
        )  # fmt: skip
        app = make_app(api=http, sessions=None, keys=keys, metrics=self.metrics)
        running = asyncio.create_task(self.rooms.run())
        async with TestServer(app) as site:
            self.url = str(site.make_url(""))
            try:
                yield self
            finally:
                await self.rooms.drain(0)
                await cancel_and_wait(running)


class _NoModels:
    async def models(self) -> list[dict[str, Any]]:
        return []

    def workers(self) -> list[dict[str, Any]]:
        return []

    async def load(self, model_id: str) -> dict[str, Any]:
        raise NotImplementedError

    async def unload(self, model_id: str) -> dict[str, Any]:
        raise NotImplementedError


def _no_session(*_: object) -> Any:
    raise AssertionError("visits only sit here")


async def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIVENESS_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        await asyncio.sleep(0.02)


@asynccontextmanager
async def user(granted: dict[str, Any]) -> AsyncIterator[rtc.Room]:
    """Somebody with a microphone: who publishes nothing is told of to others only after 3 s."""
    room = rtc.Room()
    await room.connect(granted["server_url"], granted["participant_token"])
    source = rtc.AudioSource(48_000, 1)
    mic = rtc.LocalAudioTrack.create_audio_track("mic", source)
    options = rtc.TrackPublishOptions(source=rtc.TrackSource.SOURCE_MICROPHONE)
    await room.local_participant.publish_track(mic, options)
    try:
        yield room
    finally:
        await room.disconnect()


def agents(room: rtc.Room) -> list[rtc.RemoteParticipant]:
    return [one for one in room.remote_participants.values() if one.kind == AGENT]


@pytest.fixture
def log() -> Any:
    """Everything that is logged, as the orchestrator would write it."""
    sink = io.StringIO()
    handler = logging.StreamHandler(sink)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.addHandler(handler)
    level = root.level
    root.setLevel(logging.DEBUG)
    yield sink
    root.setLevel(level)
    root.removeHandler(handler)
    assert "eyJ" not in sink.getvalue(), "a token was logged"


# --- the way in ---


@BOTH
async def test_whoever_has_a_token_finds_an_agent_in_the_room(
    livekit: LiveKitServer, entry: str, log: io.StringIO
) -> None:
    async with Desk(livekit, entry).open() as desk:
        await desk.ready()
        granted = await desk.token(room="kitchen", identity="ada", voice="joe", events="1")
        async with user(granted) as room:
            await eventually(lambda: agents(room), "the agent")
            assert room.name == "kitchen"
            me = room.local_participant
            assert (me.identity, me.attributes["duplex.voice"]) == ("ada", "joe")
            assert agents(room)[0].identity.startswith("agent-")
            await eventually(lambda: desk.sittings[0].linked == "ada", "the agent sees the user")
            assert (desk.rooms.live, desk.slots.held) == (1, 1)
        await eventually(lambda: not desk.slots.held, "the slot is back")
        assert desk.sittings[0].ended == "user_left"
        assert len(desk.sittings) == 1
    assert '"event": "token"' in log.getvalue()


async def test_a_token_of_somebody_elses_gets_our_agent_by_its_name(
    livekit: LiveKitServer,
) -> None:
    """Their own token service, explicit dispatch: what `agentserver` is for."""
    async with Desk(livekit, "agentserver", agent_name="julia").open() as desk:
        await desk.ready()
        token = api.AccessToken(livekit.api_key, livekit.api_secret).with_identity("ada")
        token.with_grants(api.VideoGrants(room_join=True, room="theirs"))
        dispatch = api.RoomAgentDispatch(agent_name="julia")
        token.with_room_config(api.RoomConfiguration(agents=[dispatch]))
        granted = {"server_url": livekit.url, "participant_token": token.to_jwt()}
        async with user(granted) as room:
            await eventually(lambda: agents(room), "the agent")
            assert agents(room)[0].name == "julia"
            assert desk.slots.held == 1


async def test_registered_for_every_room_it_needs_no_name(livekit: LiveKitServer) -> None:
    async with Desk(livekit, "agentserver", dispatch="automatic").open() as desk:
        await desk.ready()
        async with user(await desk.token()) as room:
            await eventually(lambda: agents(room), "the agent")
            await asyncio.sleep(0.5)
            assert len(agents(room)) == 1


@BOTH
async def test_two_tokens_for_one_room_are_one_agent(livekit: LiveKitServer, entry: str) -> None:
    async with Desk(livekit, entry).open() as desk:
        await desk.ready()
        first = await desk.token(room="kitchen", identity="ada")
        second = await desk.token(room="kitchen", identity="bob")
        async with user(first) as room, user(second):
            await eventually(lambda: agents(room), "the agent")
            await eventually(lambda: desk.sittings[0].linked, "the link")
            third = await desk.token(room="kitchen", identity="cleo")
            async with user(third) as other:
                await eventually(lambda: len(other.remote_participants) == 3, "all four")
                await asyncio.sleep(0.5)
                assert len(agents(other)) == 1
                assert len(desk.sittings) == 1
                assert desk.sittings[0].linked in ("ada", "bob"), "whoever of the two was first"


@BOTH
async def test_a_reloaded_page_has_an_agent_again(livekit: LiveKitServer, entry: str) -> None:
    """The new page has its token before the old one has left, and the room stands all the while."""
    async with Desk(livekit, entry).open() as desk:
        await desk.ready()
        async with user(await desk.token(room="kitchen", identity="ada-1")) as room:
            await eventually(lambda: agents(room), "the agent")
            await eventually(lambda: desk.sittings[0].linked, "the link")
            reloaded = await desk.token(room="kitchen", identity="ada-2")
        async with user(reloaded) as room:
            await eventually(lambda: desk.sittings[-1].linked == "ada-2", "an agent for the page")
            await eventually(lambda: len(agents(room)) == 1, "one agent")
            assert desk.slots.held == 1


@BOTH
async def test_a_user_who_comes_back_to_a_room_that_still_stands_has_an_agent(
    livekit: LiveKitServer, entry: str
) -> None:
    """LiveKit dispatches to new rooms only; one that was left stands for 20 s more."""
    async with Desk(livekit, entry).open() as desk:
        await desk.ready()
        for visit in (1, 2):
            async with user(await desk.token(room="kitchen", identity=f"ada-{visit}")) as room:
                await eventually(lambda: agents(room), f"the agent, visit {visit}")
                await eventually(lambda: desk.sittings[-1].linked, "the link")
            await eventually(lambda: not desk.slots.held, "the slot is back")


# --- full ---


@BOTH
async def test_a_full_house_refuses_tokens_and_a_free_seat_is_taken_at_once(
    livekit: LiveKitServer, entry: str
) -> None:
    async with Desk(livekit, entry, max_sessions=1).open() as desk:
        await desk.ready()
        for round_trip in range(3):
            async with user(await desk.token()) as room:
                await eventually(lambda: agents(room), f"the agent, round {round_trip}")
                await eventually(lambda: desk.sittings[-1].linked, "the link")
                with pytest.raises(TokenRefused) as full:
                    await desk.token()
                assert (full.value.status, full.value.retry_after_s) == (429, 5)
                assert full.value.body["error"]["code"] == "exhausted"
            # No pause but for the slot: what LiveKit's server believes of our load is stale now.
            await eventually(lambda: not desk.slots.held, "the slot is back")


async def test_a_job_over_the_limit_is_refused_and_one_after_it_taken(
    livekit: LiveKitServer,
) -> None:
    async with Desk(livekit, "agentserver", max_sessions=1).open() as desk:
        await desk.ready()
        async with api.LiveKitAPI(livekit.url, livekit.api_key, livekit.api_secret) as service:

            async def dispatch(room: str) -> None:
                wanted = api.CreateAgentDispatchRequest(room=room, agent_name="duplex")
                await service.agent_dispatch.create_dispatch(wanted)

            await dispatch("one")
            await eventually(lambda: desk.slots.held == 1, "the first job")
            await dispatch("two")
            await dispatch("one")
            await asyncio.sleep(1.0)
            assert [sitting.access.room for sitting in desk.sittings] == ["one"]
            desk.sittings[0].close("user_left")
            await eventually(lambda: not desk.slots.held, "the slot is back")
            await dispatch("three")
            await eventually(lambda: len(desk.sittings) == 2, "a job again")


async def test_a_deleted_room_frees_its_slot(livekit: LiveKitServer) -> None:
    async with Desk(livekit, "agentserver").open() as desk:
        await desk.ready()
        async with user(await desk.token(room="kitchen")) as room:
            await eventually(lambda: agents(room), "the agent")
            async with api.LiveKitAPI(livekit.url, livekit.api_key, livekit.api_secret) as service:
                await service.room.delete_room(api.DeleteRoomRequest(room="kitchen"))
            await eventually(lambda: not desk.slots.held, "the slot is back")


# --- a server that refuses, is away, comes back ---


@BOTH
@pytest.mark.parametrize("wrong", [{"api_secret": "x" * 43}, {"api_key": "nokey"}])
async def test_a_wrong_key_is_named_and_no_token_is_shown(
    livekit: LiveKitServer, entry: str, wrong: dict[str, Any], log: io.StringIO
) -> None:
    async with Desk(livekit, entry, **wrong).open() as desk:
        await eventually(lambda: "refuses our key" in desk.rooms.check().text, "the diagnosis")
        with pytest.raises(TokenRefused) as refused:
            await desk.token()
        assert refused.value.status == 500
        assert "LIVEKIT_API_SECRET" in str(refused.value)
        assert "eyJ" not in str(refused.value)
        await asyncio.sleep(2.5)
    said = [line for line in log.getvalue().splitlines() if "refuses our key" in line]
    assert len([line for line in said if '"level": "warning"' in line]) == 1, "said once"


@BOTH
async def test_a_server_that_comes_up_later_is_found(
    livekit: LiveKitServer, entry: str, log: io.StringIO
) -> None:
    await livekit.kill()
    async with Desk(livekit, entry).open() as desk:
        with pytest.raises(TokenRefused) as refused:
            await desk.token()
        assert (refused.value.status, refused.value.body["error"]["code"]) == (503, "unavailable")
        assert refused.value.retry_after_s
        assert not desk.rooms.check().ok
        await livekit.restart()
        await desk.ready()
        async with user(await desk.token()) as room:
            await eventually(lambda: agents(room), "the agent")
    assert log.getvalue().count("the LiveKit server answers") == 1
    assert "failed to connect to livekit" not in log.getvalue(), "not every attempt is a line"


async def test_a_restarted_server_is_registered_at_again(
    livekit: LiveKitServer, log: io.StringIO
) -> None:
    def said(what: str) -> int:
        return log.getvalue().count(what)

    async with Desk(livekit, "agentserver").open() as desk:
        await eventually(lambda: said("registered at the LiveKit server") == 1, "registration")
        await livekit.kill()
        await eventually(lambda: said("the registration is lost"), "the loss")
        assert not desk.rooms.check().ok
        await livekit.restart()
        await eventually(lambda: said("registered at the LiveKit server") == 2, "registration")
        async with user(await desk.token()) as room:
            await eventually(lambda: agents(room), "the agent")
        assert said("the registration is lost") == 1


async def test_a_restart_keeps_a_visit_and_sends_no_second_agent(livekit: LiveKitServer) -> None:
    async with Desk(livekit, "agentserver").open() as desk:
        await desk.ready()
        async with user(await desk.token()) as room:
            await eventually(lambda: agents(room), "the agent")
            await livekit.kill()
            await eventually(lambda: not desk.rooms.check().ok, "the loss")
            await livekit.restart()
            await desk.ready()
            await eventually(lambda: len(agents(room)) == 1, "the agent again")
            await asyncio.sleep(1.0)
            assert (len(agents(room)), len(desk.sittings), desk.slots.held) == (1, 1, 1)


@pytest.mark.parametrize("kind", ["expired", "another room"])
async def test_the_server_keeps_to_what_a_token_says(livekit: LiveKitServer, kind: str) -> None:
    async with Desk(livekit, "direct", token_ttl_ms=10_000).open() as desk:
        granted = await desk.token(room="kitchen")
        if kind == "another room":
            async with user(granted) as room:
                assert room.name == "kitchen", "the token's room, whatever the client would like"
            return
        room = rtc.Room()
        options = rtc.RoomOptions()
        # A minute's leeway is the server's; past that it is the clock's word.
        stale = api.AccessToken(livekit.api_key, livekit.api_secret).with_identity("ada")
        stale.with_grants(api.VideoGrants(room_join=True, room="kitchen"))
        stale.ttl = -stale.ttl
        with pytest.raises(rtc.ConnectError):
            await room.connect(livekit.url, stale.to_jwt(), options)
        await eventually(lambda: len(desk.sittings) == 1, "the agent was not disturbed")


# --- the end ---


@BOTH
async def test_a_drain_ends_in_bounded_time_and_warns_before(
    livekit: LiveKitServer, entry: str
) -> None:
    async with Desk(livekit, entry).open() as desk:
        await desk.ready()
        async with user(await desk.token()) as room:
            await eventually(lambda: agents(room), "the agent")
            draining = asyncio.create_task(desk.rooms.drain(500))
            await eventually(lambda: desk.sittings[0].warned, "the warning")
            with pytest.raises(TokenRefused) as refused:
                await desk.token()
            assert refused.value.status == 503
            await asyncio.wait_for(draining, LIVENESS_S)
            assert desk.sittings[0].ended == "draining"
            assert (desk.rooms.live, desk.slots.held) == (0, 0)
            await eventually(lambda: not agents(room), "the agent has left")


@BOTH
async def test_it_ends_without_a_server_too(livekit: LiveKitServer, entry: str) -> None:
    desk = Desk(livekit, entry)
    async with desk.open():
        await desk.ready()
        async with user(await desk.token()) as room:
            await eventually(lambda: agents(room), "the agent")
            await livekit.kill()
            await asyncio.wait_for(desk.rooms.drain(100), LIVENESS_S)


async def test_other_agent_servers_of_this_process_keep_their_pool(
    livekit: LiveKitServer,
) -> None:
    from livekit.agents import ipc

    original = ipc.proc_pool.ProcPool
    async with Desk(livekit, "agentserver").open() as desk:
        await desk.ready()
        assert ipc.proc_pool.ProcPool is original


# --- the orchestrator itself ---


@asynccontextmanager
async def orchestrator(
    logs: Path, server: LiveKitServer, entry: str, **environ: str
) -> AsyncIterator[Installation]:
    """Its own process, with real visits; it understands no words."""
    config = (
        f"livekit: {{entry: {entry}}}\nasr: {{engine: /nowhere/at/all}}\n"
        "server: {drain_ms: 300}\n"
    )
    env = {"DUPLEX_API_KEY": "", **environ}
    async with installation(logs, livekit=server, config=config, env=env) as running:
        yield running


@BOTH
async def test_a_session_begins_and_no_token_is_in_the_log(
    livekit: LiveKitServer, entry: str, tmp_path: Path
) -> None:
    async with orchestrator(tmp_path, livekit, entry) as running:
        await _rooms_ready(running)
        granted = await fetch_token(running.url, identity="ada", events="1")
        async with room_user(granted["server_url"], granted["participant_token"]) as person:
            started = await person.until_event(SessionStarted)
            assert started.model == "espeak-en"
            assert await running.metric("duplex_rooms") == 1.0
            os.kill(running.orchestrator.pid, signal.SIGTERM)
            status = await asyncio.wait_for(running.orchestrator.wait(), LIVENESS_S)
    log = (tmp_path / "orchestrator.log").read_text()
    assert status == 0, log[-3000:]
    assert '"token"' in log or ": token" in log
    assert "eyJ" not in log
    assert "Traceback" not in log


async def test_a_wrong_secret_is_told_by_the_orchestrator_and_its_websocket_goes_on(
    livekit: LiveKitServer, tmp_path: Path
) -> None:
    wrong = {"LIVEKIT_API_SECRET": "y" * 43}
    async with orchestrator(tmp_path, livekit, "direct", **wrong) as running:
        with pytest.raises(TokenRefused, match="refuses our key") as refused:
            await fetch_token(running.url)
        assert refused.value.status == 500
        async with aiohttp.ClientSession() as http, http.get(f"{running.url}/readyz") as answer:
            body = await answer.json()
            assert (answer.status, body["ready"]) == (200, True)
            assert (body["checks"]["rooms"]["ok"]) is False
        async with (
            aiohttp.ClientSession() as http,
            http.get(f"{running.url}/v1/transports") as answer,
        ):
            found = await answer.json()
            assert (found["ws"], found["livekit"]) == (True, False)
    assert "eyJ" not in (tmp_path / "orchestrator.log").read_text()


async def _rooms_ready(running: Installation) -> None:
    async with aiohttp.ClientSession() as http:
        for _ in range(400):
            async with http.get(f"{running.url}/v1/transports") as answer:
                if (await answer.json())["livekit"]:
                    return
            await asyncio.sleep(0.05)
    raise AssertionError("rooms never became ready")
