"""From a folder to an engine that runs, shared by all models that speak with these weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import cast

from src.rpc.errors import CorruptModel, FailedPrecondition
from src.tts.families.csm.engine import Engine
from src.tts.families.csm.engines import Lease, OtherTerms, engine_for
from src.tts.families.csm.options import EngineOptions
from src.tts.families.torch_host import loading, one_folder

_log = logging.getLogger(__name__)

_DOWNLOAD = (
    "hf download sesame/csm-1b --local-dir {folder} config.json tokenizer.json "
    "tokenizer_config.json transformers.safetensors.index.json "
    "transformers-00001-of-00002.safetensors transformers-00002-of-00002.safetensors"
)


def pack_folder(model_id: str, family: str, files: Mapping[str, Path]) -> Path:
    """The folder that holds the weights, as `from_pretrained` wants it.

    Raises CorruptModel: without files, with what to download and where to put it.
    """
    config = files.get("config.json")
    if config is None:
        folder = PurePosixPath("voicepacks", family, model_id.removeprefix(f"{family}-"))
        raise CorruptModel(
            f"{model_id}: there are no weights. Download 7 GB of them into {folder}, where its "
            f"metadata.yaml is (accept the licence on the model's page first): "
            f"`{_DOWNLOAD.format(folder=folder)}`; docs/families/{family}.md says more. "
            "To try the engine without weights: --default_model tiny-csm-random, which speaks noise"
        )
    return one_folder(model_id, "a Sesame model", config.parent, files)


def open_engine(
    model_id: str,
    folder: Path,
    device: str,
    options: EngineOptions,
    progress: Callable[[float], None] = lambda _: None,
) -> Lease[Engine]:
    """A share in the engine on these weights; the first to ask loads them.

    Raises CorruptModel, InvalidArgument for a device that does not exist, Unavailable where weights
    or slots do not fit in its memory, FailedPrecondition while they are loaded with other options:
    a second copy would take the memory of the first again, unseen.
    """

    def make() -> Engine:
        with loading(model_id, device, lower="max_slots or positions"):
            return _make(model_id, folder, device, options, progress)

    try:
        return engine_for((folder.resolve(), device), make, options, EngineOptions.serves)
    except OtherTerms as other:
        raise FailedPrecondition(
            f"{model_id}: its weights are in memory already, for another model, with "
            f"{_difference(cast(EngineOptions, other.terms), options)}; give the entries of all "
            "models that share weights the same settings"
        ) from None


def _make(
    model_id: str,
    folder: Path,
    device: str,
    options: EngineOptions,
    progress: Callable[[float], None],
) -> Engine:
    from src.tts.families.csm.cores import settle
    from src.tts.families.csm.device_model import DeviceModel
    from src.tts.families.csm.weights import load_weights

    weights = load_weights(folder, device=device, dtype=options.dtype)
    progress(0.6)
    model = DeviceModel(
        weights,
        slots=options.max_slots,
        positions=options.positions,
        compile=options.compile,
        max_adapters=options.max_adapters,
        max_rank=options.max_rank,
    )
    progress(0.9)
    engine = Engine(model, name=model_id)
    engine.start()
    engine.run(lambda _: settle(weights))
    return engine


def _difference(theirs: EngineOptions, ours: EngineOptions) -> str:
    mine = asdict(ours)
    return ", ".join(
        f"{name} {value} (this one: {mine[name]})"
        for name, value in asdict(theirs).items()
        if value != mine[name]
    )
