"""`just nsys-tts` and `just ncu-tts` start the right process, and say what is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from src.tts.adapters import FAMILIES
from src.tts.catalog import ROOT
from src.tts.config import parser

JUST = Path(sys.executable).with_name("just")
UV = f"""#!{sys.executable}
import json, os, sys
asked = {{"argv": sys.argv[1:], "project": os.environ.get("UV_PROJECT_ENVIRONMENT", "")}}
open(os.environ["ASKED"], "w").write(json.dumps(asked))
"""
NVIDIA_SMI = "#!/bin/sh\nexit 0\n"
ALWAYS = ("uv", "nsys", "ncu")


def run(
    tmp_path: Path, *recipe: str, there: tuple[str, ...] = ALWAYS
) -> tuple[subprocess.CompletedProcess[str], dict[str, str | list[str]]]:
    """The recipe with these programs in PATH; `uv` only writes down what it was asked."""
    for name in there:
        program = tmp_path / name
        program.write_text(UV if name == "uv" else NVIDIA_SMI)
        program.chmod(0o755)
    (tmp_path / "just").symlink_to(JUST)
    asked = tmp_path / "asked.json"
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "ASKED": str(asked), "HOME": str(tmp_path)}
    done = subprocess.run(
        [str(JUST), "--justfile", str(ROOT / "justfile"), *recipe],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    return done, json.loads(asked.read_text()) if asked.exists() else {}


@pytest.mark.parametrize("tool", ["nsys", "ncu"])
@pytest.mark.parametrize(
    ("name", "adapter", "environment"),
    [
        ("piper", "piper", ""),
        ("xtts", "xtts", ".venv-xtts"),
        ("parler", "parler_tts", ".venv-parler"),
        ("spark", "spark_tts", ".venv-spark"),
        ("cosyvoice", "cosyvoice2", ".venv-cosyvoice"),
        ("sesame", "sesame", ".venv-sesame"),
    ],
)
def test_the_profiler_runs_the_worker_in_the_familys_environment(
    tmp_path: Path, tool: str, name: str, adapter: str, environment: str
) -> None:
    done, asked = run(tmp_path, f"{tool}-tts", name, "--port", "0")
    assert done.returncode == 0, done.stderr
    argv = list(asked["argv"])
    worker = argv.index("src.tts.worker")
    assert argv[worker - 2 : worker] == ["python", "-m"]
    flags = parser().parse_args(argv[worker + 1 :])
    assert (flags.adapter, flags.device, flags.port) == (adapter, "cpu", 0)
    assert adapter in FAMILIES
    assert asked["project"] == environment
    before = argv[:worker]
    assert before.index("DUPLEX_NVTX=1") < before.index(tool)
    assert ("nvtx" in before) is (not environment), "a family's own environment has torch"


def test_only_what_speaks_is_profiled_kernel_by_kernel(tmp_path: Path) -> None:
    """The name is the range's in src/tts/synthesis.py."""
    _, asked = run(tmp_path, "ncu-tts", "parler")
    argv = list(asked["argv"])
    assert argv[argv.index("--nvtx-include") + 1] == "tts.parler_tts/"


def options(argv: list[str], tool: str) -> list[str]:
    """What the tool is given before the program that it starts, which is the worker itself."""
    started = argv.index("src.tts.worker") - 2
    return argv[argv.index(tool) + 1 : started]


def test_ncu_follows_the_one_process_and_all_its_threads(tmp_path: Path) -> None:
    """An engine may start its kernels on another thread than the one that named the range; what
    torch's compiler starts beside it speaks nothing. As `ncu --help` writes them."""
    _, asked = run(tmp_path, "ncu-tts", "sesame", "--port", "0")
    given = options(list(asked["argv"]), "ncu")
    switches = {"--nvtx", "--force-overwrite"}
    rest = [option for option in given if option not in switches]
    assert switches <= set(given)
    assert dict(zip(rest[::2], rest[1::2], strict=True)) == {
        "--target-processes": "application-only",
        "--nvtx-push-pop-scope": "process",
        "--nvtx-include": "tts.sesame/",
        "--launch-count": "200",
        "--export": "out/profiles/tts-sesame",
    }


def test_nsys_traces_the_gpu_the_ranges_and_the_waiting(tmp_path: Path) -> None:
    _, asked = run(tmp_path, "nsys-tts", "sesame", "--port", "0")
    assert options(list(asked["argv"]), "nsys") == [
        "profile",
        "--trace=cuda,nvtx,osrt",
        "--force-overwrite=true",
        "--output=out/profiles/tts-sesame",
    ]


def test_a_gpu_is_taken_where_there_is_one(tmp_path: Path) -> None:
    _, asked = run(tmp_path, "nsys-tts", "xtts", there=(*ALWAYS, "nvidia-smi"))
    argv = list(asked["argv"])
    assert argv[argv.index("--device") + 1] == "cuda:0"


@pytest.mark.parametrize(("tool", "page"), [("nsys", "nsight-systems"), ("ncu", "nsight-compute")])
def test_without_the_tool_it_says_where_to_get_it(tmp_path: Path, tool: str, page: str) -> None:
    if any((Path(folder) / tool).exists() for folder in ("/usr/bin", "/bin")):
        pytest.skip(f"{tool} is installed")
    done, asked = run(tmp_path, f"{tool}-tts", "xtts", there=("uv",))
    assert done.returncode != 0
    assert f"https://developer.nvidia.com/{page}" in done.stderr
    assert not asked
