"""Fetches the page's one dependency, livekit-client, into `src/client/web/vendor/`.

`just web-deps`, or with nothing but Python: `python3 scripts/web_deps.py`. What is fetched is named
with its hash in `package-lock.json`; nothing is unpacked before the hash is right, and nothing that
was fetched is ever run here. Other registries: `npm_config_registry=https://…`.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import hashlib
import hmac
import io
import json
import os
import sys
import tarfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WEB = Path(__file__).resolve().parents[1] / "src" / "client" / "web"
PUBLIC_REGISTRY = "https://registry.npmjs.org/"
TIMEOUT_S = 60.0
MAX_BYTES = 64 << 20

# The bundle has its own dependencies inside; it imports nothing.
WANTED: dict[str, dict[str, str]] = {
    "livekit-client": {
        "package/dist/livekit-client.esm.mjs": "livekit-client.esm.mjs",
        "package/LICENSE": "livekit-client.LICENSE",
    }
}


class WebDepsError(RuntimeError):
    """What is there cannot be used, or nothing came; the message says what to do."""


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    url: str
    integrity: str


def fetch_all(web: Path, env: Mapping[str, str]) -> list[str]:
    """One line per package about what happened. Raises WebDepsError, and then changes nothing."""
    return [_fetch(package, web / "vendor", env) for package in locked(web)]


def locked(web: Path) -> list[Package]:
    """What `package-lock.json` says of the packages we want. Raises WebDepsError."""
    asked = _json(web / "package.json").get("dependencies", {})
    packages = _json(web / "package-lock.json").get("packages", {})
    return [_locked(name, asked, packages) for name in WANTED]


def _locked(name: str, asked: Mapping[str, str], packages: Mapping[str, Any]) -> Package:
    entry = packages.get(f"node_modules/{name}")
    if entry is None or asked.get(name) != entry.get("version"):
        have = entry.get("version") if entry else None
        raise WebDepsError(
            f"package.json asks for {name} {asked.get(name)}, package-lock.json has {have}: "
            "`npm install --package-lock-only` in src/client/web makes them agree"
        )
    url, integrity = entry.get("resolved", ""), entry.get("integrity", "")
    if not url or not integrity:
        raise WebDepsError(f"package-lock.json gives no address or no hash for {name}")
    return Package(name, entry["version"], url, integrity)


def _json(path: Path) -> dict[str, Any]:
    try:
        read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WebDepsError(f"{path} cannot be read: {error}") from error
    return read


def _fetch(package: Package, vendor: Path, env: Mapping[str, str]) -> str:
    if is_up_to_date(package, vendor):
        return f"{package.name} {package.version} is there already"
    url = address(package.url, env)
    print(f"{package.name} {package.version} from {_shown(url)} …", file=sys.stderr, flush=True)
    archive = _download(url)
    check_integrity(archive, package)
    files = unpack(archive, WANTED[package.name])
    _write(files, package, vendor)
    return f"{package.name} {package.version} is in {vendor}"


def address(url: str, env: Mapping[str, str]) -> str:
    """The locked address, at the registry that npm's own variable names."""
    registry = env.get("npm_config_registry") or env.get("NPM_CONFIG_REGISTRY") or PUBLIC_REGISTRY
    if not url.startswith(PUBLIC_REGISTRY):
        raise WebDepsError(f"package-lock.json names another registry than npm's: {url}")
    if not registry.startswith(("https://", "http://")):
        raise WebDepsError(f"npm_config_registry={registry} is not an http address")
    return registry.rstrip("/") + "/" + url.removeprefix(PUBLIC_REGISTRY)


def _download(url: str) -> bytes:
    """Goes through the proxy of the environment and trusts SSL_CERT_FILE, as OpenSSL does."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:  # noqa: S310
            archive: bytes = answer.read(MAX_BYTES + 1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise WebDepsError(
            f"{_shown(url)} does not answer ({error}). Behind a proxy set https_proxy and "
            "SSL_CERT_FILE; another registry is npm_config_registry"
        ) from error
    if len(archive) > MAX_BYTES:
        raise WebDepsError(f"{_shown(url)} sends more than {MAX_BYTES >> 20} MB")
    return archive


def _shown(url: str) -> str:
    """Without the password that a registry's address may hold."""
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def check_integrity(archive: bytes, package: Package) -> None:
    """Raises WebDepsError unless the archive is the locked one."""
    wanted = [part for part in package.integrity.split() if part.startswith("sha512-")]
    if not wanted:
        raise WebDepsError(f"package-lock.json has no sha512 for {package.name}")
    found = hashlib.sha512(archive).digest()
    if not any(hmac.compare_digest(found, _digest(part)) for part in wanted):
        raise WebDepsError(
            f"what came is not {package.name} {package.version}: its sha512 is "
            f"{base64.b64encode(found).decode()}, package-lock.json has {package.integrity}. "
            "Nothing was unpacked. A proxy's error page? A changed registry?"
        )


def _digest(integrity: str) -> bytes:
    try:
        return base64.b64decode(integrity.partition("-")[2].partition("?")[0], validate=True)
    except binascii.Error:
        return b""


def unpack(archive: bytes, wanted: Mapping[str, str]) -> dict[str, bytes]:
    """Our names and the contents of the wanted members; whatever else is in there stays in there.

    Raises WebDepsError if one is missing or is not a plain file.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
            return {ours: _member(tar, theirs) for theirs, ours in wanted.items()}
    except (tarfile.TarError, OSError, EOFError) as error:
        raise WebDepsError(f"not a package: {error}") from error


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    try:
        member = tar.getmember(name)
    except KeyError:
        raise WebDepsError(f"the package has no {name}") from None
    # extractfile would follow a link to another member.
    plain = member.isreg() and member.size <= MAX_BYTES
    content = tar.extractfile(member) if plain else None
    if content is None:
        raise WebDepsError(f"{name} is not a plain file")
    return content.read()


def _write(files: Mapping[str, bytes], package: Package, vendor: Path) -> None:
    vendor.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        _replace(vendor / name, content)
    # Last: what is stamped is complete.
    _replace(_stamp_path(package, vendor), json.dumps(_stamp(package, files), indent=2).encode())


def _replace(path: Path, content: bytes) -> None:
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_bytes(content)
    new.replace(path)


def _stamp_path(package: Package, vendor: Path) -> Path:
    return vendor / f"{package.name}.fetched.json"


def _stamp(package: Package, files: Mapping[str, bytes]) -> dict[str, Any]:
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return {"package": package.name, "integrity": package.integrity, "sha256": hashes}


def is_up_to_date(package: Package, vendor: Path) -> bool:
    """The stamp is this package's, and the files are still those that it was written for."""
    try:
        files = {name: (vendor / name).read_bytes() for name in WANTED[package.name].values()}
        stamp = json.loads(_stamp_path(package, vendor).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(stamp == _stamp(package, files))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fetch what the page needs for LiveKit rooms.")
    parser.add_argument("--web", type=Path, default=WEB, help="the page's folder")
    args = parser.parse_args(argv)
    try:
        for line in fetch_all(args.web, os.environ):
            print(line)
    except WebDepsError as error:
        print(f"web-deps: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
