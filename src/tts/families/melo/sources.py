"""MeloTTS's package: a folder of its repository (checkout.py), and what it wants installed.

Of it `melo.models` and `melo.text` are imported, never `melo.api`.
"""

from __future__ import annotations

import os
from pathlib import Path

from src.tts.families.checkout import Source
from src.tts.families.settings import require_modules
from src.tts.tts_base import MissingPackage

FAMILY = "melo"
HOME = "MELO_HOME"
INSTALL = (
    "uv sync --extra melo && git clone https://github.com/myshell-ai/MeloTTS && "
    f"git -C MeloTTS checkout 2091453 && export {HOME}=$PWD/MeloTTS  (Python 3.11 or newer)"
)
MODULES = ("torch", "transformers", "tokenizers", "numba", "inflect")
# Other packages have this name, but no such file; the dictionary is read from it.
SOURCE = Source(HOME, "melo", mark="text/cmudict.rep")


def package_folder() -> Path:
    """Raises MissingPackage. Imports nothing."""
    require_modules(FAMILY, MODULES, INSTALL)
    folder = SOURCE.find()
    if folder is None:
        home, mark = os.environ.get(HOME), f"{SOURCE.package}/{SOURCE.mark}"
        # Who has cloned it already needs another path, not another clone.
        wrong = f"; there is no {mark} in {home}, which {HOME} names" if home else ""
        raise MissingPackage(FAMILY, INSTALL + wrong)
    return folder
