"""Dockerfiles, compose file, environment files and board, as far as they show without an engine."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from scripts.compose_file import (
    ComposeError,
    Service,
    interpolate,
    read_env_file,
    services,
    variables,
)
from scripts.images_check import environment, in_order
from src.common.livekit_server import VERSION
from src.orchestrator import config as orchestrator
from src.orchestrator.metrics import Metrics
from src.tts import config as worker
from src.tts.metrics import WorkerMetrics
from src.tts.worker import DRAIN_MS

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "docker-compose.yml"
DOCKERFILES = sorted(path.name for path in ROOT.glob("Dockerfile.*"))
EXAMPLE = read_env_file(ROOT / ".env.example")
COSYVOICE_ENV = read_env_file(ROOT / ".env.cosyvoice")
OURS = {"orchestrator", "tts0", "tts-gpu", "tts-cosyvoice", "llm"}
WORKERS = {"tts0", "tts-gpu", "tts-cosyvoice"}
# The engine's and the drivers' own.
FOREIGN = {"COMPOSE_PROFILES", "CUDA_VISIBLE_DEVICES"}
BOARD = ROOT / "deploy/monitoring/grafana/boards/duplex-voice.json"
PROMETHEUS = ROOT / "deploy/monitoring/prometheus.yml"


@pytest.fixture(scope="module")
def compose() -> dict[str, Service]:
    return services(COMPOSE, environment())


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, rest) with continued lines joined and comments gone."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", text)
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.split("\n") if line]


def argument(name: str, wanted: str) -> str:
    [value] = {
        r.partition("=")[2]
        for i, r in instructions(name)
        if i == "ARG" and r.startswith(f"{wanted}=")
    }
    return value


def locked() -> set[tuple[str, str]]:
    """(package, version) of everything in the lock."""
    text = (ROOT / "uv.lock").read_text(encoding="utf-8")
    return set(re.findall(r'^name = "(.+)"\nversion = "(.+)"$', text, re.MULTILINE))


# --- compose file and environment ---


def test_all_of_the_documents_services_are_there(compose: dict[str, Service]) -> None:
    assert {"redis", "livekit-server", "orchestrator", "tts0", "tts-cosyvoice"} <= set(compose)
    assert {"prometheus", "grafana"} <= set(compose)


def test_without_a_profile_nothing_needs_a_gpu(compose: dict[str, Service]) -> None:
    default = {name for name, service in compose.items() if not service.profiles}
    assert default == {"redis", "livekit-server", "orchestrator", "tts0"}
    assert not any("deploy" in compose[name].raw for name in default)
    assert all("deploy" in s.raw for s in compose.values() if "gpu" in s.profiles)


@pytest.mark.parametrize("secret", ["DUPLEX_API_KEY", "LIVEKIT_API_SECRET"])
def test_a_secret_that_is_not_set_is_named_with_what_to_do(secret: str) -> None:
    with pytest.raises(ComposeError, match=rf"{secret} is not set: set {secret} in \.env"):
        services(COMPOSE, {**environment(), secret: ""})


def test_the_examples_hold_no_secret() -> None:
    assert EXAMPLE["DUPLEX_API_KEY"] == EXAMPLE["LIVEKIT_API_SECRET"] == ""


def test_every_variable_is_in_an_example_and_every_one_there_is_used() -> None:
    asked = variables(COMPOSE.read_text(encoding="utf-8"))
    known = {*EXAMPLE, *COSYVOICE_ENV, "COSYVOICE_TARGET"}
    assert asked <= known, asked - known
    assert set(EXAMPLE) <= asked | FOREIGN, set(EXAMPLE) - asked


def test_what_the_example_says_is_the_default() -> None:
    """Whoever sets nothing but the two secrets gets what the example shows."""
    secrets = {name: environment()[name] for name in ("DUPLEX_API_KEY", "LIVEKIT_API_SECRET")}
    assert services(COMPOSE, secrets).keys() == services(COMPOSE, {**EXAMPLE, **secrets}).keys()
    for name, service in services(COMPOSE, secrets).items():
        assert service.raw == services(COMPOSE, {**EXAMPLE, **secrets})[name].raw


def test_every_variable_of_the_orchestrator_does_something(compose: dict[str, Service]) -> None:
    given = compose["orchestrator"].environment
    values = {name: f"http://{name.lower().replace('_', '-')}" for name in given}
    values["DUPLEX_API_KEY"] = "duplex-api-key"
    config = orchestrator.orchestrator_config(ROOT / "configs/orchestrator.yaml", {}, values)
    found = str({**config.model_dump(), "keys": config.server.keys})
    secrets = [config.livekit.api_secret, config.llm.api_key]
    found += str([secret.get_secret_value() for secret in secrets])
    assert all(value in found for value in values.values()), (values, found)


def test_the_orchestrators_flags_are_its_own(compose: dict[str, Service]) -> None:
    command = compose["orchestrator"].command
    assert command[:3] == ["python", "-m", "src.orchestrator.server"]
    args = orchestrator.parser().parse_args(command[3:])
    assert args.ws
    assert args.livekit
    assert args.host == "0.0.0.0"  # noqa: S104 - what a container has to
    assert compose["orchestrator"].raw["ports"][0].endswith(f":{args.port}")


@pytest.mark.parametrize("name", sorted(WORKERS - {"tts-cosyvoice"}))
def test_a_workers_flags_are_its_own(name: str, compose: dict[str, Service]) -> None:
    service = compose[name]
    assert service.command[:3] == ["python", "-m", "src.tts.worker"]
    config = read_flags(service.command[3:], service.environment)
    assert config.worker.announced_addr(7001) == f"{name}:{config.worker.port}"
    assert config.redis.url == "redis://redis:6379"
    assert not config.worker.allow_fallback


def read_flags(argv: list[str], environ: dict[str, str]) -> worker.WorkerConfig:
    args = worker.parser().parse_args(argv)
    return worker.worker_config(args.config, worker.overrides_from(args), environ)


def test_cosyvoices_variables_arrive_as_flags(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    pack = tmp_path / "cosyvoice2" / "en-base"
    pack.mkdir(parents=True)
    env = {
        **COSYVOICE_ENV,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "ADVERTISE_ADDR": "tts-cosyvoice:7002",
        "COSYVOICE_MODEL_PATH": str(pack),
        "COSYVOICE_VOICEPACK_DIR": str(pack.parent),
    }
    script = ["sh", str(ROOT / "deploy/cosyvoice-worker.sh")]
    argv = subprocess.run(script, env=env, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    assert argv[:2] == ["-m", "src.tts.worker"]
    config = read_flags(argv[2:-1], COSYVOICE_ENV)
    assert config.worker.port == 7002
    assert config.worker.voicepacks_dir == tmp_path
    assert config.model_manager.default_model_id == "cosyvoice2-en-base"
    assert config.model_manager.ttl_ms == 600_000
    assert config.model_manager.resident_cap == 2

    env["COSYVOICE_MODEL_PATH"] = str(tmp_path / "nowhere")
    done = subprocess.run(script, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no voice pack in" in done.stderr


def test_every_variable_of_cosyvoice_does_something(compose: dict[str, Service]) -> None:
    """The container starts with the same values, and the build takes its three."""
    given = compose["tts-cosyvoice"].build_args
    image = dict(
        pair.split("=", 1)
        for kind, rest in instructions("Dockerfile.tts-cosyvoice")
        if kind == "ENV"
        for pair in rest.split()
    )
    built_with = {"PYTORCH_VERSION", "CUDA_VERSION", "PYTHON_VERSION"}
    for name in built_with:
        assert argument("Dockerfile.tts-cosyvoice", name) == given[name] == COSYVOICE_ENV[name]
    for name in set(COSYVOICE_ENV) - built_with - {"REDIS_URL", "CUDA_VISIBLE_DEVICES"}:
        assert image[name] == COSYVOICE_ENV[name]
    assert read_flags([], COSYVOICE_ENV).redis.url == COSYVOICE_ENV["REDIS_URL"]


def test_services_start_after_what_they_need(compose: dict[str, Service]) -> None:
    for name in OURS - {"llm"}:
        assert compose[name].depends_on["redis"] == "service_healthy"
    assert compose["orchestrator"].depends_on["tts0"] == "service_healthy"
    assert compose["grafana"].depends_on == {"prometheus": "service_healthy"}
    order = [service.name for service in in_order(compose)]
    assert order.index("redis") < order.index("tts0") < order.index("orchestrator")


def test_every_service_is_confined(compose: dict[str, Service]) -> None:
    for service in compose.values():
        raw = service.raw
        assert raw["read_only"] is True
        assert raw["cap_drop"] == ["ALL"]
        assert raw["security_opt"] == ["no-new-privileges:true"]
        assert raw["restart"] == "unless-stopped"
        binds = [v for v in raw.get("volumes", []) if v.startswith((".", "/"))]
        assert all(bind.endswith(":ro") for bind in binds), binds


@pytest.mark.parametrize("name", sorted(WORKERS))
def test_espeak_may_load_its_copies(name: str, compose: dict[str, Service]) -> None:
    """Docker's tmpfs is noexec unless told otherwise, and every worker has eSpeak in it."""
    [mount] = compose[name].raw["tmpfs"]
    assert "exec" in mount.partition(":")[2].split(",")
    temporary = [v for v in instructions(compose[name].dockerfile) if "TMPDIR" in v[1]]
    assert not temporary


def test_nothing_is_written_into_a_read_only_container(compose: dict[str, Service]) -> None:
    """Compose refuses: "`file` is the sole supported option" (docker/compose#12031)."""
    document = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    for kind in ("configs", "secrets"):
        inline = {n for n, one in document.get(kind, {}).items() if "file" not in one}
        for service in compose.values():
            assert not inline & {one["source"] for one in service.raw.get(kind, [])}


def test_every_service_says_whether_it_is_well(compose: dict[str, Service]) -> None:
    for service in compose.values():
        health = service.raw["healthcheck"]
        assert service.start_s == (600 if "deploy" in service.raw else 120), (
            "a GPU's models are large"
        )
        assert health["interval"]
        assert service.health_test or service.name in OURS, "our images bring the command"


def test_voice_packs_are_read_only_where_the_catalog_looks(compose: dict[str, Service]) -> None:
    assert "./voicepacks:/app/voicepacks:ro" in compose["tts0"].raw["volumes"]
    assert "./voicepacks:/app/voicepacks:ro" in compose["tts-gpu"].raw["volumes"]
    packs = "./voicepacks/cosyvoice2:/models/cosyvoice2:ro"
    assert packs in compose["tts-cosyvoice"].raw["volumes"]
    assert "ln -s /models voicepacks" in (ROOT / "Dockerfile.tts-cosyvoice").read_text()


def test_nobody_is_killed_while_draining(compose: dict[str, Service]) -> None:
    drain_ms = orchestrator.OrchestratorConfig().server.drain_ms
    assert compose["orchestrator"].grace_s * 1000 > drain_ms
    for name in WORKERS:
        assert compose[name].grace_s * 1000 > DRAIN_MS


def test_ports_open_on_this_machine_only_unless_asked(compose: dict[str, Service]) -> None:
    ports = [port for service in compose.values() for port in service.raw.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_images_of_others_are_pinned(compose: dict[str, Service]) -> None:
    for service in compose.values():
        bases = [service.build_args["BASE"]] if service.dockerfile else [service.image]
        for image in bases:
            name, _, tag = image.partition(":")
            assert tag, f"{name} has no tag"
            assert re.match(r"v?\d+\.\d|bookworm", tag), f"{image} moves"


def test_livekit_server_is_the_one_that_is_tested(compose: dict[str, Service]) -> None:
    livekit = compose["livekit-server"]
    assert livekit.image == f"livekit/livekit-server:v{VERSION}"
    config = yaml.safe_load(livekit.environment["LIVEKIT_CONFIG"])
    told = compose["orchestrator"].environment
    assert config["keys"] == {told["LIVEKIT_API_KEY"]: told["LIVEKIT_API_SECRET"]}
    assert told["LIVEKIT_URL"] == f"ws://livekit-server:{config['port']}"
    inside = {f":{port}" for port in (config["port"], config["rtc"]["tcp_port"])}
    inside.add(f":{config['rtc']['udp_port']}/udp")
    assert {f":{port.rpartition(':')[2]}" for port in livekit.raw["ports"]} == inside


def test_the_small_language_model_is_where_the_example_says(compose: dict[str, Service]) -> None:
    assert "http://llm:8091/v1" in (ROOT / ".env.example").read_text()
    [command] = [rest for kind, rest in instructions("Dockerfile.llm") if kind == "CMD"]
    assert json.loads(command)[-2:] == ["--port", "8091"]


# --- Dockerfiles ---


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_dockerfile_can_stand_on_another_base(name: str) -> None:
    kinds = [kind for kind, _ in instructions(name)]
    assert {rest.partition("=")[0] for kind, rest in instructions(name)[: kinds.index("FROM")]} >= {
        "BASE"
    }
    stages = {"${BASE}"}
    for kind, rest in instructions(name):
        if kind == "FROM":
            image, *alias = rest.split()
            assert image in stages, f"{image} is neither the base nor a stage"
            stages |= {alias[1]} if alias else set()


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_is_small_confined_and_stops_when_asked(name: str) -> None:
    every = instructions(name)
    kinds = [kind for kind, _ in every]
    assert kinds.count("FROM") >= 2
    assert dict(every)["USER"] == "10001:10001"
    assert dict(every)["STOPSIGNAL"] == "SIGTERM"
    assert "HEALTHCHECK" in kinds
    label = dict(every)["LABEL"]
    for wanted in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{wanted}=" in label
    # Not through `uv run`, which would stand between the engine's signal and the process.
    assert not re.search(r"\buv\b", dict(every)["CMD"] + dict(every)["HEALTHCHECK"])


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_lock_comes_before_the_sources(name: str) -> None:
    text = [f"{kind} {rest}" for kind, rest in instructions(name)]
    [lock, *_] = [i for i, line in enumerate(text) if line == "COPY pyproject.toml uv.lock ./"]
    [sync, *_] = [i for i, line in enumerate(text) if "uv sync --frozen" in line]
    sources = [i for i, line in enumerate(text) if re.match(r"COPY (src|configs|tests) ", line)]
    assert lock < sync
    assert all(sync < i for i in sources)
    assert "--no-dev" in text[sync] or "--only-group" in text[sync]


def test_all_dockerfiles_have_the_same_uv() -> None:
    assert len({argument(name, "UV_VERSION") for name in DOCKERFILES}) == 1


def test_what_is_left_out_is_in_the_lock() -> None:
    """A package that was renamed would silently come back."""
    known = {package for package, _ in locked()}
    for name in DOCKERFILES:
        left_out = re.findall(r"--no-install-package (\S+)", (ROOT / name).read_text())
        assert left_out
        assert set(left_out) <= known


def test_pytorch_and_cosyvoices_sources_are_pinned() -> None:
    assert ("torch", argument("Dockerfile.tts-cosyvoice", "PYTORCH_VERSION")) in locked()
    for name in ("Dockerfile.tts", "Dockerfile.tts-cosyvoice"):
        commits = [
            r.partition("=")[2] for i, r in instructions(name) if i == "ARG" and "_COMMIT=" in r
        ]
        assert len(commits) == 2
        assert all(re.fullmatch(r"[0-9a-f]{40}", commit) for commit in commits)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_build_takes_what_the_compose_file_gives(
    name: str, compose: dict[str, Service]
) -> None:
    declared = {rest.partition("=")[0] for kind, rest in instructions(name) if kind == "ARG"}
    users = [service for service in compose.values() if service.dockerfile == name]
    assert users
    for service in users:
        assert set(service.build_args) <= declared


def ignored(path: str) -> bool:
    """As Docker reads the file: the last line that matches decides."""
    verdict = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        deep = pattern.removeprefix("**/")
        parts = path.split("/")
        heads = ["/".join(parts[: n + 1]) for n in range(len(parts))]
        if deep != pattern:
            hit = any(fnmatch.fnmatchcase(part, deep) for part in parts)
        else:
            hit = any(
                fnmatch.fnmatchcase(head, pattern) and head.count("/") == pattern.count("/")
                for head in heads
            )
        if hit:
            verdict = not line.startswith("!")
    return verdict


@pytest.mark.parametrize(
    "path",
    [".git/config", ".venv/bin/python", ".venv-xtts/x", ".env", "voicepacks/piper/a/model.onnx",
     "voicepacks/sesame/csm-1b/model.safetensors", "out/demo.wav", "src/common/__pycache__/a.pyc",
     "secrets.txt", "src/client/web/vendor/livekit-client.esm.mjs", ".hypothesis/x"],
)  # fmt: skip
def test_weights_secrets_and_leavings_do_not_go_in(path: str) -> None:
    assert ignored(path)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_is_there_and_goes_in(name: str) -> None:
    for kind, rest in instructions(name):
        if kind == "COPY" and "--from" not in rest:
            *files, _ = rest.split()
            for file in files:
                assert (ROOT / file).exists(), file
                assert not ignored(file), file


# --- the board ---


def exported(registry: CollectorRegistry) -> dict[str, set[str]]:
    """Metric, as Prometheus stores it → its labels."""
    found: dict[str, set[str]] = {}
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
    for collector in registry._collector_to_names:
        labels = set(getattr(collector, "_labelnames", ()))
        for family in collector.collect():
            for suffix in suffixes.get(family.type, [""]):
                found[family.name + suffix] = labels | ({"le"} if suffix == "_bucket" else set())
    return found


def expressions() -> Iterator[tuple[str, str]]:
    """(expression, legend) of every panel."""
    for panel in json.loads(BOARD.read_text(encoding="utf-8"))["panels"]:
        for target in panel.get("targets", []):
            yield target["expr"], target["legendFormat"]


@pytest.fixture(scope="module")
def metrics() -> dict[str, set[str]]:
    return {**exported(Metrics().registry), **exported(WorkerMetrics().registry)}


def test_the_board_asks_for_metrics_that_there_are(metrics: dict[str, set[str]]) -> None:
    scraped = {"job", "instance", "worker"}
    for expression, legend in expressions():
        names = re.findall(r"\b(?:duplex|tts|process)_\w+", expression)
        assert names, expression
        for name in names:
            assert name in metrics, f"{name} in {expression}"
        labels = {label for name in names for label in metrics[name]} | scraped
        grouped = re.findall(r"by \(([^)]*)\)", expression)
        asked = {label.strip() for group in grouped for label in group.split(",")}
        assert asked | set(re.findall(r"{{(\w+)}}", legend)) <= labels, expression


def test_every_metric_of_ours_is_on_the_board(metrics: dict[str, set[str]]) -> None:
    shown = " ".join(expression for expression, _ in expressions())
    ours = {
        re.sub(r"_(bucket|sum|count)$", "_", m)
        for m in metrics
        if m.startswith(("duplex_", "tts_"))
    }
    missing = {name for name in ours if name not in shown}
    assert not missing


def test_prometheus_asks_every_worker_at_its_port(compose: dict[str, Service]) -> None:
    config = yaml.safe_load(PROMETHEUS.read_text(encoding="utf-8"))
    jobs: dict[str, Any] = {job["job_name"]: job for job in config["scrape_configs"]}
    assert jobs["orchestrator"]["static_configs"][0]["targets"] == ["orchestrator:8080"]
    [workers] = jobs["workers"]["dns_sd_configs"]
    assert set(workers["names"]) == WORKERS
    for name in WORKERS - {"tts-cosyvoice"}:
        command = compose[name].command
        assert command[command.index("--metrics_port") + 1] == str(workers["port"])
    assert f"--metrics_port {workers['port']} " in (ROOT / "deploy/cosyvoice-worker.sh").read_text()
    key = jobs["orchestrator"]["authorization"]["credentials_file"]
    prometheus = compose["prometheus"]
    assert f'printf %s "$METRICS_API_KEY" >{key};' in prometheus.raw["entrypoint"][2]
    given = services(COMPOSE, {**environment(), "DUPLEX_API_KEY": "one"})["prometheus"].environment
    assert given == {"METRICS_API_KEY": "one"}


def test_grafana_finds_its_source_and_its_board(compose: dict[str, Service]) -> None:
    """What its provisioning needs: https://grafana.com/docs/grafana/latest/administration/provisioning."""
    folder = BOARD.parents[1] / "provisioning"
    sources = yaml.safe_load((folder / "datasources/prometheus.yml").read_text(encoding="utf-8"))
    boards = yaml.safe_load((folder / "dashboards/boards.yml").read_text(encoding="utf-8"))
    assert sources["apiVersion"] == boards["apiVersion"] == 1
    [source], [provider] = sources["datasources"], boards["providers"]
    assert (source["type"], source["access"]) == ("prometheus", "proxy")
    assert source["url"] == "http://prometheus:9090"
    assert provider["type"] == "file"

    mounted = {v.split(":")[1]: v.split(":")[0] for v in compose["grafana"].raw["volumes"]}
    assert ROOT / mounted["/etc/grafana/provisioning"] == folder
    assert ROOT / mounted[provider["options"]["path"]] == BOARD.parent
    home = compose["grafana"].environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/{BOARD.name}"

    board = json.loads(BOARD.read_text(encoding="utf-8"))
    assert board["uid"]
    assert board["title"]
    assert "id" not in board, "Grafana gives one, and refuses another's"
    asked = [
        one
        for p in board["panels"]
        for one in (p, *p.get("targets", []))
        if "row" not in p.values()
    ]
    assert {(one["datasource"]["type"], one["datasource"]["uid"]) for one in asked} == {
        (source["type"], source["uid"])
    }
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


# --- variables in the compose file ---


@pytest.mark.parametrize(
    ("text", "becomes"),
    [
        ("$$HOME costs $$5", "$HOME costs $5"),
        ("${SET}:${EMPTY}", "x:"),
        ("${EMPTY:-other}/${NONE:-}", "other/"),
        ("${NONE:-${SET}}", "x"),
        ("${SET:?why}", "x"),
    ],
)
def test_variables_are_put_in(text: str, becomes: str) -> None:
    assert interpolate(text, {"SET": "x", "EMPTY": ""}) == becomes


@pytest.mark.parametrize("text", ["$HOME", "${A:?set A}", "${A", "${A-b}", "${}x${:-}"])
def test_what_compose_would_refuse_is_refused(text: str) -> None:
    with pytest.raises(ComposeError):
        interpolate(text, {})


def test_an_env_file_is_lines_of_name_and_value(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("# note\n\nA=1\nB=x=y\nC=\n")
    assert read_env_file(file) == {"A": "1", "B": "x=y", "C": ""}
    file.write_text("export A\n")
    with pytest.raises(ComposeError, match="env:1: expected NAME=value"):
        read_env_file(file)
