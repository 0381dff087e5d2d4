"""CosyVoice 2: needs a PyTorch of its own, so it runs in a container image of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from src.rpc.errors import Unavailable
from src.tts.adapters.settings import require_modules
from src.tts.catalog import ModelMeta
from src.tts.tts_base import AdapterCapabilities, Model

INSTALL = (
    "docker compose up tts-cosyvoice"
    "  (PyTorch 2.3.1 in an image of its own; see docs/COSYVOICE_PYTORCH_CONFLICT.md)"
)


class CosyVoice2Adapter:
    family = "cosyvoice2"
    capabilities = AdapterCapabilities(zero_shot=True, emotive_zero_prompt=True)

    def check_installed(self) -> None:
        require_modules(self.family, ("cosyvoice",), INSTALL)

    def load(
        self,
        meta: ModelMeta,
        files: Mapping[str, Path],
        device: str,
        progress: Callable[[float], None],
    ) -> Model:
        """Raises MissingPackage, or Unavailable where the package is there."""
        self.check_installed()
        raise Unavailable(
            f"{meta.model_id}: this build speaks with CosyVoice 2 only in its container image; "
            "see docs/COSYVOICE_PYTORCH_CONFLICT.md"
        )
