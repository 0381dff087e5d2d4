"""Voice packs as folders: which model lies where, and is everything there that it needs?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from src.common.config import ConfigError, read_yaml
from src.rpc.errors import DuplexError, UnknownName
from src.tts.catalog import METADATA, Catalog, ModelMeta
from src.tts.pack_files import WEIGHTS, BadFile, check_file
from src.tts.recordings import LONGEST_MS, SHORTEST_MS, Transcripts, read_recording, read_references
from src.tts.sources import MissingFile, Source, SourceResolver


@dataclass(frozen=True, slots=True)
class Pack:
    """`voicepacks/<family>/<name>/` and the catalog entry that it is, or completes."""

    family: str
    name: str
    folder: Path
    meta: ModelMeta

    def place(self, file: str) -> Path | None:
        """Where the worker looks for a file first; None: nowhere on the disk."""
        for source in map(Source.parse, self.meta.files[file].sources):
            if source.scheme == "path" and not source.rest.startswith(("~", "$")):
                return Path(source.rest)
        return None

    def __str__(self) -> str:
        return f"{self.family} {self.name}"


def find_packs(catalog: Catalog, voicepacks: Path) -> dict[tuple[str, str], Pack]:
    """By family and name: the folders that are there, and those that catalog entries name."""
    packs = {
        (folder.parent.name, folder.name): Pack(folder.parent.name, folder.name, folder, meta)
        for folder, meta in _on_disk(catalog, voicepacks)
    }
    for meta in catalog.models.values():
        for key in _named_by(meta, voicepacks):
            packs.setdefault(key, Pack(*key, voicepacks.joinpath(*key), meta))
    return packs


def pick(packs: Mapping[tuple[str, str], Pack], family: str, name: str = "") -> Pack:
    """By family and name, or by model id alone. Raises UnknownName with the nearest."""
    if not name:
        by_id = {pack.meta.model_id: pack for pack in packs.values()}
        if family in by_id:
            return by_id[family]
        raise UnknownName.among("voice pack", family, by_id)
    if (family, name) in packs:
        return packs[family, name]
    families = {key[0] for key in packs}
    if family not in families:
        raise UnknownName.among("family", family, families)
    names = [key[1] for key in packs if key[0] == family]
    raise UnknownName.among(f"voice pack of {family}", name, names)


def _on_disk(catalog: Catalog, voicepacks: Path) -> Iterator[tuple[Path, ModelMeta]]:
    for metadata in sorted(voicepacks.glob(f"*/*/{METADATA}")):
        folder = metadata.parent
        try:
            raw = read_yaml(metadata)
        except (ConfigError, OSError):
            continue  # among the catalog's problems already
        said = raw if isinstance(raw, dict) else {}
        model_id = said.get("model_id", f"{folder.parent.name}-{folder.name}")
        meta = catalog.models.get(model_id)
        if meta is not None and not any(str(metadata) in problem for problem in catalog.problems):
            yield folder, meta


def _named_by(meta: ModelMeta, voicepacks: Path) -> Iterator[tuple[str, str]]:
    for file in meta.files.values():
        for source in map(Source.parse, file.sources):
            path = Path(source.rest)
            if source.scheme == "path" and path.is_relative_to(voicepacks):
                parts = path.relative_to(voicepacks).parts
                if len(parts) > 2:
                    yield parts[0], parts[1]


# --- is a pack good? ---


class State(str, Enum):
    OK = "ok"
    ABSENT = "not fetched"
    BAD = "bad"


@dataclass(slots=True)
class Verdict:
    """What was found; `problems` and `notes` are sentences for a person."""

    files: int = 0
    size: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    weights: bool = False

    @property
    def state(self) -> State:
        if self.problems:
            return State.BAD
        if self.missing or not self.weights:
            # Nothing but a README and perhaps a recording: it has not been fetched yet.
            return State.BAD if self.weights else State.ABSENT
        return State.OK


@dataclass(frozen=True, slots=True)
class RecordingLimits:
    """What a family's adapter asks of a recording; `tests/unit/test_packs.py` holds them to it."""

    transcripts: Transcripts = Transcripts.WISHED
    shortest_ms: int = SHORTEST_MS
    longest_ms: int = LONGEST_MS
    presets: str = ""
    """The file with voices of the model's own; without it or a recording there is no voice."""
    makes_up: bool = False
    """It speaks without either."""


_DATA_ONLY = {("cosyvoice2", "cosyvoice2.yaml")}
"""Files whose adapter drops the tags: the published ones are full of them."""


def check_pack(pack: Pack, limits: RecordingLimits | None = None) -> Verdict:
    """All that can be told without loading weights. Pinned files are read to be hashed."""
    verdict, resolver = Verdict(), SourceResolver()
    files: dict[str, Path] = {}
    for name, file in pack.meta.files.items():
        try:
            files[name] = resolver.resolve(pack.meta.model_id, name, file.sources, file.sha256)
        except MissingFile:
            if file.optional:
                verdict.notes.append(f"{name} is not there, which is allowed")
            else:
                verdict.missing.append(f"{name} is not there")
        except DuplexError as error:
            verdict.problems.append(error.message)
            verdict.weights = True
    for name, path in files.items():
        _check_one(verdict, pack, name, path)
    _check_recordings(verdict, pack, files, limits or limits_of(pack.meta.family))
    return verdict


def _check_one(verdict: Verdict, pack: Pack, name: str, path: Path) -> None:
    verdict.files += 1
    verdict.size += path.stat().st_size
    verdict.weights |= path.suffix in WEIGHTS
    try:
        if (pack.meta.family, name) in _DATA_ONLY:
            check_file(path, yaml_is_data=True)
        else:
            check_file(path)
    except (BadFile, OSError) as bad:
        verdict.problems.append(f"{name} {bad}")


def _check_recordings(
    verdict: Verdict, pack: Pack, files: Mapping[str, Path], limits: RecordingLimits | None
) -> None:
    if limits is None:
        return
    meta = pack.meta
    listed = () if limits.presets or limits.makes_up else meta.voices
    try:
        references = read_references(meta.model_id, files, listed, limits.transcripts)
    except DuplexError as error:
        verdict.problems.append(error.message)
        return
    if limits.presets and limits.presets not in files and not any(references.values()):
        verdict.missing.append(
            f"there is no voice in it: put 5 to 15 s of one into ref/seed.wav, and what is said "
            f"into ref/seed.txt, or bring {limits.presets}"
        )
    for reference in filter(None, references.values()):
        try:
            read_recording(
                reference.audio, shortest_ms=limits.shortest_ms, longest_ms=limits.longest_ms
            )
        except DuplexError as error:
            verdict.problems.append(error.message)


_LIMITS: dict[str, RecordingLimits] = {
    "sesame": RecordingLimits(),
    "unsloth_sesame": RecordingLimits(),
    "xtts": RecordingLimits(Transcripts.OPTIONAL, shortest_ms=1_000, presets="speakers_xtts.pth"),
    "spark_tts": RecordingLimits(Transcripts.OPTIONAL, makes_up=True),
    "cosyvoice2": RecordingLimits(Transcripts.NEEDED, presets="spk2info.pt"),
}


def limits_of(family: str) -> RecordingLimits | None:
    """None: the family takes no recordings."""
    return _LIMITS.get(family)
