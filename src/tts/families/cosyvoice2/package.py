"""The sources of CosyVoice 2: where they lie, and how they are imported without their side effects.

They are no distribution: see checkout.py. Only the modules that speak are imported: not
`cosyvoice.cli.cosyvoice`, which runs a pack's yaml and downloads what it does not find
(hyperpyyaml, modelscope).
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import types
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from src.tts.families.checkout import Source
from src.tts.families.settings import require_modules
from src.tts.tts_base import MissingPackage

FAMILY = "cosyvoice2"
HOME = "COSYVOICE_HOME"
COMMIT = "ace7c47"
INSTALL = (
    "docker compose up tts-cosyvoice  (or, without a container: git clone --recursive"
    f" https://github.com/FunAudioLLM/CosyVoice at {COMMIT}, export {HOME}=<its folder>,"
    " uv sync --extra cosyvoice; see docs/COSYVOICE_PYTORCH_CONFLICT.md)"
)
COSYVOICE = Source(HOME, "cosyvoice", "cli/model.py")
MATCHA = Source(HOME, "matcha", "utils/audio.py", under="third_party/Matcha-TTS")
MODULES = (
    "torch", "torchaudio", "transformers", "onnxruntime", "omegaconf", "conformer", "diffusers",
    "einops", "librosa", "whisper", "tiktoken", "inflect", "scipy",
)  # fmt: skip
_log = logging.getLogger(__name__)


def check_sources() -> None:
    """Raises MissingPackage. Imports nothing."""
    home = os.environ.get(HOME)
    if COSYVOICE.find() is None:
        # Who has cloned it already needs another path, not another clone.
        missing = f"{COSYVOICE.package}/{COSYVOICE.mark}"
        wrong = f"; there is no {missing} in {home}, which {HOME} names" if home else ""
        raise MissingPackage(FAMILY, INSTALL + wrong)
    if MATCHA.find() is None:
        fetch = f"git -C {home} submodule update --init {MATCHA.under}"
        raise MissingPackage(FAMILY, fetch if home else INSTALL)
    require_modules(FAMILY, MODULES, INSTALL)


def import_package() -> Any:
    """A namespace of what this family's engine needs. Inside `well_behaved` of torch_host."""
    COSYVOICE.offer()
    MATCHA.offer()
    _shim_matcha()
    import cosyvoice.cli.frontend as frontend
    import cosyvoice.cli.model as model
    import cosyvoice.flow.decoder as decoder
    import cosyvoice.flow.flow as flow
    import cosyvoice.flow.flow_matching as matching
    import cosyvoice.hifigan.f0_predictor as pitch
    import cosyvoice.hifigan.generator as vocoder
    import cosyvoice.llm.llm as llm
    import cosyvoice.tokenizer.tokenizer as tokenizer
    import cosyvoice.transformer.upsample_encoder as encoder
    from matcha.utils.audio import mel_spectrogram

    matching.set_all_random_seed = _seed_none
    frontend.load_wav = _sound_at
    _quieten()
    return types.SimpleNamespace(
        frontend=frontend, model=model, decoder=decoder, flow=flow, matching=matching,
        pitch=pitch, vocoder=vocoder, llm=llm, tokenizer=tokenizer, encoder=encoder,
        mel_spectrogram=mel_spectrogram,
    )  # fmt: skip


def _shim_matcha() -> None:
    """`matcha.utils` imports what a training run needs (lightning, hydra, a downloader) for the
    sake of two modules that need none of it."""
    if "matcha.utils" in sys.modules:
        return
    import matcha

    folder = Path(next(iter(matcha.__path__))) / "utils"
    package, pylogger = types.ModuleType("matcha.utils"), types.ModuleType("matcha.utils.pylogger")
    package.__path__ = [str(folder)]
    package.__spec__ = importlib.util.spec_from_loader("matcha.utils", None, is_package=True)
    pylogger.get_pylogger = logging.getLogger  # type: ignore[attr-defined]
    sys.modules.update({package.__name__: package, pylogger.__name__: pylogger})
    matcha.utils, package.pylogger = package, pylogger  # type: ignore[attr-defined]


def _seed_none(seed: int) -> None:
    """In place of the package's, which seeds every generator of the process, GPUs' included, to
    draw the flow's noise right afterwards: opening.py draws that from one of its own."""


def _sound_at(sounds: dict[int, Any], sample_rate: int, min_sr: int = 16_000) -> Any:
    """In place of the package's, which reads files by ffmpeg: (1, samples) at that rate."""
    return sounds[sample_rate]


def _quieten() -> None:
    """Its modules log through the root logger, which makes `logging` give that one a handler."""
    own = logging.getLogger("cosyvoice")
    own.setLevel(logging.WARNING)
    for name, module in list(sys.modules.items()):
        if name.startswith("cosyvoice.") and getattr(module, "logging", None) is logging:
            module.logging = own  # type: ignore[attr-defined]


def text_normalisers() -> tuple[Any, Any] | None:
    """For Chinese and for English; None: only numbers are spelled out, in English.

    wetext before 0.1 downloads its grammars when it is first used.
    """
    try:
        if tuple(map(int, version("wetext").split(".")[:2])) < (0, 1):
            _log.warning("wetext is older than 0.1, which would download: texts are not normalised")
            return None
        from wetext import Normalizer  # type: ignore[import-not-found,unused-ignore]
    except (PackageNotFoundError, ImportError, ValueError):
        return None
    return CarefulNormaliser(Normalizer(remove_erhua=False)), CarefulNormaliser(Normalizer())


class CarefulNormaliser:
    """wetext's, which takes no two spaces in a row and puts a backslash before every quote."""

    def __init__(self, normaliser: Any) -> None:
        self._normaliser = normaliser

    def normalize(self, text: str) -> str:
        plain = " ".join(text.replace("\\", " ").split())
        said: str = self._normaliser.normalize(plain) if plain else ""
        return said.replace("\\", "")
