"""What a container engine asks of our servers, and the answers it can get."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from src.common.health import NotReady, check, main
from src.common.processes import free_port


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(int(self.path.strip("/")))
        self.end_headers()

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def http() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def worker() -> Iterator[tuple[str, health.HealthServicer]]:
    server = grpc.server(ThreadPoolExecutor(2))
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"grpc://127.0.0.1:{port}", servicer
    server.stop(None).wait()


def test_ready_is_status_200(http: str) -> None:
    assert main([f"{http}/200"]) == 0


def test_not_ready_is_any_other_status(http: str) -> None:
    with pytest.raises(NotReady, match="answered 503"):
        check(f"{http}/503")
    with pytest.raises(NotReady, match="answered 204"):
        check(f"{http}/204")


def test_a_proxy_is_not_asked(http: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    assert main([f"{http}/200"]) == 0


def test_a_worker_is_ready_when_it_serves(worker: tuple[str, health.HealthServicer]) -> None:
    target, servicer = worker
    servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    with pytest.raises(NotReady, match="does not serve yet"):
        check(target)
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    assert main([target]) == 0


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_nobody_there_is_not_ready(scheme: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"{scheme}://127.0.0.1:{free_port()}"]) == 1
    assert capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["http://a", "http://b"]])
def test_one_target_is_asked_for(argv: list[str]) -> None:
    assert main(argv) == 2


def test_a_scheme_that_is_none_is_said() -> None:
    with pytest.raises(NotReady, match="write http"):
        check("tcp://127.0.0.1:1")
