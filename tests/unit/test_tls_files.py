"""Files for TLS that cannot work are refused at the start, by the name of the key and the file."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from src.common.config import ConfigError
from src.orchestrator.config import DEFAULT_CONFIG, orchestrator_config
from src.orchestrator.server import run
from src.orchestrator.worker_tls import WorkerTls, WorkerTlsSettings
from src.rpc.tls import server_fault
from src.tts import worker
from src.tts.catalog import ROOT
from src.tts.config import TlsSettings, worker_config
from tests.certificates import Authority, Pair, locked

NO_FILE = Path("no-such-file.yaml")


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def pair(ours: Authority) -> Pair:
    return ours.sign("pair")


@pytest.fixture(scope="module")
def other(ours: Authority) -> Pair:
    return ours.sign("other")


@pytest.fixture(scope="module")
def expired(ours: Authority) -> Pair:
    return ours.sign("expired", days=-1)


def refused(**files: Path) -> str:
    with pytest.raises(ConfigError) as error:
        WorkerTlsSettings(**files).load()
    return str(error.value)


def refused_by_worker(**files: Path) -> str:
    with pytest.raises(ConfigError) as error:
        worker._credentials(TlsSettings(**files))
    return str(error.value)


# --- the files ---


def test_a_missing_file_is_named_with_its_key(ours: Authority, pair: Pair) -> None:
    gone = ours.folder / "gone.pem"
    said = f"{gone}: No such file or directory"
    assert refused(ca=gone) == f"tts.tls.ca: {said}"
    assert refused(ca=ours.ca, cert=gone, key=pair.key) == f"tts.tls.cert: {said}"
    assert refused(ca=ours.ca, cert=pair.cert, key=gone) == f"tts.tls.key: {said}"
    assert refused_by_worker(cert=pair.cert, key=gone) == f"worker.tls.key: {said}"
    assert refused_by_worker(cert=pair.cert, key=pair.key, ca=gone) == f"worker.tls.ca: {said}"


def test_a_certificate_of_another_key_is_refused(ours: Authority, pair: Pair, other: Pair) -> None:
    said = refused(ca=ours.ca, cert=pair.cert, key=other.key)
    assert f"tts.tls.cert ({pair.cert}) does not belong to tts.tls.key ({other.key})" in said
    said = refused_by_worker(cert=pair.cert, key=other.key)
    assert f"worker.tls.cert ({pair.cert}) does not belong to worker.tls.key" in said


def test_files_that_hold_something_else_are_refused(ours: Authority, pair: Pair) -> None:
    assert f"tts.tls.ca: {pair.key} holds no certificate" in refused(ca=pair.key)
    said = refused(ca=ours.ca, cert=pair.key, key=pair.key)
    assert f"tts.tls.cert: {pair.key} holds no certificate" in said
    said = refused(ca=ours.ca, cert=pair.cert, key=pair.cert)
    assert f"tts.tls.key: {pair.cert} holds no private key" in said
    said = refused_by_worker(cert=pair.cert, key=pair.key, ca=pair.key)
    assert f"worker.tls.ca: {pair.key} holds no certificate" in said


def test_a_key_behind_a_passphrase_is_refused_and_nobody_is_asked(
    ours: Authority, pair: Pair
) -> None:
    key = locked(pair.key)
    said = refused(ca=ours.ca, cert=pair.cert, key=key)
    assert f"tts.tls.key: {key} is locked with a passphrase" in said


def test_an_expired_certificate_is_refused(ours: Authority, expired: Pair) -> None:
    said = refused(ca=ours.ca, cert=expired.cert, key=expired.key)
    assert f"tts.tls.cert: {expired.cert}: certificate has expired" in said
    said = refused_by_worker(cert=expired.cert, key=expired.key)
    assert f"worker.tls.cert: {expired.cert}: certificate has expired" in said


def test_a_bundle_with_comments_in_any_script_is_read(ours: Authority) -> None:
    bundle = ours.folder / "bundle.pem"
    bundle.write_text(f"# Főtanúsítvány\n{ours.ca.read_text()}", encoding="utf-8")
    assert WorkerTlsSettings(ca=bundle).load().client is not None


def test_a_certificate_for_clients_only_is_good_for_a_caller(ours: Authority) -> None:
    only = ours.sign("only", use="clientAuth")
    assert WorkerTlsSettings(ca=ours.ca, cert=only.cert, key=only.key).load().client is not None
    assert server_fault(only.cert, only.key, "127.0.0.1")


def test_a_worker_knows_which_names_its_certificate_is_for(ours: Authority, pair: Pair) -> None:
    assert server_fault(pair.cert, pair.key, "127.0.0.1") == ""
    assert server_fault(pair.cert, pair.key, "localhost") == ""
    assert "gpubox2.lan" in server_fault(pair.cert, pair.key, "gpubox2.lan")
    assert "10.0.0.5" in server_fault(pair.cert, pair.key, "10.0.0.5")


def test_a_worker_that_announces_another_name_says_so_in_its_log(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    tls = TlsSettings(cert=pair.cert, key=pair.key)
    worker._warn_of_another_name(tls, "127.0.0.1:7001")
    worker._warn_of_another_name(TlsSettings(), "gpubox2.lan:7001")
    assert not caplog.records
    worker._warn_of_another_name(tls, "gpubox2.lan:7001")
    assert "gpubox2.lan" in caplog.text
    assert "worker.advertise_addr has to be a subjectAltName" in caplog.text


def test_the_documentations_commands_make_files_that_are_good(
    ours: Authority, tmp_path: Path
) -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    [commands] = [block for block in blocks if "openssl" in block]
    subprocess.run(["bash", "-ec", commands], cwd=tmp_path, check=True, capture_output=True)
    cert, key = tmp_path / "gpubox2.pem", tmp_path / "gpubox2.key"
    assert worker._credentials(TlsSettings(cert=cert, key=key, ca=tmp_path / "ca.pem"))
    assert WorkerTlsSettings(ca=tmp_path / "ca.pem", cert=cert, key=key).load().client is not None
    assert server_fault(cert, key, "gpubox2.lan") == server_fault(cert, key, "10.0.0.5") == ""


# --- the settings ---


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{ca: a.pem, cert: b.pem}", "cert and key belong together"),
        ("{ca: a.pem, key: b.pem}", "cert and key belong together"),
        ("{cert: a.pem, key: b.pem}", "cert and key need ca"),
        ("{cafile: a.pem}", "unknown key 'tts.tls.cafile'"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, written: str, said: str) -> None:
    path = tmp_path / "orchestrator.yaml"
    path.write_text(f"tts: {{tls: {written}}}")
    with pytest.raises(ConfigError, match=said) as refusal:
        orchestrator_config(path, environ={})
    assert "tts.tls" in str(refusal.value)


def test_the_shipped_file_shows_every_key() -> None:
    shown = yaml.safe_load(DEFAULT_CONFIG.read_text(encoding="utf-8"))["tts"]["tls"]
    assert set(shown) == set(WorkerTlsSettings.model_fields)


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "orchestrator.yaml"
    path.write_text("tts: {tls: {ca: file.pem, allow_plain: true}}")
    environ = {f"DUPLEX_TTS_TLS_{part}": f"env-{part}" for part in ("CA", "CERT", "KEY")}
    tls = orchestrator_config(path, environ=environ).tts.tls
    assert (tls.ca, tls.cert, tls.key) == (Path("env-CA"), Path("env-CERT"), Path("env-KEY"))
    assert tls.allow_plain
    assert orchestrator_config(path, environ={}).tts.tls.ca == Path("file.pem")


def test_the_workers_environment_wins_over_its_file(tmp_path: Path) -> None:
    path = tmp_path / "worker.yaml"
    path.write_text("worker: {adapter: espeak, tls: {cert: file.pem, key: file.key}}")
    environ = {f"WORKER_TLS_{part}": f"env-{part}" for part in ("CA", "CERT", "KEY")}
    tls = worker_config(path, environ=environ).worker.tls
    assert (tls.ca, tls.cert, tls.key) == (Path("env-CA"), Path("env-CERT"), Path("env-KEY"))
    assert worker_config(path, environ={}).worker.tls.cert == Path("file.pem")


def test_the_orchestrator_does_not_start_with_files_that_cannot_be_used(
    ours: Authority, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUPLEX_TTS_TLS_CA", str(ours.folder / "gone.pem"))
    assert run(["--ws", "--port", "0"]) == 2
    assert "cannot start: tts.tls.ca: " in capsys.readouterr().err


# --- who is called, and how ---


@pytest.mark.parametrize(
    "target", ["127.0.0.1:7001", "localhost:7001", "[::1]:7001", "unix:/run/worker.sock"]
)
def test_plain_text_on_this_machine_is_fine(ours: Authority, target: str) -> None:
    assert WorkerTlsSettings(ca=ours.ca).load().refusal(target, tls=False) == ""


@pytest.mark.parametrize("target", ["10.0.0.5:7001", "gpubox2.lan:7001", "[fd00::1]:7001"])
def test_plain_text_to_another_machine_is_refused_where_tls_is_set_up(
    ours: Authority, target: str
) -> None:
    settings = WorkerTlsSettings(ca=ours.ca)
    assert "tts.tls.allow_plain" in settings.load().refusal(target, tls=False)
    assert settings.load().refusal(target, tls=True) == ""
    moving = settings.model_copy(update={"allow_plain": True})
    assert moving.load().refusal(target, tls=False) == ""
    assert WorkerTls().refusal(target, tls=False) == ""


def test_a_worker_with_tls_needs_an_authority() -> None:
    assert "set tts.tls.ca" in WorkerTls().refusal("127.0.0.1:7001", tls=True)
