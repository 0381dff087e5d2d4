"""Settings, languages and packages: the checks that every family makes in the same words."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from src.rpc.errors import InvalidArgument, UnknownName
from src.tts.tts_base import MissingPackage

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Setting(Protocol[T_co]):
    """One thing that a session or a catalog entry may set; what they write is text."""

    @property
    def default(self) -> T_co: ...

    @property
    def help(self) -> str:
        """A sentence on what it does and which values it takes."""
        ...

    def read(self, name: str, raw: str) -> T_co:
        """Raises InvalidArgument, or UnknownName where a list of names is all that it takes."""
        ...


@dataclass(frozen=True, slots=True)
class Range:
    """A number."""

    low: float
    high: float
    default: float
    what: str

    @property
    def help(self) -> str:
        return f"{self.what}, {self.low:g} to {self.high:g} (default {self.default:g})"

    def read(self, name: str, raw: str) -> float:
        """Raises InvalidArgument; NaN is out of every range."""
        try:
            value = float(raw)
        except ValueError:
            value = float("nan")
        if not self.low <= value <= self.high:
            raise InvalidArgument(
                f"setting {name!r} must be a number from {self.low:g} to {self.high:g}, got {raw!r}"
            )
        return value


SEED = Range(
    0, 2**31 - 1, 0, "the same seed says the same text in the same way; 0: in another each time"
)
"""Of families whose stream has a generator of its own: `own_generator` in torch_host."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a few names."""

    options: tuple[str, ...]
    default: str
    what: str

    @property
    def help(self) -> str:
        return f"{self.what}: {', '.join(self.options)} (default {self.default})"

    def read(self, name: str, raw: str) -> str:
        """Raises UnknownName with the nearest option."""
        wanted = raw.strip().lower()
        if wanted not in self.options:
            raise UnknownName.among(f"value of setting {name!r}:", raw, self.options)
        return wanted


@dataclass(frozen=True, slots=True)
class Words:
    """A text for the model to read, not to say."""

    longest: int
    what: str
    default: str = ""

    @property
    def help(self) -> str:
        said = f" (default {self.default!r})" if self.default else ""
        return f"{self.what}, up to {self.longest} characters{said}"

    def read(self, name: str, raw: str) -> str:
        """On one line. Raises InvalidArgument for one that is too long."""
        text = " ".join(raw.split())
        if len(text) > self.longest:
            raise InvalidArgument(
                f"setting {name!r} takes up to {self.longest} characters, got {len(text)}"
            )
        return text


def helps(known: Mapping[str, Setting[object]]) -> dict[str, str]:
    """`AdapterCapabilities.settings` for these."""
    return {name: entry.help for name, entry in known.items()}


def read_settings(known: Mapping[str, Setting[T]], *layers: Mapping[str, str]) -> dict[str, T]:
    """Every setting's value: its default, or what the last layer that names it says.

    Raises UnknownName for a key that is not in `known`, and what `Setting.read` raises.
    """
    values = {name: entry.default for name, entry in known.items()}
    for layer in layers:
        for name, raw in layer.items():
            if name not in known:
                raise UnknownName.among("setting", name, known)
            values[name] = known[name].read(name, raw)
    return values


def match_language(wanted: str, known: Iterable[str]) -> str | None:
    """The known BCP 47 tag for `wanted`: itself, else the first of the same language."""
    tags = list(known)
    tag = wanted.replace("_", "-").lower()
    exact = next((t for t in tags if t.lower() == tag), None)
    if exact is not None:
        return exact
    base = tag.partition("-")[0]
    # "en" takes any English; "en-au" takes plain "en" but no other country's.
    if base == tag:
        return next((t for t in tags if t.lower().partition("-")[0] == base), None)
    return next((t for t in tags if t.lower() == base), None)


def known_voice(wanted: str, voices: Sequence[str]) -> str:
    """`wanted`, or the first where none is asked for. Raises UnknownName."""
    if wanted and wanted not in voices:
        raise UnknownName.among("voice", wanted, voices)
    return wanted or voices[0]


def known_language(wanted: str, languages: Sequence[str]) -> str:
    """What `match_language` finds, or the first where none is asked for. Raises UnknownName."""
    known = match_language(wanted or languages[0], languages)
    if known is None:
        raise UnknownName.among("language", wanted, languages)
    return known


def require_modules(family: str, modules: Iterable[str], install: str) -> None:
    """Raises MissingPackage if one of these cannot be found. Imports none of them."""
    if any(importlib.util.find_spec(module) is None for module in modules):
        raise MissingPackage(family, install)
