"""What a voice pack of MeloTTS must hold, part by part, and what loading and unloading leave."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from src.rpc.errors import CorruptModel
from src.tts.adapters import adapter_melo
from src.tts.adapters.adapter_melo import BERT, MeloAdapter, MeloModel
from src.tts.catalog import ModelMeta
from src.tts.tts_base import CancelToken, Segment, VoiceSpec
from tests.families.melo.tiny import files_of


def load(files: dict[str, Path], device: str = "cpu", progress: Any = lambda _: None) -> MeloModel:
    return MeloAdapter().load(ModelMeta(model_id="m", family="melo"), files, device, progress)


def seconds(model: MeloModel, text: str, **settings: str) -> float:
    stream = model.stream([Segment(text, 0)], VoiceSpec("", "", settings), CancelToken())
    return sum(chunk.samples.size for chunk in stream) / 44_100


@pytest.fixture
def pack(tiny_pack: Path, tmp_path: Path) -> dict[str, Path]:
    """A copy to spoil."""
    return files_of(Path(shutil.copytree(tiny_pack, tmp_path / "pack")))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda c: c["symbols"].remove("UNK"), "describes no"),
        (lambda c: c.update(model=[]), "describes no"),
        (lambda c: c["data"].update(sampling_rate=0), "describes no"),
        (lambda c: c["data"].update(spk2id={"EN-US": "0"}), "describes no"),
        (lambda c: c.update(num_languages=2), "too few tones or languages"),
    ],
)
def test_a_configuration_that_lacks_a_part_is_refused(
    pack: dict[str, Path], change: Callable[[dict[str, Any]], object], complaint: str
) -> None:
    config = json.loads(pack["config.json"].read_text())
    change(config)
    pack["config.json"].write_text(json.dumps(config))
    with pytest.raises(CorruptModel, match=complaint):
        load(pack)


@pytest.mark.parametrize(("width", "layers"), [(64, 4), (768, 2)])
def test_a_bert_of_another_size_is_refused(pack: dict[str, Path], width: int, layers: int) -> None:
    from transformers import BertConfig, BertModel

    folder = pack[f"{BERT}/config.json"].parent
    words = len(pack[f"{BERT}/vocab.txt"].read_text().splitlines())
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=words, num_attention_heads=2, **sizes)).save_pretrained(folder)
    with pytest.raises(CorruptModel, match=f"is {width} wide with {layers} layers"):
        load(pack)


def test_a_bert_in_half_precision_is_computed_in_whole(pack: dict[str, Path]) -> None:
    from safetensors.torch import load_file, save_file

    path = pack[f"{BERT}/model.safetensors"]
    halves = {name: each.half() for name, each in load_file(path).items()}
    save_file(halves, path, {"format": "pt"})
    config = json.loads(pack[f"{BERT}/config.json"].read_text())
    pack[f"{BERT}/config.json"].write_text(json.dumps({**config, "dtype": "float16"}))
    model = load(pack)
    assert {each.dtype for each in model._network._bert.parameters()} == {torch.float32}
    assert seconds(model, "Hello.")


def test_a_file_of_bert_under_another_name_is_refused(pack: dict[str, Path]) -> None:
    path = pack[f"{BERT}/vocab.txt"]
    other = path.rename(path.with_name("words.txt"))
    with pytest.raises(CorruptModel, match="by these names"):
        load({**pack, f"{BERT}/vocab.txt": other})


def test_durations_that_are_drawn_without_end_are_held_too(pack: dict[str, Path]) -> None:
    checkpoint = torch.load(pack["checkpoint.pth"], weights_only=True)
    checkpoint["model"]["sdp.flows.0.m"].fill_(-60.0)
    torch.save(checkpoint, pack["checkpoint.pth"])
    assert 1 < seconds(load(pack), "Hello.", sdp_ratio="1") < 8


def test_loading_tells_how_far_it_is_and_is_quiet(
    tiny_pack: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    logging.enable_progress_bar()
    capfd.readouterr()
    told: list[float] = []
    model = load(files_of(tiny_pack), "", told.append)
    said = capfd.readouterr()
    assert "Loading weights" not in said.err
    assert "LOAD REPORT" not in said.err
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    # Weights that are computed anew for each run are not for many threads.
    assert not any(hasattr(module, "weight_g") for module in model._network._net.modules())


def test_unloading_closes_what_guesses_words_and_gives_the_memory_back(
    tiny_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[object] = []
    monkeypatch.setattr(adapter_melo, "_close", done.append)
    monkeypatch.setattr(adapter_melo, "give_back_memory", done.append)
    model = load(files_of(tiny_pack))
    guess = model._guess
    model.unload()
    assert done == [guess, "cpu"]


def test_loading_finds_the_package_by_itself(
    tiny_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "melo"]:
        monkeypatch.delitem(sys.modules, name)
    model = load(files_of(tiny_pack))
    assert seconds(model, "Hello.")


def test_nothing_to_say_is_no_chunk(tiny_pack: Path) -> None:
    stream = load(files_of(tiny_pack)).stream([Segment("", 0)], VoiceSpec("", ""), CancelToken())
    assert list(stream) == []
