"""The engine's own share of a first frame, from the worker's metrics."""

from __future__ import annotations

import re

import aiohttp

_SAMPLE = re.compile(r"^tts_engine_first_chunk_ms_(sum|count)\{.*\} (\S+)$", re.MULTILINE)


class EngineClock:
    """Reads how long engines took for the first chunks since it was read last."""

    def __init__(self, http: aiohttp.ClientSession, port: int) -> None:
        self._http = http
        self._url = f"http://127.0.0.1:{port}/metrics"
        self._sum_ms = 0.0
        self._count = 0.0

    async def lap(self) -> float:
        """Mean over the utterances that began since the last lap; 0 if there were none."""
        async with self._http.get(self._url) as answer:
            found = _SAMPLE.findall(await answer.text())
        before_ms, before = self._sum_ms, self._count
        self._sum_ms = sum(float(value) for name, value in found if name == "sum")
        self._count = sum(float(value) for name, value in found if name == "count")
        begun = self._count - before
        return (self._sum_ms - before_ms) / begun if begun else 0.0
