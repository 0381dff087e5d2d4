"""Rules that hold for every test."""

from __future__ import annotations

import os
import re
from collections.abc import Generator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says nothing: other processes share the machine.
settings.register_profile("duplex", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("duplex")

# Set by CI: a skip means that something which must be there is missing, so it fails.
REQUIRE_SERVICES = bool(os.environ.get("DUPLEX_REQUIRE_SERVICES"))
# What a default installation leaves out on purpose; such a test says so with this prefix.
OPTIONAL = "optional: "

_OTHER_ROOMS = re.compile(
    r"\bsrc\.(orchestrator|client|demo|livekit_plugin)\b|\bbenchmarks\b|livekit|playwright|web_deps"
    r"|\btests\.integration\.(browser|page)"
)


@cache
def _is_worker_slice(path: Path) -> bool:
    return not _OTHER_ROOMS.search(path.read_text(encoding="utf-8"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "worker_slice: needs only the worker; set for a test file by what it names"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _is_worker_slice(item.path):
            item.add_marker(pytest.mark.worker_slice)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if REQUIRE_SERVICES and report.skipped and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else "")
        if OPTIONAL not in reason:
            report.outcome = "failed"
            report.longrepr = f"required here, but skipped: {reason}"
    return report
