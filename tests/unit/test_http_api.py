"""The HTTP API and the session endpoint over real sockets, with a scripted session behind them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType, web
from aiohttp.test_utils import TestClient, TestServer

from src.audio.pcm import Int16
from src.common.clock import MonotonicClock
from src.orchestrator.app import make_app
from src.orchestrator.auth import ApiKeys, SessionSlots
from src.orchestrator.http_api import Check, HttpApi
from src.orchestrator.metrics import Metrics
from src.orchestrator.ports import SpeechFrame
from src.orchestrator.web_page import WebPage
from src.orchestrator.ws_endpoint import EndpointLimits, WsEndpoint
from src.orchestrator.ws_inbound import InboundLimits
from src.orchestrator.ws_transport import OutboundLimits, WsTransport
from src.rpc.errors import DuplexError, Exhausted, InUse, UnknownName
from src.rpc.ws_events import Latency, SessionStart, SessionStarted

Client = TestClient[web.Request, web.Application]
START = {"type": "session.start"}
KEY = {"Authorization": "Bearer k1"}


class ScriptedSession:
    """Says it has started, counts what it hears, and does what `text` tells it."""

    def __init__(self, start: SessionStart, transport: WsTransport) -> None:
        self.start = start
        self.transport = transport
        self.heard_samples = 0
        self.playbacks: list[tuple[str, int, bool]] = []
        self.switches: list[tuple[str, str]] = []
        self.closed: list[str] = []
        self.failure: BaseException | None = None
        self.voice_is_there = asyncio.Event()
        if start.model != "cold":
            self.voice_is_there.set()
        self._end = asyncio.Event()

    async def run(self) -> None:
        await self.voice_is_there.wait()
        self.transport.send_event(SessionStarted(session_id="s", model="m", voice="v"))
        await self._end.wait()
        if self.failure is not None:
            raise self.failure

    def close(self, reason: str) -> None:
        self.closed.append(reason)
        self._end.set()

    def fail(self, failure: BaseException) -> None:
        self.failure = failure
        self._end.set()

    def on_mic(self, samples: Int16) -> None:
        self.heard_samples += samples.size

    def on_playback(self, utterance_id: str, seq: int, *, flushed: bool) -> None:
        self.playbacks.append((utterance_id, seq, flushed))

    def on_text(self, text: str, *, speak: bool) -> None:
        self.transport.begin_audio("u1", 0, resumed=False)
        for seq in range(int(text)):
            self.transport.send_frame(SpeechFrame("u1", seq, seq * 20, bytes(1920)))

    def on_model_switch(self, model: str, voice: str) -> None:
        self.switches.append((model, voice))

    def on_presence(self, *, here: bool) -> None:
        raise AssertionError("a socket that is lost ends its session")


class FakeModels:
    async def models(self) -> list[dict[str, Any]]:
        return [{"model_id": "m"}]

    def workers(self) -> list[dict[str, Any]]:
        return [{"name": "w", "vram_gb": 8.0}]

    async def load(self, model_id: str) -> dict[str, Any]:
        if model_id == "full":
            raise Exhausted("loading others", retry_after_ms=1_500)
        raise UnknownName.among("model", model_id, ["piper-en-joe"])

    async def unload(self, model_id: str) -> dict[str, Any]:
        raise InUse(f"{model_id} is in use by s-1")


class FakeRooms:
    """A token desk: answers, refuses, or is away."""

    def __init__(self, check: Check | None = None, refusal: DuplexError | None = None) -> None:
        self.asked_by: list[str] = []
        self._check = check or Check(True, "127.0.0.1:7880")
        self._refusal = refusal

    def check(self) -> Check:
        return self._check

    async def token(self, request: web.Request, who: str) -> web.Response:
        self.asked_by.append(who)
        if self._refusal is not None:
            raise self._refusal
        return web.json_response({"method": request.method, "room": request.query.get("room")})


class _Server(TestServer):
    """Leaves a lost connection to the handler, as in production."""

    async def _make_runner(self, **options: Any) -> web.BaseRunner:
        return await super()._make_runner(**{**options, "handler_cancellation": False})


class Orchestrator:
    """The application under test and what its sessions saw."""

    def __init__(
        self,
        *,
        keys: tuple[str, ...] = (),
        max_sessions: int = 8,
        limits: EndpointLimits | None = None,
        checks: dict[str, Check] | None = None,
        page: WebPage | None = None,
        origins: tuple[str, ...] = (),
        rooms: FakeRooms | None = None,
        websocket: bool = True,
    ) -> None:
        self.sessions: list[ScriptedSession] = []
        self.metrics = Metrics()
        found = checks or {"worker": Check(True, "one")}
        self.endpoint = WsEndpoint(
            self._make, SessionSlots(max_sessions, max_sessions), limits or EndpointLimits(),
            self.metrics, MonotonicClock(),
        )  # fmt: skip
        api_keys = ApiKeys(keys)
        self.api = HttpApi(
            keys=api_keys,
            checks={name: lambda check=check: check for name, check in found.items()},  # type: ignore[misc]
            metrics=self.metrics,
            models=FakeModels(),
            page=page,
            rooms=rooms,
            no_rooms="no rooms here: set LIVEKIT_URL",
            websocket=websocket,
        )
        self.app = make_app(
            api=self.api,
            sessions=self.endpoint if websocket else None,
            keys=api_keys,
            metrics=self.metrics,
            allowed_origins=origins,
        )

    def _make(
        self, session_id: str, start: SessionStart, transport: WsTransport
    ) -> ScriptedSession:
        self.sessions.append(ScriptedSession(start, transport))
        return self.sessions[-1]

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        async with TestClient(_Server(self.app)) as client:
            yield client


@asynccontextmanager
async def session(
    orchestrator: Orchestrator, start: dict[str, Any] = START, **connect: Any
) -> AsyncIterator[tuple[aiohttp.ClientWebSocketResponse, ScriptedSession]]:
    async with orchestrator.client() as client:
        socket = await client.ws_connect("/v1/session", **connect)
        await socket.send_json(start)
        assert (await event(socket))["type"] == "session.started"
        yield socket, orchestrator.sessions[-1]
        await socket.close()


async def event(socket: aiohttp.ClientWebSocketResponse) -> dict[str, Any]:
    message = await socket.receive(timeout=5)
    assert message.type is WSMsgType.TEXT, message
    parsed: dict[str, Any] = json.loads(message.data)
    return parsed


async def closed_with(socket: aiohttp.ClientWebSocketResponse) -> int | None:
    while not socket.closed:
        await socket.receive(timeout=5)
    return socket.close_code


async def eventually(condition: Any) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never happened")


# --- HTTP ---


async def test_health_is_open_and_ready_tells_what_is_missing() -> None:
    checks = {"recogniser": Check(False, "loading"), "workers": Check(True, "2 workers")}
    async with Orchestrator(keys=("k1",), checks=checks).client() as client:
        assert (await client.get("/healthz")).status == 200
        open_answer = await client.get("/readyz")
        assert open_answer.status == 503
        assert await open_answer.json() == {"ready": False}
        body = await (await client.get("/readyz", headers=KEY)).json()
        assert body["checks"]["recogniser"] == {"ok": False, "text": "loading"}


async def test_ready_when_every_check_passes() -> None:
    async with Orchestrator().client() as client:
        answer = await client.get("/readyz")
        assert (answer.status, (await answer.json())["ready"]) == (200, True)


@pytest.mark.parametrize("path", ["/metrics", "/v1/models", "/v1/protocol.json", "/v1/session"])
async def test_everything_else_asks_for_a_key(path: str) -> None:
    async with Orchestrator(keys=("k1",)).client() as client:
        answer = await client.get(path)
        assert answer.status == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert (await answer.json())["error"]["code"] == "unauthenticated"
        assert (await client.get(path, headers=KEY)).status != 401


async def test_errors_are_json_with_code_message_and_retry() -> None:
    async with Orchestrator().client() as client:
        unknown = await client.post("/v1/models/piper-en-jo/load")
        assert unknown.status == 404
        assert "did you mean 'piper-en-joe'" in (await unknown.json())["error"]["message"]
        full = await client.post("/v1/models/full/load")
        assert (full.status, full.headers["Retry-After"]) == (429, "2")
        assert (await full.json())["error"]["retry_after_ms"] == 1_500
        held = await client.post("/v1/models/m/unload")
        assert (held.status, (await held.json())["error"]["code"]) == (409, "in_use")
        nowhere = await client.get("/v1/nowhere")
        assert (nowhere.status, (await nowhere.json())["error"]["code"]) == (404, "not_found")
        wrong = await client.delete("/v1/models")
        assert (wrong.status, (await wrong.json())["error"]["code"]) == (405, "invalid_argument")
        plain = await client.get("/v1/session")
        assert (plain.status, (await plain.json())["error"]["code"]) == (400, "invalid_argument")


async def test_the_index_says_what_is_here_or_shows_the_page(tmp_path: Path) -> None:
    async with Orchestrator(page=WebPage(tmp_path)).client() as client:
        text = await (await client.get("/")).text()
        assert "/v1/session" in text
        assert "/v1/livekit/token" in text
    (tmp_path / "index.html").write_text("<p>hello</p>")
    async with Orchestrator(page=WebPage(tmp_path)).client() as client:
        assert "hello" in await (await client.get("/")).text()
        assert "hello" in await (await client.get("/web/index.html")).text()


@pytest.fixture
def page_root(tmp_path: Path) -> Path:
    root = tmp_path / "web"
    (root / "vendor").mkdir(parents=True)
    for name in ("index.html", "app.js", "vendor/lk.mjs", "a.wasm", "lock.json", ".hidden.js"):
        (root / name).write_text("x")
    (tmp_path / "secret.js").write_text("outside")
    (root / "link.js").symlink_to(tmp_path / "secret.js")
    (root / "notes.py").write_text("x")
    return root


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/web/app.js", "text/javascript; charset=utf-8"),
        ("/web/vendor/lk.mjs", "text/javascript; charset=utf-8"),
        ("/web/a.wasm", "application/wasm"),
        ("/web/lock.json", "application/json"),
    ],
)
async def test_the_page_runs_its_own_scripts_only(page_root: Path, path: str, kind: str) -> None:
    page = WebPage(page_root, "wss://user@lk.example:7880/x")
    async with Orchestrator(page=page, keys=("k1",)).client() as client:
        answer = await client.get(path)
        assert (answer.status, answer.headers["Content-Type"]) == (200, kind)
        assert answer.headers["Cache-Control"] == "no-cache"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        policy = dict(
            rule.split(" ", 1) for rule in answer.headers["Content-Security-Policy"].split("; ")
        )
        assert (policy["script-src"], policy["worker-src"]) == ("'self'", "'self' blob:")
        assert "wss://lk.example:7880" in policy["connect-src"].split()
        assert "https://lk.example:7880" in policy["connect-src"].split()
        assert "unsafe" not in str(policy)


@pytest.mark.parametrize(
    "path",
    ["../secret.js", "%2e%2e/secret.js", "..%2fsecret.js", "link.js", ".hidden.js", "notes.py",
     "vendor", "vendor/", "none.js", "a%00.js", "x" * 5000 + ".js"],
)  # fmt: skip
async def test_nothing_but_the_page_is_served(page_root: Path, path: str) -> None:
    async with Orchestrator(page=WebPage(page_root)).client() as client:
        answer = await client.get(f"/web/{path}")
        assert answer.status == 404
        assert "outside" not in await answer.text()


async def test_an_unchanged_file_is_not_sent_again(page_root: Path) -> None:
    async with Orchestrator(page=WebPage(page_root)).client() as client:
        tag = (await client.get("/web/app.js")).headers["ETag"]
        again = await client.get("/web/app.js", headers={"If-None-Match": tag})
        assert again.status == 304


async def test_a_token_is_for_those_with_a_key_by_get_and_post() -> None:
    rooms = FakeRooms()
    async with Orchestrator(keys=("k1",), rooms=rooms).client() as client:
        assert (await client.get("/v1/livekit/token")).status == 401
        assert (await client.post("/v1/livekit/token", json={})).status == 401
        asked = await client.get("/v1/livekit/token?room=kitchen", headers=KEY)
        assert await asked.json() == {"method": "GET", "room": "kitchen"}
        posted = await client.post("/v1/livekit/token", json={}, headers=KEY)
        assert (await posted.json())["method"] == "POST"
        assert rooms.asked_by == [ApiKeys(["k1"]).check("k1")] * 2


async def test_without_rooms_a_token_is_not_found_and_how_to_get_rooms_is_said() -> None:
    async with Orchestrator().client() as client:
        answer = await client.get("/v1/livekit/token")
        error = (await answer.json())["error"]
        assert (answer.status, error["code"]) == (404, "not_found")
        assert "LIVEKIT_URL" in error["message"]


async def test_a_refusal_of_the_rooms_reaches_the_client() -> None:
    rooms = FakeRooms(refusal=Exhausted("all 2 sessions are taken", retry_after_ms=4_500))
    async with Orchestrator(rooms=rooms).client() as client:
        answer = await client.get("/v1/livekit/token")
        assert (answer.status, answer.headers["Retry-After"]) == (429, "5")


@pytest.mark.parametrize(
    ("rooms", "websocket", "livekit", "why"),
    [
        (None, True, False, "LIVEKIT_URL"),
        (FakeRooms(), False, True, ""),
        (FakeRooms(Check(False, "10.1.2.3 does not answer")), True, False, "does not answer"),
    ],
)
async def test_the_page_learns_which_transports_there_are(
    rooms: FakeRooms | None, websocket: bool, livekit: bool, why: str
) -> None:
    async with Orchestrator(rooms=rooms, websocket=websocket, keys=("k1",)).client() as client:
        found = await (await client.get("/v1/transports")).json()
        assert (found["ws"], found["livekit"], found["key"]) == (websocket, livekit, True)
        assert why in found["why"]
        assert "10.1.2.3" not in found["why"], "open to all, so it names no address"


async def test_rooms_alone_have_no_websocket() -> None:
    async with Orchestrator(rooms=FakeRooms(), websocket=False).client() as client:
        answer = await client.get("/v1/session")
        assert answer.status == 404
        assert "--ws" in (await answer.json())["error"]["message"]


async def test_what_is_not_needed_does_not_spoil_readiness() -> None:
    checks = {"rooms": Check(False, "down", needed=False), "worker": Check(True, "one")}
    async with Orchestrator(checks=checks).client() as client:
        answer = await client.get("/readyz")
        body = await answer.json()
        assert (answer.status, body["ready"], body["checks"]["rooms"]["ok"]) == (200, True, False)


async def test_models_and_schema_are_served() -> None:
    async with Orchestrator().client() as client:
        fleet = await (await client.get("/v1/models")).json()
        assert fleet == {
            "models": [{"model_id": "m"}],
            "workers": [{"name": "w", "vram_gb": 8.0}],
        }
        schema = await (await client.get("/v1/protocol.json")).json(content_type=None)
        assert "SessionStart" in schema["$defs"]


async def test_a_strange_web_page_may_not_use_a_keyless_server() -> None:
    async with Orchestrator().client() as client:
        headers = {"Origin": "https://evil.example"}
        assert (await client.get("/v1/models", headers=headers)).status == 401
        with pytest.raises(aiohttp.WSServerHandshakeError):
            await client.ws_connect("/v1/session", headers=headers)
        assert (await client.ws_connect("/v1/session", origin="http://localhost")).closed is False


async def test_a_strange_page_cannot_make_a_browser_fetch_a_token() -> None:
    rooms = FakeRooms()
    async with Orchestrator(rooms=rooms).client() as client:
        as_image = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "image"}
        assert (await client.get("/v1/livekit/token", headers=as_image)).status == 401
        assert rooms.asked_by == []
        own = {"Sec-Fetch-Site": "same-origin"}
        assert (await client.get("/v1/livekit/token", headers=own)).status == 200


async def test_metrics_show_what_sessions_report() -> None:
    orchestrator = Orchestrator()
    observer = orchestrator.metrics.observer()
    observer.session_opened()
    observer.barge_in("real")
    observer.frame_sent(3.0)
    observer.frame_jitter(4.0)
    observer.frames_kept(7)
    observer.edge_to_last_frame(0.4)
    observer.edge_to_worker_paused(4.0)
    observer.turn_finished(
        Latency(turn_id="t", endpoint_ms=200, transcript_ms=260, first_token_ms=300,
                first_clause_ms=320, first_audio_ms=380)
    )  # fmt: skip
    async with orchestrator.client() as client:
        text = await (await client.get("/metrics")).text()
    for line in (
        "duplex_sessions 1.0",
        'duplex_barge_ins_total{verdict="real"} 1.0',
        "duplex_frames_kept 7.0",
        'duplex_frame_jitter_seconds_bucket{le="0.005"} 1.0',
        'duplex_first_audio_seconds_bucket{le="0.4"} 1.0',
        'duplex_edge_to_last_frame_seconds_bucket{le="0.0005"} 1.0',
        'duplex_edge_to_worker_paused_seconds_bucket{le="0.005"} 1.0',
        'duplex_frame_lateness_seconds_bucket{le="0.003"} 1.0',
        'duplex_turn_stage_seconds_count{stage="transcript"} 1.0',
    ):
        assert line in text
    observer.session_closed("client_ended")
    exposed = orchestrator.metrics.expose().decode()
    assert "duplex_sessions 0.0" in exposed
    assert "duplex_frames_kept 0.0" in exposed


# --- sessions ---


async def test_a_session_hears_its_client_and_its_client_hears_it() -> None:
    orchestrator = Orchestrator()
    async with session(orchestrator, {**START, "sample_rate": 48_000}) as (socket, scripted):
        await socket.send_bytes(bytes(1920))
        await socket.send_json({"type": "text", "text": "3"})
        assert (await event(socket))["type"] == "audio.begin"
        for _ in range(3):
            assert len((await socket.receive(timeout=5)).data) == 1920
        await socket.send_json({"type": "playback", "utterance_id": "u1", "seq": 99})
        await socket.send_json({"type": "model.switch", "model": "m2"})
        await eventually(lambda: scripted.switches)
        assert scripted.start.sample_rate == 48_000
        assert scripted.heard_samples == 320
        assert scripted.playbacks == [("u1", 2, False)]
        await socket.send_json({"type": "session.end"})
        assert await closed_with(socket) == 1000
    assert scripted.closed == ["client_ended"]
    await eventually(lambda: orchestrator.endpoint.live == 0)


async def test_a_key_may_come_as_a_subprotocol() -> None:
    orchestrator = Orchestrator(keys=("k1",))
    async with session(orchestrator, protocols=("duplex.v1", "bearer.k1")) as (socket, _):
        assert socket.protocol == "duplex.v1"


async def test_a_bad_message_is_answered_and_the_session_goes_on() -> None:
    orchestrator = Orchestrator()
    async with session(orchestrator) as (socket, scripted):
        await socket.send_bytes(b"\0" * 3)
        error = await event(socket)
        assert (error["type"], error["code"], error["fatal"]) == (
            "error",
            "invalid_argument",
            False,
        )
        await socket.send_json({"type": "playbak"})
        assert "did you mean 'playback'" in (await event(socket))["message"]
        await socket.send_bytes(bytes(640))
        await eventually(lambda: scripted.heard_samples == 320)
    assert 'duplex_refused_total{code="invalid_argument"} 1.0' in (
        orchestrator.metrics.expose().decode()
    )


async def test_words_that_come_before_the_voice_are_refused_not_lost() -> None:
    orchestrator = Orchestrator()
    async with orchestrator.client() as client:
        socket = await client.ws_connect("/v1/session")
        await socket.send_json({**START, "model": "cold"})
        await socket.send_json({"type": "text", "text": "1"})
        error = await event(socket)
        assert (error["code"], error["fatal"]) == ("failed_precondition", False)
        orchestrator.sessions[-1].voice_is_there.set()
        assert (await event(socket))["type"] == "session.started"
        await socket.send_json({"type": "text", "text": "1"})
        assert (await event(socket))["type"] == "audio.begin"
        await socket.close()


@pytest.mark.parametrize(
    ("first", "code"),
    [
        (b"\0\0", 4409),
        ("{", 4400),
        ('{"type":"session.start","sample_rate":11025}', 4400),
        ('{"type":"sesion.start"}', 4404),
        ('{"type":"text","text":"hi"}', 4409),
    ],
)
async def test_a_wrong_beginning_closes_with_the_errors_code(first: Any, code: int) -> None:
    orchestrator = Orchestrator()
    async with orchestrator.client() as client:
        socket = await client.ws_connect("/v1/session")
        await (socket.send_bytes(first) if isinstance(first, bytes) else socket.send_str(first))
        assert (await event(socket))["fatal"] is True
        assert await closed_with(socket) == code
    assert orchestrator.sessions == []


async def test_a_client_that_never_starts_is_let_go() -> None:
    orchestrator = Orchestrator(limits=EndpointLimits(start_timeout_ms=50))
    async with orchestrator.client() as client:
        socket = await client.ws_connect("/v1/session")
        assert "session.start" in (await event(socket))["message"]
        assert await closed_with(socket) == 4400


async def test_one_session_too_many_is_refused_and_a_place_comes_back() -> None:
    orchestrator = Orchestrator(max_sessions=1)
    async with orchestrator.client() as client:
        first = await client.ws_connect("/v1/session")
        await first.send_json(START)
        await event(first)
        second = await client.ws_connect("/v1/session")
        refusal = await event(second)
        assert (refusal["code"], refusal["fatal"]) == ("exhausted", True)
        assert refusal["retry_after_ms"]
        assert await closed_with(second) == 4429
        await first.close()
        await eventually(lambda: orchestrator.endpoint.live == 0)
        third = await client.ws_connect("/v1/session")
        await third.send_json(START)
        assert (await event(third))["type"] == "session.started"
        await third.close()


async def test_ten_megabytes_are_refused_with_a_reason() -> None:
    orchestrator = Orchestrator()
    async with orchestrator.client() as client:
        socket = await client.ws_connect("/v1/session", max_msg_size=0)
        await socket.send_json(START)
        await event(socket)
        sending = asyncio.ensure_future(socket.send_bytes(bytes(10_000_000)))
        error = await event(socket)
        assert (error["code"], error["fatal"]) == ("invalid_argument", True)
        assert await closed_with(socket) == 4400
        await asyncio.wait([sending], timeout=5)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        await eventually(lambda: orchestrator.sessions[-1].closed == ["client_gone"])


async def test_a_flood_of_audio_ends_the_session() -> None:
    limits = EndpointLimits(inbound=InboundLimits(mic_burst_ms=1_000))
    async with session(Orchestrator(limits=limits)) as (socket, scripted):
        for _ in range(3):
            await socket.send_bytes(bytes(32_000))
        error = await event(socket)
        assert (error["code"], error["fatal"]) == ("exhausted", True)
        assert await closed_with(socket) == 4429
        assert scripted.closed == ["refused"]


async def test_a_client_that_vanishes_ends_its_session() -> None:
    orchestrator = Orchestrator()
    async with session(orchestrator) as (socket, scripted):
        transport = socket.get_extra_info("socket")
        assert transport is not None
        socket._response.connection.transport.abort()  # type: ignore[union-attr]
        await eventually(lambda: scripted.closed == ["client_gone"])


@pytest.mark.parametrize("reads_again", [True, False])
async def test_a_client_that_reads_nothing_is_cut_off(reads_again: bool) -> None:
    limits = EndpointLimits(outbound=OutboundLimits(max_queue_bytes=200_000))
    orchestrator = Orchestrator(limits=limits)
    async with session(orchestrator) as (socket, scripted):
        wire = socket._response.connection.transport  # type: ignore[union-attr]
        wire.pause_reading()  # type: ignore[union-attr]
        await socket.send_json({"type": "text", "text": "20000"})
        await eventually(lambda: scripted.closed == ["client_stalled"])
        if reads_again:
            wire.resume_reading()  # type: ignore[union-attr]
            assert await closed_with(socket) == 4429
        await eventually(lambda: orchestrator.endpoint.live == 0)
        wire.resume_reading()  # type: ignore[union-attr]


async def test_an_error_of_the_session_reaches_the_client_with_its_close_code() -> None:
    async with session(Orchestrator()) as (socket, scripted):
        scripted.fail(UnknownName.among("model", "x", ["y"]))
        assert (await event(socket))["code"] == "unknown_name"
        assert await closed_with(socket) == 4404


async def test_a_fault_ends_one_session_and_tells_no_details() -> None:
    async with session(Orchestrator()) as (socket, scripted):
        scripted.fail(ZeroDivisionError("secret"))
        error = await event(socket)
        assert (error["code"], error["fatal"]) == ("internal", True)
        assert "secret" not in error["message"]
        assert await closed_with(socket) == DuplexError.close


async def test_draining_tells_everybody_and_takes_nobody_new() -> None:
    orchestrator = Orchestrator()
    async with session(orchestrator) as (socket, scripted):
        draining = asyncio.ensure_future(orchestrator.endpoint.drain(100))
        warning = await event(socket)
        assert (warning["code"], warning["fatal"]) == ("unavailable", False)
        async with (
            aiohttp.ClientSession() as late,
            late.ws_connect(socket._response.url.with_scheme("ws")) as newcomer,
        ):
            assert (await newcomer.receive_json(timeout=5))["code"] == "unavailable"
            assert (await newcomer.receive(timeout=5)).data == 4503
        assert (await event(socket))["fatal"] is True
        assert await closed_with(socket) == 4503
        assert scripted.closed == ["draining"]
        await draining
