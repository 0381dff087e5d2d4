"""Sesame CSM: conversation for many sessions at once, on one engine (src/tts/families/csm)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from src.rpc.errors import InvalidArgument
from src.tts.catalog import ModelMeta
from src.tts.families.csm.opening import open_engine, pack_folder
from src.tts.families.csm.options import SesameOptions, read_options
from src.tts.families.csm.speech import SETTINGS, SesameModel
from src.tts.families.csm.voices import load_voices
from src.tts.families.settings import require_modules
from src.tts.recordings import read_references
from src.tts.tts_base import RANDOM_WEIGHTS, AdapterCapabilities

INSTALL = "uv sync --extra sesame  (PyTorch and transformers; Python 3.11 or newer)"
MODULES = ("torch", "transformers", "safetensors")
# So that most pieces of text end after a few seconds, as speech does.
_TINY_END_GAIN = 2.5
_log = logging.getLogger(__name__)


class SesameAdapter:
    family = "sesame"
    capabilities = AdapterCapabilities(
        zero_shot=True, own_engine=True, streams=True, settings=SETTINGS
    )

    def check_installed(self) -> None:
        require_modules(self.family, MODULES, INSTALL)

    def load(
        self,
        meta: ModelMeta,
        files: Mapping[str, Path],
        device: str,
        progress: Callable[[float], None],
    ) -> SesameModel:
        """`meta.settings` are those of families/csm/options.py; the files are a folder as
        `from_pretrained` reads it, and the recordings of src/tts/recordings.py.

        Raises besides: InvalidArgument for a device that does not exist, for settings out of range
        and for a recording that makes no voice prompt, Unavailable where memory is short.
        """
        self.check_installed()
        options = read_options(meta.settings, device)
        references = read_references(meta.model_id, files, meta.voices)
        with _weights(meta, files, options) as folder:
            lease = open_engine(meta.model_id, folder, device, options.engine, progress)
        try:
            voices = load_voices(
                lease.engine, references, speaker=options.speaker, sampling=options.sampling
            )
            progress(1.0)
            return SesameModel(lease, voices, languages=meta.languages, seed=options.seed)
        except BaseException:
            lease.release()
            raise


@contextmanager
def _weights(meta: ModelMeta, files: Mapping[str, Path], options: SesameOptions) -> Iterator[Path]:
    """The folder to load from; random weights are gone from the disk when they are loaded."""
    if not options.tiny:
        yield pack_folder(meta.model_id, meta.family, files)
        return
    if RANDOM_WEIGHTS not in meta.tags:
        raise InvalidArgument(
            f"{meta.model_id}: an entry with the setting 'tiny' must have the tag "
            f"{RANDOM_WEIGHTS!r}, so that nobody takes its noise for a voice"
        )
    from src.tts.families.csm.tiny import make_tiny_pack

    _log.warning("RANDOM WEIGHTS: %s is a test of the engine and speaks noise", meta.model_id)
    with TemporaryDirectory(prefix="tiny-csm-") as folder:
        yield make_tiny_pack(Path(folder), layers=2, depth_layers=1, end_gain=_TINY_END_GAIN)
