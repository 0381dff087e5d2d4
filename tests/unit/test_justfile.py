"""The recipes hand on what was typed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from src.tts.config import parser

ROOT = Path(__file__).resolve().parents[2]
JUST = Path(sys.executable).with_name("just")
SHOWS_ITS_ARGUMENTS = "#!/usr/bin/env bash\nprintf '<%s>' \"$@\"\necho\n"


@pytest.fixture
def uv(tmp_path: Path) -> Path:
    """A folder with a `uv` in it that only shows what it is asked for."""
    tool = tmp_path / "uv"
    tool.write_text(SHOWS_ITS_ARGUMENTS)
    tool.chmod(0o755)
    return tmp_path


def ran(uv: Path, *words: str) -> str:
    path = os.pathsep.join([str(uv), str(JUST.parent), os.environ["PATH"]])
    done = subprocess.run(
        [str(JUST), *words],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("words", "typed"),
    [
        (["test", "-k", "one or other"], "<run><pytest><-k><one or other>"),
        (["test"], "<run><pytest>"),
        (["test-python", "3.13", "-k", "a or b"], "<pytest><-k><a or b>"),
        (["test-family", "xtts", "-k", "a or b"], "<pytest><tests/families/xtts><-k><a or b>"),
        (["test-family", "piper"], "<run><pytest><tests/unit/test_piper_adapter.py>"),
        (["bench-csm", "--note", "it's quiet"], "<benchmarks.csm><--note><it's quiet>"),
        (["bench-families", "piper", "--note", "a b"], "<benchmarks.families><piper><--note><a b>"),
        (["voicepack-check"], "<-m><scripts.voicepack><check>"),
        (["voicepack", "xtts", "my voice"], "<fetch><xtts><my voice>"),
        (["voicepack-convert", "my model.pth", "--i-trust-it"], "<my model.pth><--i-trust-it>"),
        (["cli", "ws://host:1", "--in", "a b.wav"], "<--host><ws://host:1><--in><a b.wav>"),
    ],
)
def test_arguments_arrive_as_they_were_typed(uv: Path, words: list[str], typed: str) -> None:
    assert ran(uv, *words).endswith(typed)


WORKER = "python -m src.tts.worker --adapter"


@pytest.mark.parametrize(
    ("words", "worker"),
    [
        (
            ["run-tts-xtts", "PORT=7003", "DEVICE=cpu"],
            f"{WORKER} xtts --port 7003 --device cpu --default_model xtts-v2-en",
        ),
        (
            ["run-tts-sesame", "DEVICE=cuda:1", "tiny-csm-random"],
            f"{WORKER} sesame --port 7001 --device cuda:1 --default_model tiny-csm-random",
        ),
        (
            ["run-tts-melo", "melo-fr", "melo-en,espeak-en", "7009", "cpu"],
            f"{WORKER} melo --port 7009 --device cpu --default_model melo-fr"
            " --preload_models melo-en,espeak-en",
        ),
        (
            ["run-tts-piper", "PRELOAD=espeak-en"],
            f"{WORKER} piper --port 7002 --device cpu --default_model piper-en-joe"
            " --preload_models espeak-en --allow_fallback",
        ),
    ],
)
def test_a_worker_is_started_as_it_was_asked(uv: Path, words: list[str], worker: str) -> None:
    assert ran(uv, *words).endswith(f"<watchfiles><--filter><python><{worker}><src><configs>")
    parser().parse_args(worker.split()[3:])  # the worker knows all of it


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["MODEL=xtts-v2-en"], "there is no MODEL: DEFAULT, PRELOAD, PORT and DEVICE are known"),
        (["a", "b", "1", "cpu", "more"], "one argument too many: more"),
    ],
)
def test_what_a_worker_cannot_be_told_is_said(uv: Path, words: list[str], says: str) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        ran(uv, "run-tts-xtts", *words)
    assert says in failed.value.stderr
