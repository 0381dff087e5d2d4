"""The router and the TTS client against workers of the generated servicer, over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from src.common.tasks import cancel_and_wait, timeout
from src.orchestrator.ports import (
    ControlAction,
    SpeechFrame,
    SpeechProvider,
    VoiceRequest,
    Word,
)
from src.orchestrator.registry import Registry
from src.orchestrator.router import MAX_TRIES, SpeechRouter
from src.orchestrator.routing_policy import ModePolicy, RoutingPolicy
from src.orchestrator.tts_client import MAX_UNSENT_CHARS
from src.rpc.announcement import Announcement, ModelEntry
from src.rpc.errors import (
    CorruptModel,
    DuplexError,
    Exhausted,
    FailedPrecondition,
    InUse,
    InvalidArgument,
    NotFound,
    Unavailable,
    UnknownName,
    abort,
)
from src.rpc.generated import tts_pb2 as pb
from src.rpc.generated import tts_pb2_grpc

PIPER = ModelEntry(model_id="piper-joe", family="piper", languages=["en"], cpu_ok=True)
COSY = ModelEntry(model_id="cosy-en", family="cosyvoice2", languages=["en"])


@dataclass
class FakeWorker(tts_pb2_grpc.TTSServicer):
    """Speaks one frame per text chunk. `refuse` maps an RPC's name to the error it ends with."""

    name: str = "w"
    lease_ttl_ms: int = 60_000
    refuse: dict[str, DuplexError] = field(default_factory=dict)
    states: dict[str, pb.ModelState] = field(default_factory=lambda: {"piper-joe": pb.RESIDENT})
    seen: list[tuple[str, Any]] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    endless: bool = False
    target: str = ""
    server: Any = None

    async def _enter(self, name: str, request: Any, context: Any) -> None:
        self.seen.append((name, request))
        if name in self.refuse:
            await abort(context, self.refuse[name])

    def calls(self, name: str) -> list[Any]:
        return [request for called, request in self.seen if called == name]

    async def StartSession(self, request: Any, context: Any) -> pb.StartSessionResp:
        await self._enter("StartSession", request, context)
        return pb.StartSessionResp(
            session_id=request.session_id,
            model_id=request.model_id,
            voice=request.voice or "first",
            language=request.language or "en",
            lease_ttl_ms=self.lease_ttl_ms,
            words_estimated=True,
        )

    async def Synthesize(self, chunks: Any, context: Any) -> AsyncIterator[pb.AudioFrame]:
        seq, utterance_id, at = 0, "", 0
        try:
            async for chunk in chunks:
                await self._enter("Synthesize", chunk, context)
                utterance_id = utterance_id or chunk.utterance_id
                while chunk.text:
                    words = [
                        pb.WordMark(
                            text=chunk.text,
                            start_ms=20 * seq,
                            end_ms=20 * seq + 20,
                            estimated=True,
                            char_start=at,
                            char_end=at + len(chunk.text),
                        )
                    ]
                    yield pb.AudioFrame(
                        pcm=bytes([seq % 256]) * 1920,
                        utterance_id=utterance_id,
                        seq=seq,
                        media_time_ms=20 * seq,
                        words=words,
                    )
                    seq, at = seq + 1, at + len(chunk.text)
                    if not self.endless:
                        break
                    await asyncio.sleep(0.01)
            yield pb.AudioFrame(utterance_id=utterance_id, seq=seq, last=True)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def Control(self, request: Any, context: Any) -> pb.ControlResp:
        await self._enter("Control", request, context)
        return pb.ControlResp(utterance_id=request.utterance_id, last_seq=7)

    async def EndSession(self, request: Any, context: Any) -> pb.EndSessionResp:
        await self._enter("EndSession", request, context)
        return pb.EndSessionResp()

    async def ListModels(self, request: Any, context: Any) -> pb.ListModelsResp:
        await self._enter("ListModels", request, context)
        return pb.ListModelsResp(
            models=[
                pb.ModelInfo(model_id=name, family="piper", state=state, licence="CC0")
                for name, state in self.states.items()
            ]
        )

    async def LoadModel(self, request: Any, context: Any) -> pb.LoadModelResp:
        await self._enter("LoadModel", request, context)
        self.states[request.model_id] = pb.RESIDENT if request.wait else pb.LOADING
        return pb.LoadModelResp(state=self.states[request.model_id])

    async def UnloadModel(self, request: Any, context: Any) -> pb.UnloadModelResp:
        await self._enter("UnloadModel", request, context)
        self.states[request.model_id] = pb.COLD
        return pb.UnloadModelResp(state=pb.COLD)

    async def start(self) -> FakeWorker:
        self.server = grpc.aio.server()
        tts_pb2_grpc.add_TTSServicer_to_server(self, self.server)  # type: ignore[no-untyped-call]
        self.target = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        await self.server.start()
        return self

    async def stop(self) -> None:
        await self.server.stop(None)

    def record(self, **fields: Any) -> Announcement:
        known = {"models": [PIPER], "resident_models": ["piper-joe"], "default_model": "piper-joe"}
        return Announcement(name=self.name, addr=f"grpc://{self.target}", **{**known, **fields})


class Fleet:
    """Workers that a router sees; Redis is away, as it may be."""

    def __init__(self, policy: RoutingPolicy | None = None) -> None:
        self.registry = Registry("redis://127.0.0.1:1/0")
        self.registry.stale_since_ms = 0.0
        self.registry._looked.set()
        self.router = SpeechRouter(self.registry, policy or RoutingPolicy(), owner="test")

    async def add(self, worker: FakeWorker, **fields: Any) -> FakeWorker:
        await worker.start()
        self.registry.fleet.announced(worker.record(**fields), 0.0)
        return worker

    def places(self) -> list[tuple[str, str]]:
        return self.registry.fleet.sessions()


@asynccontextmanager
async def fleet(
    *workers: FakeWorker, policy: RoutingPolicy | None = None, **fields: Any
) -> AsyncIterator[Fleet]:
    made = Fleet(policy)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(made.registry.aclose)
        for worker in workers:
            await made.add(worker, **fields)
            stack.push_async_callback(worker.stop)
        stack.push_async_callback(made.router.aclose)
        yield made


def ask(session_id: str = "s1", **fields: Any) -> VoiceRequest:
    return VoiceRequest(session_id, **fields)


async def until(condition: Callable[[], bool]) -> None:
    async with timeout(10):
        while not condition():  # noqa: ASYNC110  (it happens on the other side of a socket)
            await asyncio.sleep(0.005)


async def heard(utterance: Any) -> list[SpeechFrame]:
    return [frame async for frame in utterance.frames()]


# --- an utterance ---


async def test_text_goes_in_as_it_is_written_and_frames_come_out() -> None:
    worker = FakeWorker()
    async with fleet(worker) as made:
        provider: SpeechProvider = made.router
        session = await provider.open(ask(voice="joe", settings={"speed": "1.1"}))
        utterance = session.utterance("u1")
        utterance.write("Hello ")
        frames: list[SpeechFrame] = []
        async for frame in utterance.frames():
            frames.append(frame)
            if frame.seq == 0:
                utterance.write("there.")
                utterance.finish()
        assert [frame.seq for frame in frames] == [0, 1]
        assert frames[1].pcm == b"\x01" * 1920
        assert frames[1].media_time_ms == 20
        assert frames[1].words == (Word("there.", 20, 40, 6, 12, estimated=True),)
        first, *rest = worker.calls("Synthesize")
        assert (first.session_id, first.utterance_id, first.text) == ("s1", "u1", "Hello ")
        assert [chunk.text for chunk in rest] == ["there."]
        assert rest[-1].is_final
        (started,) = worker.calls("StartSession")
        assert (started.model_id, started.voice, started.owner) == ("piper-joe", "joe", "test")
        assert dict(started.settings) == {"speed": "1.1"}


async def test_text_written_at_one_go_is_one_chunk() -> None:
    worker = FakeWorker()
    async with fleet(worker) as made:
        utterance = (await made.router.open(ask())).utterance("u1")
        for token in ("One", " two", " three", ""):
            utterance.write(token)
        utterance.finish()
        utterance.finish()
        await heard(utterance)
        (chunk,) = worker.calls("Synthesize")
        assert chunk.text == "One two three"
        assert chunk.is_final


async def test_the_voice_says_what_it_is() -> None:
    async with fleet(FakeWorker()) as made:
        info = (await made.router.open(ask(language="en"))).info
        assert (info.model, info.voice, info.worker) == ("piper-joe", "first", "w")
        assert info.words_estimated
        assert not info.fallback


async def test_closing_the_iteration_stops_the_workers_side() -> None:
    worker = FakeWorker(endless=True)
    async with fleet(worker) as made:
        utterance = (await made.router.open(ask())).utterance("u1")
        utterance.write("word ")
        async with aclosing(utterance.frames()) as frames:  # type: ignore[type-var]
            async for frame in frames:
                if frame.seq == 3:
                    break
        async with timeout(10):
            await worker.cancelled.wait()


async def test_cancelling_the_reader_stops_the_workers_side() -> None:
    worker = FakeWorker(endless=True)
    async with fleet(worker) as made:
        utterance = (await made.router.open(ask())).utterance("u1")
        utterance.write("word ")
        reader = asyncio.create_task(heard(utterance))
        await until(lambda: utterance._last_seq >= 2)
        await cancel_and_wait(reader)
        assert reader.cancelled()
        async with timeout(10):
            await worker.cancelled.wait()


async def test_closing_from_another_task_ends_the_reader_quietly() -> None:
    worker = FakeWorker(endless=True)
    async with fleet(worker) as made:
        utterance = (await made.router.open(ask())).utterance("u1")
        utterance.write("word ")
        reader = asyncio.create_task(heard(utterance))
        await until(lambda: utterance._last_seq >= 2)
        await utterance.aclose()
        async with timeout(10):
            assert len(await reader) >= 3
        assert [call.action for call in worker.calls("Control")] == [pb.STOP]
        utterance.write("too late")
        await utterance.aclose()


async def test_an_utterance_that_said_nothing_costs_no_call() -> None:
    worker = FakeWorker()
    async with fleet(worker) as made:
        utterance = (await made.router.open(ask())).utterance("u1")
        await utterance.aclose()
        assert await utterance.control(ControlAction.STOP) == -1
        assert [name for name, _ in worker.seen] == ["StartSession"]


async def test_control_reaches_the_worker_and_after_the_end_costs_nothing() -> None:
    worker = FakeWorker(endless=True)
    async with fleet(worker) as made:
        utterance = (await made.router.open(ask())).utterance("u1")
        utterance.write("word ")
        frames = utterance.frames()
        await anext(frames)
        for action in (ControlAction.PAUSE, ControlAction.PAUSE, ControlAction.RESUME):
            assert await utterance.control(action) == 7
        sent = [(call.action, call.utterance_id) for call in worker.calls("Control")]
        assert sent == [(pb.PAUSE, "u1"), (pb.PAUSE, "u1"), (pb.RESUME, "u1")]
        await utterance.aclose()
        count = len(worker.calls("Control"))
        assert await utterance.control(ControlAction.STOP) == utterance._last_seq
        assert len(worker.calls("Control")) == count


async def test_text_has_its_limits() -> None:
    async with fleet(FakeWorker()) as made:
        utterance = (await made.router.open(ask())).utterance("u1")
        with pytest.raises(InvalidArgument, match="at most"):
            utterance.write("x" * (MAX_UNSENT_CHARS + 1))
        utterance.finish()
        with pytest.raises(FailedPrecondition, match="'u1' was finished"):
            utterance.write("more")


# --- errors ---


@pytest.mark.parametrize(
    ("refused", "seen"),
    [
        (InvalidArgument("bad text"), InvalidArgument),
        (FailedPrecondition("speaking already"), FailedPrecondition),
        (Unavailable("draining"), Unavailable),
        (NotFound("no session 's1'"), Unavailable),
    ],
)
async def test_errors_of_an_utterance_are_typed(
    refused: DuplexError, seen: type[DuplexError]
) -> None:
    async with fleet(FakeWorker(refuse={"Synthesize": refused})) as made:
        utterance = (await made.router.open(ask())).utterance("u1")
        utterance.write("Hello")
        with pytest.raises(DuplexError, match=refused.message) as caught:
            await heard(utterance)
        assert type(caught.value) is seen


async def test_a_worker_that_dies_in_mid_utterance_is_unavailable_and_avoided() -> None:
    worker = FakeWorker(endless=True)
    async with fleet(worker) as made:
        session = await made.router.open(ask())
        utterance = session.utterance("u1")
        utterance.write("word ")
        frames = utterance.frames()
        await anext(frames)
        await worker.stop()
        with pytest.raises(Unavailable, match=r"worker w at 127\.0\.0\.1:"):
            async for _ in frames:
                pass
        (view,) = made.registry.view()
        assert view.avoid_until_ms > 0
        with pytest.raises(Unavailable):
            await session.utterance("u2").control(ControlAction.PAUSE)
        await session.aclose()
        assert made.places() == []


# --- opening ---


@pytest.mark.parametrize("refused", [Exhausted("full", retry_after_ms=70), Unavailable("draining")])
async def test_a_refusal_goes_to_the_next_best(refused: DuplexError) -> None:
    first, second = FakeWorker("a", refuse={"StartSession": refused}), FakeWorker("b")
    async with fleet(first, second) as made:
        session = await made.router.open(ask())
        assert session.info.worker == "b"
        assert made.places() == [("b", "s1")]
        again = await made.router.open(ask("s2"))
        assert again.info.worker == "b"
        assert len(first.calls("StartSession")) == 1, "avoided for a while"


async def test_an_unreachable_worker_is_passed_over() -> None:
    async with fleet(FakeWorker("b")) as made:
        nobody = FakeWorker("a", target="127.0.0.1:1").record()
        made.registry.fleet.announced(nobody, 0.0)
        assert (await made.router.open(ask())).info.worker == "b"


async def test_when_all_refuse_the_last_refusal_is_told_after_a_bounded_number_of_tries() -> None:
    workers = [
        FakeWorker(name, refuse={"StartSession": Exhausted(f"{name} is full", retry_after_ms=900)})
        for name in "abcde"
    ]
    async with fleet(*workers) as made:
        with pytest.raises(Exhausted, match="is full") as caught:
            await made.router.open(ask())
        assert caught.value.retry_after_ms == 900
        assert sum(len(worker.calls("StartSession")) for worker in workers) == MAX_TRIES
        assert made.places() == []


async def test_a_request_that_is_wrong_is_not_tried_elsewhere() -> None:
    workers = [
        FakeWorker(name, refuse={"StartSession": UnknownName("unknown setting 'sped'")})
        for name in "ab"
    ]
    async with fleet(*workers) as made:
        with pytest.raises(UnknownName, match="sped"):
            await made.router.open(ask())
        assert sum(len(worker.calls("StartSession")) for worker in workers) == 1
        assert made.places() == []
        with pytest.raises(UnknownName, match="did you mean 'opus'"):
            await made.router.open(ask(codec="opsu"))


async def test_the_last_place_is_claimed_once() -> None:
    async with fleet(FakeWorker(), max_sessions=1) as made:
        results = await asyncio.gather(
            *(made.router.open(ask(f"s{n}")) for n in range(5)), return_exceptions=True
        )
        refused = [result for result in results if isinstance(result, Exhausted)]
        assert len(refused) == 4
        (session,) = (result for result in results if not isinstance(result, BaseException))
        await session.aclose()
        assert (await made.router.open(ask("next"))).info.worker == "w"


async def test_a_cancelled_open_gives_its_place_back() -> None:
    worker = FakeWorker()
    async with fleet(worker) as made:
        entered = asyncio.Event()

        async def stuck(request: Any, context: Any) -> None:
            entered.set()
            await asyncio.sleep(60)

        worker.StartSession = stuck  # type: ignore[method-assign,assignment]
        await worker.stop()
        await made.add(worker)
        task = asyncio.create_task(made.router.open(ask()))
        async with timeout(10):
            await entered.wait()
        assert made.places() == [("w", "s1")]
        await cancel_and_wait(task)
        assert made.places() == []


# --- leases ---


async def test_a_lease_is_renewed_until_the_session_is_closed() -> None:
    worker = FakeWorker(lease_ttl_ms=30)
    async with fleet(worker) as made:
        session = await made.router.open(ask(voice="joe"))
        await until(lambda: len(worker.calls("StartSession")) >= 4)
        asked = {
            call.SerializeToString(deterministic=True) for call in worker.calls("StartSession")
        }
        assert len(asked) == 1, "same session, same model, same voice"
        await session.aclose()
        await session.aclose()
        count = len(worker.calls("StartSession"))
        await asyncio.sleep(0.05)
        assert len(worker.calls("StartSession")) == count
        assert [call.session_id for call in worker.calls("EndSession")] == ["s1"]
        assert made.places() == []


async def test_renewing_survives_a_worker_that_is_away_and_ends_when_the_lease_is_lost() -> None:
    worker = FakeWorker(lease_ttl_ms=30)
    async with fleet(worker) as made:
        session = await made.router.open(ask())
        worker.refuse["StartSession"] = Unavailable("starting")
        await until(lambda: len(worker.calls("StartSession")) >= 4)
        assert not session._keeper.done()
        worker.refuse["StartSession"] = FailedPrecondition("another model")
        await until(session._keeper.done)
        await session.aclose()


async def test_closing_the_router_ends_what_is_open() -> None:
    worker = FakeWorker()
    async with fleet(worker) as made:
        await made.router.open(ask("s1"))
        await made.router.open(ask("s2"))
        await made.router.aclose()
        assert {call.session_id for call in worker.calls("EndSession")} == {"s1", "s2"}
        assert made.places() == []


# --- models ---


async def test_a_stand_in_speaks_while_the_named_model_loads() -> None:
    worker = FakeWorker()
    policy = RoutingPolicy(routing={"default": ModePolicy(serve_while_loading=True)})
    async with fleet(worker, policy=policy, models=[PIPER, COSY]) as made:
        session = await made.router.open(ask(model="cosy-en", settings={"emotion": "calm"}))
        assert session.info.model == "piper-joe"
        assert session.info.fallback
        assert session.info.fallback_reason == "cosy-en is loading; piper-joe speaks meanwhile"
        await until(lambda: bool(worker.calls("LoadModel")))
        (load,) = worker.calls("LoadModel")
        assert (load.model_id, load.wait) == ("cosy-en", False)
        (started,) = worker.calls("StartSession")
        assert dict(started.settings) == {}, "they belong to the family that was asked for"


async def test_the_fleets_models_are_merged() -> None:
    one = FakeWorker("a", states={"piper-joe": pb.RESIDENT, "x": pb.COLD})
    two = FakeWorker("b", states={"piper-joe": pb.COLD})
    silent = FakeWorker("c", refuse={"ListModels": Unavailable("starting")})
    async with fleet(one, two, silent) as made:
        piper, other = await made.router.models()
        assert piper["id"] == "piper-joe"
        assert piper["state"] == "resident"
        assert piper["workers"] == {"a": "resident", "b": "cold", "c": "resident"}
        assert piper["licence"] == "CC0"
        assert piper["languages"] == ["en"]
        assert (other["id"], other["state"]) == ("x", "cold")


async def test_load_and_unload() -> None:
    worker = FakeWorker(states={"piper-joe": pb.RESIDENT, "cosy-en": pb.COLD})
    async with fleet(worker, models=[PIPER, COSY]) as made:
        assert (await made.router.load("cosy-en"))["state"] == "resident"
        assert (await made.router.unload("cosy-en"))["state"] == "cold"
        with pytest.raises(UnknownName, match="did you mean 'cosy-en'"):
            await made.router.load("cosy-e")
        with pytest.raises(UnknownName, match="did you mean 'cosy-en'"):
            await made.router.unload("cosy-e")
        worker.refuse = {
            "UnloadModel": InUse("held by s1"),
            "LoadModel": CorruptModel("model.onnx"),
        }
        with pytest.raises(InUse, match="held by s1"):
            await made.router.unload("piper-joe")
        with pytest.raises(CorruptModel, match=r"model\.onnx"):
            await made.router.load("cosy-en")


# --- the real worker ---


async def test_a_real_worker_is_found_speaks_pauses_and_is_missed_when_it_dies(
    redis_url: str, start_worker: Any
) -> None:
    registry = Registry(redis_url)
    router = SpeechRouter(registry, RoutingPolicy())
    watching = asyncio.create_task(registry.run())
    try:
        worker = await start_worker("--redis_url", redis_url)
        await until(lambda: len(registry.view()) == 1)
        session = await router.open(ask(language="en"))
        assert session.info.worker == registry.view()[0].name

        short = session.utterance("u1")
        short.write("Good ")
        short.write("morning.")
        short.finish()
        frames = await heard(short)
        assert [frame.seq for frame in frames] == list(range(len(frames)))
        assert {len(frame.pcm) for frame in frames} == {1920}
        words = [word for frame in frames for word in frame.words]
        assert ["Good morning."[word.char_start : word.char_end] for word in words] == [
            "Good",
            "morning.",
        ]

        long = session.utterance("u2")
        long.write("This sentence goes on and on. " * 20)
        stream = long.frames()
        assert (await anext(stream)).seq == 0
        last = await long.control(ControlAction.PAUSE)
        assert await long.control(ControlAction.PAUSE) == last
        await long.control(ControlAction.RESUME)
        async with timeout(10):
            after = [(await anext(stream)).seq for _ in range(last + 5)]
        assert after == list(range(1, last + 6)), "nothing lost, nothing repeated"
        worker.process.kill()
        with pytest.raises(Unavailable):
            async for _ in stream:
                pass
        with pytest.raises(Unavailable):
            await router.open(ask("s2"))
        await session.aclose()
        await until(lambda: registry.view() == ())
        assert registry.fleet.sessions() == []
    finally:
        await router.aclose()
        await cancel_and_wait(watching)
        await registry.aclose()


async def test_a_session_is_free_for_the_next_utterance_once_one_is_closed(
    redis_url: str, start_worker: Any
) -> None:
    registry = Registry(redis_url)
    router = SpeechRouter(registry, RoutingPolicy())
    watching = asyncio.create_task(registry.run())
    try:
        await start_worker("--redis_url", redis_url)
        await until(lambda: len(registry.view()) == 1)
        session = await router.open(ask())
        for turn in range(20):
            utterance = session.utterance(f"u{turn}")
            utterance.write("This sentence goes on and on. " * 5)
            frames = utterance.frames()
            assert (await anext(frames)).utterance_id == f"u{turn}"
            await utterance.aclose()
    finally:
        await router.aclose()
        await cancel_and_wait(watching)
        await registry.aclose()
