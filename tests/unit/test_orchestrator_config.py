from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from src.common.config import ConfigError
from src.orchestrator.config import (
    DEFAULT_CONFIG,
    OrchestratorConfig,
    RoutingSettings,
    missing_for_rooms,
    orchestrator_config,
    overrides_from,
    parser,
)
from src.orchestrator.server import CannotStart, choose_transports

MISSING = Path("no-such-file.yaml")


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "orchestrator.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_shipped_file_shows_every_key_with_its_default() -> None:
    raw = yaml.safe_load(DEFAULT_CONFIG.read_text(encoding="utf-8"))
    assert orchestrator_config(DEFAULT_CONFIG, environ={}) == orchestrator_config(
        MISSING, environ={}
    )
    for section, field in OrchestratorConfig.model_fields.items():
        assert field.annotation is not None
        assert set(raw[section]) == set(field.annotation.model_fields), section


def test_the_documents_sample_is_understood_but_for_rooms(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        transport: {webrtc: true, ws_fallback: true}
        asr: {engine: "whisper-small"}
        vad: {aggressiveness: 2}
        routing: {policy: "default", prefer_resident: true}
        redis: {url: "redis://localhost:6379"}
        """,
    )
    config = orchestrator_config(path, environ={})
    assert config.transport.webrtc
    assert (config.asr.engine, config.vad.aggressiveness) == ("whisper-small", 2)
    assert config.redis.url == "redis://localhost:6379"


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    path = written(
        tmp_path, "server: {port: 1111, host: 127.0.0.1}\nredis: {url: 'redis://file'}\n"
    )
    args = parser().parse_args(["--ws", "--port", "2222", "--config", str(path)])
    config = orchestrator_config(
        path, overrides_from(args), {"REDIS_URL": "redis://env", "LLM_MODEL": "m"}
    )
    assert config.server.port == 2222
    assert config.redis.url == "redis://env"
    assert config.llm.model == "m"


@pytest.mark.parametrize(
    ("argv", "transports"),
    [
        ([], (False, True)),
        (["--ws"], (False, True)),
        (["--livekit", "--ws"], (True, True)),
        (["--livekit"], (True, False)),
    ],
)
def test_flags_choose_the_transports(argv: list[str], transports: tuple[bool, bool]) -> None:
    config = orchestrator_config(MISSING, overrides_from(parser().parse_args(argv)), {})
    assert (config.transport.webrtc, config.transport.ws_fallback) == transports


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("severs: {}", "did you mean 'server'"),
        ("limits: {max_sesions: 3}", "did you mean 'max_sessions'"),
        ("server: {port: 70000}", "server.port"),
        ("server: {api_keys: ['with space']}", "letters, digits"),
        ("retention: {audio: true}", "never keeps audio"),
        ("vad: {aggresiveness: 2}", "did you mean 'aggressiveness'"),
        ("[1, 2]", "mapping"),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path: Path, text: str, hint: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=hint) as caught:
        orchestrator_config(path, environ={})
    assert str(path) in str(caught.value)


def test_an_open_door_is_refused_and_the_environment_closes_it() -> None:
    flags = {"server.host": "0.0.0.0"}  # noqa: S104
    with pytest.raises(ConfigError, match="DUPLEX_API_KEY"):
        orchestrator_config(MISSING, flags, {})
    config = orchestrator_config(MISSING, flags, {"DUPLEX_API_KEY": "one, two"})
    assert config.server.keys == ("one", "two")


def test_keys_are_not_shown() -> None:
    config = orchestrator_config(MISSING, {}, {"DUPLEX_API_KEY": "top-secret"})
    assert "top-secret" not in repr(config)


def test_prefer_resident_is_laid_over_every_mode() -> None:
    policy = RoutingSettings(prefer_resident=False).load()
    assert {mode.prefer_resident for mode in policy.routing.values()} == {False}


def test_a_mode_that_the_routing_file_lacks_is_named() -> None:
    with pytest.raises(ConfigError, match="'fast'"):
        RoutingSettings(policy="fast").load()


ROOMS = {
    "LIVEKIT_URL": "ws://127.0.0.1:7880",
    "LIVEKIT_API_KEY": "devkey",
    "LIVEKIT_API_SECRET": "a-secret-of-more-than-thirty-two-characters",
}


def started_with(*argv: str, environ: dict[str, str]) -> OrchestratorConfig:
    flags = overrides_from(parser().parse_args(argv))
    return choose_transports(orchestrator_config(MISSING, flags, environ))


def test_rooms_and_the_websocket_are_chosen_by_flags() -> None:
    both = started_with("--ws", "--livekit", environ=ROOMS).transport
    assert (both.webrtc, both.ws_fallback) == (True, True)
    alone = started_with("--livekit", environ=ROOMS).transport
    assert (alone.webrtc, alone.ws_fallback) == (True, False)


@pytest.mark.parametrize("absent", [*ROOMS, None])
def test_rooms_alone_cannot_start_without_a_server(absent: str | None) -> None:
    environ = {name: value for name, value in ROOMS.items() if absent and name != absent}
    with pytest.raises(CannotStart, match=f"{absent or 'LIVEKIT_URL and .*'}.*or start with --ws"):
        started_with("--livekit", environ=environ)


def test_beside_a_websocket_rooms_without_a_server_are_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = started_with("--ws", "--livekit", environ={})
    assert (config.transport.webrtc, config.transport.ws_fallback) == (False, True)
    assert "LIVEKIT_URL" in capsys.readouterr().err
    assert missing_for_rooms(config.livekit) == [*ROOMS]


@pytest.mark.parametrize(
    "url", ["127.0.0.1:7880", "ws://", "ws://[::1", "ws://host:port", "ws://host:99999"]
)
def test_a_livekit_url_that_cannot_be_one_is_found_at_the_start(url: str) -> None:
    with pytest.raises(ConfigError, match=r"livekit\.url"):
        started_with("--livekit", environ={**ROOMS, "LIVEKIT_URL": url})


def test_livekit_is_not_imported_where_there_are_no_rooms() -> None:
    program = (
        "import sys, src.orchestrator.server; print([m for m in sys.modules if 'livekit' in m])"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
