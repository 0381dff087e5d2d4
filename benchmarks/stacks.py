"""The processes under measurement: the product, with the parts that a benchmark scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.machine import Meter
from benchmarks.scripted_orchestrator import Samples
from src.common.processes import Child, free_port
from src.demo.stack import ROOT, Ports, Report, Stack, StackOptions, running_stack

SCRIPTED_ASR_MS = 40
SCRIPTED_FIRST_TOKEN_MS = 50
SCRIPTED_GAP_MS = 10
REPLY = (
    "Well, let me tell you about the lighthouse on the northern coast, which was built a long time "
    "ago by a family of fishermen who had lost two boats in a winter storm, and who carried wood "
    "to the top every evening to light a fire, until the fire became a lamp, and the lamp became "
    "a machine, and nobody lived there any more, although the light still turns."
)


@dataclass
class Bench:
    """Where a benchmark works."""

    out: Path
    quick: bool
    report: Report

    @property
    def logs(self) -> Path:
        return self.out / "logs"


@dataclass
class Lab:
    """A running installation. `samples` are there once it has been stopped."""

    stack: Stack
    meter: Meter
    samples_file: Path
    worker_metrics_port: int
    samples: Samples = field(default_factory=dict)

    def collect(self) -> None:
        self.samples = json.loads(self.samples_file.read_text(encoding="utf-8"))


SHIPPED_LLM = {
    "llm.system_prompt": "Answer in one short sentence.",
    "llm.temperature": 0.2,
    "llm.max_tokens": 40,
    "llm.extra_body": {"seed": 7},
}
"""The language model's task in the comparison with other frameworks."""
LOADED = {"limits.max_sessions_per_key": 64, "llm.stop_after_sentences": 0, "llm.warm_up": False}


@asynccontextmanager
async def real_stack(bench: Bench, name: str) -> AsyncIterator[Lab]:
    """Every engine as it is shipped. The language model gets the comparison's task."""
    async with _lab(bench, name, StackOptions(Ports.free(), bench.logs / name), SHIPPED_LLM) as lab:
        yield lab


@asynccontextmanager
async def scripted_stack(bench: Bench, name: str) -> AsyncIterator[Lab]:
    """Scripted words and replies, eSpeak's voice: what is left is ours."""
    port = free_port()
    llm = await Child.start(
        "scripted-llm",
        [
            *(sys.executable, "-m", "tests.scripted_llm", "--port", str(port), "--reply", REPLY),
            *("--first_ms", str(SCRIPTED_FIRST_TOKEN_MS), "--gap_ms", str(SCRIPTED_GAP_MS)),
        ],
        log=bench.logs / name / "scripted-llm.log",
    )
    options = StackOptions(
        Ports.free(),
        bench.logs / name,
        voice="espeak-en",
        llm_base_url=f"http://127.0.0.1:{port}/v1",
        orchestrator_args=("--scripted_ms", str(SCRIPTED_ASR_MS)),
    )
    try:
        async with _lab(bench, name, options, LOADED) as lab:
            yield lab
    finally:
        await llm.stop()


@asynccontextmanager
async def _lab(
    bench: Bench, name: str, options: StackOptions, config: Mapping[str, Any]
) -> AsyncIterator[Lab]:
    samples = bench.logs / name / "samples.json"
    metrics_port = free_port()
    options = StackOptions(
        options.ports,
        options.log_dir,
        voice=options.voice,
        llm_base_url=options.llm_base_url,
        worker_args=("--metrics_port", str(metrics_port)),
        orchestrator_args=(
            *("--config", str(config_file(bench.logs / name / "orchestrator.yaml", config))),
            *("--samples", str(samples)),
            *options.orchestrator_args,
        ),
        orchestrator_module="benchmarks.scripted_orchestrator",
    )
    async with running_stack(options, bench.report) as stack:
        lab = Lab(stack, Meter(stack.children), samples, metrics_port)
        yield lab
    lab.collect()


def config_file(path: Path, overrides: Mapping[str, Any]) -> Path:
    """The shipped configuration with these dotted keys laid over it."""
    raw = yaml.safe_load((ROOT / "configs" / "orchestrator.yaml").read_text(encoding="utf-8"))
    for dotted, value in overrides.items():
        section, _, key = dotted.partition(".")
        raw[section][key] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path
