"""What the page borrows is the locked thing or nothing."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from scripts import web_deps
from scripts.web_deps import PUBLIC_REGISTRY, WEB, WebDepsError, fetch_all

MODULE = "package/dist/livekit-client.esm.mjs"
TARBALL = "livekit-client/-/livekit-client-1.2.3.tgz"
GOOD = {MODULE: b"export const version = 1;", "package/LICENSE": b"Apache"}


def packed(files: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


def sha512(archive: bytes) -> str:
    return "sha512-" + base64.b64encode(hashlib.sha512(archive).digest()).decode()


class Registry:
    """A package registry on the loopback that serves one archive and counts."""

    def __init__(self) -> None:
        self.archive = packed(dict(GOOD))
        self.asked: list[str] = []
        registry = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                registry.asked.append(self.path)
                self.send_response(200 if self.path.endswith(TARBALL) else 404)
                self.end_headers()
                self.wfile.write(registry.archive)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))

    @property
    def env(self) -> dict[str, str]:
        return {"npm_config_registry": f"http://127.0.0.1:{self.server.server_port}/npm"}


@pytest.fixture
def registry() -> Iterator[Registry]:
    running = Registry()
    running.thread.start()
    yield running
    running.server.shutdown()
    running.thread.join()
    running.server.server_close()


def web(tmp_path: Path, integrity: str, *, asked: str = "1.2.3", **entry: str) -> Path:
    package = {"version": "1.2.3", "resolved": PUBLIC_REGISTRY + TARBALL, "integrity": integrity}
    lock = {"packages": {"node_modules/livekit-client": {**package, **entry}}}
    (tmp_path / "package.json").write_text(json.dumps({"dependencies": {"livekit-client": asked}}))
    (tmp_path / "package-lock.json").write_text(json.dumps(lock))
    return tmp_path


def vendored(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "vendor").glob("*"))


def test_the_locked_package_is_fetched_once(tmp_path: Path, registry: Registry) -> None:
    page = web(tmp_path, sha512(registry.archive))
    fetch_all(page, registry.env)
    told = fetch_all(page, registry.env)

    assert registry.asked == [f"/npm/{TARBALL}"]
    assert told == ["livekit-client 1.2.3 is there already"]
    assert (page / "vendor" / "livekit-client.esm.mjs").read_bytes() == GOOD[MODULE]
    assert vendored(page) == [
        "livekit-client.LICENSE",
        "livekit-client.esm.mjs",
        "livekit-client.fetched.json",
    ]


def test_a_file_that_was_changed_is_fetched_again(tmp_path: Path, registry: Registry) -> None:
    page = web(tmp_path, sha512(registry.archive))
    fetch_all(page, registry.env)
    (page / "vendor" / "livekit-client.esm.mjs").write_text("half of")
    fetch_all(page, registry.env)
    assert (page / "vendor" / "livekit-client.esm.mjs").read_bytes() == GOOD[MODULE]


def test_another_hash_is_refused_and_what_was_there_stays(
    tmp_path: Path, registry: Registry
) -> None:
    fetch_all(web(tmp_path, sha512(registry.archive)), registry.env)
    before = (tmp_path / "vendor" / "livekit-client.esm.mjs").read_bytes()
    page = web(tmp_path, sha512(b"what the lock was made of"))
    with pytest.raises(WebDepsError, match=r"not livekit-client 1\.2\.3.*Nothing was unpacked"):
        fetch_all(page, registry.env)
    assert (tmp_path / "vendor" / "livekit-client.esm.mjs").read_bytes() == before


def test_nothing_is_read_from_an_archive_before_its_hash_is_right(
    tmp_path: Path, registry: Registry
) -> None:
    page = web(tmp_path, sha512(b"another"))
    registry.archive = b"not even a tar file"
    with pytest.raises(WebDepsError, match="sha512"):
        fetch_all(page, registry.env)
    assert vendored(page) == []


@pytest.mark.parametrize("weak", ["sha1-2jmj7l5rSw0yVb/vlWAYkK/YBwk=", "sha512-", "sha512-%%%"])
def test_a_hash_that_proves_nothing_is_refused(
    tmp_path: Path, registry: Registry, weak: str
) -> None:
    with pytest.raises(WebDepsError, match=r"no sha512|is not livekit-client|not livekit-client"):
        fetch_all(web(tmp_path, weak), registry.env)
    assert vendored(tmp_path) == []


def test_only_the_wanted_members_leave_the_archive(tmp_path: Path, registry: Registry) -> None:
    folder = tmp_path / "page"
    folder.mkdir()
    absolute = str(tmp_path / "evil.txt")
    outside = {"package/../../evil.txt": b"x", absolute: b"x", "../evil.txt": b"x"}
    registry.archive = packed({**outside, **GOOD, "package/postinstall.js": b"run me"})
    fetch_all(web(folder, sha512(registry.archive)), registry.env)
    assert not list(tmp_path.rglob("*evil*"))
    assert len(vendored(folder)) == 3


def test_a_link_in_the_place_of_the_module_is_refused(tmp_path: Path, registry: Registry) -> None:
    registry.archive = packed({"package/LICENSE": b"x", MODULE: link(MODULE, "/etc/passwd")})
    with pytest.raises(WebDepsError, match="not a plain file"):
        fetch_all(web(tmp_path, sha512(registry.archive)), registry.env)
    assert vendored(tmp_path) == []


def test_a_package_without_the_module_is_refused(tmp_path: Path, registry: Registry) -> None:
    registry.archive = packed({"package/LICENSE": b"x"})
    with pytest.raises(WebDepsError, match="has no package/dist"):
        fetch_all(web(tmp_path, sha512(registry.archive)), registry.env)


def test_a_lock_that_is_not_of_this_package_json_is_refused(
    tmp_path: Path, registry: Registry
) -> None:
    with pytest.raises(WebDepsError, match=r"asks for livekit-client 1\.3\.0, .* has 1\.2\.3"):
        fetch_all(web(tmp_path, "sha512-", asked="1.3.0"), registry.env)
    assert not registry.asked


def test_a_lock_that_names_another_registry_is_refused(tmp_path: Path) -> None:
    page = web(tmp_path, "sha512-x", resolved="https://example.org/livekit-client.tgz")
    with pytest.raises(WebDepsError, match="another registry"):
        fetch_all(page, {})


def test_no_answer_says_what_can_be_set(
    tmp_path: Path, registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    base = registry.env["npm_config_registry"].replace("http://", "http://me:hunter2@")
    page = web(tmp_path, "sha512-x", resolved=PUBLIC_REGISTRY + "gone.tgz")
    with pytest.raises(WebDepsError, match=r"does not answer.*SSL_CERT_FILE") as caught:
        fetch_all(page, {"npm_config_registry": base})
    assert "hunter2" not in str(caught.value) + capsys.readouterr().err


def test_trouble_is_one_sentence_and_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert web_deps.main(["--web", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("web-deps: ")


def test_the_real_lock_is_of_the_public_registry_and_has_hashes() -> None:
    lock = json.loads((WEB / "package-lock.json").read_text(encoding="utf-8"))
    packages = {name: entry for name, entry in lock["packages"].items() if name}
    assert web_deps.locked(WEB)
    for entry in packages.values():
        assert entry["resolved"].startswith(PUBLIC_REGISTRY)
        assert entry["integrity"].startswith("sha512-")
