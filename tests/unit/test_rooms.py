"""Rooms without a room: who is admitted, where the slots go, what the token endpoint answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import jwt
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from livekit import api

from src.common.clock import ManualClock
from src.common.tasks import cancel_and_wait
from src.orchestrator.auth import ApiKeys, SessionSlots
from src.orchestrator.http_api import error_middleware
from src.orchestrator.metrics import Metrics
from src.orchestrator.rooms import token_request
from src.orchestrator.rooms.rooms import Rooms
from src.orchestrator.rooms.server_probe import Place, ServerProbe
from src.orchestrator.rooms.settings import LiveKitSettings
from src.orchestrator.rooms.visit import RoomAccess
from src.orchestrator.rooms.visits import Visits
from src.rpc.errors import DuplexError, Exhausted, Internal, InvalidArgument, Unavailable

SECRET = "a-secret-of-more-than-thirty-two-characters"


def livekit_settings(url: str = "ws://127.0.0.1:1", **changed: object) -> LiveKitSettings:
    given = {"url": url, "api_key": "devkey", "api_secret": SECRET, **changed}
    return LiveKitSettings.model_validate(given)


class ScriptedVisit:
    """Runs until it is told to end."""

    def __init__(self, access: RoomAccess) -> None:
        self.access = access
        self.linked = ""
        self.warned: list[DuplexError] = []
        self.stubborn = False
        self._over: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def run(self) -> str:
        return await self._over

    def warn(self, error: DuplexError) -> None:
        self.warned.append(error)

    def close(self, reason: str) -> None:
        if not self.stubborn and not self._over.done():
            self._over.set_result(reason)

    def fail(self, error: BaseException) -> None:
        self._over.set_exception(error)


class Scene:
    """Visits with two slots, whose visits are scripted."""

    def __init__(self) -> None:
        self.slots = SessionSlots(2, 2)
        self.clock = ManualClock()
        self.metrics = Metrics()
        self.made: list[ScriptedVisit] = []
        self.failed_joins = 0
        self.visits = Visits(
            self.make, self.slots, self.metrics, self.clock,
            heir_ms=30_000, on_failed_join=self._failed,
        )  # fmt: skip

    def make(self, access: RoomAccess) -> ScriptedVisit:
        self.made.append(ScriptedVisit(access))
        return self.made[-1]

    def begin(self, room: str, who: str = "ada") -> ScriptedVisit:
        self.slots.take(who)
        self.visits.begin(access(room), who)
        return self.made[-1]

    def _failed(self) -> None:
        self.failed_joins += 1

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Scene]:
        task = asyncio.create_task(self.visits.run())
        await asyncio.sleep(0)
        try:
            yield self
        finally:
            await cancel_and_wait(task)


def access(room: str, identity: str = "") -> RoomAccess:
    return RoomAccess("ws://127.0.0.1:1", "token", room, identity)


async def eventually(condition: Callable[[], object]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never happened")


# --- visits and their slots ---


@pytest.mark.parametrize(
    ("error", "doubted"), [(None, 0), (Unavailable("gone"), 1), (RuntimeError("ours"), 1)]
)
async def test_a_slot_comes_back_once_however_a_visit_ends(
    error: Exception | None, doubted: int
) -> None:
    async with Scene().running() as scene:
        visit = scene.begin("kitchen")
        await asyncio.sleep(0)
        assert (scene.visits.live, scene.slots.held) == (1, 1)
        visit.fail(error) if error else visit.close("user_left")
        await eventually(lambda: not scene.visits.live)
        assert (scene.slots.held, scene.failed_joins) == (0, doubted)
        assert scene.begin("kitchen"), "the room may be visited again"


async def test_a_visit_that_is_cancelled_before_its_first_step_gives_its_slot_back() -> None:
    scene = Scene()
    async with scene.running():
        scene.begin("kitchen")
    assert (scene.visits.live, scene.slots.held) == (0, 0)


async def test_a_visit_that_cannot_be_made_leaves_the_slot_with_its_caller() -> None:
    scene = Scene()
    scene.slots.take("ada")
    with pytest.raises(Unavailable):
        scene.visits.begin(access("kitchen"), "ada")
    assert scene.slots.held == 1


async def test_a_reloaded_page_gets_the_next_visit_in_the_same_slot() -> None:
    async with Scene().running() as scene:
        first = scene.begin("kitchen")
        first.linked = "ada-1"
        scene.visits.expect(access("kitchen", "ada-2"))
        first.close("user_left")
        await eventually(lambda: len(scene.made) == 2)
        assert scene.made[1].access.identity == "ada-2"
        assert (scene.visits.live, scene.slots.held) == (1, 1)
        scene.made[1].close("user_left")
        await eventually(lambda: not scene.visits.live)
        assert (scene.slots.held, len(scene.made)) == (0, 2)


async def test_a_second_token_before_anybody_came_is_for_the_same_visit() -> None:
    async with Scene().running() as scene:
        visit = scene.begin("kitchen")
        scene.visits.expect(access("kitchen", "ada-2"))
        visit.close("nobody_came")
        await eventually(lambda: not scene.visits.live)
        assert len(scene.made) == 1


async def test_one_who_came_long_ago_is_not_waited_for() -> None:
    async with Scene().running() as scene:
        visit = scene.begin("kitchen")
        visit.linked = "ada"
        scene.visits.expect(access("kitchen", "bob"))
        scene.clock.advance(30_001)
        visit.close("user_left")
        await eventually(lambda: not scene.visits.live)
        assert len(scene.made) == 1


async def test_a_drain_warns_waits_closes_and_begins_nothing_new() -> None:
    async with Scene().running() as scene:
        quick, slow = scene.begin("kitchen"), scene.begin("hall")
        quick.linked = "ada"
        scene.visits.expect(access("kitchen", "ada-2"))
        draining = asyncio.create_task(scene.visits.drain(100))
        await eventually(lambda: quick.warned and slow.warned)
        quick.close("user_left")
        with pytest.raises(Unavailable):
            scene.visits.begin(access("attic"), "ada")
        await draining
        assert len(scene.made) == 2, "a page that reloads now finds nobody"
        assert (scene.visits.live, scene.slots.held) == (0, 0)
        assert await slow.run() == "draining"


# --- what may be asked for ---


def test_a_query_becomes_wishes_of_the_session() -> None:
    pairs = {
        "room": "küche-1", "identity": "ada@home", "name": "Ada L.", "mode": "quality",
        "voice": "joe", "events": "1",
    }  # fmt: skip
    asked = token_request.from_query(pairs.items())
    assert (asked.room, asked.identity, asked.name) == ("küche-1", "ada@home", "Ada L.")
    assert asked.attributes == {
        "duplex.mode": "quality",
        "duplex.voice": "joe",
        "duplex.events": "1",
    }
    assert asked.named


def test_who_names_nothing_gets_names_of_their_own() -> None:
    one, other = token_request.from_query([]), token_request.from_json(b"", "duplex")
    assert one.room != other.room
    assert one.identity != other.identity
    assert not one.named


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ({"rom": "a"}, "did you mean 'room'"),
        ({"room": "a/b"}, "room: 1 to 128"),
        ({"room": "a" * 129}, "room: 1 to 128"),
        ({"identity": "a\nb"}, "identity: 1 to 128"),
        ({"identity": "agent-7"}, "may not begin with 'agent-'"),
        ({"name": "a\x00"}, "printable"),
        ({"voice": "v" * 513}, "at most 512"),
        ({"events": "yes"}, "events is 1"),
    ],
)
def test_a_wrong_query_is_told_why(query: dict[str, str], says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        token_request.from_query(query.items())


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="twice"):
        token_request.from_query([("room", "a"), ("room", "b")])


def test_the_standard_request_is_understood_with_what_newer_sdks_add() -> None:
    body = {
        "room_name": "kitchen",
        "participant_identity": "ada",
        "participant_name": "Ada",
        "participant_metadata": "note",
        "participant_attributes": {"duplex.voice": "joe", "colour": "red"},
        "room_config": {"agents": [{"agent_name": "duplex", "metadata": ""}], "tags": {}},
        "something_new": 1,
    }
    asked = token_request.from_json(json.dumps(body).encode(), "duplex")
    assert (asked.room, asked.identity, asked.name) == ("kitchen", "ada", "Ada")
    assert (asked.metadata, asked.attributes["colour"]) == ("note", "red")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        ('{"room_name": 5}', "room_name"),
        ('{"participant_metadata": "%s"}' % ("m" * 4097), "participant_metadata"),
        (json.dumps({"participant_attributes": {str(n): "" for n in range(33)}}), "32"),
        ('{"participant_attributes": {"lk.agent.state": "x"}}', "LiveKit's own"),
        ('{"participant_attributes": {"duplex.voise": "x"}}', "did you mean 'duplex.voice'"),
        ('{"participant_identity": "agent-x"}', "agent-"),
        ('{"room_config": {"agents": [{"agent_name": "dupex"}]}}', "did you mean 'duplex'"),
    ],
)
def test_a_wrong_body_is_told_why(body: str, says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        token_request.from_json(body.encode(), "duplex")


# --- the token endpoint, in front of a LiveKit server that is scripted ---


class FakeLiveKit:
    """As much of a LiveKit server as answers `ListRooms` and `ListParticipants`."""

    def __init__(self) -> None:
        self.status = 200
        self.rooms: dict[str, list[api.ParticipantInfo]] = {}
        self.asked = 0
        app = web.Application()
        app.router.add_post("/twirp/livekit.RoomService/{call}", self._answer)
        self.server = TestServer(app)

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.server.port}"

    async def _answer(self, request: web.Request) -> web.Response:
        self.asked += 1
        if self.status != 200:
            token = request.headers["Authorization"]
            words = {"code": "unauthenticated", "msg": f"invalid token: {token}"}
            return web.json_response(words, status=self.status)
        body: Any
        if request.match_info["call"] == "ListRooms":
            wanted = api.ListRoomsRequest.FromString(await request.read()).names
            found = [api.Room(name=name) for name in wanted if name in self.rooms]
            body = api.ListRoomsResponse(rooms=found)
        else:
            room = api.ListParticipantsRequest.FromString(await request.read()).room
            body = api.ListParticipantsResponse(participants=self.rooms[room])
        return web.Response(body=body.SerializeToString(), content_type="application/protobuf")


@pytest.fixture
async def livekit_server() -> AsyncIterator[FakeLiveKit]:
    fake = FakeLiveKit()
    await fake.server.start_server()
    yield fake
    await fake.server.close()


class Desk:
    """`Rooms` behind HTTP, with scripted visits."""

    def __init__(self, livekit: FakeLiveKit, max_sessions: int = 2, **settings: object) -> None:
        self.slots = SessionSlots(max_sessions, max_sessions)
        self.made: list[ScriptedVisit] = []
        self.hindrance: DuplexError | None = None
        self.rooms = Rooms(
            livekit_settings(livekit.url, **settings), _no_session, self.slots, Metrics(),
            ManualClock(), make_visit=self._make, can_begin=self._can_begin,
        )  # fmt: skip

    def _make(self, wanted: RoomAccess) -> ScriptedVisit:
        self.made.append(ScriptedVisit(wanted))
        return self.made[-1]

    def _can_begin(self) -> None:
        if self.hindrance is not None:
            raise self.hindrance

    @asynccontextmanager
    async def open(self) -> AsyncIterator[TestClient[web.Request, web.Application]]:
        app = web.Application(middlewares=[error_middleware(Metrics())])

        async def token(request: web.Request) -> web.Response:
            return await self.rooms.token(request, ApiKeys().check(""))

        app.router.add_get("/token", token)
        app.router.add_post("/token", token)
        running = asyncio.create_task(self.rooms.run())
        async with TestClient(TestServer(app)) as client:
            yield client
        await cancel_and_wait(running)


def _no_session(*_: object) -> Any:
    raise AssertionError("visits are scripted here")


async def test_a_token_comes_with_an_agent_in_its_room(livekit_server: FakeLiveKit) -> None:
    desk = Desk(livekit_server, public_url="wss://voice.example", token_ttl_ms=60_000)
    async with desk.open() as client:
        answer = await client.get("/token?room=kitchen&identity=ada&voice=joe")
        body = await answer.json()
        assert (answer.status, answer.headers["Cache-Control"]) == (200, "no-store")
        read = jwt.decode(
            body.pop("participant_token"), SECRET, ["HS256"], options={"verify_nbf": False}
        )
        assert (read["sub"], read["video"]["room"]) == ("ada", "kitchen")
        assert read["attributes"] == {"duplex.voice": "joe"}
        assert body == {
            "server_url": "wss://voice.example",
            "room_name": "kitchen",
            "participant_identity": "ada",
            "expires_in_s": 60,
        }
        assert desk.made[0].access.room == "kitchen"
        assert desk.made[0].access.url == livekit_server.url, "we go in by the inner address"
        assert desk.made[0].access.identity == "", "whoever comes first to a new room"


async def test_a_standard_request_gets_the_standard_answer(livekit_server: FakeLiveKit) -> None:
    async with Desk(livekit_server).open() as client:
        answer = await client.post("/token", json={"room_name": "kitchen"})
        body = await answer.json()
        assert {"server_url", "participant_token"} <= body.keys()
        assert body["room_name"] == "kitchen"


async def test_two_tokens_for_one_room_are_one_agent(livekit_server: FakeLiveKit) -> None:
    desk = Desk(livekit_server, max_sessions=1)
    async with desk.open() as client:
        for identity in ("ada", "bob", "ada"):
            answer = await client.get(f"/token?room=kitchen&identity={identity}")
            assert answer.status == 200
        assert (len(desk.made), desk.slots.held) == (1, 1)


async def test_a_full_house_says_so_before_anybody_sits_in_an_empty_room(
    livekit_server: FakeLiveKit,
) -> None:
    desk = Desk(livekit_server, max_sessions=1)
    async with desk.open() as client:
        assert (await client.get("/token")).status == 200
        full = await client.get("/token")
        assert (full.status, full.headers["Retry-After"]) == (429, "5")
        desk.made[0].close("user_left")
        await eventually(lambda: desk.slots.held == 0)
        assert (await client.get("/token")).status == 200


async def test_another_orchestrators_agent_is_left_alone(livekit_server: FakeLiveKit) -> None:
    agent = api.ParticipantInfo(kind=api.ParticipantInfo.Kind.AGENT)
    livekit_server.rooms = {"kitchen": [agent], "hall": [api.ParticipantInfo(identity="ada")]}
    desk = Desk(livekit_server)
    async with desk.open() as client:
        assert (await client.get("/token?room=kitchen")).status == 200
        assert (desk.made, desk.slots.held) == ([], 0)
        assert (await client.get("/token?room=hall&identity=bob")).status == 200
        assert desk.made[0].access.identity == "bob", "not the one who sits there already"


@pytest.mark.parametrize(
    ("status", "answered", "says"),
    [(401, 500, "refuses our key"), (404, 503, "HTTP 404"), (503, 503, "HTTP 503")],
)
async def test_a_server_that_refuses_us_is_named_without_its_words(
    livekit_server: FakeLiveKit, status: int, answered: int, says: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    livekit_server.status = status
    desk = Desk(livekit_server)
    async with desk.open() as client:
        answer = await client.get("/token")
        assert answer.status == answered
        assert says in (await answer.json())["error"]["message"]
        assert not desk.rooms.check().ok
        assert desk.slots.held == 0
        livekit_server.status = 200
        assert (await client.get("/token")).status == 200, "asked again, not remembered for ever"
        assert desk.rooms.check().ok
    assert "eyJ" not in caplog.text
    assert caplog.text.count("no rooms:") == 1


async def test_a_failed_join_makes_the_next_token_ask_the_server(
    livekit_server: FakeLiveKit,
) -> None:
    desk = Desk(livekit_server)
    async with desk.open() as client:
        assert (await client.get("/token")).status == 200
        await livekit_server.server.close()
        desk.made[0].fail(Unavailable("the room cannot be entered"))
        await eventually(lambda: desk.slots.held == 0)
        answer = await client.get("/token")
        assert answer.status == 503
        assert "does not answer" in (await answer.json())["error"]["message"]


async def test_no_token_while_no_session_could_begin_or_the_server_goes_down(
    livekit_server: FakeLiveKit,
) -> None:
    desk = Desk(livekit_server)
    async with desk.open() as client:
        desk.hindrance = Unavailable("the recogniser is still loading", retry_after_ms=1_000)
        assert (await client.get("/token")).status == 503
        desk.hindrance = None
        await desk.rooms.drain(0)
        answer = await client.get("/token")
        assert (answer.status, answer.headers["Retry-After"]) == (503, "2")
        assert desk.slots.held == 0


async def test_a_probe_asks_once_for_many_who_wait(livekit_server: FakeLiveKit) -> None:
    probe = ServerProbe(livekit_settings(livekit_server.url))
    running = asyncio.create_task(probe.run())
    await asyncio.gather(*(probe.ask() for _ in range(10)))
    assert livekit_server.asked <= 2
    assert await probe.place("nowhere") is Place.ABSENT
    await cancel_and_wait(running)


@pytest.mark.parametrize("url", ["ws://127.0.0.1:1", "ws://no-such-host.invalid"])
async def test_a_server_that_is_not_there_is_unavailable(url: str) -> None:
    probe = ServerProbe(livekit_settings(url))
    running = asyncio.create_task(probe.run())
    with pytest.raises(Unavailable, match="LIVEKIT_URL"):
        await probe.ensure()
    await cancel_and_wait(running)


# --- the registered entry ---


class Request:
    """A `JobRequest`, and what became of it."""

    def __init__(self, room: str, host: Any, *, assigned: bool = True) -> None:
        self.id = f"job-{room}"
        self.room = api.Room(name=room)
        self.outcome = ""
        self._host = host
        self._assigned = assigned

    async def reject(self, *, terminate: bool = True) -> None:
        self.outcome = "ended" if terminate else "passed on"

    async def accept(self, *, name: str) -> None:
        if not self._assigned:
            raise TimeoutError("assignment timed out")
        info = FakeJobInfo(self.id, self.room)
        self._host.begin_job(info)
        self.outcome = f"accepted as {name}"


class FakeJobInfo:
    def __init__(self, job_id: str, room: api.Room) -> None:
        self.url, self.token = "ws://inner", "job-token"
        self.job = type("Job", (), {"id": job_id, "room": room})()


class RegisteredScene(Desk):
    """The registered entry, as if it stood registered."""

    def __init__(self, livekit: FakeLiveKit, monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
        super().__init__(livekit, entry="agentserver", **more)
        self.entry: Any = self.rooms._entry
        monkeypatch.setattr(type(self.entry), "registered", True)
        monkeypatch.setattr(self.entry, "run", asyncio.Event().wait)

    async def dispatch(self, room: str, *, assigned: bool = True) -> str:
        request = Request(room, self.entry, assigned=assigned)
        await self.entry._on_request(request)
        return request.outcome


async def test_a_token_keeps_a_slot_until_its_job_comes(
    livekit_server: FakeLiveKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = RegisteredScene(livekit_server, monkeypatch, max_sessions=1)
    async with scene.open() as client:
        assert (await client.get("/token?room=kitchen")).status == 200
        assert (await client.get("/token?room=kitchen")).status == 200, "the same room again"
        assert (await client.get("/token?room=hall")).status == 429
        assert await scene.dispatch("hall") == "passed on"
        assert await scene.dispatch("kitchen") == "accepted as duplex"
        assert (scene.slots.held, scene.made[0].access.token) == (1, "job-token")
        assert await scene.dispatch("kitchen") == "ended", "one agent in a room"
        scene.made[0].close("user_left")
        await eventually(lambda: scene.slots.held == 0)
        assert await scene.dispatch("hall") == "accepted as duplex", "tokens of other people's"


async def test_a_slot_that_nobody_comes_for_is_free_again(
    livekit_server: FakeLiveKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = RegisteredScene(livekit_server, monkeypatch, join_timeout_ms=1_000)
    async with scene.open() as client:
        assert (await client.get("/token?room=kitchen")).status == 200
        assert scene.slots.held == 1
        await eventually(lambda: scene.slots.held == 0)
        assert await scene.dispatch("kitchen") == "accepted as duplex", "late, but welcome"


async def test_a_job_that_is_never_assigned_gives_its_slot_back(
    livekit_server: FakeLiveKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = RegisteredScene(livekit_server, monkeypatch)
    async with scene.open():
        assert await scene.dispatch("kitchen", assigned=False) == ""
        assert (scene.slots.held, scene.made) == (0, [])


async def test_a_room_that_stands_already_is_entered_by_ourselves(
    livekit_server: FakeLiveKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    livekit_server.rooms = {"kitchen": []}
    scene = RegisteredScene(livekit_server, monkeypatch)
    async with scene.open() as client:
        assert (await client.get("/token?room=kitchen")).status == 200
        assert scene.made[0].access.room == "kitchen"
        scene.made[0].linked = "ada"
        assert (await client.get("/token?room=kitchen")).status == 200
        assert (len(scene.made), scene.slots.held) == (1, 1)


async def test_no_token_before_it_is_registered(
    livekit_server: FakeLiveKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = RegisteredScene(livekit_server, monkeypatch)
    monkeypatch.setattr(type(scene.entry), "registered", False)
    async with scene.open() as client:
        assert (await client.get("/token")).status == 503
        await eventually(lambda: "not registered" in scene.rooms.check().text)


async def test_a_livekit_agents_that_has_changed_is_found_at_the_start(
    livekit_server: FakeLiveKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    from livekit.agents import ipc

    from src.orchestrator.rooms.agent_server import IncompatibleAgents

    monkeypatch.delattr(ipc.proc_pool.ProcPool, "launch_job")
    with pytest.raises(IncompatibleAgents, match=r"launch_job.*livekit\.entry to direct"):
        Desk(livekit_server, entry="agentserver")
    assert Desk(livekit_server).rooms.live == 0, "the direct way does not mind"


def test_wrong_key_and_silence_are_told_apart() -> None:
    from src.orchestrator.rooms.server_probe import _refusal

    assert isinstance(_refusal("lk:7880", 401), Internal)
    assert not isinstance(_refusal("lk:7880", 500), Exhausted | Internal)
