"""Each family's real package, on small random weights of its true architecture.

`just test-family NAME` runs a folder of these in an environment that has the package; where it is
missing, the folder is left out.
"""

from __future__ import annotations

from importlib.util import find_spec


def left_out_without(*modules: str) -> list[str]:
    """For `collect_ignore_glob`: all of a folder's tests, unless these can be imported."""
    return [] if all(find_spec(module) for module in modules) else ["test_*.py"]
