"""One file from a Hugging Face hub onto the disk: gone on with where it was cut off, checked, and
only then there.

HF_ENDPOINT names another hub, HF_TOKEN (or what `hf auth login` left) opens pages with terms, and
HF_HUB_OFFLINE forbids it all, as they do for huggingface_hub.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote, urlsplit, urlunsplit

import httpx

PUBLIC_HUB = "https://huggingface.co"
Report = Callable[[int, int], None]
"""Bytes that are there, and how many there will be; 0: the hub does not say."""

_BLOCK = 1 << 20
_TIMEOUT = httpx.Timeout(30.0, connect=10.0)
_TRIES = 5
"""In a row, of which none brought a byte."""
_NOBODY = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.ProxyError,
    httpx.UnsupportedProtocol,
)
"""Asked again only if there was somebody before."""
_SPARE = 64 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


class NotFetched(Exception):
    """The file did not come; the message says why."""

    for_all: ClassVar[bool] = False
    """Whoever asks for the next file is told the same."""


class Unreachable(NotFetched):
    """No network, no such host, or it broke off again and again."""

    for_all = True


class Refused(NotFetched):
    """401, 403: terms to accept on the page, or a token that is missing or not enough."""


class NotOnHub(NotFetched):
    """404: no such file, revision or repository."""


class WrongFile(NotFetched):
    """What came is not what was pinned, or not what the hub itself announced."""


class NoSpace(NotFetched):
    for_all = True


class _TryAgain(Exception):
    """The hub is busy, or the connection broke."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """`hub:<repo>@<revision>/<file>`, taken apart."""

    repo: str
    revision: str
    file: str

    @classmethod
    def parse(cls, rest: str) -> HubFile:
        repo, _, tail = rest.partition("@")
        revision, _, file = tail.partition("/")
        return cls(repo, revision, file)

    def at(self, revision: str) -> str:
        return f"hub:{self.repo}@{revision}/{self.file}"


@dataclass(frozen=True, slots=True)
class Hub:
    """Where the files are, and who asks for them."""

    base: str = PUBLIC_HUB
    token: str = ""
    offline: bool = False

    @classmethod
    def of(cls, env: Mapping[str, str]) -> Hub:
        offline = env.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
        return cls((env.get("HF_ENDPOINT") or PUBLIC_HUB).rstrip("/"), _token(env), offline)

    def url(self, place: HubFile) -> str:
        repo, revision, file = map(quote, (place.repo, place.revision, place.file))
        return f"{self.base}/{repo}/resolve/{revision}/{file}"

    def shown(self, place: HubFile) -> str:
        """The address without the password that HF_ENDPOINT may hold."""
        return _without_password(self.url(place))

    def page(self, place: HubFile) -> str:
        return _without_password(f"{self.base}/{place.repo}")


@dataclass(frozen=True, slots=True)
class Fetched:
    sha256: str
    size: int
    commit: str
    """What the revision stood for; empty: the hub did not say."""


def download(
    place: HubFile,
    target: Path,
    hub: Hub,
    *,
    sha256: str = "",
    report: Report = lambda done, total: None,
    pause: Callable[[float], None] = time.sleep,
) -> Fetched:
    """Fetches one file; `target` is there afterwards, whole and checked, or as it was before.

    Raises a NotFetched. What came until then is kept beside the target, hidden, and the next call
    goes on from there if the hub's file is still the same.
    """
    if hub.offline:
        raise Unreachable("HF_HUB_OFFLINE is set")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _part_of(target) as part, _client(hub) as client:
        said = _receive_all(client, hub.url(place), part, sha256.lower(), report, pause)
        found = _hash(part.file)
        expected = sha256.lower() or said.sha256
        if expected and found != expected:
            part.forget()
            raise WrongFile(_mismatch(hub.shown(place), found, expected, bool(sha256)))
        size = part.file.stat().st_size
        part.file.replace(target)
    return Fetched(found, size, said.commit)


@dataclass(frozen=True, slots=True)
class _Said:
    """What the hub's headers tell of a file."""

    sha256: str
    commit: str
    etag: str
    total: int

    @classmethod
    def of(cls, answer: httpx.Response, offset: int) -> _Said:
        # The hub's own answer; the one that carries the bytes may be a storage's behind a redirect.
        own = (answer.history or [answer])[0].headers
        digest = own.get("x-linked-etag", "").strip('"').lower()
        rest = int(answer.headers.get("content-length") or 0)
        total = int(own.get("x-linked-size") or (offset + rest if rest else 0))
        etag = answer.headers.get("etag", "")
        return cls(
            digest if _SHA256.fullmatch(digest) else "",
            own.get("x-repo-commit", ""),
            "" if etag.startswith("W/") else etag,
            total,
        )


@dataclass(frozen=True, slots=True)
class _Part:
    """What has come so far, and a note of which file it is a part of."""

    file: Path
    note: Path

    @property
    def size(self) -> int:
        return self.file.stat().st_size

    @property
    def etag(self) -> str:
        return self.note.read_text(encoding="utf-8") if self.note.is_file() else ""

    def start(self, etag: str) -> None:
        os.truncate(self.file, 0)
        self.note.write_text(etag, encoding="utf-8")

    def forget(self) -> None:
        self.file.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


@contextmanager
def _part_of(target: Path) -> Iterator[_Part]:
    """Raises NotFetched while another process fetches the same file."""
    part = _Part(
        target.with_name(f".{target.name}.part"), target.with_name(f".{target.name}.part-of")
    )
    with part.file.open("ab") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise NotFetched(f"{target} is being fetched by another process") from None
        try:
            yield part
        finally:
            if not part.file.is_file() or not part.size:
                part.forget()


@contextmanager
def _client(hub: Hub) -> Iterator[httpx.Client]:
    # Compressed, the bytes would be neither those that are counted nor those that a range names.
    headers = {"Accept-Encoding": "identity"}
    if hub.token:
        headers["Authorization"] = f"Bearer {hub.token}"  # httpx drops it towards other hosts
    with httpx.Client(headers=headers, timeout=_TIMEOUT, follow_redirects=True) as client:
        yield client


def _receive_all(
    client: httpx.Client,
    url: str,
    part: _Part,
    pinned: str,
    report: Report,
    pause: Callable[[float], None],
) -> _Said:
    tries, answered = 0, False
    while True:
        before = part.size
        try:
            return _receive(client, url, part, pinned, report)
        except (_TryAgain, httpx.TransportError) as error:
            grew = part.size > before
            answered = answered or grew or not isinstance(error, _NOBODY)
            tries = 0 if grew else tries + 1
            if tries >= _TRIES or not answered:
                raise Unreachable(f"{_host(url)}: {error or type(error).__name__}") from None
            pause(2.0**tries)
        except (httpx.InvalidURL, httpx.HTTPError) as error:
            raise Unreachable(f"{_host(url)}: {error}") from None


def _receive(client: httpx.Client, url: str, part: _Part, pinned: str, report: Report) -> _Said:
    offset, etag = part.size, part.etag
    resume = {"Range": f"bytes={offset}-", "If-Range": etag} if offset and etag else {}
    with client.stream("GET", url, headers=resume) as answer:
        _check_status(answer)
        if answer.status_code == 416:  # it has become shorter
            part.start("")
            raise _TryAgain("the file has changed")
        goes_on = answer.status_code == 206 and _goes_on(answer, offset, etag)
        if answer.status_code == 206 and not goes_on:
            part.start("")
            raise _TryAgain("another part came than the one asked for")
        said = _Said.of(answer, offset if goes_on else 0)
        if pinned and said.sha256 and said.sha256 != pinned:
            raise WrongFile(_mismatch(_without_password(url), said.sha256, pinned, True))
        if not goes_on:
            part.start(said.etag)
        _check_space(part, said.total)
        _write(answer, part.file, said.total, report)
    if said.total and part.size != said.total:
        raise _TryAgain(f"{part.size} of {said.total} bytes came")
    return said


def _check_status(answer: httpx.Response) -> None:
    status, code = answer.status_code, answer.headers.get("x-error-code", "")
    said = f"{status}{f' {code}' if code else ''}"
    if status in (401, 403):
        raise Refused(f"the hub answers {said}")
    if status in (404, 410):
        raise NotOnHub(f"the hub answers {said}")
    if status == 429 or status >= 500:
        raise _TryAgain(f"the hub answers {said}")
    if status not in (200, 206, 416):
        raise NotFetched(f"the hub answers {said}")


def _goes_on(answer: httpx.Response, offset: int, etag: str) -> bool:
    begins: bool = answer.headers.get("content-range", "").startswith(f"bytes {offset}-")
    return begins and bool(answer.headers.get("etag", etag) == etag)


def _check_space(part: _Part, total: int) -> None:
    free = shutil.disk_usage(part.file.parent).free
    needed = total - part.size
    if needed > free - _SPARE:
        raise NoSpace(
            f"{needed / 1e9:.1f} GB are to come and {free / 1e9:.1f} GB are free at "
            f"{part.file.parent}"
        )


def _write(answer: httpx.Response, path: Path, total: int, report: Report) -> None:
    with path.open("ab") as out:
        done = out.tell()
        report(done, total)
        for block in answer.iter_raw():  # as it comes: a fixed size loses the rest at a cut
            out.write(block)
            done += len(block)
            report(done, total)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _mismatch(where: str, found: str, expected: str, pinned: bool) -> str:
    by = "the catalog pins" if pinned else "the hub announced"
    return f"{where} has sha256 {found}, {by} {expected}; it was not kept"


def _token(env: Mapping[str, str]) -> str:
    if token := env.get("HF_TOKEN", "").strip():
        return token
    home = env.get("HF_HOME") or str(Path("~/.cache/huggingface").expanduser())
    path = Path(env.get("HF_TOKEN_PATH") or Path(home) / "token")
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def _host(url: str) -> str:
    return urlsplit(_without_password(url)).netloc or url


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
