"""Workers behind TLS, by the orchestrator's own router: real certificates, real handshakes."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from src.orchestrator.config import OrchestratorConfig
from src.orchestrator.ports import ControlAction
from src.orchestrator.router import SpeechRouter
from src.orchestrator.routing_policy import ModePolicy, RoutingPolicy
from src.orchestrator.server import Orchestrator
from src.orchestrator.worker_tls import WorkerTlsSettings
from src.rpc.errors import CorruptModel, Exhausted, Unavailable
from src.rpc.generated import tts_pb2 as pb
from src.rpc.generated import tts_pb2_grpc
from src.rpc.tls import ClientTls
from tests.certificates import Authority, Pair
from tests.integration.live import installation, talker
from tests.integration.test_tts_client import COSY, PIPER, FakeWorker, Fleet, ask, heard, until

ELSEWHERE = "grpc://gpubox2.lan:7001"


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("others"), "others")


@pytest.fixture(scope="module")
def pair(ours: Authority) -> Pair:
    return ours.sign("pair")


@dataclass
class TlsWorker(FakeWorker):
    pair: Pair | None = None
    callers: Path | None = None
    """Who signs for those who may call (mTLS)."""
    port: int = 0

    async def start(self) -> FakeWorker:
        assert self.pair is not None
        files = (self.pair.key.read_bytes(), self.pair.cert.read_bytes())
        root = self.callers.read_bytes() if self.callers else None
        credentials = grpc.ssl_server_credentials([files], root, root is not None)
        self.server = grpc.aio.server()
        tts_pb2_grpc.add_TTSServicer_to_server(self, self.server)  # type: ignore[no-untyped-call]
        self.port = self.server.add_secure_port(f"127.0.0.1:{self.port}", credentials)
        self.target = f"127.0.0.1:{self.port}"
        await self.server.start()
        return self

    def record(self, **fields: Any) -> Any:
        return super().record(**{"tls": True, **fields})


@asynccontextmanager
async def fleet(
    *workers: FakeWorker, policy: RoutingPolicy | None = None, **files: Any
) -> AsyncIterator[Fleet]:
    made = Fleet()
    tls = WorkerTlsSettings(**files).load()
    made.router = SpeechRouter(made.registry, policy or RoutingPolicy(), owner="test", tls=tls)
    try:
        for worker in workers:
            await made.add(worker)
        yield made
    finally:
        await made.router.aclose()
        for worker in workers:
            await worker.stop()
        await made.registry.aclose()


def announce(made: Fleet, name: str, addr: str = ELSEWHERE, **fields: Any) -> None:
    """A worker that nobody could call."""
    record = FakeWorker(name=name).record(**fields).model_copy(update={"addr": addr})
    made.registry.fleet.announced(record, 0.0)


async def refusal(worker: FakeWorker, **files: Any) -> str:
    async with fleet(worker, **files) as made:
        with pytest.raises(Unavailable) as error:
            await made.router.open(ask())
        assert not worker.seen
        assert made.places() == []
        return str(error.value)


# --- what works ---


@pytest.mark.parametrize("mutual", [False, True])
async def test_every_call_goes_over_tls(ours: Authority, pair: Pair, mutual: bool) -> None:
    worker = TlsWorker(pair=pair, callers=ours.ca if mutual else None, lease_ttl_ms=30)
    own: dict[str, Any] = {"cert": pair.cert, "key": pair.key} if mutual else {}
    async with fleet(worker, ca=ours.ca, **own) as made:
        session = await made.router.open(ask())
        utterance = session.utterance("u1")
        utterance.write("Hello.")
        assert await utterance.control(ControlAction.PAUSE) == 7
        utterance.finish()
        assert [frame.seq for frame in await heard(utterance)] == [0]
        await until(lambda: len(worker.calls("StartSession")) > 1)  # the lease is renewed
        await session.aclose()
        assert [model["licence"] for model in await made.router.models()] == ["CC0"]
        await made.router.load("piper-joe")
        await made.router.unload("piper-joe")
    assert {name for name, _ in worker.seen} == {
        "StartSession",
        "Synthesize",
        "Control",
        "EndSession",
        "ListModels",
        "LoadModel",
        "UnloadModel",
    }


async def test_a_preload_goes_over_tls(ours: Authority, pair: Pair) -> None:
    mode = ModePolicy(fallbacks=["cosyvoice2"], preload_preferred=True)
    worker = TlsWorker(pair=pair)
    policy = RoutingPolicy(routing={"default": mode})
    async with fleet(worker, policy=policy, ca=ours.ca) as made:
        record = worker.record(models=[PIPER, COSY], default_model="")
        made.registry.fleet.announced(record, 0.0)
        await made.router.open(ask())
        await until(lambda: bool(worker.calls("LoadModel")))
    assert worker.calls("LoadModel")[0].model_id == "cosy-en"


async def test_a_certificate_may_be_trusted_by_itself(pair: Pair) -> None:
    async with fleet(TlsWorker(pair=pair), ca=pair.cert) as made:
        assert (await made.router.open(ask())).info.worker == "w"


@pytest.mark.parametrize("trusted", ["ca", "cert"])
async def test_there_is_nothing_to_say_of_a_worker_that_is_fine(
    ours: Authority, pair: Pair, trusted: str
) -> None:
    worker = await TlsWorker(pair=pair, callers=ours.ca).start()
    client = ClientTls(ours.ca if trusted == "ca" else pair.cert, pair.cert, pair.key)
    assert await client.complaint(worker.target) == ""
    await worker.stop()


async def test_a_mixed_fleet_is_called_as_each_worker_announces(
    ours: Authority, pair: Pair
) -> None:
    plain, secure = FakeWorker(name="plain"), TlsWorker(name="secure", pair=pair)
    async with fleet(plain, secure, ca=ours.ca) as made:
        for number in range(2):
            await made.router.open(ask(f"s{number}"))
    assert len(plain.calls("StartSession")) == len(secure.calls("StartSession")) == 1


async def test_a_worker_that_comes_back_with_tls_is_called_over_it(
    ours: Authority, pair: Pair
) -> None:
    async with fleet(ca=ours.ca) as made:
        before = await made.add(FakeWorker())
        await (await made.router.open(ask("s1"))).aclose()
        await before.stop()
        after = TlsWorker(pair=pair, port=int(before.target.rpartition(":")[2]))
        await made.add(after)
        made.registry.recovered("w")
        session = await made.router.open(ask("s2"))
        assert after.calls("StartSession")
        await session.aclose()
        assert [key[2] for key in made.router._clients] == [True], "the plain one is closed"
        await after.stop()


# --- what does not, in words that say what to do ---


async def test_another_authoritys_certificate(ours: Authority, others: Authority) -> None:
    said = await refusal(TlsWorker(pair=others.sign("foreign")), ca=ours.ca)
    assert "worker w at 127.0.0.1:" in said
    assert f"tts.tls.ca ({ours.ca}) did not sign its certificate" in said


async def test_an_expired_certificate(ours: Authority) -> None:
    said = await refusal(TlsWorker(pair=ours.sign("expired", days=-1)), ca=ours.ca)
    assert "has expired" in said
    assert "made anew" in said


async def test_a_certificate_for_another_host(ours: Authority) -> None:
    pair = ours.sign("gpubox2", "DNS:gpubox2.lan")
    said = await refusal(TlsWorker(pair=pair), ca=ours.ca)
    assert "is not for '127.0.0.1': make one with it as a subjectAltName" in said


async def test_a_worker_that_asks_for_a_certificate_and_none_is_set(
    ours: Authority, pair: Pair
) -> None:
    said = await refusal(TlsWorker(pair=pair, callers=ours.ca), ca=ours.ca)
    assert "set tts.tls.cert and tts.tls.key" in said


async def test_a_worker_that_does_not_accept_our_certificate(
    ours: Authority, others: Authority, pair: Pair
) -> None:
    own = others.sign("caller")
    worker = TlsWorker(pair=pair, callers=ours.ca)
    said = await refusal(worker, ca=ours.ca, cert=own.cert, key=own.key)
    assert f"it hangs up on tts.tls.cert ({own.cert})" in said
    assert "worker.tls.ca" in said


async def test_a_worker_that_announces_tls_and_speaks_plain_text(ours: Authority) -> None:
    async with fleet(ca=ours.ca) as made:
        worker = await made.add(FakeWorker(), tls=True)
        with pytest.raises(Unavailable, match="does not speak TLS"):
            await made.router.open(ask())
        await worker.stop()


async def test_tls_is_announced_and_no_authority_is_set(pair: Pair) -> None:
    assert "set tts.tls.ca" in await refusal(TlsWorker(pair=pair))


async def test_a_worker_that_is_just_gone_is_not_blamed_on_tls(ours: Authority, pair: Pair) -> None:
    async with fleet(ca=ours.ca) as made:
        worker = await made.add(TlsWorker(pair=pair))
        await worker.stop()
        with pytest.raises(Unavailable, match="is lost"):
            await made.router.open(ask())


async def test_a_workers_own_refusal_is_told_as_it_is(ours: Authority, pair: Pair) -> None:
    refuse = {
        "StartSession": Unavailable("worker w is draining"),
        "LoadModel": CorruptModel("model.onnx is torn"),
    }
    async with fleet(TlsWorker(pair=pair, refuse=refuse), ca=ours.ca) as made:
        with pytest.raises(CorruptModel, match="torn"):
            await made.router.load("piper-joe")
        with pytest.raises(Unavailable, match="is draining"):
            await made.router.open(ask())


async def test_loading_and_unloading_say_it_too(ours: Authority, others: Authority) -> None:
    worker = TlsWorker(pair=others.sign("foreign"))
    async with fleet(worker, ca=ours.ca) as made:
        with pytest.raises(Unavailable, match="did not sign"):
            await made.router.load("piper-joe")
        with pytest.raises(Unavailable, match="did not sign"):
            await made.router.unload("piper-joe")
        assert (await made.router.models())[0]["state"] == "resident", "as it announced"


# --- failover ---


async def test_a_bad_certificate_is_passed_over_for_a_good_one_and_logged(
    ours: Authority, others: Authority, pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    bad = TlsWorker(name="a-bad", pair=others.sign("foreign"))
    good = TlsWorker(name="b-good", pair=pair)
    async with fleet(bad, good, ca=ours.ca) as made:
        session = await made.router.open(ask())
        assert session.info.worker == "b-good"
        utterance = session.utterance("u1")
        utterance.write("Hello.")
        utterance.finish()
        assert len(await heard(utterance)) == 1
    [warning] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.__dict__["worker"] == "a-bad"
    assert "did not sign" in warning.__dict__["reason"]


async def test_plain_workers_elsewhere_use_up_no_tries(ours: Authority, pair: Pair) -> None:
    async with fleet(TlsWorker(name="z", pair=pair), ca=ours.ca) as made:
        for number in range(5):
            announce(made, f"plain-{number}")
        assert (await made.router.open(ask())).info.worker == "z"


async def test_a_model_is_loaded_where_it_may_be(ours: Authority, pair: Pair) -> None:
    worker = TlsWorker(name="z", pair=pair)
    async with fleet(worker, ca=ours.ca) as made:
        announce(made, "a-plain")
        await made.router.load("piper-joe")
    assert worker.calls("LoadModel")


async def test_only_plain_workers_elsewhere_is_an_error_that_says_so(
    ours: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    async with fleet(ca=ours.ca) as made:
        announce(made, "plain")
        for _ in range(2):
            with pytest.raises(Unavailable, match=r"worker plain: .* tts\.tls\.allow_plain"):
                await made.router.open(ask())
            with pytest.raises(Unavailable, match=r"tts\.tls\.allow_plain"):
                await made.router.load("piper-joe")
        announce(made, "draining-too", draining=True)
        with pytest.raises(Unavailable, match=r"tts\.tls\.allow_plain"):
            await made.router.open(ask())
    assert [record.__dict__["worker"] for record in caplog.records] == ["plain", "draining-too"]


async def test_of_one_that_was_tried_and_one_that_is_refused_the_first_is_told(
    ours: Authority, others: Authority
) -> None:
    async with fleet(TlsWorker(pair=others.sign("foreign")), ca=ours.ca) as made:
        announce(made, "plain")
        with pytest.raises(Unavailable, match="did not sign"):
            await made.router.open(ask())


async def test_a_full_fleet_is_full_whatever_else_is_refused(ours: Authority, pair: Pair) -> None:
    async with fleet(ca=ours.ca) as made:
        worker = TlsWorker(pair=pair)
        await made.add(worker, max_sessions=1)
        announce(made, "plain")
        await made.router.open(ask("s1"))
        with pytest.raises(Exhausted, match="full"):
            await made.router.open(ask("s2"))
        await worker.stop()


async def test_a_stand_in_is_no_reason_to_call_a_refused_worker(
    ours: Authority, pair: Pair
) -> None:
    policy = RoutingPolicy(routing={"default": ModePolicy(serve_while_loading=True)})
    async with fleet(TlsWorker(pair=pair), policy=policy, ca=ours.ca) as made:
        announce(made, "plain", models=[COSY], resident_models=[], default_model="")
        with pytest.raises(Unavailable):
            await made.router.open(ask(model="cosy-en"))


async def test_a_refused_worker_keeps_no_other_from_unloading(ours: Authority, pair: Pair) -> None:
    worker = TlsWorker(name="z", pair=pair)
    async with fleet(worker, ca=ours.ca) as made:
        announce(made, "a-plain")
        with pytest.raises(Unavailable, match=r"tts\.tls\.allow_plain"):
            await made.router.unload("piper-joe")
    assert worker.states == {"piper-joe": pb.COLD}


async def test_readiness_counts_only_workers_that_are_called(ours: Authority, pair: Pair) -> None:
    config = OrchestratorConfig.model_validate({"tts": {"tls": {"ca": str(ours.ca)}}})
    orchestrator = Orchestrator(config, RoutingPolicy())
    async with fleet(ca=ours.ca) as made:
        orchestrator._registry, orchestrator._speech = made.registry, made.router
        announce(made, "plain")
        check = orchestrator._check_workers()
        assert not check.ok
        assert "plain is not called: it serves plain text on another machine" in check.text
        worker = await made.add(TlsWorker(name="secure", pair=pair))
        check = orchestrator._check_workers()
        assert check.ok
        assert check.text.startswith("secure, plain is not called")
        assert [listed["tls"] for listed in made.router.workers()] == [False, True]
        await worker.stop()


# --- the real thing ---


@pytest.mark.slow
@pytest.mark.parametrize("mutual", [False, True])
async def test_a_whole_installation_speaks_over_tls(
    ours: Authority, pair: Pair, tmp_path: Path, mutual: bool
) -> None:
    files = {
        "WORKER_TLS_CERT": pair.cert,
        "WORKER_TLS_KEY": pair.key,
        "DUPLEX_TTS_TLS_CA": ours.ca,
    }
    if mutual:
        caller = ours.sign("caller", use="clientAuth")
        files |= {
            "WORKER_TLS_CA": ours.ca,
            "DUPLEX_TTS_TLS_CERT": caller.cert,
            "DUPLEX_TTS_TLS_KEY": caller.key,
        }
    env = {name: str(path) for name, path in files.items()}
    async with installation(tmp_path, env=env) as running:
        async with grpc.aio.insecure_channel(running.worker) as channel:
            stub = tts_pb2_grpc.TTSStub(channel)  # type: ignore[no-untyped-call]
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.ListModels(pb.ListModelsReq(), timeout=5)
        async with talker(running) as client:
            await client.say("Hello there.")
            await client.until_event("audio.end")
        assert client.played
