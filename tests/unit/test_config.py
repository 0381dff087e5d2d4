"""Configuration: what `load_config` promises, and the worker's flags, file and environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import Field

from src.common.config import ConfigError, StrictModel, load_config
from src.rpc.errors import UnknownName
from src.tts.catalog import ROOT
from src.tts.config import (
    ModelManagerSettings,
    TlsSettings,
    WorkerConfig,
    WorkerSettings,
    overrides_from,
    parser,
    read_catalog,
    worker_config,
)


class Pace(StrictModel):
    burst_ms: int = 60


class Example(StrictModel):
    port: int = 7001
    pace: Pace = Pace()
    many: list[Pace] = Field(default_factory=list)
    named: dict[str, Pace] = Field(default_factory=dict)
    maybe: Pace | None = None


def example(tmp_path: Path, text: str, **overrides: Any) -> Example:
    path = tmp_path / "example.yaml"
    path.write_text(text)
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config(path, Example, dotted)


# --- src/common/config.py ---


def test_a_missing_file_and_an_empty_one_are_the_defaults(tmp_path: Path) -> None:
    assert load_config(tmp_path / "absent.yaml", Example) == Example()
    assert example(tmp_path, "# nothing\n") == Example()


def test_a_section_with_all_its_keys_commented_out_is_the_defaults(tmp_path: Path) -> None:
    assert example(tmp_path, "pace:\n  # burst_ms: 20\n") == Example()
    assert example(tmp_path, "pace:\n", pace__burst_ms=40).pace.burst_ms == 40


def test_overrides_win_and_those_not_given_do_not_hide_the_file(tmp_path: Path) -> None:
    text = "port: 1\npace: {burst_ms: 20}"
    assert example(tmp_path, text, port=2, pace__burst_ms=None) == Example(
        port=2, pace=Pace(burst_ms=20)
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot: 1", "unknown key 'prot'; did you mean 'port'?"),
        ("prot:", "unknown key 'prot'; did you mean 'port'?"),
        ("pace: {burst: 1}", "unknown key 'pace.burst'; did you mean 'burst_ms'?"),
        ("many: [{brust_ms: 1}]", "unknown key 'many.0.brust_ms'; did you mean 'burst_ms'?"),
        ("named: {a: {brust_ms: 1}}", "unknown key 'named.a.brust_ms'; did you mean 'burst_ms'?"),
        ("maybe: {brust_ms: 1}", "unknown key 'maybe.brust_ms'; did you mean 'burst_ms'?"),
        ("port: high", "port: "),
        ("pace: 3", "pace: "),
        ("[1, 2]", "expected a mapping at the top, got list"),
        ("port: [", "not valid YAML"),
    ],
)
def test_bad_files_are_refused_by_file_key_and_reason(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        example(tmp_path, text)
    assert "example.yaml" in str(refused.value)
    assert said in str(refused.value)


def test_an_override_into_something_that_is_no_section_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pace: "):
        example(tmp_path, "pace: 3", pace__burst_ms=1)


# --- the worker ---

CATALOG = """
models:
  - {model_id: espeak-en, family: espeak}
  - {model_id: piper-en-joe, family: piper}
  - {model_id: piper-de-thorsten, family: piper}
"""
FILE = """
worker: {adapter: espeak, catalog: %s, voicepacks_dir: %s}
model_manager: {default_model_id: espeak-en, ttl_ms: 5000}
redis: {url: redis://file:6379}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    catalog, path = tmp_path / "catalog.yaml", tmp_path / "worker.yaml"
    catalog.write_text(CATALOG)
    path.write_text(FILE % (catalog, tmp_path / "packs"))
    return path


def configured(file: Path, flags: str = "", **environ: str) -> WorkerConfig:
    args = parser().parse_args(["--config", str(file), *flags.split()])
    return worker_config(args.config, overrides_from(args), environ)


def test_flags_win_over_the_file(file: Path) -> None:
    config = configured(
        file,
        "--default_model piper-en-joe --preload_models espeak-en,piper-de-thorsten --port 0 "
        "--ttl_ms 7 --resident_cap 4 --max_parallel_loads 2 --min_residency_ms 8 --allow_fallback "
        "--host 0.0.0.0 --name w --device cuda:1 --log_level debug",
    )
    manager, worker = config.model_manager, config.worker
    assert manager == ModelManagerSettings(
        default_model_id="piper-en-joe",
        preload_model_ids=["espeak-en", "piper-de-thorsten"],
        ttl_ms=7,
        resident_cap=4,
        max_parallel_loads=2,
        min_residency_ms=8,
    )
    assert (worker.host, worker.port, worker.name) == ("0.0.0.0", 0, "w")  # noqa: S104
    assert (worker.device, worker.log_level, worker.allow_fallback) == ("cuda:1", "debug", True)


def test_what_no_flag_says_is_taken_from_the_file(file: Path) -> None:
    config = configured(file)
    assert config.model_manager.ttl_ms == 5000
    assert config.model_manager.default_model_id == "espeak-en"
    assert config.redis.url == "redis://file:6379"


def test_the_environment_wins_over_the_file_and_a_flag_over_both(file: Path) -> None:
    environ = {"REDIS_URL": "redis://env:6379"}
    assert configured(file, **environ).redis.url == "redis://env:6379"
    assert configured(file, "--redis_url redis://flag:1", **environ).redis.url == "redis://flag:1"


def test_an_adapter_alone_brings_the_first_model_of_its_family(file: Path) -> None:
    config = configured(file, "--adapter piper")
    assert config.model_manager.default_model_id == "piper-en-joe"
    assert config.worker.adapter == "piper"


def test_a_default_model_alone_brings_its_adapter(file: Path) -> None:
    assert configured(file, "--default_model piper-en-joe").worker.adapter == "piper"


def test_an_adapter_and_a_default_of_another_family_are_taken_as_given(file: Path) -> None:
    config = configured(file, "--adapter piper --default_model espeak-en")
    assert (config.worker.adapter, config.model_manager.default_model_id) == ("piper", "espeak-en")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--adapter pipr", "did you mean 'piper'"),
        ("--default_model piper-en-jo", "did you mean 'piper-en-joe'"),
    ],
)
def test_unknown_names_on_the_command_line_name_the_nearest(
    file: Path, flags: str, said: str
) -> None:
    with pytest.raises(UnknownName, match=said):
        configured(file, flags)


def test_neither_adapter_nor_default_is_an_error_that_says_so(file: Path) -> None:
    file.write_text(file.read_text().replace("adapter: espeak,", "").replace("espeak-en", "''"))
    with pytest.raises(ConfigError, match=r"worker.adapter nor model_manager.default_model_id"):
        configured(file)


def test_preloads_that_do_not_fit_under_the_cap_are_refused(file: Path) -> None:
    flags = "--adapter piper --preload_models espeak-en,piper-de-thorsten --resident_cap"
    with pytest.raises(ConfigError, match="raise resident_cap or preload fewer"):
        configured(file, f"{flags} 2")
    configured(file, f"{flags} 3")


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("worker: {sample_rate: 44100}", "worker.sample_rate"),
        ("worker: {overflow: burst}", "worker.overflow"),
        ("worker: {port: 70000}", "worker.port"),
        ("worker: {burst_ms: 200, lead_ms: 100}", "more than lead_ms"),
        ("worker: {tls: {cert: a.pem}}", "cert and key belong together"),
        ("worker: {tls: {ca: a.pem}}", "needs cert and key"),
        ("worker: {alow_fallback: true}", "did you mean 'allow_fallback'"),
        ("model_manager: {resident_cap: 0}", "resident_cap"),
        ("model_manager: {ttl: 5}", "did you mean 'ttl_ms'"),
    ],
)
def test_values_that_cannot_work_are_refused(tmp_path: Path, section: str, said: str) -> None:
    path = tmp_path / "worker.yaml"
    path.write_text(section)
    with pytest.raises(ConfigError, match=said):
        worker_config(path)


@pytest.mark.parametrize("written", ["off", "'off'", "null"])
def test_loudness_and_metrics_can_be_off(file: Path, written: str) -> None:
    added = f"worker: {{loudness_dbfs: {written}, metrics_port: {written}, "
    file.write_text(file.read_text().replace("worker: {", added))
    worker = configured(file).worker
    assert (worker.loudness_dbfs, worker.metrics_port) == (None, None)


@pytest.mark.parametrize("flags", ["--config absent.yaml", "--adaptr piper", "--port high"])
def test_flags_that_nobody_knows_end_with_a_usage_message(
    flags: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(flags.split())
    assert "usage:" in capsys.readouterr().err


def test_flags_are_never_abbreviated() -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--default", "x"])


def test_every_flag_has_a_key_and_no_flag_given_overrides_nothing(file: Path) -> None:
    overrides = overrides_from(parser().parse_args([]))
    assert set(overrides.values()) == {None}
    for key in overrides:
        section, leaf = key.split(".")
        fields = WorkerConfig.model_fields[section].annotation
        assert fields is not None
        assert leaf in fields.model_fields


def test_names_and_addresses_are_settled_when_the_port_is_known() -> None:
    worker = WorkerSettings(adapter="piper", host="10.0.0.5")
    assert worker.announced_addr(7003) == "10.0.0.5:7003"
    assert worker.announced_name(7003).startswith("tts-piper@")
    assert worker.announced_name(7003).endswith(":7003")
    named = WorkerSettings(name="tts-piper@0", advertise_addr="tts0:7001")
    assert (named.announced_name(1), named.announced_addr(1)) == ("tts-piper@0", "tts0:7001")


# --- the shipped file is the manual ---


def test_the_shipped_file_shows_every_key_with_its_default() -> None:
    path = ROOT / "configs" / "worker.yaml"
    shown = yaml.safe_load(path.read_text())
    shipped = load_config(path, WorkerConfig)
    assert set(shown) == set(WorkerConfig.model_fields)
    assert set(shown["worker"]) == set(WorkerSettings.model_fields)
    assert set(shown["worker"]["tls"]) == set(TlsSettings.model_fields)
    assert set(shown["model_manager"]) == set(ModelManagerSettings.model_fields)
    worker = {**shipped.worker.model_dump(), "adapter": ""}
    manager = {**shipped.model_manager.model_dump(), "default_model_id": ""}
    assert worker == WorkerSettings().model_dump()
    assert manager == ModelManagerSettings().model_dump()
    assert shipped.redis == WorkerConfig().redis


def test_the_shipped_file_and_catalog_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = worker_config(Path("configs/worker.yaml"), environ={})
    assert config.model_manager.default_model_id == "piper-en-joe"
    assert config.worker.adapter == "piper"
    assert read_catalog(config).problems == ()
