"""The generated code is that of the .proto files beside it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed")

ROOT = Path(__file__).resolve().parents[2]


def check(cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/gen_proto.py", "--check"]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_generated_code_is_fresh() -> None:
    result = check(ROOT)
    assert result.returncode == 0, result.stderr


def test_a_changed_proto_is_noticed(tmp_path: Path) -> None:
    for folder in ("scripts", "src/rpc"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "scripts/gen_proto.py").write_text((ROOT / "scripts/gen_proto.py").read_text())
    for proto in (ROOT / "src/rpc").glob("*.proto"):
        text = proto.read_text().replace("uint32 frame_ms", "uint32 frame_millis")
        (tmp_path / "src/rpc" / proto.name).write_text(text)
    (tmp_path / "src/rpc/generated").symlink_to(ROOT / "src/rpc/generated")
    result = check(tmp_path)
    assert result.returncode != 0
    assert "tts_pb2.py" in result.stderr
