"""Our Prometheus configuration in a real Prometheus, and all that Grafana's board asks of it."""

from __future__ import annotations

import asyncio
import json
import math
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from scripts.compose_file import Service, services
from scripts.images_check import environment
from src.common.processes import Child, free_port
from src.common.tasks import cancel_and_wait
from tests.audio_fixtures import at_level, espeak_speech
from tests.integration.live import Installation, installation, talker

ROOT = Path(__file__).resolve().parents[2]
BOARD = ROOT / "deploy/monitoring/grafana/boards/duplex-voice.json"
PROMETHEUS = ROOT / "deploy/monitoring/prometheus.yml"
KEY = "a-key-for-the-test"
MODELS = """
models:
  - {model_id: espeak-en, family: espeak, cpu_ok: true, languages: [en-US]}
  - {model_id: espeak-de, family: espeak, cpu_ok: true, languages: [de]}
"""
STORY = (
    "Once upon a time there was a lighthouse keeper who counted the ships every evening. "
    "He wrote their names into a blue book, and the book grew heavier with every year."
)
# Four of the 15 s that Grafana takes for the scrape interval of a source that says none.
RATE_INTERVAL = "1m"
ALL_ANSWERED_S = 180.0
# A session on the WebSocket on a worker that keeps up leaves these at zero.
MAY_BE_ZERO = {
    "sum(duplex_rooms)",
    "sum(rate(duplex_rooms_joined_total[$__rate_interval]))",
    "sum(tts_queue_depth)",
    "tts_queue_depth",
    "sum(tts_fallback)",
    "sum(increase(tts_leases_expired_total[1h]))",
    "sum(increase(tts_frames_dropped_total[$__rate_interval]))",
}

if not (shutil.which("prometheus") and shutil.which("promtool")):
    pytest.skip(
        "optional: no prometheus and promtool here (apt-get install prometheus)",
        allow_module_level=True,
    )
pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]


@dataclass(frozen=True)
class Target:
    """One expression of a panel."""

    panel: str
    expression: str
    legend: str

    @property
    def labels(self) -> set[str]:
        return set(re.findall(r"{{(\w+)}}", self.legend))


def targets() -> Iterator[Target]:
    for panel in json.loads(BOARD.read_text(encoding="utf-8"))["panels"]:
        for target in panel.get("targets", []):
            yield Target(panel["title"], target["expr"], target["legendFormat"])


@dataclass(frozen=True)
class Prometheus:
    url: str

    async def get(self, path: str, **params: str) -> Any:
        async with (
            aiohttp.ClientSession() as http,
            http.get(f"{self.url}/api/v1/{path}", params=params) as answer,
        ):
            body = await answer.json()
        assert body["status"] == "success", (params, body)
        return body["data"]

    async def samples(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """(labels, value) as Grafana would get them now, without what is not a number."""
        query = expression.replace("$__rate_interval", RATE_INTERVAL)
        found = (await self.get("query", query=query))["result"]
        values = [(one["metric"], float(one["value"][1])) for one in found]
        return [(labels, value) for labels, value in values if not math.isnan(value)]

    async def is_up(self) -> bool:
        with suppress(aiohttp.ClientError):
            async with aiohttp.ClientSession() as http, http.get(f"{self.url}/-/ready") as answer:
                return answer.status == 200
        return False


def local(config: Path, key: Path, orchestrator: int, worker: int) -> str:
    """Our configuration with this machine's addresses in place of the services' names.

    Docker's name server tells a worker's address; here a target says what it would be called.
    """
    read = yaml.safe_load(config.read_text(encoding="utf-8"))
    jobs = {job["job_name"]: job for job in read["scrape_configs"]}
    jobs["orchestrator"]["static_configs"][0]["targets"] = [f"127.0.0.1:{orchestrator}"]
    jobs["orchestrator"]["authorization"]["credentials_file"] = str(key)
    [found] = jobs["workers"].pop("dns_sd_configs")
    jobs["workers"]["static_configs"] = [
        {"targets": [f"127.0.0.1:{worker}"], "labels": {"__meta_dns_name": found["names"][0]}}
    ]
    return yaml.safe_dump(read)


def as_composed(service: Service, folder: Path, port: int) -> list[str]:
    """The service's own command line, on this machine's program and this test's folder."""
    moved = {
        "/bin/prometheus": shutil.which("prometheus") or "",
        "/tmp/metrics-key": str(folder / "key"),  # noqa: S108 - what is replaced
        "/etc/prometheus/prometheus.yml": str(folder / "prometheus.yml"),
        "=/prometheus": f"={folder / 'data'}",
    }
    argv = [str(part) for part in service.raw["entrypoint"]] + service.command
    for there, here in moved.items():
        assert any(there in part for part in argv), there
        argv = [part.replace(there, here) for part in argv]
    return [*argv, f"--web.listen-address=127.0.0.1:{port}"]


@asynccontextmanager
async def watched(folder: Path) -> AsyncIterator[tuple[Installation, Prometheus]]:
    """An installation behind a key, and the compose file's Prometheus beside it."""
    catalog, port, metrics_port = folder / "catalog.yaml", free_port(), free_port()
    catalog.write_text(MODELS, encoding="utf-8")
    flags = ["--catalog", str(catalog), "--voicepacks_dir", str(folder)]
    async with installation(
        folder,
        env={"DUPLEX_API_KEY": KEY},
        worker_args=[*flags, "--metrics_port", str(metrics_port), "--min_residency_ms", "0"],
    ) as running:
        config = folder / "prometheus.yml"
        config.write_text(local(PROMETHEUS, folder / "key", running.port, metrics_port))
        service = services(ROOT / "docker-compose.yml", {**environment(), "DUPLEX_API_KEY": KEY})
        child = await Child.start(
            "prometheus",
            as_composed(service["prometheus"], folder, port),
            log=folder / "prometheus.log",
            env=service["prometheus"].environment,
        )
        prometheus = Prometheus(f"http://127.0.0.1:{port}")
        try:
            await child.ready(prometheus.is_up, 60.0)
            yield running, prometheus
        finally:
            await child.stop()


async def converse(running: Installation) -> None:
    """One conversation after the other: told a story, interrupted, answered.

    A model comes and goes once before, as most do in a worker's life.
    """
    speech = at_level(espeak_speech("Stop please, I have heard enough of that."), -22.0)
    headers = {"X-API-Key": KEY}
    async with aiohttp.ClientSession(running.url, headers=headers) as http:
        for name in ("load", "unload"):
            async with http.post(f"/v1/models/espeak-de/{name}") as done:
                assert done.status == 200
        while True:
            async with http.post("/v1/models/nobody/load"):
                pass
            async with talker(running, key=KEY) as client:
                await client.say(STORY)
                await client.until(lambda: client.played.get("u1", -1) >= 60, "the story")
                client.talk(speech)
                await client.until_event("barge_in", verdict="real")
                await client.until_event("latency")
                await client.until(lambda: client.events("audio.end"), "the answer")


async def both_up(prometheus: Prometheus) -> dict[str, dict[str, Any]]:
    """Job → target, once both have been asked."""
    while True:
        found = (await prometheus.get("targets"))["activeTargets"]
        if len(found) == 2 and all(target["health"] != "unknown" for target in found):
            return {target["labels"]["job"]: target for target in found}
        await asyncio.sleep(1)


async def test_every_panel_of_the_board_is_answered_while_a_session_speaks(tmp_path: Path) -> None:
    async with watched(tmp_path) as (running, prometheus):
        assert (tmp_path / "key").stat().st_mode & 0o077 == 0, "others could read the key"

        asked = await asyncio.wait_for(both_up(prometheus), 60.0)
        assert {job: one["lastError"] for job, one in asked.items()} == {
            "orchestrator": "",
            "workers": "",
        }
        assert asked["workers"]["labels"]["worker"] == "tts0"

        silent = list(targets())
        assert len(silent) >= 30
        talking = asyncio.create_task(converse(running))
        try:
            deadline = asyncio.get_running_loop().time() + ALL_ANSWERED_S
            while silent and asyncio.get_running_loop().time() < deadline:
                await asyncio.sleep(2)
                silent = [one for one in silent if not await answered(prometheus, one)]
                assert not talking.done() or talking.result()
        finally:
            await cancel_and_wait(talking)
        assert not [(one.panel, one.expression) for one in silent]


async def answered(prometheus: Prometheus, target: Target) -> bool:
    """With a value, and with the labels that the legend names."""
    found = await prometheus.samples(target.expression)
    if target.expression not in MAY_BE_ZERO:
        found = [(labels, value) for labels, value in found if value > 0]
    return bool(found) and all(target.labels <= set(labels) for labels, _ in found)


def test_promtool_accepts_the_configuration(tmp_path: Path) -> None:
    key, config = tmp_path / "key", tmp_path / "prometheus.yml"
    key.write_text(KEY)
    config.write_text(local(PROMETHEUS, key, 8080, 9464))
    done = subprocess.run(["promtool", "check", "config", str(config)], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_what_may_be_zero_is_on_the_board() -> None:
    assert {target.expression for target in targets()} >= MAY_BE_ZERO
