"""Which workers are called over TLS, which in plain text, and which are not called at all."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from src.common.config import ConfigError, StrictModel
from src.orchestrator.auth import is_loopback
from src.rpc.tls import ClientTls, TlsError

NAMES = {part: f"tts.tls.{part}" for part in ("ca", "cert", "key")}


class WorkerTlsSettings(StrictModel):
    """Files (PEM) towards workers that serve TLS; `cert` and `key` for those that ask (mTLS)."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    allow_plain: bool = Field(False, description="with ca: plain text beyond this machine too")

    @model_validator(mode="after")
    def _together(self) -> WorkerTlsSettings:
        if (self.cert is None) != (self.key is None):
            raise ValueError("cert and key belong together: give both or neither")
        if self.cert is not None and self.ca is None:
            raise ValueError("cert and key need ca: the authority that signed the workers'")
        return self

    def load(self) -> WorkerTls:
        """Reads the files. Raises ConfigError that names the key and the file."""
        if self.ca is None:
            return WorkerTls()
        try:
            client = ClientTls(self.ca, self.cert, self.key, NAMES)
        except TlsError as error:
            raise ConfigError(str(error)) from error
        return WorkerTls(client, allow_plain=self.allow_plain)


class WorkerTls:
    """`client` None: TLS is not set up here."""

    def __init__(self, client: ClientTls | None = None, *, allow_plain: bool = False) -> None:
        self.client = client
        self._allow_plain = allow_plain

    def refusal(self, target: str, tls: bool) -> str:
        """Why a worker that announced `tls` at `target` is not called; "" if it is."""
        if tls and self.client is None:
            return "it serves TLS: set tts.tls.ca to the authority that signed its certificate"
        if tls or self.client is None or self._allow_plain or _here(target):
            return ""
        return (
            "it serves plain text on another machine, and tts.tls.ca is set: give it "
            "worker.tls.cert and key, or set tts.tls.allow_plain while you move"
        )


def _here(target: str) -> bool:
    return target.startswith("unix:") or is_loopback(target.rpartition(":")[0])
