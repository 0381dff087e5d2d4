"""Voice packs that are wrong, and ones that would do harm."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from src.rpc.errors import CorruptModel, DuplexError, InvalidArgument, Unavailable, UnknownName
from src.tts.families.cosyvoice2.pack import NEEDED
from tests.families.cosyvoice.packs import changed, chunks, files_of, load, rewrite
from tests.families.cosyvoice.tiny import record

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.timeout(400)  # the first test waits for the package's import

HOSTILE = """
__now: !apply:os.system ["touch {mark}"]
__new: !new:subprocess.Popen [["touch", "{mark}"]]
__tag: !!python/object/apply:os.system ["touch {mark}"]
__module: !module:antigravity
"""


def test_a_pack_s_yaml_is_never_run(pack: Path, tmp_path: Path) -> None:
    mark = tmp_path / "was_here"
    good = (pack / "cosyvoice2.yaml").read_text()
    hostile = changed(
        pack,
        tmp_path,
        lambda copy: rewrite(copy / "cosyvoice2.yaml", HOSTILE.format(mark=mark) + good),
    )
    model = load(hostile)
    assert chunks(model, "Hello.", most=1)
    model.unload()
    assert not mark.exists()


def test_the_package_s_loader_would_have_run_it(tmp_path: Path) -> None:
    """So that the test above can fail."""
    hyperpyyaml = pytest.importorskip("hyperpyyaml")
    mark = tmp_path / "was_here"
    hyperpyyaml.load_hyperpyyaml(f'a: !apply:os.mkdir ["{mark}"]\n')
    assert mark.exists()


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_file_is_named(pack: Path, tmp_path: Path, name: str) -> None:
    poor = changed(pack, tmp_path, lambda copy: (copy / name).unlink())
    with pytest.raises(CorruptModel, match=f"{name} missing; docs/VOICEPACK_COSYVOICE2"):
        load(poor)


def truncated(name: str) -> Callable[[Path], None]:
    def cut(copy: Path) -> None:
        rewrite(copy / name, (copy / name).read_bytes()[:1000])

    return cut


def pickled(copy: Path) -> None:
    rewrite(copy / "flow.pt", pickle.dumps({"a": pytest.raises}, protocol=2))


def another_size(copy: Path) -> None:
    text = (copy / "cosyvoice2.yaml").read_text()
    rewrite(copy / "cosyvoice2.yaml", text.replace("base_channels: 32", "base_channels: 64"))


def without_a_weight(copy: Path) -> None:
    weights = torch.load(copy / "flow.pt", weights_only=True)
    del weights["encoder_proj.bias"]
    (copy / "flow.pt").unlink()
    torch.save(weights, copy / "flow.pt")


def no_yaml(copy: Path) -> None:
    rewrite(copy / "cosyvoice2.yaml", "a: [")


def a_preset_of_another_family(copy: Path) -> None:
    (copy / "spk2info.pt").unlink()
    torch.save({"bob": {"embedding": torch.zeros(1, 80)}}, copy / "spk2info.pt")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (truncated("llm.pt"), "llm.pt cannot be read"),
        (truncated("CosyVoice-BlankEN/model.safetensors"), "its files cannot be read"),
        (truncated("campplus.onnx"), "campplus.onnx cannot be loaded"),
        (pickled, "pickled objects.*voicepack-convert"),
        (another_size, r"hift.pt is not what cosyvoice2.yaml describes"),
        (without_a_weight, "flow.pt is not what.*encoder_proj.bias"),
        (no_yaml, "cosyvoice2.yaml cannot be read"),
        (a_preset_of_another_family, r"'bob'.*\(1, 80\), not \(1, 192\)"),
    ],
)
def test_a_damaged_file_is_named(
    pack: Path, tmp_path: Path, change: Callable[[Path], None], said: str
) -> None:
    with pytest.raises(CorruptModel, match=f"(?s){said}"):
        load(changed(pack, tmp_path, change))


@pytest.mark.parametrize(
    "place",
    ["torch.nn.Module.to", "src.tts.families.cosyvoice2.frontend._speaker_of"],
    ids=["weights", "voices"],
)
def test_memory_that_runs_out_while_loading_is_no_corrupt_model(
    pack: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(place, full)
    with pytest.raises(Unavailable, match="cosyvoice2-tiny does not fit into the memory of cpu"):
        load(pack)


def recording(seconds: float, *, channels: int = 1, level: float = 0.3) -> Callable[[Path], None]:
    def write(copy: Path) -> None:
        path = copy / "ref" / "seed.wav"
        path.unlink()
        noise = np.random.default_rng(0).standard_normal((int(24_000 * seconds), channels))
        soundfile.write(path, (noise * level).clip(-1, 1).astype(np.float32), 24_000)

    return write


def no_transcript(copy: Path) -> None:
    (copy / "ref" / "seed.txt").unlink()


def no_voice(copy: Path) -> None:
    for name in ("ref/seed.wav", "ref/seed.txt", "spk2info.pt"):
        (copy / name).unlink()


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (recording(0.1), InvalidArgument, "lasts 0.1 s"),
        (recording(31), InvalidArgument, "lasts 31.0 s"),
        (recording(2, level=0.0), InvalidArgument, "silent"),
        (recording(2, channels=2), InvalidArgument, "2 channels"),
        (no_transcript, CorruptModel, "seed.wav but not ref/seed.txt"),
        (no_voice, CorruptModel, "has no voice.*ref/seed.wav"),
    ],
    ids=["short", "long", "silent", "stereo", "no transcript", "no voice"],
)
def test_a_recording_that_makes_no_voice_is_refused_in_words(
    pack: Path,
    tmp_path: Path,
    change: Callable[[Path], None],
    error: type[DuplexError],
    said: str,
) -> None:
    with pytest.raises(error, match=said):
        load(changed(pack, tmp_path, change))


def test_listed_voices_are_these_in_this_order(pack: Path, tmp_path: Path) -> None:
    def more(copy: Path) -> None:
        record(copy / "ref" / "bob.wav", 1.0)
        (copy / "ref" / "bob.txt").write_text("I am Bob.")

    copy = changed(pack, tmp_path, more)
    model = load(copy)
    assert model.voices == ("default", "bob", "anna")
    model.unload()
    for voices in (["anna", "bob"], ["bob", "anna"]):
        model = load(copy, voices=voices)
        assert model.voices == tuple(voices)
        model.unload()
    with pytest.raises(UnknownName, match="bob"):
        load(copy, voices=["bobb"])


def test_a_pack_is_not_written_to(pack: Path) -> None:
    def state() -> dict[str, tuple[int, int]]:
        return {
            name: (path.stat().st_mtime_ns, path.stat().st_size)
            for name, path in files_of(pack).items()
        }

    before = state()
    load(pack).unload()
    assert state() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused(pack: Path) -> None:
    with pytest.raises(InvalidArgument, match="this machine has none"):
        load(pack, "cuda:0")


@pytest.mark.parametrize("settings", [{"speed": "9"}, {"max_streams": "0"}, {"spead": "1"}])
def test_wrong_settings_of_an_entry_fail_the_load(pack: Path, settings: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument, match=next(iter(settings))):
        load(pack, settings=settings)
