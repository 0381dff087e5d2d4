"""Which folder is which model's, and what makes a pack good, bad or not there yet."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from src.rpc.errors import UnknownName
from src.tts.adapters import FAMILIES
from src.tts.catalog import ROOT, load_catalog
from src.tts.families.cosyvoice2 import pack as cosyvoice2_pack
from src.tts.families.xtts import loading as xtts_loading
from src.tts.families.xtts import pack as xtts_pack
from src.tts.packs import Pack, State, Verdict, check_pack, find_packs, limits_of, pick
from src.tts.recordings import Transcripts

LISTED = """
models:
  - model_id: cosyvoice2-en-base
    family: cosyvoice2
    files:
      cosyvoice2.yaml: {sources: ["path:voicepacks/cosyvoice2/en-base/cosyvoice2.yaml"]}
      llm.safetensors: {sources: ["path:voicepacks/cosyvoice2/en-base/llm.safetensors"]}
      spk2info.pt: {optional: true, sources: ["path:voicepacks/cosyvoice2/en-base/spk2info.pt"]}
  - model_id: melo-en
    family: melo
    files:
      config.json: {sources: ["path:voicepacks/melo/en/config.json"]}
  - {model_id: espeak-en, family: espeak}
"""
HEADER = json.dumps({"w": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}).encode()
_ZIP = io.BytesIO()
with zipfile.ZipFile(_ZIP, "w") as _made:
    _made.writestr("m/data.pkl", pickle.dumps({}, 2))
PLAIN = _ZIP.getvalue()
WEIGHTS = struct.pack("<Q", len(HEADER)) + HEADER + b"1234"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    put(tmp_path, "configs/model_catalog.yaml", LISTED)
    put(tmp_path, "voicepacks/cosyvoice2/en-base/metadata.yaml", "")
    return tmp_path


def put(root: Path, name: str, content: str | bytes = WEIGHTS) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def packs(root: Path) -> dict[tuple[str, str], Pack]:
    voicepacks = root / "voicepacks"
    catalog = load_catalog(root / "configs/model_catalog.yaml", voicepacks, root)
    return find_packs(catalog, voicepacks)


def verdict(root: Path, family: str, name: str) -> Verdict:
    return check_pack(packs(root)[family, name])


def test_packs_are_the_folders_that_are_there_and_those_that_the_catalog_names(
    root: Path,
) -> None:
    put(root, "voicepacks/piper/mine/metadata.yaml", "model_id: amy")
    put(root, "voicepacks/piper/broken/metadata.yaml", "langages: [en]")
    found = packs(root)
    assert {key: pack.meta.model_id for key, pack in found.items()} == {
        ("cosyvoice2", "en-base"): "cosyvoice2-en-base",
        ("piper", "mine"): "amy",
        ("melo", "en"): "melo-en",
    }
    assert found["melo", "en"].folder == root / "voicepacks" / "melo" / "en"


@pytest.mark.parametrize(
    ("family", "name", "said"),
    [
        ("cosyvoice", "en-base", "unknown family 'cosyvoice'; did you mean 'cosyvoice2'?"),
        ("cosyvoice2", "enbase", "unknown voice pack of cosyvoice2 'enbase'; did you mean 'en-b"),
        ("melo-e", "", "unknown voice pack 'melo-e'; did you mean 'melo-en'?"),
    ],
)
def test_a_pack_that_nobody_knows_names_the_nearest(
    root: Path, family: str, name: str, said: str
) -> None:
    with pytest.raises(UnknownName) as refused:
        pick(packs(root), family, name)
    assert refused.value.message.startswith(said)


def test_a_model_id_alone_is_enough(root: Path) -> None:
    assert str(pick(packs(root), "melo-en")) == "melo en"
    assert pick(packs(root), "melo", "en").meta.model_id == "melo-en"


def test_a_folder_with_nothing_but_notes_is_not_fetched_yet(root: Path) -> None:
    put(root, "voicepacks/cosyvoice2/en-base/README.md", "what to put here")
    found = verdict(root, "cosyvoice2", "en-base")
    assert found.state is State.ABSENT
    assert found.missing[:2] == ["cosyvoice2.yaml is not there", "llm.safetensors is not there"]


def whole(root: Path) -> Path:
    folder = root / "voicepacks/cosyvoice2/en-base"
    record(folder, "seed.wav")
    put(folder, "ref/seed.txt", "what is said")
    put(folder, "cosyvoice2.yaml", "seed: !apply:random.seed [1986]")
    put(folder, "llm.safetensors")
    return folder


def test_a_pack_with_all_it_needs_is_good_without_what_is_optional(root: Path) -> None:
    whole(root)
    found = verdict(root, "cosyvoice2", "en-base")
    assert (found.state, found.files, found.problems) == (State.OK, 4, [])
    assert any("spk2info.pt is not there" in note for note in found.notes)


def test_a_pack_half_of_which_is_there_is_bad(root: Path) -> None:
    (whole(root) / "cosyvoice2.yaml").unlink()
    found = verdict(root, "cosyvoice2", "en-base")
    assert (found.state, found.missing) == (State.BAD, ["cosyvoice2.yaml is not there"])


def test_tags_that_an_adapter_drops_are_no_fault_elsewhere_they_are(root: Path) -> None:
    folder = whole(root)
    put(folder, "more.yaml", "seed: !apply:random.seed [1986]")
    (problem,) = verdict(root, "cosyvoice2", "en-base").problems
    assert problem.startswith("more.yaml names code to run")


def test_a_file_that_is_not_the_pinned_one_is_bad(root: Path) -> None:
    whole(root)
    pinned = LISTED.replace("llm.safetensors: {", "llm.safetensors: {sha256: '%s', " % ("0" * 64))
    put(root, "configs/model_catalog.yaml", pinned)
    found = verdict(root, "cosyvoice2", "en-base")
    assert found.state is State.BAD
    assert "llm.safetensors" in found.problems[0]
    assert f"expected sha256 {'0' * 64}" in found.problems[0]


def test_a_cut_off_file_is_bad_by_name(root: Path) -> None:
    put(whole(root), "llm.safetensors", WEIGHTS[:-1])
    found = verdict(root, "cosyvoice2", "en-base")
    assert found.problems == ["llm.safetensors is cut off: 3 bytes of tensors, its header says 4"]


# --- recordings ---


def record(folder: Path, name: str, seconds: float = 3.0, channels: int = 1) -> None:
    path = folder / "ref" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    samples = rng.normal(0, 0.1, (int(24_000 * seconds), channels)).astype(np.float32)
    soundfile.write(path, samples, 24_000)


@pytest.mark.parametrize(
    ("seconds", "channels", "said"),
    [(0.2, 1, "lasts 0.2 s"), (31.0, 1, "lasts 31.0 s"), (3.0, 2, "has 2 channels")],
)
def test_a_recording_that_no_voice_can_be_made_of_is_bad(
    root: Path, seconds: float, channels: int, said: str
) -> None:
    folder = whole(root)
    record(folder, "seed.wav", seconds, channels)
    found = verdict(root, "cosyvoice2", "en-base")
    assert found.state is State.BAD
    assert said in found.problems[0]


def test_a_pack_without_a_voice_is_bad_unless_its_family_makes_one_up(root: Path) -> None:
    folder = whole(root)
    shutil.rmtree(folder / "ref")
    found = verdict(root, "cosyvoice2", "en-base")
    assert (found.state, found.problems) == (State.BAD, [])
    assert "put 5 to 15 s of one into ref/seed.wav" in found.missing[0]
    put(folder, "spk2info.pt", PLAIN)
    assert verdict(root, "cosyvoice2", "en-base").state is State.OK
    put(root, "voicepacks/spark_tts/mine/metadata.yaml", "")
    put(root, "voicepacks/spark_tts/mine/model.safetensors")
    assert verdict(root, "spark_tts", "mine").state is State.OK


def test_a_voice_without_the_transcript_that_its_family_needs_is_bad(root: Path) -> None:
    put(root, "voicepacks/sesame/mine/metadata.yaml", "voices: [anna]")
    folder = put(root, "voicepacks/sesame/mine/model.safetensors").parent
    record(folder, "anna.wav")
    (problem,) = verdict(root, "sesame", "mine").problems
    assert "has ref/anna.wav but not ref/anna.txt" in problem


def test_a_listed_voice_may_be_a_preset_and_must_otherwise_be_recorded(root: Path) -> None:
    put(root, "voicepacks/xtts/mine/metadata.yaml", "voices: [ana]")
    put(root, "voicepacks/xtts/mine/speakers_xtts.pth", PLAIN)
    assert verdict(root, "xtts", "mine").state is State.OK
    put(root, "voicepacks/sesame/mine/metadata.yaml", "voices: [ana, bo]")
    folder = put(root, "voicepacks/sesame/mine/model.safetensors").parent
    record(folder, "bo.wav")
    put(folder, "ref/bo.txt", "what is said")
    (problem,) = verdict(root, "sesame", "mine").problems
    assert "unknown recording for a voice of sesame-mine 'ana'" in problem


def test_the_limits_are_the_adapters_own() -> None:
    xtts = limits_of("xtts")
    assert xtts is not None
    assert xtts.presets == xtts_pack.PRESETS
    cosy = limits_of("cosyvoice2")
    assert cosy is not None
    assert cosy.presets == cosyvoice2_pack.PRESETS
    assert (xtts.shortest_ms, xtts.transcripts) == (xtts_loading._SHORTEST_MS, Transcripts.OPTIONAL)
    takes_recordings = {family for family in FAMILIES if limits_of(family) is not None}
    assert takes_recordings == {"sesame", "unsloth_sesame", "xtts", "spark_tts", "cosyvoice2"}


def test_every_pack_that_this_repository_names_can_be_looked_over() -> None:
    catalog = load_catalog(ROOT / "configs/model_catalog.yaml", ROOT / "voicepacks")
    found = find_packs(catalog, ROOT / "voicepacks")
    names = {str(pack) for pack in found.values()}
    assert {"piper en-joe", "cosyvoice2 en-base", "sesame csm-1b", "xtts v2-en"} <= names
    assert {"spark_tts 0.5b", "parler_tts mini-v1", "melo en"} <= names
    for pack in found.values():
        assert all(pack.place(name) for name in pack.meta.files)
