"""What the adapter does itself, beside the package doing it: symbols, BERT's states, the sound.

The package's English module wants modules that nobody has, and writes a file beside itself: it is
read from a copy, with two small ones in their place.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec, spec_from_file_location
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from src.tts.adapters.adapter_melo import MeloAdapter, MeloModel
from src.tts.catalog import ModelMeta
from src.tts.families.melo.bounds import Stopped
from src.tts.families.melo.english import Dictionary, English, spell
from src.tts.families.melo.network import Sound
from src.tts.families.melo.sources import SOURCE, package_folder
from src.tts.families.torch_host import own_generator
from src.tts.tts_base import CancelToken
from tests.families.melo.tiny import files_of, make_net

TEXTS = [
    "Hello world, this is a test.",
    "Don't stop me now! It's ten to 5, isn't it?",
    "Dr. Smith paid $3.50 on the 21st, at 10:30 pm, for 42 books.",
    "In 1999, 1,234 of them; 3.14 is not enough.",
    "Verve of five velvet vans. Judge Thursday's vision, young singer.",
    "camelCase qzxv well-known café",
]


def module_of(name: str, **what: object) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(what)
    return module


def said(word: str) -> list[str]:
    """In g2p_en's place: words without an entry are spelled, as ours are here."""
    return spell(word) if any(char.isalpha() for char in word) else [word]


def distribute_phone(n_phone: int, n_word: int) -> list[int]:
    """As in melo.text.japanese: to whoever has the fewest."""
    slots = [0] * n_word
    for _ in range(n_phone):
        slots[slots.index(min(slots))] += 1
    return slots


@dataclass(frozen=True)
class Package:
    english: Any
    bert: Any

    def read(self, text: str) -> tuple[list[str], list[int], list[int], torch.Tensor]:
        """Symbols, tones, symbols per token, and BERT's state for each symbol: [768, symbols]."""
        norm = self.english.text_normalize(re.sub(r"([a-z])([A-Z])", r"\1 \2", text))
        symbols, tones, per_token = self.english.g2p(norm)
        return symbols, tones, per_token, self.bert.get_bert_feature(norm, per_token, "cpu")


@pytest.fixture(scope="module")
def package(tiny_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    """Its English module and the one that asks BERT, out of a copy, with what they want at hand."""
    import transformers

    SOURCE.offer()
    folder = tmp_path_factory.mktemp("package")
    bert = str(tiny_pack / "bert-base-uncased")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "g2p_en", module_of("g2p_en", G2p=lambda: said))
        japanese = module_of("melo.text.japanese", distribute_phone=distribute_phone)
        patch.setitem(sys.modules, "melo.text.japanese", japanese)
        for kind in (transformers.AutoTokenizer, transformers.AutoModelForMaskedLM):
            real = kind.from_pretrained
            patch.setattr(
                kind,
                "from_pretrained",
                lambda name, real=real: real(bert, local_files_only=True),
            )
        text = package_folder() / "text"
        copied(text / "cmudict.rep", folder)
        english = loaded("melo.text.english", copied(text / "english.py", folder))
        states = loaded("melo.text.english_bert", copied(text / "english_bert.py", folder))
        states.model = transformers.AutoModelForMaskedLM.from_pretrained("bert-base-uncased").eval()
    return Package(english, states)


def copied(path: Path, folder: Path) -> Path:
    return Path(shutil.copy(path, folder / path.name))


def loaded(name: str, path: Path) -> Any:
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    model: MeloModel, package: Package, index: int
) -> None:
    (run,) = model._english.read(TEXTS[index])
    symbols, tones, per_token, _ = package.read(TEXTS[index])
    assert list(run.symbols) == symbols
    assert list(run.tones) == tones
    assert list(run.per_token) == per_token
    assert len(run.tokens) == len(per_token)
    assert sum(run.per_token) == len(run.symbols)


@pytest.mark.parametrize("index", range(len(TEXTS)))
def test_berts_states_are_the_packages(model: MeloModel, package: Package, index: int) -> None:
    (run,) = model._english.read(TEXTS[index])
    ours = model._network._features(run.tokens, run.per_token)[0]
    theirs = package.read(TEXTS[index])[3]
    assert float(theirs.std()) > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_every_entry_of_the_dictionary_is_read_alike(package: Package) -> None:
    ours = Dictionary.read(package_folder() / "text" / "cmudict.rep")
    theirs = package.english.eng_dict
    assert len(ours) == len(theirs) > 100_000
    assert [word for word in theirs if ours.say(word) != list(chain(*theirs[word]))] == []


@pytest.mark.parametrize(("speed", "sdp_ratio"), [(1.0, 0.2), (0.7, 0.0), (2.0, 1.0)])
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
    ours = network.say(run, sound, own_generator(1), CancelToken())
    assert theirs.std() > 0.01
    np.testing.assert_allclose(ours, np.clip(theirs, -1, 1), atol=2e-4)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_a_run_ends_at_its_next_layer(model: MeloModel, share: float) -> None:
    """Wherever it is: in BERT, the durations, the flow, the vocoder."""
    network, sound, cancel = model._network, Sound(0, 1.0, 0.0, 0.0, 0.2), CancelToken()
    (run,) = model._english.read(TEXTS[0])
    begun: list[str] = []

    def begin(name: str, at: int) -> None:
        begun.append(name)
        if len(begun) == at:
            cancel.cancel()

    layers = [
        (f"{part}.{name}", module)
        for part, whole in (("bert", network._bert), ("net", network._net))
        for name, module in whole.named_modules()
        if not list(module.children())
    ]
    # After all others: what has begun has looked.
    at = -1
    hooks = [
        layer.register_forward_pre_hook(lambda *_, name=name: begin(name, at))
        for name, layer in layers
    ]
    try:
        network.say(run, sound, None, cancel)
        assert {name.partition(".")[0] for name in begun} == {"bert", "net"}
        at = int(share * len(begun)) + 1
        begun.clear()
        with pytest.raises(Stopped):
            network.say(run, sound, None, cancel)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(begun) == at
