"""A language-model host that connects in: the protocol without I/O, then both sockets for real."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeAlias, cast

import aiohttp
import grpc
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from src.common.tasks import timeout
from src.orchestrator.llm_bridge import LlmSettings, make_bridge
from src.orchestrator.llm_host import HostHub, HostSession
from src.orchestrator.llm_host_link import MAX_OUTBOX, HostLink
from src.orchestrator.llm_host_wire import (
    MAX_TEXT,
    BridgeMessage,
    Closed,
    Cut,
    Go,
    Hello,
    Hold,
    HostMessage,
    Reply,
    Turn,
    Welcome,
    bridge_to_proto,
    host_from_proto,
    parse_bridge,
    parse_host,
)
from src.rpc.errors import InvalidArgument, Unavailable
from src.rpc.generated import llm_bridge_pb2 as pb
from src.rpc.generated import llm_bridge_pb2_grpc as pb_grpc

LIVENESS_S = 5.0


def nothing() -> None:
    pass


def reply_to(turn: Turn, text: str, *, final: bool = False) -> Reply:
    return Reply(session_id=turn.session_id, turn_id=turn.turn_id, text=text, is_final=final)


async def until(condition: Callable[[], object]) -> None:
    async with timeout(LIVENESS_S):
        while not condition():  # noqa: ASYNC110 - the other side has no event to wait for
            await asyncio.sleep(0.005)


class FakeHost:
    """A host at the link: no socket in between."""

    def __init__(self, hub: HostHub, name: str = "h") -> None:
        self.link = HostLink(name, nothing)
        self.seen: list[BridgeMessage] = []
        hub.join(self.link)

    def read(self) -> list[BridgeMessage]:
        new = self.link.take()
        self.seen += new
        return new

    def turn(self) -> Turn:
        """The one turn among what is new."""
        (turn,) = [message for message in self.read() if isinstance(message, Turn)]
        return turn


def open_session(hub: HostHub, session_id: str = "s1", timeout_ms: int = 5_000) -> HostSession:
    return hub.session(session_id, first_token_timeout_ms=timeout_ms, idle_timeout_ms=timeout_ms)


async def first_of(session: HostSession, host: FakeHost, text: str = "Hi.") -> tuple[Turn, str]:
    """Begin turn t1 and let the host say `one`."""
    reply = session.respond("t1", text)
    waiting = asyncio.ensure_future(anext(reply))
    await asyncio.sleep(0)
    turn = host.turn()
    host.link.receive(reply_to(turn, "one"))
    said = await waiting
    await reply.aclose()
    return turn, said


class TestLink:
    def test_text_of_unknown_and_cut_turns_is_ignored(self) -> None:
        link = HostLink("h", nothing)
        link.receive(Reply(session_id="s", turn_id="t", text="too early"))
        reply = link.begin("s", "t", "Hi.", speculative=False, wake=nothing)
        link.receive(Reply(session_id="other", turn_id="t", text="not mine"))
        link.cut("s", "t", "", completed=False)
        link.receive(Reply(session_id="s", turn_id="t", text="too late"))
        assert reply.take() == ""

    def test_nothing_after_the_final_piece_counts(self) -> None:
        link = HostLink("h", nothing)
        reply = link.begin("s", "t", "Hi.", speculative=False, wake=nothing)
        link.receive(Reply(session_id="s", turn_id="t", text="end", is_final=True))
        link.receive(Reply(session_id="s", turn_id="t", text="more"))
        assert reply.finished
        assert reply.take() == "end"
        assert reply.take() == ""

    def test_hold_and_go_only_for_a_reply_that_is_being_written(self) -> None:
        link = HostLink("h", nothing)
        link.begin("s", "t", "Hi.", speculative=True, wake=nothing)
        link.take()
        link.hold("s", "other")
        link.hold("s", "t")
        link.go("s", "t")
        assert link.take() == [
            Hold(session_id="s", turn_id="t"),
            Go(session_id="s", turn_id="t"),
        ]

    def test_a_lost_host_ends_its_replies_after_what_it_had_said(self) -> None:
        link = HostLink("h", nothing)
        reply = link.begin("s", "t", "Hi.", speculative=False, wake=nothing)
        link.receive(Reply(session_id="s", turn_id="t", text="half"))
        link.lose()
        assert reply.take() == "half"
        with pytest.raises(Unavailable, match="'h' went away"):
            reply.take()

    def test_a_host_that_floods_loses_the_turn(self) -> None:
        link = HostLink("h", nothing)
        reply = link.begin("s", "t", "Hi.", speculative=False, wake=nothing)
        link.receive(Reply(session_id="s", turn_id="t", text="x" * MAX_TEXT))
        link.receive(Reply(session_id="s", turn_id="t", text="x"))
        assert len(reply.take()) == MAX_TEXT
        with pytest.raises(Unavailable, match="more than can be spoken"):
            reply.take()

    def test_a_host_that_does_not_read_is_gone(self) -> None:
        link = HostLink("h", nothing)
        reply = link.begin("s", "t", "Hi.", speculative=False, wake=nothing)
        for _ in range(MAX_OUTBOX):
            link.hold("s", "t")
        assert link.lost
        with pytest.raises(Unavailable):
            reply.take()

    @given(st.lists(st.sampled_from(["begin", "text", "final", "cut", "close", "lose", "hold"])))
    def test_the_outbox_and_the_replies_stay_bounded(self, steps: list[str]) -> None:
        link, turn = HostLink("h", nothing), 0
        for step in steps:
            if step == "begin":
                turn += 1
                link.begin("s", f"t{turn}", "Hi.", speculative=False, wake=nothing)
            elif step in ("text", "final"):
                done = step == "final"
                link.receive(Reply(session_id="s", turn_id=f"t{turn}", text="x", is_final=done))
            elif step == "cut":
                link.cut("s", f"t{turn}", "x", completed=True)
            elif step == "hold":
                link.hold("s", f"t{turn}")
            elif step == "close":
                link.close_session("s")
            else:
                link.lose()
        sent = link.take()
        assert len(sent) <= len(steps)
        assert not (link.lost and sent)


class TestSession:
    async def test_streams_what_the_host_writes(self) -> None:
        hub = HostHub()
        host = FakeHost(hub)
        reply = open_session(hub).respond("t1", "Capital?", speculative=True)
        waiting = asyncio.ensure_future(anext(reply))
        await asyncio.sleep(0)
        turn = host.turn()
        assert (turn.session_id, turn.text, turn.speculative) == ("s1", "Capital?", True)
        host.link.receive(reply_to(turn, "Paris"))
        assert await waiting == "Paris"
        host.link.receive(reply_to(turn, " it"))
        host.link.receive(reply_to(turn, " is.", final=True))
        assert [text async for text in reply] == [" it is."]

    async def test_closing_tells_the_host_to_stop_and_commit_what_was_heard(self) -> None:
        hub = HostHub()
        host = FakeHost(hub)
        session = open_session(hub)
        turn, said = await first_of(session, host)
        assert said == "one"
        assert host.read() == [Hold(session_id="s1", turn_id=turn.turn_id)]
        session.commit("t1", "Hi.", "on", completed=False)
        cut = Cut(session_id="s1", turn_id=turn.turn_id, heard_text="on", completed=False)
        assert host.read() == [cut]

    async def test_a_speculation_thrown_away_is_cut_once_with_nothing_heard(self) -> None:
        hub = HostHub()
        host = FakeHost(hub)
        session = open_session(hub)
        first, _ = await first_of(session, host, "Capital of")
        second, _ = await first_of(session, host, "Capital of France?")
        session.commit("t1", "Capital of France?", "one", completed=True)
        host.read()
        cuts = [message for message in host.seen if isinstance(message, Cut)]
        assert [(cut.turn_id, cut.heard_text) for cut in cuts] == [
            (first.turn_id, ""),
            (second.turn_id, "one"),
        ]

    async def test_late_text_of_a_first_attempt_stays_out_of_the_second(self) -> None:
        hub = HostHub()
        host = FakeHost(hub)
        session = open_session(hub)
        first, _ = await first_of(session, host, "Capital of")
        reply = session.respond("t1", "Capital of France?")
        waiting = asyncio.ensure_future(anext(reply))
        await asyncio.sleep(0)
        second = host.turn()
        host.link.receive(reply_to(first, "WRONG"))
        host.link.receive(reply_to(second, "Paris."))
        assert await waiting == "Paris."
        await reply.aclose()

    async def test_hold_reaches_the_host_and_gates_the_text(self) -> None:
        hub = HostHub()
        host = FakeHost(hub)
        session = open_session(hub, timeout_ms=30)
        reply = session.respond("t1", "Hi.")
        waiting = asyncio.ensure_future(anext(reply))
        await asyncio.sleep(0)
        turn = host.turn()
        session.hold("t1")
        host.link.receive(reply_to(turn, "held"))
        # Longer than the time-out: a host that was told to wait is not late.
        await asyncio.sleep(0.08)
        assert not waiting.done()
        session.go("t1")
        assert await waiting == "held"
        kinds = [message.type for message in host.read()]
        assert kinds == ["hold", "go"]
        await reply.aclose()

    async def test_a_silent_host_times_out(self) -> None:
        hub = HostHub()
        FakeHost(hub)
        with pytest.raises(Unavailable, match="did not begin to answer within 20 ms"):
            await anext(open_session(hub, timeout_ms=20).respond("t1", "Hi."))

    async def test_a_lost_host_ends_the_reply_and_the_next_turn_goes_to_another(self) -> None:
        hub = HostHub()
        one = FakeHost(hub, "one")
        session = open_session(hub)
        reply = session.respond("t1", "Hi.")
        waiting = asyncio.ensure_future(anext(reply))
        await asyncio.sleep(0)
        hub.leave(one.link)
        with pytest.raises(Unavailable, match="'one' went away"):
            await waiting
        two = FakeHost(hub, "two")
        await first_of(session, two)
        assert session.name == "host:two"

    async def test_nobody_connected(self) -> None:
        with pytest.raises(Unavailable, match="no language model host"):
            await anext(open_session(HostHub()).respond("t1", "Hi."))

    async def test_sessions_are_dealt_out_in_turn_and_stay(self) -> None:
        hub = HostHub()
        hosts = [FakeHost(hub, "one"), FakeHost(hub, "two")]
        sessions = [open_session(hub, f"s{index}") for index in range(4)]
        for _ in range(2):
            for session in sessions:
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(anext(session.respond("t1", "Hi.")), 0.01)
        for host in hosts:
            host.read()
            served = [m.session_id for m in host.seen if isinstance(m, Turn)]
            assert len(served) == 4
            assert len(set(served)) == 2

    async def test_closing_the_session_tells_the_host(self) -> None:
        hub = HostHub()
        host = FakeHost(hub)
        session = open_session(hub)
        await first_of(session, host)
        await session.aclose()
        assert host.read()[-1] == Closed(session_id="s1")

    async def test_the_bridge_echoes_until_a_host_is_there(self) -> None:
        hub = HostHub()
        bridge = make_bridge(LlmSettings(), hub, {})
        assert bridge.name == "echo"
        FakeHost(hub, "joe")
        assert bridge.name == "host:joe"
        assert isinstance(await bridge.open("s1"), HostSession)


class TestWire:
    @pytest.mark.parametrize(
        "message",
        [
            Welcome(bridge_id="b"),
            Turn(session_id="s", turn_id="t", text="é", speculative=True),
            Hold(session_id="s", turn_id="t"),
            Go(session_id="s", turn_id="t"),
            Cut(session_id="s", turn_id="t", heard_text="x", completed=True),
            Closed(session_id="s"),
        ],
    )
    def test_json_and_proto_say_the_same(self, message: BridgeMessage) -> None:
        assert parse_bridge(message.model_dump_json()) == message
        proto = bridge_to_proto(message)
        assert proto.WhichOneof("message") == message.type
        inner = getattr(proto, message.type)
        for name, value in message.model_dump(exclude={"type"}).items():
            assert getattr(inner, name) == value

    def test_a_hosts_proto_is_read(self) -> None:
        reply = pb.ReplyText(session_id="s", turn_id="t", text="x", is_final=True)
        assert host_from_proto(pb.HostMessage(reply=reply)) == Reply(
            session_id="s", turn_id="t", text="x", is_final=True
        )
        assert host_from_proto(pb.HostMessage(hello=pb.Hello())) == Hello()

    @pytest.mark.parametrize(
        "text", ["", "[]", '{"type":"x"}', '{"type":"reply","text":3}', "\xff"]
    )
    def test_anything_else_is_refused_without_repeating_it(self, text: str) -> None:
        with pytest.raises(InvalidArgument, match="not a message of a language model host"):
            parse_host(text)
        with pytest.raises(InvalidArgument):
            host_from_proto(pb.HostMessage())


# --- both sockets, for real ---


class Caller:
    """A host's own side, the same over both sockets."""

    async def send(self, message: HostMessage) -> None:
        raise NotImplementedError

    async def receive(self) -> BridgeMessage | None:
        raise NotImplementedError

    async def next(self) -> BridgeMessage:
        async with timeout(LIVENESS_S):
            message = await self.receive()
        assert message is not None
        return message


Socket: TypeAlias = "aiohttp.ClientWebSocketResponse"


class WsCaller(Caller):
    def __init__(self, socket: Socket) -> None:
        self.socket = socket

    async def send(self, message: HostMessage) -> None:
        await self.socket.send_str(message.model_dump_json())

    async def receive(self) -> BridgeMessage | None:
        message = await self.socket.receive()
        return parse_bridge(message.data) if message.type == aiohttp.WSMsgType.TEXT else None


GrpcCall = grpc.aio.StreamStreamCall[pb.HostMessage, pb.BridgeMessage]


class GrpcCaller(Caller):
    def __init__(self, call: GrpcCall) -> None:
        self.call = call

    async def send(self, message: HostMessage) -> None:
        fields = message.model_dump(exclude={"type"})
        await self.call.write(pb.HostMessage(**{message.type: fields}))

    async def receive(self) -> BridgeMessage | None:
        message = await self.call.read()
        if not isinstance(message, pb.BridgeMessage):
            return None
        kind = message.WhichOneof("message") or ""
        inner = getattr(message, kind)
        fields = {field.name: getattr(inner, field.name) for field in inner.DESCRIPTOR.fields}
        kinds = {m.model_fields["type"].default: m for m in (Welcome, Turn, Hold, Go, Cut, Closed)}
        return kinds[kind](**fields)


def check_key(key: str) -> bool:
    return key == "right"


@asynccontextmanager
async def ws_socket(hub: HostHub, headers: dict[str, str] | None = None) -> AsyncIterator[Socket]:
    app = web.Application()
    app.router.add_get("/v1/llm", hub.ws_handler(check_key))
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1/llm"
    try:
        async with aiohttp.ClientSession() as http, http.ws_connect(url, headers=headers) as socket:
            yield cast(Socket, socket)
    finally:
        await runner.cleanup()


@asynccontextmanager
async def grpc_call(hub: HostHub) -> AsyncIterator[GrpcCall]:
    server = grpc.aio.server()
    hub.add_to_grpc(server, check_key)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield pb_grpc.LLMHostStub(channel).Connect()  # type: ignore[no-untyped-call]
    finally:
        await server.stop(0)


@asynccontextmanager
async def caller_over(kind: str, hub: HostHub) -> AsyncIterator[Caller]:
    if kind == "ws":
        async with ws_socket(hub) as socket:
            yield WsCaller(socket)
    else:
        async with grpc_call(hub) as call:
            yield GrpcCaller(call)


@pytest.mark.parametrize("kind", ["ws", "grpc"])
class TestSockets:
    async def test_a_whole_turn(self, kind: str) -> None:
        hub = HostHub()
        async with caller_over(kind, hub) as caller:
            await caller.send(Hello(name="joe", api_key="right"))
            assert isinstance(await caller.next(), Welcome)
            assert hub.names == ("joe",)
            session = open_session(hub)
            reply = session.respond("t1", "Capital?")
            waiting = asyncio.ensure_future(anext(reply))
            turn = await caller.next()
            assert isinstance(turn, Turn)
            await caller.send(reply_to(turn, "Paris"))
            assert await waiting == "Paris"
            session.hold("t1")
            assert isinstance(await caller.next(), Hold)
            session.go("t1")
            assert isinstance(await caller.next(), Go)
            await caller.send(reply_to(turn, ".", final=True))
            assert [text async for text in reply] == ["."]
            session.commit("t1", "Capital?", "Paris.", completed=True)
            cut = await caller.next()
            assert isinstance(cut, Cut)
            assert (cut.heard_text, cut.completed) == ("Paris.", True)
            await session.aclose()
            assert isinstance(await caller.next(), Closed)

    async def test_a_host_that_vanishes_in_mid_answer(self, kind: str) -> None:
        hub = HostHub()
        async with caller_over(kind, hub) as caller:
            await caller.send(Hello(name="joe", api_key="right"))
            await caller.next()
            reply = open_session(hub).respond("t1", "Capital?")
            waiting = asyncio.ensure_future(anext(reply))
            turn = await caller.next()
            assert isinstance(turn, Turn)
            await caller.send(reply_to(turn, "Par"))
            assert await waiting == "Par"
        with pytest.raises(Unavailable, match="'joe' went away"):
            await asyncio.wait_for(anext(reply), LIVENESS_S)
        assert hub.names == ()

    async def test_closing_the_hub_ends_the_call(self, kind: str) -> None:
        hub = HostHub()
        async with caller_over(kind, hub) as caller:
            await caller.send(Hello(api_key="right"))
            await caller.next()
            await hub.aclose()
            async with timeout(LIVENESS_S):
                assert await caller.receive() is None


class TestRefusals:
    @pytest.mark.parametrize(
        ("first", "code"),
        [
            (Hello(api_key="wrong").model_dump_json(), 4401),
            (Hello().model_dump_json(), 4401),
            (Reply(session_id="s", turn_id="t").model_dump_json(), 4400),
            ("nonsense", 4400),
        ],
    )
    async def test_ws(self, first: str, code: int) -> None:
        hub = HostHub()
        async with ws_socket(hub) as socket:
            await socket.send_str(first)
            message = await asyncio.wait_for(socket.receive(), LIVENESS_S)
            assert message.type == aiohttp.WSMsgType.CLOSE
            assert message.data == code
        assert hub.names == ()

    async def test_ws_header(self) -> None:
        hub = HostHub()
        async with ws_socket(hub, {"Authorization": "Bearer right"}) as socket:
            await socket.send_str(Hello(name="joe").model_dump_json())
            await until(lambda: hub.names == ("joe",))
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            async with ws_socket(hub, {"Authorization": "Bearer wrong"}):
                pass
        assert caught.value.status == 401

    async def test_grpc(self) -> None:
        async with grpc_call(HostHub()) as call:
            await call.write(pb.HostMessage(hello=pb.Hello(api_key="wrong")))
            assert await call.code() == grpc.StatusCode.UNAUTHENTICATED

    async def test_bad_message_later_ends_only_that_host(self) -> None:
        hub = HostHub()
        FakeHost(hub, "other")
        async with ws_socket(hub) as socket:
            await socket.send_str(Hello(name="joe", api_key="right").model_dump_json())
            await until(lambda: "joe" in hub.names)
            await socket.send_str("{}")
            await until(lambda: hub.names == ("other",))
