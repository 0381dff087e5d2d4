"""Build the wheel `livekit-plugins-duplex` out of src/livekit_plugin; needs uv, and no network.

Inside the wheel everything lies under `livekit.plugins.duplex`, also the few modules of other rooms
that the plugin imports, so that it can be installed beside anything.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.gen_proto import generate  # noqa: E402

NAME = "livekit-plugins-duplex"
PACKAGE = "livekit.plugins.duplex"
ROOM = "src.livekit_plugin"
STUBS = "src.rpc.generated"
README = ROOT / "docs" / "livekit_plugin.md"
GRPC_FLOOR, PROTOBUF_FLOOR = "1.66.0", "5.29.3"

_OURS = re.compile(r"\bsrc\.livekit_plugin\b|\bsrc(?=\.\w)")
# Generated code refuses every runtime older than its generator. Ours is plain proto3, which runs on
# the floors below (tried), and other plugins in the same agent may need an older one.
_PROTOBUF_GUARD = re.compile(
    r"^from google\.protobuf import runtime_version.*\n|^_runtime_version\.Val[^)]*\)\n", re.M
)
_GRPC_GUARD = re.compile(r"(?<=^GRPC_GENERATED_VERSION = ')[\d.]+(?=')", re.M)

PYPROJECT = f"""\
[project]
name = "{NAME}"
version = "{{version}}"
description = "LiveKit Agents plugin: text to speech by a fleet of Duplex workers"
readme = "README.md"
license = "Apache-2.0"
requires-python = ">=3.10"
dependencies = ["grpcio>={GRPC_FLOOR}", "livekit-agents>=1.8", "protobuf>={PROTOBUF_FLOOR}"]

[build-system]
requires = ["uv_build>=0.8"]
build-backend = "uv_build"

[tool.uv.build-backend]
module-name = "{PACKAGE}"
module-root = ""
"""


def build(out: Path) -> Path:
    """The wheel, in `out`. Raises SystemExit with uv's words when it cannot be built."""
    with tempfile.TemporaryDirectory() as tmp:
        stage(Path(tmp))
        uv = os.environ.get("UV") or shutil.which("uv") or sys.exit("uv is not installed")
        command = [uv, "build", "--wheel", "--offline", "--no-config", "--out-dir", str(out), tmp]
        result = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
    if result.returncode != 0:
        sys.exit(f"uv build failed:\n{result.stderr}")
    return max(out.glob("*.whl"), key=lambda wheel: wheel.stat().st_mtime)


def stage(where: Path) -> None:
    """Everything that the build backend needs, under names of its own."""
    package = where / PACKAGE.replace(".", "/")
    with tempfile.TemporaryDirectory() as tmp:
        generate(Path(tmp))
        for module, path in sorted(needed(Path(tmp)).items()):
            target = package / _renamed(module).removeprefix(PACKAGE).lstrip(".").replace(".", "/")
            target = target / "__init__.py" if path.name == "__init__.py" else _with_py(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(_rewritten(path.read_text(encoding="utf-8")), encoding="utf-8")
    (package / "py.typed").touch()
    shutil.copy(README, where / "README.md")
    (where / "pyproject.toml").write_text(PYPROJECT.format(version=_version()), encoding="utf-8")


def needed(stubs: Path) -> dict[str, Path]:
    """Each module of ours that the plugin reaches, with its packages; stubs as freshly made."""
    files = (ROOT / ROOM.replace(".", "/")).glob("*.py")
    todo = [ROOM, *(f"{ROOM}.{path.stem}" for path in files if path.stem != "__init__")]
    found: dict[str, Path] = {}
    while todo:
        module = todo.pop()
        path = _file_of(module, stubs if module.startswith(STUBS + ".") else ROOT)
        if module in found or path is None:
            continue
        found[module] = path
        todo.append(module.rpartition(".")[0])
        todo.extend(_imports(path))
    return {module: path for module, path in found.items() if module != "src"}


def _file_of(module: str, root: Path) -> Path | None:
    path = root / module.replace(".", "/")
    return next((p for p in (_with_py(path), path / "__init__.py") if p.is_file()), None)


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("src."):
            yield node.module or ""
            # A module, if there is one by this name.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _renamed(text: str) -> str:
    return _OURS.sub(PACKAGE, text)


def _rewritten(source: str) -> str:
    return _GRPC_GUARD.sub(GRPC_FLOOR, _PROTOBUF_GUARD.sub("", _renamed(source)))


def _with_py(path: Path) -> Path:
    return path.with_name(path.name + ".py")


def _version() -> str:
    scope: dict[str, str] = {}
    exec((ROOT / "src/livekit_plugin/version.py").read_text(encoding="utf-8"), scope)  # noqa: S102
    return scope["__version__"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "dist", help="default: out/dist")
    print(build(parser.parse_args().out))


if __name__ == "__main__":
    main()
