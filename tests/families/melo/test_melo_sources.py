"""What the adapter does itself, beside the package doing it: symbols, BERT's states, the sound.

The package's English module needs three modules that nobody has, and writes a file beside itself; it
runs on a copy of the sources, in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from src.tts.adapters.adapter_melo import MeloAdapter, MeloModel
from src.tts.adapters.melo_english import Dictionary, English, spell
from src.tts.adapters.melo_network import Sound, Stopped, find_sources
from src.tts.catalog import ModelMeta
from src.tts.tts_base import CancelToken
from tests.families.melo.tiny import files_of, make_net

TEXTS = [
    "Hello world, this is a test.",
    "Don't stop me now! It's ten to 5, isn't it?",
    "Dr. Smith paid $3.50 on the 21st, at 10:30 pm, for 42 books.",
    "In 1999, 1,234 of them; 3.14 is not enough.",
    "Verve of five velvet vans. Judge Thursday's vision, young singer.",
    "camelCase qzxv well-known",
]
STILL = {"noise": "0", "noise_w": "0"}

# The package as it is, with g2p_en's neighbours: words without an entry are spelled in both.
_PACKAGE = """
import json, sys, types, importlib.machinery
sys.path[:0] = [{sources!r}, {root!r}]
from src.tts.adapters.melo_english import spell
def stub(name, **what):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(what)
    sys.modules[name] = module
def distribute_phone(n_phone, n_word):
    slots = [0] * n_word
    for _ in range(n_phone):
        slots[slots.index(min(slots))] += 1
    return slots
def said(word):
    return spell(word) if any(c.isalpha() for c in word) else [word]
stub("g2p_en", G2p=lambda: said)
stub("melo.text.japanese", distribute_phone=distribute_phone)
import torch, transformers
def local(kind):
    real = kind.from_pretrained
    kind.from_pretrained = lambda name, **options: real({bert!r}, local_files_only=True)
local(transformers.AutoTokenizer)
local(transformers.AutoModelForMaskedLM)
from melo.text import english, english_bert
out = []
for text in json.loads(sys.stdin.read()):
    norm = english.text_normalize(__import__("re").sub(r"([a-z])([A-Z])", r"\\1 \\2", text))
    symbols, tones, per_token = english.g2p(norm)
    english_bert.model and english_bert.model.eval()
    english_bert.get_bert_feature(norm, per_token, "cpu")
    english_bert.model.eval()
    states = english_bert.get_bert_feature(norm, per_token, "cpu")
    out.append([symbols, tones, per_token, states.tolist()])
entries = {{w: [p for s in e for p in s] for w, e in english.eng_dict.items()}}
json.dump([out, entries], open({out!r}, "w"))
"""


@pytest.fixture(scope="module")
def package(tiny_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """[per text: symbols, tones, symbols per token, BERT's states], and its dictionary."""
    sources = find_sources()
    assert sources is not None
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(sources, folder / "melo")
    out = folder / "out.json"
    script = _PACKAGE.format(
        sources=str(folder),
        root=str(Path(__file__).resolve().parents[3]),
        bert=str(tiny_pack / "bert-base-uncased"),
        out=str(out),
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(TEXTS),
        env=environment,
        text=True,
        capture_output=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def model(tiny_pack: Path) -> MeloModel:
    meta = ModelMeta(model_id="melo-tiny", family="melo")
    loaded = MeloAdapter().load(meta, files_of(tiny_pack), "cpu", lambda _: None)
    loaded._english = spelling(loaded._english)
    return loaded


def spelling(english: English) -> English:
    """Words without an entry are spelled, for a comparison with a package that does so."""
    english._guess = spell
    return english


@pytest.mark.parametrize("index", range(len(TEXTS)))
def test_symbols_tones_and_tokens_are_the_packages(
    model: MeloModel, package: Any, index: int
) -> None:
    (run,) = model._english.read(TEXTS[index])
    symbols, tones, per_token, _ = package[0][index]
    assert list(run.symbols) == symbols
    assert list(run.tones) == tones
    assert list(run.per_token) == per_token
    assert len(run.tokens) == len(per_token)
    assert sum(run.per_token) == len(run.symbols)


@pytest.mark.parametrize("index", range(len(TEXTS)))
def test_berts_states_are_the_packages(model: MeloModel, package: Any, index: int) -> None:
    (run,) = model._english.read(TEXTS[index])
    ours = model._network._features(run.tokens, run.per_token)[0]
    theirs = torch.tensor(package[0][index][3])
    assert float(theirs.std()) > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_every_entry_of_the_dictionary_is_read_alike(package: Any) -> None:
    sources = find_sources()
    assert sources is not None
    ours, theirs = Dictionary.read(sources / "text" / "cmudict.rep"), package[1]
    assert len(ours) == len(theirs) > 100_000
    assert [word for word, said in theirs.items() if ours.say(word) != said] == []


@pytest.mark.parametrize("sdp_ratio", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("speed", [0.7, 1.0, 2.0])
def test_the_sound_is_that_of_the_packages_call(
    model: MeloModel, tiny_pack: Path, speed: float, sdp_ratio: float
) -> None:
    config = json.loads((tiny_pack / "config.json").read_text())
    net = make_net(config).eval()
    net.load_state_dict(torch.load(tiny_pack / "checkpoint.pth", weights_only=True)["model"])
    (run,) = model._english.read(TEXTS[0])
    network = model._network
    symbols = [config["symbols"].index(symbol) for symbol in run.symbols]

    def row(numbers: list[int]) -> torch.Tensor:
        blanks = [0] * (2 * len(numbers) + 1)
        blanks[1::2] = numbers
        return torch.tensor([blanks])

    counts = [2 * count for count in run.per_token]
    counts[0] += 1
    with torch.no_grad():
        theirs = net.infer(
            row(symbols),
            torch.tensor([2 * len(symbols) + 1]),
            torch.tensor([3]),
            row([7 + tone for tone in run.tones]),
            row([2] * len(symbols)),
            torch.zeros(1, 1024, 2 * len(symbols) + 1),
            network._features(run.tokens, counts),
            noise_scale=0.0,
            noise_scale_w=0.0,
            sdp_ratio=sdp_ratio,
            length_scale=1 / speed,
        )[0][0, 0].numpy()
    sound = Sound(speaker=3, speed=speed, noise=0.0, noise_w=0.0, sdp_ratio=sdp_ratio)
    ours = network.say(run, sound, CancelToken())
    assert theirs.std() > 0.01
    np.testing.assert_allclose(ours, np.clip(theirs, -1, 1), atol=2e-4)


def test_a_run_ends_at_its_next_layer(model: MeloModel) -> None:
    cancel = CancelToken()
    net, seen = model._network._net, []
    hooks = [net.dp.register_forward_pre_hook(lambda *_: cancel.cancel())]
    hooks += [net.dec.register_forward_hook(lambda *_: seen.append("decoded"))]
    try:
        (run,) = model._english.read(TEXTS[0])
        with pytest.raises(Stopped):
            model._network.say(run, Sound(0, 1.0, 0.0, 0.0, 0.2), cancel)
    finally:
        for hook in hooks:
            hook.remove()
    assert seen == []
