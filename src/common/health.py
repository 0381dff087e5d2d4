"""Is a server of ours ready? `python -m src.common.health http://127.0.0.1:8080/readyz`, or `grpc://…`.

What a container engine runs. Exit status 0: ready; 1: not yet, with the reason on stderr.
A gRPC server may speak TLS. To one that asks for a certificate (mTLS) the server's own is shown:
the files that WORKER_TLS_CERT and WORKER_TLS_KEY name.
"""

from __future__ import annotations

import os
import socket
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import grpc

TIMEOUT_S = 3.0
CERT_ENV, KEY_ENV = "WORKER_TLS_CERT", "WORKER_TLS_KEY"
_HOW_TO_SHOW_ONE = f"; if it asks for a certificate, name its own in {CERT_ENV} and {KEY_ENV}"


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

    cert, key = os.environ.get(CERT_ENV), os.environ.get(KEY_ENV)
    own = (cert, key) if cert and key else ()
    try:
        files = tuple(map(_read, own))  # here, as ssl would not say which one is missing
        shown = _shown(address, own)
        channel = _channel(address, shown, files)
    except OSError as error:  # ssl's too: the certificate has expired, say
        raise NotReady(f"{address}: {error}") from error
    with channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            hint = _HOW_TO_SHOW_ONE if shown and not own else ""
            raise NotReady(f"{address}: {error.code().name}{hint}") from error
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise NotReady(f"{address} is up and does not serve yet")


def _channel(address: str, shown: tuple[bytes, str] | None, own: tuple[bytes, ...]) -> grpc.Channel:
    import grpc

    direct = ("grpc.enable_http_proxy", 0)
    if shown is None:
        return grpc.insecure_channel(address, options=[direct])
    # This asks whether our own server lives, not who it is: what it showed is what we trust.
    certificate, name = shown
    cert, key = own or (None, None)
    credentials = grpc.ssl_channel_credentials(certificate, key, cert)
    named = ("grpc.ssl_target_name_override", name)
    return grpc.secure_channel(address, credentials, options=[direct, named])


def _shown(address: str, own: tuple[str, ...]) -> tuple[bytes, str] | None:
    """The certificate (PEM) that is shown there, and a name that it is for; None: no TLS there.

    Raises OSError, ssl's included.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if own:
        context.load_cert_chain(*own)
    try:
        with _handshake(context, address) as line:
            pem = ssl.DER_cert_to_PEM_cert(line.getpeercert(binary_form=True) or b"")
    except (ssl.SSLError, ConnectionError):
        return None
    # ssl tells the names only of a certificate that it has verified.
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=pem)
    with _handshake(context, address) as line:
        names = [pair[1] for pair in (line.getpeercert() or {}).get("subjectAltName", ())]
    return pem.encode(), str(names[0]) if names else ""


def _read(path: str) -> bytes:
    return Path(path).read_bytes()


def _handshake(context: ssl.SSLContext, address: str) -> ssl.SSLSocket:
    host, _, port = address.rpartition(":")
    raw = socket.create_connection((host.strip("[]"), int(port)), TIMEOUT_S)
    try:
        return context.wrap_socket(raw)
    except BaseException:
        raw.close()
        raise


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
