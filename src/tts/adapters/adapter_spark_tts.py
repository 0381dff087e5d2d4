"""Spark-TTS: a language model that writes speech codes, and BiCodec, which turns them into sound.

The package speaks whole utterances; here the codes are decoded in windows while they are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from src.tts.catalog import ModelMeta
from src.tts.families.settings import Choice, Range, read_settings
from src.tts.families.spark.pack import (
    FAMILY,
    check_installed,
    load_bicodec,
    load_llm,
    pack_folder,
    samples_per_code,
)
from src.tts.families.spark.speech import CONTROLLABLE, SESSION, SETTINGS, SparkTtsModel, Voicing
from src.tts.families.spark.voices import encode_voices
from src.tts.families.spark.windows import WindowPlan
from src.tts.families.torch_host import check_device, loading, quiet_transformers, well_behaved
from src.tts.recordings import Reference, Transcripts, read_references
from src.tts.tts_base import AdapterCapabilities

_ENGINE = {
    "max_streams": Range(1, 64, 4, "utterances at once"),
    "left_context": Range(0, 200, 25, "codes of 20 ms that a window hears of what came before"),
    "look_ahead": Range(0, 50, 4, "codes that a window hears of what comes after"),
}
_KNOWN: dict[str, Any] = {
    **_ENGINE,
    "dtype": Choice(("auto", "float32", "bfloat16"), "auto", "of the language model"),
    **SESSION,
}


class SparkTtsAdapter:
    family = FAMILY
    capabilities = AdapterCapabilities(zero_shot=True, streams=True, settings=SETTINGS)

    def check_installed(self) -> None:
        check_installed()

    def load(
        self,
        meta: ModelMeta,
        files: Mapping[str, Path],
        device: str,
        progress: Callable[[float], None],
    ) -> SparkTtsModel:
        """`meta.settings` may hold a session's keys (as defaults) and the others of `_KNOWN`.

        Raises besides: InvalidArgument for a device that does not exist, for settings out of range
        and for a recording that makes no voice prompt, Unavailable where memory is short.
        """
        self.check_installed()
        settings = read_settings(_KNOWN, meta.settings)
        place = check_device(meta.model_id, device)
        folder = pack_folder(meta.model_id, files)
        references = _references(meta, files)
        rate, hop = samples_per_code(meta.model_id, folder)
        with well_behaved(), quiet_transformers(), loading(meta.model_id, device):
            bicodec = load_bicodec(meta.model_id, folder, place)
            progress(0.2)
            recorded = {name: each for name, each in references.items() if each is not None}
            cloned = encode_voices(meta.model_id, files, folder, recorded, bicodec, place)
            progress(0.5)
            llm = load_llm(meta.model_id, folder, place, str(settings["dtype"]), bicodec)
            progress(0.8)
            plan = WindowPlan(int(settings["left_context"]), int(settings["look_ahead"]))
            model = SparkTtsModel(
                meta.model_id,
                llm,
                Voicing(bicodec, place, rate, hop, plan),
                {name: cloned.get(name) for name in references},
                max_streams=int(settings["max_streams"]),
                languages=meta.languages,
                defaults={k: v for k, v in meta.settings.items() if k in SESSION},
            )
            model.warm_up()
        progress(1.0)
        return model


def _references(meta: ModelMeta, files: Mapping[str, Path]) -> dict[str, Reference | None]:
    """The voices by name; None: made up by the model. Raises as `read_references` does."""
    if set(meta.voices) == {CONTROLLABLE}:
        return {CONTROLLABLE: None}
    listed = [name for name in meta.voices if name != CONTROLLABLE]
    found = read_references(meta.model_id, files, listed, Transcripts.OPTIONAL)
    if meta.voices:
        return {name: found.get(name) for name in meta.voices}
    recorded = {name: each for name, each in found.items() if each is not None}
    return {**recorded, CONTROLLABLE: recorded.get(CONTROLLABLE)}
