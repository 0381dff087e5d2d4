"""The families of this build. A family's module is imported when somebody asks for it."""

from __future__ import annotations

import importlib
from typing import cast

from src.rpc.errors import UnknownName
from src.tts.tts_base import Adapter

_MODULES = {
    "piper": "src.tts.adapters.adapter_piper:PiperAdapter",
    "espeak": "src.tts.adapters.adapter_espeak:EspeakAdapter",
    "cosyvoice2": "src.tts.adapters.adapter_cosyvoice2:CosyVoice2Adapter",
    "sesame": "src.tts.adapters.adapter_sesame:SesameAdapter",
    "unsloth_sesame": "src.tts.adapters.adapter_unsloth_sesame:UnslothSesameAdapter",
    "xtts": "src.tts.adapters.adapter_xtts:XttsAdapter",
    "spark_tts": "src.tts.adapters.adapter_spark_tts:SparkTtsAdapter",
    "parler_tts": "src.tts.adapters.adapter_parler_tts:ParlerTtsAdapter",
    "melo": "src.tts.adapters.adapter_melo:MeloAdapter",
    "http": "src.tts.adapters.adapter_http_speech:HttpSpeechAdapter",
}
FAMILIES = tuple(_MODULES)


def adapter_for(family: str) -> Adapter:
    """A new adapter. Raises UnknownName for a family that this build does not have."""
    try:
        place = _MODULES[family]
    except KeyError:
        raise UnknownName.among("model family", family, FAMILIES) from None
    module, _, name = place.partition(":")
    return cast(Adapter, getattr(importlib.import_module(module), name)())
