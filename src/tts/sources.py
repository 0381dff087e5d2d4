"""Where a model's files lie: places tried in order. A pinned hash is never worked around.

path:<file>                        absolute, or relative to the catalog's root; ~ and $NAME expand
package:<module>/<file inside it>  an installed data package, found without importing it
hub:<repo>@<revision>/<file>       Hugging Face, only when the hub is allowed
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, cast

from src.rpc.errors import CorruptModel

Progress = Callable[[float], None]
Scheme = Literal["path", "package", "hub"]
INSTALL_MODELS = "uv sync --group local-models"

_BLOCK = 1 << 20
_SHAPES: dict[str, tuple[re.Pattern[str], str]] = {
    "path": (re.compile(r".+"), "path:<file>"),
    "package": (re.compile(r"[\w.]+/.+"), "package:<module>/<file inside it>"),
    "hub": (re.compile(r"[^@]+@[^/@]+/.+"), "hub:<repo>@<revision>/<file>"),
}


@dataclass(frozen=True, slots=True)
class Source:
    """One place, taken apart. `str()` gives it back as it was written."""

    scheme: Scheme
    rest: str

    @classmethod
    def parse(cls, text: str) -> Source:
        """Raises ValueError that says how a source is written."""
        scheme, colon, rest = text.partition(":")
        if not colon or scheme not in _SHAPES:
            shapes = ", ".join(shape for _, shape in _SHAPES.values())
            raise ValueError(f"unknown source {text!r}; write one of: {shapes}")
        pattern, shape = _SHAPES[scheme]
        if not pattern.fullmatch(rest):
            raise ValueError(f"source {text!r} is not of the form {shape}")
        return cls(cast(Scheme, scheme), rest)

    def __str__(self) -> str:
        return f"{self.scheme}:{self.rest}"


class MissingFile(CorruptModel):
    """No place has the file."""


class _NotThere(Exception):
    """This place does not have the file; the message says why."""


@dataclass(slots=True)
class SourceResolver:
    """Finds and verifies files. Blocking, and safe on several threads at once."""

    allow_hub: bool = False
    _hashes: dict[tuple[str, int, int], str] = field(default_factory=dict)

    def resolve(
        self,
        model_id: str,
        name: str,
        sources: Sequence[str],
        sha256: str = "",
        progress: Progress = lambda _: None,
    ) -> Path:
        """The first place that has the file, hash verified. Raises CorruptModel, MissingFile.

        A place that has the file with other content is refused, and the next one is not tried:
        somebody put the wrong file there, and that has to be seen.
        """
        path, source = self._find(model_id, name, sources)
        if sha256:
            self._verify(model_id, name, path, source, sha256, progress)
        progress(1.0)
        return path

    def _find(self, model_id: str, name: str, sources: Sequence[str]) -> tuple[Path, Source]:
        parsed = [Source.parse(text) for text in sources]
        looked: list[str] = []
        for source in parsed:
            try:
                return self._locate(source), source
            except _NotThere as why:
                looked.append(f"{source} ({why})")
        raise MissingFile(
            f"{model_id}: {name} is nowhere. Looked at: {'; '.join(looked)}. "
            f"{_advice(model_id, parsed)}"
        )

    def _locate(self, source: Source) -> Path:
        if source.scheme == "path":
            return _on_disk(source.rest)
        if source.scheme == "package":
            return _in_package(source.rest)
        return self._from_hub(source.rest)

    def _from_hub(self, rest: str) -> Path:
        if not self.allow_hub:
            raise _NotThere("the hub is off")
        try:
            from huggingface_hub import hf_hub_download
        except ImportError:
            raise _NotThere("huggingface_hub is not installed") from None
        repo, _, tail = rest.partition("@")
        revision, _, file = tail.partition("/")
        try:
            return Path(hf_hub_download(repo, file, revision=revision))
        except (OSError, ValueError) as error:  # the hub's own errors derive from these two
            raise _NotThere(f"{type(error).__name__}: {error}") from error

    def _verify(
        self, model_id: str, name: str, path: Path, source: Source, sha256: str, progress: Progress
    ) -> None:
        found = self._sha256(path, progress)
        if found != sha256.lower():
            raise CorruptModel(
                f"{model_id}: {name} from {source} is not the file that is pinned: expected sha256 "
                f"{sha256.lower()}, found {found} at {path}. Replace the file, or correct the pin "
                "in the catalog if you trust this one."
            )

    def _sha256(self, path: Path, progress: Progress) -> str:
        stat = path.stat()
        key = (str(path), stat.st_size, stat.st_mtime_ns)
        if key not in self._hashes:
            self._hashes[key] = _hash_file(path, stat.st_size, progress)
        return self._hashes[key]


def _on_disk(rest: str) -> Path:
    expanded = os.path.expandvars(rest)
    if unset := re.search(r"\$\{?(\w+)\}?", expanded):
        raise _NotThere(f"${unset.group(1)} is not set")
    path = Path(expanded).expanduser()
    if not path.is_file():
        raise _NotThere("no such file")
    return path


def _in_package(rest: str) -> Path:
    module, _, file = rest.partition("/")
    top, *inner = module.split(".")  # find_spec would import the parents of a dotted name
    spec = find_spec(top)
    if spec is None:
        raise _NotThere("not installed")
    for folder in spec.submodule_search_locations or ():
        path = Path(folder, *inner, file)
        if path.is_file():
            return path
    raise _NotThere("installed, but without this file")


def _hash_file(path: Path, size: int, progress: Progress) -> str:
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            done += len(block)
            progress(min(1.0, done / size))
    return digest.hexdigest()


def _advice(model_id: str, sources: Sequence[Source]) -> str:
    schemes = {source.scheme for source in sources}
    ways = []
    if "package" in schemes:
        ways.append(f"run `{INSTALL_MODELS}`")
    if {"path", "hub"} <= schemes:
        ways.append(f"run `uv run just voicepack {model_id}`")
    if "path" in schemes:
        ways.append("put the file where it is looked for")
    if "hub" in schemes:
        ways.append("allow the download with --allow_hub")
    return "To fix it: " + ", or ".join(ways) + "."
