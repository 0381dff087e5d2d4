"""Families whose package is a repository, not a distribution.

A variable (`MELO_HOME`) names a checkout; without it the package may lie on the path already, as in
an image. From a checkout one package is made importable and nothing beside it: such repositories
have a `src`, a `tools` and a `cli` at their top, too, which would hide other people's.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType


@dataclass(frozen=True, slots=True)
class Source:
    """A package of a checkout."""

    variable: str
    """Of the environment: it names the checkout's folder."""
    package: str
    mark: str
    """A file in the package's folder that other packages of this name do not have."""
    under: str = "."
    """The folder of the checkout in which the package's folder is."""

    def find(self) -> Path | None:
        """The package's folder. A checkout that is named is the only place that is looked at."""
        return next((at for at in self._places() if (at / self.mark).is_file()), None)

    def offer(self) -> None:
        """Make it importable for good. Its own `__init__.py` is not run: these have empty ones.

        One that has been imported from elsewhere is forgotten first. Does nothing where there is
        no such package: importing it says so.
        """
        folder = self.find()
        if folder is None or self._is_offered(folder):
            return
        inside = f"{self.package}."
        for name in [name for name in sys.modules if name.startswith(inside)]:
            del sys.modules[name]
        module = ModuleType(self.package)
        module.__path__ = [str(folder)]
        sys.modules[self.package] = module

    def _is_offered(self, folder: Path) -> bool:
        module = sys.modules.get(self.package)
        return module is not None and list(getattr(module, "__path__", ())) == [str(folder)]

    def _places(self) -> Iterator[Path]:
        if home := os.environ.get(self.variable):
            yield Path(home).expanduser() / self.under / self.package
            return
        module = sys.modules.get(self.package)
        if module is not None:
            yield from map(Path, getattr(module, "__path__", ()))
        elif (spec := importlib.util.find_spec(self.package)) is not None:
            yield from map(Path, spec.submodule_search_locations or ())
