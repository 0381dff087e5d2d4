"""Packs and recordings: what is loaded, what is refused in which words; nobody writes to them."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import soundfile

from src.rpc.errors import CorruptModel, InvalidArgument, Unavailable, UnknownName
from src.tts.families.xtts.pack import plain_checkpoint
from tests.families.xtts.tiny import files_of, load, make_tiny_pack, said, spec

pytestmark = pytest.mark.usefixtures("brief")

Change = Callable[[Path], None]


@pytest.fixture
def pack(tiny_pack: Path, tmp_path: Path) -> Path:
    """One of its own to spoil: links to the files of the whole one."""
    folder = tmp_path / "pack"
    folder.mkdir()
    for name, path in files_of(tiny_pack).items():
        (folder / name).symlink_to(path)
    return folder


def put(path: Path, content: str | bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def saved(path: Path, content: Any) -> None:
    import torch

    path.unlink(missing_ok=True)
    torch.save(content, path)


def checkpoint_of(pack: Path) -> dict[str, Any]:
    import torch

    checkpoint: dict[str, Any] = torch.load(pack / "model.pth", weights_only=True)
    return checkpoint


# --- checkpoints ---


def old_checkpoint(pack: Path) -> dict[str, Any]:
    """As the first releases are: the configuration beside the weights, as an object."""
    from TTS.tts.configs.xtts_config import XttsConfig

    return {**checkpoint_of(pack), "config": XttsConfig()}


def test_a_checkpoint_with_pickled_objects_is_refused_and_stays_as_it_is(pack: Path) -> None:
    """The package itself would write it anew where it lies."""
    saved(pack / "model.pth", old_checkpoint(pack))
    before = (pack / "model.pth").read_bytes()
    with pytest.raises(CorruptModel, match=r"just voicepack-convert .*model\.pth"):
        load(files_of(pack))
    assert (pack / "model.pth").read_bytes() == before


def test_made_plain_it_loads_and_sounds_as_before(pack: Path, tiny_pack: Path) -> None:
    saved(pack / "model.pth", plain_checkpoint(old_checkpoint(pack)))
    whole = said(load(files_of(tiny_pack)), "Hello.")
    assert np.array_equal(said(load(files_of(pack)), "Hello."), whole)


def test_a_plain_checkpoint_holds_tensors_alone(pack: Path) -> None:
    import torch

    class Own(dict[str, Any]):
        pass

    weights = Own(checkpoint_of(pack)["model"])
    weights["gpt.final_norm.weight"] = torch.nn.Parameter(weights["gpt.final_norm.weight"])
    big = torch.zeros(1000)
    weights["mel_stats"] = big[:80]
    plain = plain_checkpoint({"model": weights, "optimizer": object(), "step": 3})
    assert list(plain) == ["model"]
    assert type(plain["model"]) is dict
    assert {type(value) for value in plain["model"].values()} == {torch.Tensor}
    assert plain["model"]["mel_stats"].untyped_storage().nbytes() == 80 * 4, "no more than it shows"


@pytest.mark.parametrize("checkpoint", [{}, {"model": {}}, {"model": [1]}, {"model": {"a": 1}}])
def test_what_holds_no_model_cannot_be_made_plain(checkpoint: dict[str, Any]) -> None:
    with pytest.raises(CorruptModel, match="XTTS"):
        plain_checkpoint(checkpoint)


def test_a_trainers_checkpoint_loads(pack: Path, tiny_pack: Path) -> None:
    weights = {f"xtts.{name}": value for name, value in checkpoint_of(pack)["model"].items()}
    saved(pack / "model.pth", {"model": weights})
    whole = said(load(files_of(tiny_pack)), "Hello.")
    assert np.array_equal(said(load(files_of(pack)), "Hello."), whole)


def test_loading_and_speaking_write_nothing(pack: Path) -> None:
    def state() -> dict[str, tuple[str, int]]:
        return {
            name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
            for name, path in files_of(pack).items()
        }

    before = state()
    said(load(files_of(pack)), "Hello.")
    assert state() == before


def test_its_files_may_lie_apart(tiny_pack: Path, tmp_path: Path) -> None:
    files = {}
    for number, (name, path) in enumerate(files_of(tiny_pack).items()):
        files[name] = tmp_path / f"{number}"
        files[name].symlink_to(path)
    assert said(load(files), "Hello.").size


# --- what is no pack ---


@pytest.mark.parametrize("name", ["config.json", "model.pth", "vocab.json"])
def test_a_missing_file_is_named(pack: Path, name: str) -> None:
    (pack / name).unlink()
    with pytest.raises(CorruptModel, match=rf"xtts-tiny: {name} is missing"):
        load(files_of(pack))


def _wrong_model(pack: Path) -> None:
    config = json.loads((pack / "config.json").read_text())
    put(pack / "config.json", json.dumps({**config, "model": "vits"}))


def _wrong_size(pack: Path) -> None:
    config = json.loads((pack / "config.json").read_text())
    config["model_args"]["gpt_layers"] = 5
    put(pack / "config.json", json.dumps(config))


def _cut_off(pack: Path) -> None:
    put(pack / "model.pth", (pack / "model.pth").read_bytes()[:100_000])


def _preset_of_another_model(pack: Path) -> None:
    import torch

    voice = {"gpt_cond_latent": torch.zeros(1, 32, 9), "speaker_embedding": torch.zeros(1, 512, 1)}
    saved(pack / "speakers_xtts.pth", {"Ana": voice})


def _pickled_presets(pack: Path) -> None:
    saved(pack / "speakers_xtts.pth", {"Ana": PurePosixPath("anything but a tensor")})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda pack: put(pack / "config.json", "{"), "config.json cannot be read"),
        (lambda pack: put(pack / "config.json", "[1]"), "config.json cannot be read"),
        (_wrong_model, "not the configuration of an XTTS-v2"),
        (_wrong_size, r"do not fit each other.*gpt\.gpt\.h\.2"),
        (
            lambda pack: put(pack / "vocab.json", "{}"),
            "xtts-tiny: its files .* do not fit each other",
        ),
        (_cut_off, "model.pth cannot be read"),
        (lambda pack: put(pack / "model.pth", b"not at all"), "model.pth"),
        (lambda pack: saved(pack / "model.pth", [1, 2]), "no checkpoint of XTTS"),
        (lambda pack: saved(pack / "speakers_xtts.pth", [1]), "no list of XTTS voices"),
        (lambda pack: saved(pack / "speakers_xtts.pth", {"Ana": 1}), "no list of XTTS voices"),
        (lambda pack: saved(pack / "speakers_xtts.pth", {"Ana": {}}), "'Ana'.*latents"),
        (_pickled_presets, r"pickled objects.*speakers_xtts\.pth"),
        (_preset_of_another_model, r"'Ana'.*\[1, n, 64\]"),
    ],
)
def test_a_spoilt_pack_is_refused_in_words(pack: Path, spoil: Change, message: str) -> None:
    spoil(pack)
    with pytest.raises(CorruptModel, match=message):
        load(files_of(pack))


def test_a_gpu_that_is_not_there_is_refused(tiny_pack: Path) -> None:
    import torch

    with pytest.raises(InvalidArgument, match="this machine"):
        load(files_of(tiny_pack), device=f"cuda:{torch.cuda.device_count()}")


@pytest.mark.parametrize("when", ["load_checkpoint", "to", "get_gpt_cond_latents"])
def test_a_device_without_room_for_it_is_said_so(
    pack: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """While its weights are read, while they are moved, and while a recording is listened to."""
    import torch
    from TTS.tts.models.xtts import Xtts

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory: 2.00 GiB")

    recording(pack, "seed.wav")
    monkeypatch.setattr(Xtts, when, full)
    with pytest.raises(Unavailable, match="xtts-tiny does not fit into the memory of cpu"):
        load(files_of(pack))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"max_streams": "0"}, "max_streams"), ({"sped": "1"}, "speed"), ({"speed": "x"}, "speed")],
)
def test_settings_of_the_entry_are_checked(
    tiny_pack: Path, settings: dict[str, str], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        load(files_of(tiny_pack), **settings)


def test_settings_of_the_entry_are_the_sessions_defaults(tiny_pack: Path) -> None:
    model = load(files_of(tiny_pack), max_streams="7", speed="1.5", top_k="1")
    assert model.max_streams == 7
    assert model.check_voice(spec()).settings["speed"] == "1.5"
    fast, slow = said(model, "Hello.").size, said(model, "Hello.", spec(speed="1")).size
    assert fast < slow


def test_languages_of_the_entry_are_the_models_own(tiny_pack: Path) -> None:
    assert load(files_of(tiny_pack), languages=["de", "en-GB", "en"]).languages == ("de", "en")
    with pytest.raises(UnknownName, match="language of xtts-tiny 'sv'"):
        load(files_of(tiny_pack), languages=["sv"])


# --- voices from recordings ---


def recording(pack: Path, name: str, seconds: float = 3.0, level: float = 0.1, **kind: Any) -> None:
    (pack / "ref").mkdir(exist_ok=True)
    seed = sum(name.encode())
    channels = kind.get("channels", 1)
    noise = np.random.default_rng(seed).normal(0, level, (int(seconds * 24_000), channels))
    soundfile.write(pack / "ref" / name, noise.astype(np.float32).squeeze(), 24_000)


def test_recordings_are_voices_before_the_presets_and_need_no_transcript(pack: Path) -> None:
    for name in ("seed.wav", "zoe.flac", "anna.wav"):
        recording(pack, name)
    model = load(files_of(pack))
    assert model.voices == ("default", "anna", "zoe", "Ana", "Ben")
    one, other = (said(model, "Hello.", spec(voice)) for voice in ("default", "anna"))
    assert not np.allclose(one[: other.size], other[: one.size], atol=1e-4)


def test_a_voices_latents_are_computed_once_and_are_the_packages(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from TTS.tts.models.xtts import Xtts

    recording(pack, "seed.wav", seconds=14)
    asked: list[str] = []
    for name in ("get_gpt_cond_latents", "get_speaker_embedding"):
        real = getattr(Xtts, name)

        def counted(*args: Any, _name: str = name, _real: Any = real, **kwargs: Any) -> Any:
            asked.append(_name)
            return _real(*args, **kwargs)

        monkeypatch.setattr(Xtts, name, counted)
    model = load(files_of(pack))
    for _ in range(2):
        said(model, "Hello.")
    assert sorted(asked) == ["get_gpt_cond_latents", "get_speaker_embedding"]

    sound, _ = soundfile.read(pack / "ref" / "seed.wav", dtype="float32")
    xtts, config = model._loaded.model, model._loaded.model.config
    monkeypatch.setattr(
        "TTS.tts.models.xtts.load_audio",
        lambda *_: torch.from_numpy(_resampled(sound))[None],
    )
    theirs = xtts.get_conditioning_latents(
        "seed.wav",
        max_ref_length=config.max_ref_len,
        gpt_cond_len=config.gpt_cond_len,
        gpt_cond_chunk_len=config.gpt_cond_chunk_len,
    )
    for mine, expected in zip(model._loaded.voices["default"], theirs, strict=True):
        assert torch.allclose(mine, expected, atol=1e-5)


def _resampled(sound: Any) -> Any:
    import soxr

    return soxr.resample(sound, 24_000, 22_050, quality="VHQ")


def test_the_entry_picks_and_orders_voices_of_both_kinds(pack: Path) -> None:
    recording(pack, "anna.wav")
    recording(pack, "unwanted.wav", seconds=40)
    assert load(files_of(pack), voices=["Ben", "anna"]).voices == ("Ben", "anna")
    with pytest.raises(UnknownName, match=r"voice for xtts-tiny 'Bem'.*Ben"):
        load(files_of(pack), voices=["Bem"])


def test_a_pack_without_any_voice_says_what_to_put_there(pack: Path) -> None:
    (pack / "speakers_xtts.pth").unlink()
    with pytest.raises(CorruptModel, match=r"ref/seed\.wav"):
        load(files_of(pack))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"seconds": 0.9}, "lasts 0.9 s"),
        ({"seconds": 31}, "lasts 31.0 s"),
        ({"level": 1e-6}, "silent"),
        ({"channels": 2}, "2 channels"),
    ],
)
def test_what_makes_no_voice_is_refused_before_the_weights_are_read(
    pack: Path, kind: dict[str, Any], message: str
) -> None:
    recording(pack, "seed.wav", **kind)
    put(pack / "model.pth", b"would be refused in other words")
    with pytest.raises(InvalidArgument, match=message):
        load(files_of(pack))


# --- manners ---


def test_loading_seeds_no_generator_and_leaves_the_root_logger_alone(tiny_pack: Path) -> None:
    import torch

    def state() -> tuple[Any, ...]:
        root = logging.getLogger()
        drawn = (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]
        return (*drawn, torch.initial_seed(), root.level, list(root.handlers))

    before = state()
    load(files_of(tiny_pack))
    assert state() == before


def test_the_maker_draws_from_its_own_seed(tmp_path: Path) -> None:
    import torch

    one = make_tiny_pack(tmp_path / "one", layers=1)
    torch.rand(3)
    other = make_tiny_pack(tmp_path / "other", layers=1)
    weights = [checkpoint_of(folder)["model"]["gpt.mel_head.weight"] for folder in (one, other)]
    assert torch.equal(*weights)
