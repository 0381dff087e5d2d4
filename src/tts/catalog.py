"""Which models there are: `configs/model_catalog.yaml` and what lies under `voicepacks/`.

A pack is a folder `voicepacks/<family>/<name>/` with a `metadata.yaml`, which holds the keys of a
catalog entry. Its id is `<family>-<name>` unless it says otherwise, and its files are all that lie
in the folder unless it lists them. A pack may complete a catalog entry of the same id and family;
the entry's pins stay. A pack that cannot be read is a problem with a name; the others live on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from src.common.config import ConfigError, StrictModel, load_config, parse_config, read_yaml
from src.rpc.errors import UnknownName
from src.tts.sources import Source

ROOT = Path(__file__).resolve().parents[2]
METADATA = "metadata.yaml"

Fingerprint = tuple[tuple[str, int, int], ...]
_log = logging.getLogger(__name__)


class ModelFile(StrictModel):
    """One file of a model and the places to look for it, tried in order.

    A place is `path:<file>`, `package:<module>/<file inside it>` or `hub:<repo>@<revision>/<file>`.
    """

    sha256: str = Field(
        default="",
        pattern=r"^([0-9a-fA-F]{64})?$",
        description="refuse any other content; empty: not pinned",
    )
    sources: list[str] = Field(min_length=1)
    optional: bool = Field(
        default=False, description="a load does without it; the family says what it loses"
    )

    @field_validator("sources")
    @classmethod
    def _well_formed(cls, sources: list[str]) -> list[str]:
        return [str(Source.parse(source)) for source in sources]


class ModelMeta(StrictModel):
    """One catalog entry."""

    model_id: str = Field(min_length=1)
    family: str = Field(min_length=1)
    backend: Literal["", "http"] = Field(
        default="", description="http: behind the server that `settings` names; empty: in here"
    )
    device: str = Field(default="", description="empty: the worker's own")
    needs_gpu: bool = False
    supports_lora: bool = False
    cpu_ok: bool = False
    native_sr: int = 0
    estimated_vram_gb: float = 0.0
    languages: list[str] = Field(default_factory=list)
    voices: list[str] = Field(default_factory=list)
    tags: list[str] = Field(default_factory=list)
    licence: str = ""
    files: dict[str, ModelFile] = Field(default_factory=dict)
    settings: dict[str, str] = Field(default_factory=dict, description="family-specific defaults")


class _CatalogFile(StrictModel):
    models: list[ModelMeta] = Field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Catalog:
    """All known models, in the order of the file, then the packs. Never changes: read a new one."""

    models: Mapping[str, ModelMeta]
    problems: tuple[str, ...] = ()
    """Packs that were left out, each with its folder and the reason."""
    fingerprints: Mapping[str, Fingerprint] = field(default_factory=dict)

    @classmethod
    def of(cls, metas: Sequence[ModelMeta], problems: Sequence[str] = ()) -> Catalog:
        """Raises ConfigError for an id that appears twice."""
        models: dict[str, ModelMeta] = {}
        for meta in metas:
            if meta.model_id in models:
                raise ConfigError(f"model_id {meta.model_id!r} appears twice in the catalog")
            models[meta.model_id] = meta
        prints = {model_id: _fingerprint(meta) for model_id, meta in models.items()}
        return cls(models, tuple(problems), prints)

    def get(self, model_id: str) -> ModelMeta:
        """Raises UnknownName with the nearest known id."""
        try:
            return self.models[model_id]
        except KeyError:
            raise UnknownName.among("model", model_id, self.models) from None

    def of_family(self, family: str) -> list[ModelMeta]:
        return [meta for meta in self.models.values() if meta.family == family]

    @property
    def families(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(meta.family for meta in self.models.values()))

    def same_model(self, other: Catalog, model_id: str) -> bool:
        """Do both name the same entry, with the same files on disk?"""
        return self.models.get(model_id) == other.models.get(model_id) and self.fingerprints.get(
            model_id
        ) == other.fingerprints.get(model_id)

    def changes_to(self, new: Catalog) -> dict[str, str]:
        """Model id → 'added', 'removed' or 'changed'."""
        changes = {}
        for model_id in {**self.models, **new.models}:
            if model_id not in self.models:
                changes[model_id] = "added"
            elif model_id not in new.models:
                changes[model_id] = "removed"
            elif not self.same_model(new, model_id):
                changes[model_id] = "changed"
        return changes


def load_catalog(path: Path, voicepacks_dir: Path | None = None, root: Path = ROOT) -> Catalog:
    """Read the catalog file and discover the packs; relative `path:` sources start at `root`.

    Raises ConfigError for a catalog file that is missing or wrong. A bad pack goes to `problems`.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such model catalog")
    entries = [_anchored(meta, root) for meta in load_config(path, _CatalogFile).models]
    listed = Catalog.of(entries)
    models, problems = dict(listed.models), []
    packs: set[str] = set()
    for folder in _pack_folders(voicepacks_dir):
        try:
            meta = _pack(folder, models, packs)
        except ConfigError as error:
            problems.append(str(error))
            _log.warning("voice pack left out: %s", error)
        else:
            packs.add(meta.model_id)
            models[meta.model_id] = meta
    return Catalog.of(list(models.values()), problems)


def _pack_folders(voicepacks_dir: Path | None) -> Iterator[Path]:
    if voicepacks_dir is not None and voicepacks_dir.is_dir():
        for folder in sorted(voicepacks_dir.glob("*/*")):
            if folder.is_dir() and not folder.name.startswith("."):
                yield folder


def _pack(folder: Path, models: Mapping[str, ModelMeta], packs: set[str]) -> ModelMeta:
    """Raises ConfigError that names the folder or its metadata file."""
    metadata = folder / METADATA
    raw = _read_metadata(metadata)
    raw.setdefault("family", folder.parent.name)
    raw.setdefault("model_id", f"{folder.parent.name}-{folder.name}")
    if not raw.get("files"):
        raw["files"] = _files_in(folder)
    meta = _anchored(parse_config(raw, ModelMeta, where=str(metadata)), folder)
    if meta.model_id in packs:
        raise ConfigError(f"{metadata}: another voice pack is called {meta.model_id!r} already")
    listed = models.get(meta.model_id)
    return meta if listed is None else _completed(listed, meta, metadata)


def _read_metadata(metadata: Path) -> dict[str, Any]:
    try:
        raw = read_yaml(metadata)
    except OSError as error:
        reason = "there is none" if isinstance(error, FileNotFoundError) else error.strerror
        raise ConfigError(f"{metadata}: {reason}") from error
    if raw is not None and not isinstance(raw, dict):
        raise ConfigError(f"{metadata}: expected a mapping at the top, got {type(raw).__name__}")
    return raw or {}


def _files_in(folder: Path) -> dict[str, Any]:
    names = (
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        # Hidden: downloads that are under way, and the notes that downloaders keep.
        if path.is_file() and not _is_hidden(path.relative_to(folder))
    )
    notes = {METADATA, "README.md"}
    return {name: {"sources": [f"path:{name}"]} for name in names if name not in notes}


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _completed(listed: ModelMeta, pack: ModelMeta, metadata: Path) -> ModelMeta:
    if listed.family != pack.family:
        raise ConfigError(
            f"{metadata}: {pack.model_id!r} is a {listed.family} model of the catalog, "
            f"and this pack is {pack.family}; give the pack another model_id"
        )
    said = {name: getattr(pack, name) for name in pack.model_fields_set}
    return listed.model_copy(update={**said, "files": {**pack.files, **listed.files}})


def _anchored(meta: ModelMeta, root: Path) -> ModelMeta:
    files = {
        name: file.model_copy(update={"sources": [_anchor(text, root) for text in file.sources]})
        for name, file in meta.files.items()
    }
    return meta.model_copy(update={"files": files})


def _anchor(text: str, root: Path) -> str:
    source = Source.parse(text)
    if source.scheme != "path" or source.rest.startswith(("/", "~", "$")):
        return text
    return f"path:{root.resolve() / source.rest}"


def _fingerprint(meta: ModelMeta) -> Fingerprint:
    """Size and age of the files on disk, so that a replaced file counts as a change."""
    found = []
    for file in meta.files.values():
        for source in map(Source.parse, file.sources):
            path = Path(source.rest)
            if source.scheme == "path" and path.is_file():
                stat = path.stat()
                found.append((source.rest, stat.st_size, stat.st_mtime_ns))
    return tuple(found)
