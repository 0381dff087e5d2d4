"""The nearest known name, for messages about unknown ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest_hint(name: str, known: Iterable[str]) -> str:
    """'; did you mean 'x'?', or the list of what there is when nothing is near."""
    names = sorted(set(known))
    near = difflib.get_close_matches(name.lower(), [n.lower() for n in names], n=1, cutoff=0.5)
    if near:
        match = next(n for n in names if n.lower() == near[0])
        return f"; did you mean {match!r}?"
    if not names:
        return "; there are none"
    shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    return f"; known: {shown}"
