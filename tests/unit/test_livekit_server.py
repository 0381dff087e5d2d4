"""`just livekit-server` with a Go that only writes down what it was asked."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from scripts import livekit_server
from scripts.livekit_server import MODULE, CannotBuild, build, check_version, wanted_go
from src.common.livekit_server import VERSION, LiveKitServer, cache_path

FAKE_GO = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$1" in
  env) echo "$GO_IS" ;;
  build)
    echo "go: downloading example.org/x v1.0.0" >&2
    echo "example.org/x" >&2
    [ -z "$BROKEN" ] || { echo "$BROKEN" >&2; exit 1; }
    while [ "$1" != -o ]; do shift; done
    echo "a server" > "$2"; chmod +x "$2" ;;
esac
"""


class Workshop:
    """A module folder, a cache, and a Go in PATH."""

    def __init__(self, folder: Path) -> None:
        self.module = folder / "module"
        self.binary = folder / "cache" / "livekit-server"
        self.calls = folder / "calls"
        tools = folder / "bin"
        for path in (self.module, tools):
            path.mkdir()
        (self.module / "go.mod").write_text((MODULE / "go.mod").read_text())
        (self.module / "go.sum").write_text("one line\n")
        (tools / "go").write_text(FAKE_GO)
        (tools / "go").chmod(0o755)
        self.env = {
            "PATH": f"{tools}:{os.defpath}",
            "CALLS": str(self.calls),
            "GO_IS": f"go{wanted_go(MODULE)}.3",
        }

    def build(self) -> Path:
        return build(self.module, self.binary, self.env)

    @property
    def builds(self) -> int:
        said = self.calls.read_text() if self.calls.exists() else ""
        return sum(line.startswith("build") for line in said.splitlines())


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def test_it_is_built_once(workshop: Workshop) -> None:
    assert workshop.build() == workshop.binary
    assert os.access(workshop.binary, os.X_OK)
    workshop.build()
    assert workshop.builds == 1


def test_other_module_hashes_are_another_server(workshop: Workshop) -> None:
    workshop.build()
    (workshop.module / "go.sum").write_text("another line\n")
    workshop.build()
    assert workshop.builds == 2


def test_a_binary_that_somebody_removed_is_built_again(workshop: Workshop) -> None:
    workshop.build()
    workshop.binary.unlink()
    workshop.build()
    assert workshop.builds == 2


@pytest.mark.parametrize("found", ["go1.22.1", "go1.25", ""])
def test_a_go_that_is_too_old_is_named_with_where_to_get_another(
    workshop: Workshop, found: str
) -> None:
    workshop.env["GO_IS"] = found
    with pytest.raises(CannotBuild, match=r"needs Go 1\.\d+.*https://go\.dev/dl.*uvx --from"):
        workshop.build()
    assert workshop.builds == 0


@pytest.mark.parametrize("found", ["go1.27rc1", "go1.30.2", "go2.0"])
def test_a_newer_go_is_welcome(workshop: Workshop, found: str) -> None:
    workshop.env["GO_IS"] = found
    workshop.build()
    assert workshop.builds == 1


def test_no_go_at_all_says_where_to_get_one(workshop: Workshop, tmp_path: Path) -> None:
    workshop.env["PATH"] = str(tmp_path / "nowhere")
    with pytest.raises(CannotBuild, match=r"there is none.*https://go\.dev/dl"):
        workshop.build()


def test_a_failed_build_shows_its_end_and_leaves_the_old_server(workshop: Workshop) -> None:
    workshop.build()
    (workshop.module / "go.sum").write_text("a wrong line\n")
    workshop.env["BROKEN"] = "verifying module: checksum mismatch"
    with pytest.raises(CannotBuild, match=r"(?s)status 1.*checksum mismatch"):
        workshop.build()
    assert workshop.binary.read_text() == "a server\n"
    assert not list(workshop.binary.parent.glob(".*"))
    del workshop.env["BROKEN"]
    workshop.build()
    assert workshop.builds == 3


def test_a_module_of_another_version_is_refused(workshop: Workshop) -> None:
    go_mod = workshop.module / "go.mod"
    go_mod.write_text(go_mod.read_text().replace(f"v{VERSION}", "v1.0.0"))
    with pytest.raises(CannotBuild, match=rf"has livekit-server 1\.0\.0.* has {VERSION}"):
        workshop.build()


def test_the_module_in_the_tree_is_the_version_that_is_looked_for() -> None:
    check_version(MODULE)
    assert VERSION in cache_path().name


def test_trouble_is_said_and_is_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert livekit_server.main([]) == 1
    assert capsys.readouterr().err.startswith("livekit-server: ")


FAKE_SERVER = """#!/bin/sh
if [ ! -e "$TRIED" ]; then touch "$TRIED"; echo "listen udp: address already in use"; exit 1; fi
port=$(printf '%s' "$LIVEKIT_CONFIG" | sed 's/.*"port": \\([0-9]*\\).*/\\1/')
exec "$PYTHON" -m http.server "$port" --bind 127.0.0.1
"""


async def test_a_port_taken_in_between_is_no_reason_to_have_no_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "livekit-server"
    fake.write_text(FAKE_SERVER)
    fake.chmod(0o755)
    monkeypatch.setenv("LIVEKIT_SERVER", str(fake))
    monkeypatch.setenv("TRIED", str(tmp_path / "tried"))
    monkeypatch.setenv("PYTHON", sys.executable)
    server = await LiveKitServer.start(tmp_path / "log")
    assert server.child.running
    await server.close()
