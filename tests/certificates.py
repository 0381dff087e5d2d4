"""An authority and certificates for tests, made with openssl as the documentation says."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

_EC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True)
class Pair:
    cert: Path
    key: Path


class Authority:
    """Signs with the key beside its `ca`."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        if shutil.which("openssl") is None:
            pytest.skip("the openssl command is not installed")
        self.folder, self.name = folder, name
        self.ca = folder / f"{name}.pem"
        self._key = folder / f"{name}.key"
        subject = ("-subj", f"/CN={name}", "-days", "30")
        _openssl("req", "-x509", *_EC, *subject, "-keyout", self._key, "-out", self.ca)

    def sign(
        self,
        name: str,
        names: str = "IP:127.0.0.1,DNS:localhost",
        *,
        days: int = 30,
        use: str = "serverAuth,clientAuth",
    ) -> Pair:
        """`days` below 0: it has expired."""
        cert, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        request, extensions = cert.with_suffix(".csr"), cert.with_suffix(".ext")
        extensions.write_text(f"subjectAltName={names}\nextendedKeyUsage={use}\n")
        _openssl("req", *_EC, "-subj", f"/CN={name}", "-keyout", key, "-out", request)
        signed_by = ("-CA", self.ca, "-CAkey", self._key, "-CAcreateserial")
        valid = ("-days", str(days), "-extfile", extensions)
        _openssl("x509", "-req", "-in", request, *signed_by, *valid, "-out", cert)
        return Pair(cert, key)


def locked(key: Path) -> Path:
    """The same key, behind a passphrase."""
    out = key.with_suffix(".locked.key")
    _openssl("ec", "-in", key, "-aes256", "-passout", "pass:secret", "-out", out)
    return out


def _openssl(*command: str | Path) -> None:
    subprocess.run(["openssl", *map(str, command)], check=True, capture_output=True)
