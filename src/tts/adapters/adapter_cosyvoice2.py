"""CosyVoice 2: a voice from a recording, instructed in words (src/tts/families/cosyvoice2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from src.tts.catalog import ModelMeta
from src.tts.families.cosyvoice2.package import FAMILY, check_sources
from src.tts.families.cosyvoice2.speech import SETTINGS, CosyVoice2Model
from src.tts.families.settings import Range, read_settings
from src.tts.tts_base import AdapterCapabilities

_ENGINE = {"max_streams": Range(1, 64, 4, "utterances at once; their steps take turns")}


class CosyVoice2Adapter:
    family = FAMILY
    capabilities = AdapterCapabilities(
        zero_shot=True, emotive_zero_prompt=True, streams=True, settings=SETTINGS
    )

    def check_installed(self) -> None:
        check_sources()

    def load(
        self,
        meta: ModelMeta,
        files: Mapping[str, Path],
        device: str,
        progress: Callable[[float], None],
    ) -> CosyVoice2Model:
        """`meta.settings` may hold a session's (as defaults) and `max_streams`.

        Raises as `open_engine` does, and UnknownName or InvalidArgument for settings.
        """
        self.check_installed()
        own = {name: raw for name, raw in meta.settings.items() if name in _ENGINE}
        spoken = {name: raw for name, raw in meta.settings.items() if name not in _ENGINE}
        streams = int(read_settings(_ENGINE, own)["max_streams"])
        from src.tts.families.cosyvoice2.opening import open_engine

        engine = open_engine(meta, files, device, progress)
        try:
            return CosyVoice2Model(
                engine, languages=meta.languages, defaults=spoken, max_streams=streams
            )
        except BaseException:
            engine.close()
            raise
