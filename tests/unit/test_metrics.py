"""What a scrape finds before anything has happened."""

from __future__ import annotations

import pytest

from src.orchestrator.metrics import Metrics


@pytest.mark.parametrize(
    "line",
    [
        'duplex_barge_ins_total{verdict="real"} 0.0',
        'duplex_barge_ins_total{verdict="false"} 0.0',
        'duplex_refused_total{code="exhausted"} 0.0',
        'duplex_refused_total{code="unauthenticated"} 0.0',
    ],
)
def test_counters_begin_at_zero_so_that_the_first_is_on_the_curve(line: str) -> None:
    assert line in Metrics().expose().decode().splitlines()


def test_an_interruption_is_counted_by_its_verdict() -> None:
    metrics = Metrics()
    metrics.observer().barge_in("real")
    assert 'duplex_barge_ins_total{verdict="real"} 1.0' in metrics.expose().decode()
