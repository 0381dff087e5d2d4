"""The machine that the figures were taken on, and what the processes on it use."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from src.common.processes import Child


def now_ms() -> float:
    """The one clock of all processes here (CLOCK_MONOTONIC), as `MonotonicClock` reads it."""
    return time.monotonic() * 1000.0


def load_average() -> float:
    return os.getloadavg()[0]


def description() -> dict[str, str]:
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class Meter:
    """Processor time of some processes between two moments, and their memory."""

    def __init__(self, children: Mapping[str, Child]) -> None:
        self._processes = {name: psutil.Process(child.pid) for name, child in children.items()}
        self._at_s = time.monotonic()
        self._used = self._cpu_s()

    def _cpu_s(self) -> dict[str, float]:
        return {name: sum(p.cpu_times()[:2]) for name, p in self._processes.items()}

    def lap(self) -> dict[str, float]:
        """CPU seconds by process since the last lap."""
        before, self._used = self._used, self._cpu_s()
        self._at_s = time.monotonic()
        return {name: used - before[name] for name, used in self._used.items()}

    def cores(self) -> dict[str, float]:
        """Cores kept busy by each process since the last lap."""
        began = self._at_s
        used = self.lap()
        return {name: cpu_s / (self._at_s - began) for name, cpu_s in used.items()}

    def rss_mb(self) -> dict[str, float]:
        return {name: p.memory_info().rss / 2**20 for name, p in self._processes.items()}
