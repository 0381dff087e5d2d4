"""The images' health check against a server behind TLS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from src.common.health import NotReady, check, main
from tests.certificates import Authority, Pair

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def elsewhere(ours: Authority) -> Pair:
    """As a worker has it: for the name that others dial, not for the loopback."""
    return ours.sign("gpubox2", "DNS:gpubox2.lan,IP:10.0.0.5")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("CERT", "KEY", "CA"):
        monkeypatch.delenv(f"WORKER_TLS_{part}", raising=False)


Serve = Callable[..., tuple[str, health.HealthServicer]]


@contextmanager
def _serving(pair: Pair, ca: Path | None) -> Iterator[tuple[str, health.HealthServicer]]:
    files = (pair.key.read_bytes(), pair.cert.read_bytes())
    root = ca.read_bytes() if ca else None
    server, servicer = grpc.server(ThreadPoolExecutor(2)), health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    credentials = grpc.ssl_server_credentials([files], root, root is not None)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    yield f"grpc://127.0.0.1:{port}", servicer
    server.stop(None).wait()


@pytest.fixture
def serve() -> Iterator[Serve]:
    with ExitStack() as stack:
        yield lambda pair, ca=None: stack.enter_context(_serving(pair, ca))


def show(monkeypatch: pytest.MonkeyPatch, pair: Pair) -> None:
    monkeypatch.setenv("WORKER_TLS_CERT", str(pair.cert))
    monkeypatch.setenv("WORKER_TLS_KEY", str(pair.key))


def test_it_asks_over_tls_whatever_the_certificates_name(serve: Serve, elsewhere: Pair) -> None:
    target, servicer = serve(elsewhere)
    assert main([target]) == 0
    servicer.set("", NOT_SERVING)
    with pytest.raises(NotReady, match="does not serve yet"):
        check(target)


def test_a_name_that_is_an_address_will_do(serve: Serve, ours: Authority) -> None:
    target, _ = serve(ours.sign("numbered", "IP:10.0.0.5"))
    assert main([target]) == 0


def test_one_that_asks_for_a_certificate_is_shown_its_own(
    serve: Serve, ours: Authority, elsewhere: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, _ = serve(elsewhere, ours.ca)
    with pytest.raises(NotReady, match="WORKER_TLS_CERT and WORKER_TLS_KEY"):
        check(target)
    show(monkeypatch, elsewhere)
    assert main([target]) == 0


def test_a_certificate_that_has_expired_since_is_not_healthy(serve: Serve, ours: Authority) -> None:
    target, _ = serve(ours.sign("expired", days=-1))
    with pytest.raises(NotReady, match="certificate has expired"):
        check(target)


def test_files_that_are_gone_are_named(
    serve: Serve, ours: Authority, elsewhere: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, _ = serve(elsewhere)
    show(monkeypatch, Pair(ours.folder / "gone.pem", ours.folder / "gone.key"))
    with pytest.raises(NotReady, match=r"gone\.pem"):
        check(target)


def test_nobody_is_asked_for_a_certificate_in_plain_text(
    monkeypatch: pytest.MonkeyPatch, elsewhere: Pair
) -> None:
    show(monkeypatch, elsewhere)
    server, servicer = grpc.server(ThreadPoolExecutor(2)), health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    assert main([f"grpc://127.0.0.1:{port}"]) == 0
    server.stop(None).wait()
