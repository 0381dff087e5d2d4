"""Is a server of ours ready? `python -m src.common.health http://127.0.0.1:8080/readyz`, or `grpc://…`.

What a container engine runs. Exit status 0: ready; 1: not yet, with the reason on stderr.
"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request
from collections.abc import Sequence

TIMEOUT_S = 3.0


class NotReady(Exception):
    """The message says what was answered."""


def check(target: str) -> None:
    """http://host:port/path must answer 200, grpc://host:port that it serves. Raises NotReady."""
    scheme, _, address = target.partition("://")
    if scheme == "grpc":
        _check_grpc(address)
    elif scheme == "http":
        _check_http(target)
    else:
        raise NotReady(f"{target}: write http://host:port/path or grpc://host:port")


def _check_http(url: str) -> None:
    try:
        # A proxy that the container's environment names has no business on the way to itself.
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(url, timeout=TIMEOUT_S) as answer:
            status = answer.status
    except urllib.error.HTTPError as error:
        status = error.code
    except OSError as error:
        raise NotReady(f"{url}: {error}") from error
    if status != 200:
        raise NotReady(f"{url} answered {status}")


def _check_grpc(address: str) -> None:
    """The standard health service, for the server as a whole."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            raise NotReady(f"{address}: {error.code().name}") from error
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise NotReady(f"{address} is up and does not serve yet")


def main(argv: Sequence[str]) -> int:
    if len(argv) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        check(argv[0])
    except NotReady as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
