"""These tests run real torch modules. `just test-sesame` brings them; the default installation does
not, and leaves this folder out."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("torch") else ["test_*.py"]
