"""LoRA voices of Sesame CSM, as Unsloth's notebook trains them: many on one base's engine.

A voice is a model of the catalog that shares its base's weights, slots and ticks
(families/csm/engines.py). It comes and goes between two ticks while others speak.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, cast

from src.rpc.errors import CorruptModel, InvalidArgument, Unavailable
from src.tts.adapters.adapter_sesame import INSTALL, MODULES
from src.tts.catalog import ROOT, ModelMeta
from src.tts.families.csm.engine import Engine
from src.tts.families.csm.opening import open_engine
from src.tts.families.csm.options import read_options
from src.tts.families.csm.speech import SETTINGS, SesameModel
from src.tts.families.csm.voices import load_voices
from src.tts.families.settings import require_modules
from src.tts.recordings import read_references
from src.tts.tts_base import AdapterCapabilities

if TYPE_CHECKING:
    from src.tts.families.csm.device_model import DeviceModel
    from src.tts.families.csm.lora import AdapterWeights

_CONFIG = "adapter_config.json"
_BASE_FAMILY = "sesame"
_PLACES = "4"
"""For LoRA voices, in an engine that the first of them makes."""
_log = logging.getLogger(__name__)


class UnslothSesameAdapter:
    family = "unsloth_sesame"
    capabilities = AdapterCapabilities(
        zero_shot=True, lora=True, own_engine=True, streams=True, settings=SETTINGS
    )

    def check_installed(self) -> None:
        require_modules(self.family, (*MODULES, "peft"), INSTALL)

    def load(
        self,
        meta: ModelMeta,
        files: Mapping[str, Path],
        device: str,
        progress: Callable[[float], None],
    ) -> SesameModel:
        """`meta.settings` are those of families/csm/options.py and `base`: the folder of the base's
        voice pack, or its model id where both lie among the same voice packs; `max_adapters` is 4
        where it is not set. The files are a folder as peft writes it, and the recordings of
        src/tts/recordings.py.

        Raises besides what SesameAdapter.load raises: CorruptModel for an adapter of another base,
        Exhausted when all places for LoRA voices on this base are taken, FailedPrecondition while
        the base is loaded with other options.
        """
        self.check_installed()
        folder = _adapter_folder(meta.model_id, files)
        base = _base_folder(meta, folder)
        settings = {"max_adapters": _PLACES, **meta.settings}
        del settings["base"]
        options = read_options(settings, device)
        if options.tiny:
            raise InvalidArgument(f"{meta.model_id}: a LoRA voice has a base and is never 'tiny'")
        if not meta.supports_lora:
            _log.warning(
                "%s lacks `supports_lora: true`; mode lora will not find it", meta.model_id
            )
        references = read_references(meta.model_id, files, meta.voices)
        # Before the weights are loaded: a wrong adapter is known in a second.
        adapter = _read_adapter(folder, base)
        with ExitStack() as undo:
            lease = open_engine(meta.model_id, base, device, options.engine, progress)
            undo.callback(lease.release)
            index = lease.engine.run(lambda model: _lora(model).add_adapter(adapter))

            def remove() -> None:
                _remove(lease.engine, index)

            undo.callback(remove)
            voices = load_voices(
                lease.engine,
                references,
                speaker=options.speaker,
                sampling=options.sampling,
                adapter=index,
            )
            progress(1.0)
            undo.pop_all()
        return SesameModel(
            lease, voices, languages=meta.languages, seed=options.seed, on_unload=remove
        )


def _adapter_folder(model_id: str, files: Mapping[str, Path]) -> Path:
    """Raises CorruptModel."""
    config = files.get(_CONFIG)
    if config is None:
        raise CorruptModel(
            f"{model_id}: there is no {_CONFIG!r} among its files. A LoRA voice is the folder that "
            "Unsloth's or peft's save_pretrained wrote; see docs/families/sesame.md"
        )
    return config.parent


def _base_folder(meta: ModelMeta, adapter: Path) -> Path:
    """Raises InvalidArgument, with the places that were looked at."""
    named = meta.settings.get("base", "")
    if not named:
        raise InvalidArgument(
            f"{meta.model_id}: a LoRA voice needs the setting 'base', its base's folder or model id"
        )
    tried = list(dict.fromkeys(_bases(named, adapter)))
    for folder in tried:
        if (folder / "config.json").is_file():
            return folder
    places = ", ".join(str(folder) for folder in tried)
    raise InvalidArgument(
        f"{meta.model_id}: its base {named!r} has no config.json; looked in {places}"
    )


def _bases(named: str, adapter: Path) -> Iterator[Path]:
    """Voice packs are <voicepacks>/<family>/<name>, and a model id is <family>-<name>."""
    path = Path(os.path.expandvars(named)).expanduser()
    yield from ((adapter / path).resolve(), (ROOT / path).resolve())
    name = named.removeprefix(f"{_BASE_FAMILY}-")
    if name != named and path.name == named:
        for packs in (adapter.resolve().parent.parent, ROOT / "voicepacks"):
            yield packs / _BASE_FAMILY / name


def _read_adapter(folder: Path, base: Path) -> AdapterWeights:
    from src.tts.families.csm.lora import read_adapter

    return read_adapter(folder, base)


def _lora(model: object) -> DeviceModel:
    """The engine runs any CsmModel; `open_engine` gives it one that takes adapters."""
    return cast("DeviceModel", model)


def _remove(engine: Engine, index: int) -> None:
    # An engine that has died took its adapters with it.
    with suppress(Unavailable):
        engine.run(lambda model: _lora(model).remove_adapter(index))
