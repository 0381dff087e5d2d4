"""docker-compose.yml as compose reads it, as far as ours goes: variables, and services one by one.

Written out because the check of the images and the tests must see what users run, and not every
machine has an engine that could tell them. Knows `$$`, `${A}`, `${A:-other}`, `${A:?why}`, nested.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_NAME = re.compile(r"\w+")


class ComposeError(ValueError):
    """The file, or what it is given, is not what it has to be; the message says where."""


@dataclass(frozen=True)
class Service:
    """One service with everything put in. Paths are as the file writes them."""

    name: str
    raw: Mapping[str, Any]

    @property
    def dockerfile(self) -> str:
        return str(self.raw.get("build", {}).get("dockerfile", ""))

    @property
    def target(self) -> str:
        return str(self.raw.get("build", {}).get("target", ""))

    @property
    def build_args(self) -> dict[str, str]:
        return _strings(self.raw.get("build", {}).get("args", {}))

    @property
    def image(self) -> str:
        return str(self.raw["image"])

    @property
    def command(self) -> list[str]:
        command = self.raw.get("command", [])
        return shlex.split(command) if isinstance(command, str) else [str(part) for part in command]

    @property
    def environment(self) -> dict[str, str]:
        return _strings(self.raw.get("environment", {}))

    @property
    def profiles(self) -> list[str]:
        return list(self.raw.get("profiles", []))

    @property
    def depends_on(self) -> dict[str, str]:
        """Service → condition."""
        return {name: str(how["condition"]) for name, how in self.raw.get("depends_on", {}).items()}

    @property
    def health_test(self) -> list[str]:
        """The command; empty: the image's own."""
        test = self.raw.get("healthcheck", {}).get("test", [])
        return [str(part) for part in test[1:]]

    @property
    def start_s(self) -> int:
        """How long it may take to get healthy; none where the file says nothing."""
        return int(str(self.raw.get("healthcheck", {}).get("start_period", "0s")).removesuffix("s"))

    @property
    def grace_s(self) -> int:
        """From SIGTERM to SIGKILL; ten seconds where the file says nothing."""
        return int(str(self.raw.get("stop_grace_period", "10s")).removesuffix("s"))


def services(path: Path, environ: Mapping[str, str]) -> dict[str, Service]:
    """Raises ComposeError, also for a variable that must be set and is not."""
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {
        name: Service(name, substituted(raw, environ, f"services.{name}"))
        for name, raw in document["services"].items()
    }


def substituted(value: Any, environ: Mapping[str, str], where: str = "") -> Any:
    """Every string in `value` with its variables put in."""
    if isinstance(value, str):
        try:
            return interpolate(value, environ)
        except ComposeError as error:
            raise ComposeError(f"{where}: {error}") from None
    if isinstance(value, Mapping):
        return {key: substituted(item, environ, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [substituted(item, environ, where) for item in value]
    return value


def interpolate(text: str, environ: Mapping[str, str]) -> str:
    """Raises ComposeError for `${A:?why}` where A is unset or empty, and for a lone `$`."""
    out, at = [], 0
    for start, end, inner in _variables(text):
        out.append(text[at:start].replace("$$", "$"))
        out.append(_value(inner, environ) if inner else "$")
        at = end
    return "".join([*out, text[at:]])


def variables(text: str) -> set[str]:
    """The names that `text` asks for, those in defaults included."""
    found = set()
    for _, _, inner in _variables(text):
        if name := _NAME.match(inner):
            found.add(name[0])
            found |= variables(inner[name.end() :])
    return found


def read_env_file(path: Path) -> dict[str, str]:
    """`NAME=value` lines; comments and empty lines aside. Raises ComposeError."""
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise ComposeError(f"{path}:{number}: expected NAME=value")
        found[name] = value
    return found


def _variables(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, what is between the braces); for `$$` that is nothing."""
    at = 0
    while (start := text.find("$", at)) >= 0:
        if text.startswith("$$", start):
            at = start + 2
            yield start, at, ""
        elif text.startswith("${", start):
            at = _closing(text, start + 2)
            yield start, at, text[start + 2 : at - 1]
        else:
            raise ComposeError(f"a lone $ in {text!r}; write $$ or ${{NAME}}")


def _closing(text: str, at: int) -> int:
    """One past the brace that closes what was opened before `at`."""
    depth = 1
    while depth:
        brace = re.compile(r"[{}]").search(text, at)
        if brace is None:
            raise ComposeError(f"no closing brace in {text!r}")
        depth += 1 if brace[0] == "{" else -1
        at = brace.end()
    return at


def _value(inner: str, environ: Mapping[str, str]) -> str:
    name = _NAME.match(inner)
    if name is None:
        raise ComposeError(f"${{{inner}}} names no variable")
    found, rest = environ.get(name[0], ""), inner[name.end() :]
    if found or not rest:
        return found
    if rest.startswith(":-"):
        return interpolate(rest[2:], environ)
    if rest.startswith(":?"):
        raise ComposeError(f"{name[0]} is not set: {interpolate(rest[2:], environ)}")
    raise ComposeError(f"${{{inner}}}: only :- and :? are understood here")


def _strings(mapping: Mapping[str, Any] | Sequence[str]) -> dict[str, str]:
    if isinstance(mapping, Mapping):
        return {name: str(value) for name, value in mapping.items()}
    return dict(item.split("=", 1) for item in mapping)
