"""TLS between a worker and those who call it: are the files good, and why was a worker refused?

gRPC takes any file without a look and tells no more of a failed handshake than that it failed.
OpenSSL has a number for each reason, so the files are tried out by it when they are read, and a
worker that could not be reached over TLS is asked once more by it.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Mapping
from pathlib import Path

import grpc

PROBE_S = 2.0
"""For each of: connecting, the handshake, its answer."""

# OpenSSL's X509_V_ERR_… (x509_vfy.h).
_NOT_YET_VALID, _EXPIRED = 9, 10
_SELF_SIGNED = frozenset({18, 19})
_NO_ISSUER = frozenset({2, 20, 21})
_OTHER_NAME = frozenset({62, 64})
_OTHER_PURPOSE = 26
# As gRPC does: what `ca` holds is trusted, also when it is no authority but the certificate itself.
_TRUST = ssl.VERIFY_X509_PARTIAL_CHAIN
_NOT_PEM = "holds no certificate; it must be PEM (-----BEGIN CERTIFICATE-----)"
CLIENT_KEYS = {"ca": "ca", "cert": "cert", "key": "key"}


class TlsError(ValueError):
    """Files that cannot be used. The message names the setting and the file."""


class ClientTls:
    """Whom a caller of workers trusts, and who it says it is.

    `names` are the settings' names for `ca`, `cert` and `key` in what is said to people. The files
    are read here and never again. Raises TlsError.
    """

    def __init__(
        self,
        ca: Path,
        cert: Path | None = None,
        key: Path | None = None,
        names: Mapping[str, str] = CLIENT_KEYS,
    ) -> None:
        self._names = names
        self._ca, self._cert = ca, cert
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._context.verify_flags |= _TRUST
        self._context.set_alpn_protocols(["h2"])
        authorities = read_authorities(ca, names["ca"])
        self._context.load_verify_locations(ca)
        if cert is None or key is None:
            if cert or key:
                given, lacking = ("cert", "key") if cert else ("key", "cert")
                raise TlsError(f"{names[given]} needs {names[lacking]} as well")
            self.credentials = grpc.ssl_channel_credentials(authorities)
            return
        private, chain = read_pair(cert, key, names["cert"], names["key"])
        self._context.load_cert_chain(cert, key)
        self.credentials = grpc.ssl_channel_credentials(authorities, private, chain)

    async def complaint(self, target: str) -> str:
        """What is wrong between us and host:port, and what to do; "" if it is not TLS."""
        host, _, port = target.rpartition(":")
        if not port.isdigit():
            return ""
        try:
            return await asyncio.to_thread(self._try, host.strip("[]"), int(port))
        except OSError:
            return ""

    def _try(self, host: str, port: int) -> str:
        """Raises OSError for what is not about TLS, a timeout among it."""
        with socket.create_connection((host, port), PROBE_S) as raw:
            try:
                line = self._context.wrap_socket(raw, server_hostname=host)
            except ssl.SSLCertVerificationError as error:
                return self._distrust(error, host)
            except ssl.SSLError as error:
                return f"it does not speak TLS ({error.reason}): give it worker.tls.cert and key"
            with line:
                # With TLS 1.3 we are through before it has looked at our certificate. If it likes
                # it, HTTP/2's settings follow; if not, gRPC hangs up without a word.
                try:
                    return "" if line.recv(1) else self._unwelcome()
                except (ssl.SSLError, ConnectionError):
                    return self._unwelcome()

    def _distrust(self, error: ssl.SSLCertVerificationError, host: str) -> str:
        code, said, ca = error.verify_code, error.verify_message, self._names["ca"]
        if code == _EXPIRED:
            return f"its certificate ({said}) has to be made anew, and the worker restarted"
        if code == _NOT_YET_VALID:
            return f"its certificate is not valid yet ({said}): compare the clocks of both machines"
        if code in _OTHER_NAME:
            return (
                f"its certificate is not for {host!r}: make one with it as a subjectAltName, or "
                "announce the worker by a name that it has (worker.advertise_addr)"
            )
        if code in _SELF_SIGNED | _NO_ISSUER:
            return f"{ca} ({self._ca}) did not sign its certificate ({said}): give the one that did"
        return f"its certificate is refused: {said}"

    def _unwelcome(self) -> str:
        cert, key = self._names["cert"], self._names["key"]
        if self._cert is None:
            return f"it hangs up on callers without a certificate (mTLS): set {cert} and {key}"
        return (
            f"it hangs up on {cert} ({self._cert}): it has to be signed by the worker's "
            "worker.tls.ca, in date, and made for clients (extendedKeyUsage clientAuth)"
        )


def read_authorities(ca: Path, name: str) -> bytes:
    """PEM. Raises TlsError."""
    pem = _read(ca, name)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(ca)
    except ssl.SSLError as error:
        raise TlsError(f"{name}: {ca} {_NOT_PEM}") from error
    return pem


def read_pair(cert: Path, key: Path, cert_name: str, key_name: str) -> tuple[bytes, bytes]:
    """(key, certificate chain), PEM, in gRPC's order. Raises TlsError, also when it has expired."""
    chain = read_authorities(cert, cert_name)
    private = _read(key, key_name)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        server.load_cert_chain(cert, key, password=_no_passphrase)
    except _Locked as error:
        raise TlsError(f"{key_name}: {key} is locked with a passphrase; give it without") from error
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            said = f"{cert_name} ({cert}) does not belong to {key_name} ({key})"
            raise TlsError(f"{said}: they must be made together") from error
        raise TlsError(f"{key_name}: {key} holds no private key; it must be PEM") from error
    fault = _rehearsed(server, cert, "")
    if fault is not None and fault.verify_code in (_EXPIRED, _NOT_YET_VALID):
        raise TlsError(f"{cert_name}: {cert}: {fault.verify_message}; make a new one") from fault
    return private, chain


def server_fault(cert: Path, key: Path, host: str) -> str:
    """Why nobody who dials `host` would accept this certificate from a server; "" if they would."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(cert, key)
    fault = _rehearsed(server, cert, host)
    return fault.verify_message if fault is not None else ""


class _Locked(Exception):
    pass


def _no_passphrase() -> str:
    """OpenSSL would ask at the terminal."""
    raise _Locked


def _read(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TlsError(f"{name}: {path}: {error.strerror}") from error


def _rehearsed(
    server: ssl.SSLContext, cert: Path, host: str
) -> ssl.SSLCertVerificationError | None:
    """A handshake in memory with one who trusts just this one. `host` "": whatever its name is."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.verify_flags |= _TRUST
    client.check_hostname = bool(host)
    client.load_verify_locations(cert)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(back, there, server_hostname=host or None),
        server.wrap_bio(there, back, server_side=True),
    )
    try:
        for end in (*ends, ends[0]):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    except ssl.SSLCertVerificationError as error:
        return error
    return None
