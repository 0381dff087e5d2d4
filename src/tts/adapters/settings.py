"""Settings, languages and packages: the checks that every family makes in the same words."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from src.rpc.errors import InvalidArgument, UnknownName
from src.tts.tts_base import MissingPackage


@dataclass(frozen=True, slots=True)
class Range:
    """A number that a session may set."""

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


def helps(ranges: Mapping[str, Range]) -> dict[str, str]:
    """`AdapterCapabilities.settings` for these ranges."""
    return {name: entry.help for name, entry in ranges.items()}


def read_settings(ranges: Mapping[str, Range], *layers: Mapping[str, str]) -> dict[str, float]:
    """Every setting's value: its default, or what the last layer that names it says.

    Raises UnknownName for a key that is not in `ranges`, InvalidArgument for a bad value.
    """
    values = {name: entry.default for name, entry in ranges.items()}
    for layer in layers:
        for name, raw in layer.items():
            if name not in ranges:
                raise UnknownName.among("setting", name, ranges)
            values[name] = ranges[name].read(name, raw)
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


def require_modules(family: str, modules: Iterable[str], install: str) -> None:
    """Raises MissingPackage if one of these cannot be found. Imports none of them."""
    if any(importlib.util.find_spec(module) is None for module in modules):
        raise MissingPackage(family, install)
