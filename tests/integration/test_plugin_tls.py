"""The LiveKit plugin towards workers behind TLS."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
from livekit.agents import APIConnectionError
from livekit.agents.types import APIConnectOptions

from src.livekit_plugin import TTS
from tests.certificates import Authority, Pair
from tests.integration.test_tts_client import FakeWorker
from tests.integration.test_worker_tls import TlsWorker

ONE_TRY = APIConnectOptions(max_retry=0, timeout=5)
ENV = {part: f"DUPLEX_TTS_TLS_{part.upper()}" for part in ("ca", "cert", "key")}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENV.values():
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("others"), "others")


@pytest.fixture(scope="module")
def pair(ours: Authority) -> Pair:
    return ours.sign("pair")


async def said(*workers: FakeWorker, **options: Any) -> int:
    """Frames of one short text."""
    async with AsyncExitStack() as stack:
        for worker in workers:
            await worker.start()
            stack.push_async_callback(worker.stop)
        speaker = TTS(target=",".join(worker.target for worker in workers), **options)
        stack.push_async_callback(speaker.aclose)
        async with speaker.stream(conn_options=ONE_TRY) as stream:
            stream.push_text("Hello.")
            stream.end_input()
            return len([event async for event in stream])


async def refusal(worker: FakeWorker, **options: Any) -> str:
    with pytest.raises(APIConnectionError) as error:
        await said(worker, **options)
    assert not worker.seen
    assert error.value.retryable
    return str(error.value)


@pytest.mark.parametrize("mutual", [False, True])
async def test_it_speaks_over_tls(ours: Authority, pair: Pair, mutual: bool) -> None:
    worker = TlsWorker(pair=pair, callers=ours.ca if mutual else None)
    own = {"cert": pair.cert, "key": str(pair.key)} if mutual else {}
    assert await said(worker, ca=str(ours.ca), **own)


async def test_the_environment_names_the_files_and_an_argument_wins(
    ours: Authority, others: Authority, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENV["ca"], str(others.ca))
    monkeypatch.setenv(ENV["cert"], str(pair.cert))
    monkeypatch.setenv(ENV["key"], str(pair.key))
    assert await said(TlsWorker(pair=pair, callers=ours.ca), ca=ours.ca)
    monkeypatch.setenv(ENV["ca"], str(ours.ca))
    assert await said(TlsWorker(pair=pair, callers=ours.ca))


async def test_grpcs_own_credentials_are_taken_instead(
    ours: Authority, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENV["ca"], "/no/such/file")
    credentials = grpc.ssl_channel_credentials(ours.ca.read_bytes())
    assert await said(TlsWorker(pair=pair), credentials=credentials)
    with pytest.raises(ValueError, match="not both"):
        TTS(ca=ours.ca, credentials=credentials)


async def test_a_bad_certificate_is_passed_over_for_a_good_one(
    ours: Authority, others: Authority, pair: Pair
) -> None:
    bad, good = TlsWorker(pair=others.sign("foreign")), TlsWorker(pair=pair)
    assert await said(bad, good, ca=ours.ca)
    assert good.calls("StartSession")
    assert not bad.seen


async def test_what_tls_did_not_like_is_said(
    ours: Authority, others: Authority, pair: Pair
) -> None:
    foreign = TlsWorker(pair=others.sign("foreign"))
    assert f"ca (DUPLEX_TTS_TLS_CA) ({ours.ca}) did not sign" in await refusal(foreign, ca=ours.ca)
    asking = TlsWorker(pair=pair, callers=ours.ca)
    words = await refusal(asking, ca=ours.ca)
    assert "set cert (DUPLEX_TTS_TLS_CERT) and key (DUPLEX_TTS_TLS_KEY)" in words
    assert "does not speak TLS" in await refusal(FakeWorker(), ca=ours.ca)


async def test_a_worker_that_is_gone_is_not_blamed_on_tls(ours: Authority, pair: Pair) -> None:
    worker = TlsWorker(pair=pair)
    await worker.start()
    await worker.stop()
    speaker = TTS(target=worker.target, ca=ours.ca)
    with pytest.raises(APIConnectionError, match="is lost"):
        await speaker.synthesize("Hello.", conn_options=ONE_TRY).collect()
    await speaker.aclose()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"ca": "gone.pem"}, r"ca \(DUPLEX_TTS_TLS_CA\): gone.pem: No such file"),
        ({"cert": "own.pem", "key": "own.key"}, r"need ca \(DUPLEX_TTS_TLS_CA\) as well"),
    ],
)
def test_files_that_cannot_work_are_refused(files: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TTS(**files)


@pytest.mark.parametrize(("given", "lacking"), [("cert", "key"), ("key", "cert")])
def test_a_certificate_and_its_key_belong_together(
    ours: Authority, pair: Pair, given: str, lacking: str
) -> None:
    path: Any = getattr(pair, given)
    with pytest.raises(ValueError, match=rf"{given} \(.*\) needs {lacking} \(.*\) as well"):
        TTS(ca=ours.ca, **{given: path})
