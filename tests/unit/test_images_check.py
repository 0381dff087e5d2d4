"""`just images-check` without an engine: how it names, runs and judges what it starts."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from scripts.compose_file import Service, services
from scripts.images_check import environment, main
from scripts.images_engine import (
    MIRRORS,
    ROOT,
    Container,
    EngineError,
    Network,
    _debootstrap,
    alone,
    run_flags,
)
from scripts.images_family import TINY, make_pack, service_for
from scripts.images_turn import Failed, judge
from src.demo.play import QUESTION
from src.tts.catalog import load_catalog
from src.tts.config import parser


@pytest.fixture(scope="module")
def compose() -> dict[str, Service]:
    return services(ROOT / "docker-compose.yml", environment())


def test_the_check_runs_what_the_file_says(compose: dict[str, Service], tmp_path: Path) -> None:
    network = Network("base", ["tts0"], tmp_path / "hosts")
    flags = " ".join(run_flags(Container(compose["tts0"], network), "image"))
    for wanted in (
        "--init", "--read-only --read-only-tmpfs=false", "--tmpfs /tmp:exec,mode=1777,size=64m",
        "--cap-drop ALL", "--security-opt no-new-privileges", "--env REDIS_URL=redis://redis:6379",
        f"--volume {ROOT}/configs:/app/configs:ro", "--volume duplex-check-tts0-cache:/cache",
    ):  # fmt: skip
        assert wanted in flags
    redis = " ".join(run_flags(Container(compose["redis"], network), "image"))
    assert "--user redis" in redis
    assert "--tmpfs /tmp:noexec,mode=1777,size=64m" in redis, "as Docker would"


def events(understood: str, answered: str) -> list[dict[str, Any]]:
    return [
        {"type": "transcript", "final": True, "text": understood},
        {"type": "reply.text", "text": answered},
        {"type": "latency", "first_audio_ms": 321},
    ]


def wav(path: Path, level: int) -> Path:
    soundfile.write(path, np.full(4_800, level, dtype=np.int16), 48_000)
    return path


def test_a_turn_is_judged_by_what_was_understood_and_heard(tmp_path: Path) -> None:
    loud, silent = wav(tmp_path / "loud.wav", 3_000), wav(tmp_path / "silent.wav", 0)
    turn = judge(events("how many days are there in a week", "You said that."), loud)
    assert turn["first_audio_ms"] == 321
    whole = events(QUESTION, "You said that.")
    for wrong, reply in (
        (events("good morning", "You said that."), loud),
        (events(QUESTION, ""), loud),
        (whole, silent),
        (whole[:2], loud),
    ):
        with pytest.raises(Failed):
            judge(wrong, reply)


def test_a_second_run_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with alone(lock):
        with (
            pytest.raises(EngineError, match=rf"another .* \(process {os.getpid()}\)"),
            alone(lock),
        ):
            pass
        with pytest.raises(EngineError), alone(lock):  # the refusal took nothing away
            pass
    lock.write_text("4194304000, of a run long ago")
    with alone(lock):
        assert lock.read_text() == str(os.getpid())


def test_a_run_touches_nothing_while_there_is_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock, ran = tmp_path / "lock", []
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("scripts.images_engine.LOCK", lock)
    monkeypatch.setattr("scripts.images_check.check", lambda *_: ran.append("touched"))
    with alone(lock):
        assert main([]) == 1
    assert not ran
    assert "another images-check is running" in capsys.readouterr().out
    assert main([]) == 0
    assert ran


def test_every_base_has_a_script_by_which_debootstrap_makes_it(tmp_path: Path) -> None:
    """Debian's knows no Ubuntu that is younger than itself, and all of them go by one script."""
    assert _debootstrap("noble", tmp_path)[-1] == _debootstrap("jammy", tmp_path)[-1] == "gutsy"
    assert _debootstrap("bookworm", tmp_path)[-1] == MIRRORS["bookworm"]


@pytest.mark.parametrize("extra", sorted(TINY))
def test_a_familys_image_is_the_compose_files_on_the_processor(extra: str, tmp_path: Path) -> None:
    service = service_for(extra, environment(), tmp_path)
    assert service.dockerfile == "Dockerfile.tts"
    assert service.build_args["EXTRAS"] == extra
    assert f"{tmp_path}:/app/voicepacks:ro" in service.raw["volumes"]
    args = parser().parse_args(service.command[3:])
    assert (args.adapter, args.device) == (TINY[extra].adapter, "cpu")
    assert args.default_model == TINY[extra].model


@pytest.mark.parametrize("extra", sorted(name for name, tiny in TINY.items() if tiny.make))
def test_a_familys_pack_is_made_in_its_image(
    extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def run_once(image: str, flags: list[str], *command: str) -> str:
        asked.extend([image, *flags, *command])
        made = flags[1].partition(":")[0]
        Path(made, "tiny").mkdir()
        return ""

    monkeypatch.setattr("scripts.images_engine.run_once", run_once)
    make_pack(extra, "image", tmp_path / "packs")
    [pack] = load_catalog(ROOT / "configs/model_catalog.yaml", tmp_path / "packs").of_family(
        TINY[extra].adapter
    )[-1:]
    assert pack.model_id == TINY[extra].model
    code = asked[-1]
    compile(code, "made", "exec")
    module = re.search(r"from (tests\.families\.\w+\.tiny) import (\w+)", code)
    assert module
    source = ROOT / (module[1].replace(".", "/") + ".py")  # needs torch to be imported
    assert f"def {module[2]}(" in source.read_text(encoding="utf-8")


def test_without_the_tools_it_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert main([]) == 2
    assert "apt-get install" in capsys.readouterr().err
