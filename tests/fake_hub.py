"""A hub on the loopback that answers as Hugging Face's does, and breaks where a test wants it."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c0ffee" + "0" * 34


@dataclass
class FakeHub:
    """`files` are what it has, by `<repo>/<file>`; the rest is how it misbehaves."""

    files: dict[str, bytes] = field(default_factory=dict)
    cut_after: list[int] = field(default_factory=list)
    """One answer each: it ends after so many bytes of the many that it announced."""
    refuse: dict[str, int] = field(default_factory=dict)
    """Repo → the status it answers without the token."""
    busy: int = 0
    """So many answers are 503."""
    token: str = "hf_right"
    takes_ranges: bool = True
    announces_hashes: bool = True
    announced: str = ""
    """A hash that it announces instead of the right one."""
    stores_elsewhere: bool = False
    """The bytes come from another host, as large files' do."""
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    port: int = 0

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def asked_for(self) -> list[str]:
        return [path for path, _ in self.asked]

    def env(self) -> dict[str, str]:
        return {"HF_ENDPOINT": self.base, "HF_HOME": "/nowhere", "HF_HUB_OFFLINE": "0"}


@contextmanager
def running(hub: FakeHub) -> Iterator[FakeHub]:
    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    hub.port = server.server_port
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub = self.hub
        hub.asked.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
        if self.path.startswith("/stored/"):
            self._send(hub.files[self.path.removeprefix("/stored/")], {})
            return
        repo, _, tail = self.path.lstrip("/").partition("/resolve/")
        file = tail.partition("/")[2]
        content = hub.files.get(f"{repo}/{file}")
        trusted = self.headers.get("Authorization") == f"Bearer {hub.token}"
        if hub.busy:
            hub.busy -= 1
            self._status(503)
        elif repo in hub.refuse and not trusted:
            self._status(hub.refuse[repo], {"X-Error-Code": "GatedRepo"})
        elif content is None:
            self._status(404, {"X-Error-Code": "EntryNotFound"})
        elif hub.stores_elsewhere:
            # Another name for this machine: another host for whoever guards a token.
            where = f"http://localhost:{hub.port}/stored/{repo}/{file}"
            self._status(302, {"Location": where, **self._linked(content)})
        else:
            self._send(content, self._linked(content))

    def _linked(self, content: bytes) -> dict[str, str]:
        said = {"X-Repo-Commit": COMMIT}
        if self.hub.announces_hashes:
            digest = self.hub.announced or hashlib.sha256(content).hexdigest()
            said["X-Linked-Etag"] = f'"{digest}"'
        return said

    def _send(self, content: bytes, headers: dict[str, str]) -> None:
        etag = f'"{hashlib.md5(content).hexdigest()}"'  # noqa: S324
        start = self._start(etag) if self.hub.takes_ranges else 0
        if start and start >= len(content):
            self._status(416)
            return
        body = content[start:]
        self.send_response(206 if start else 200)
        for name, value in {"ETag": etag, **headers}.items():
            self.send_header(name, value)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.hub.cut_after:
            self.wfile.write(body[: self.hub.cut_after.pop(0)])
            self.wfile.flush()
            self.close_connection = True
            return
        with suppress(ConnectionError):  # who reads the headers alone hangs up
            self.wfile.write(body)

    def _start(self, etag: str) -> int:
        asked = self.headers.get("Range", "")
        if not asked or self.headers.get("If-Range") != etag:
            return 0
        return int(asked.removeprefix("bytes=").rstrip("-"))

    def _status(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass
