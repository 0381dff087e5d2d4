"""What a fleet looks like between two heartbeats, and what the registry makes of a record."""

from __future__ import annotations

import pytest

from src.common.clock import ManualClock
from src.orchestrator.registry import AVOID_MS, SETTLE_MS, Fleet, Registry
from src.orchestrator.routing import WorkerView
from src.rpc.announcement import KEY_PREFIX, Announcement, WorkerMetrics

NOWHERE = "redis://127.0.0.1:1/0"


def record(name: str = "w", sessions: int = 0, max_sessions: int = 0) -> Announcement:
    return Announcement(
        name=name,
        addr=f"grpc://{name}:7001",
        metrics=WorkerMetrics(sessions=sessions),
        max_sessions=max_sessions,
    )


def only(fleet: Fleet) -> WorkerView:
    (view,) = fleet.view()
    return view


def test_sessions_opened_since_the_heartbeat_are_added_to_it() -> None:
    fleet = Fleet()
    fleet.announced(record(sessions=3), now_ms=1_000)
    fleet.opened("w", "a", now_ms=1_100)
    fleet.opened("w", "b", now_ms=1_200)
    assert only(fleet).sessions == 5
    assert only(fleet).queue_depth == 2
    fleet.announced(record(sessions=5), now_ms=2_000)
    assert only(fleet).sessions == 5
    assert only(fleet).queue_depth == 0
    assert only(fleet).open_here == 2


def test_a_session_opened_just_before_the_heartbeat_is_not_taken_as_announced() -> None:
    fleet = Fleet()
    fleet.announced(record(), now_ms=1_000)
    fleet.opened("w", "a", now_ms=2_000 - SETTLE_MS + 1)
    fleet.announced(record(sessions=0), now_ms=2_000)
    assert only(fleet).sessions == 1


def test_a_place_that_was_freed_since_the_heartbeat_is_free() -> None:
    fleet = Fleet()
    fleet.opened("w", "a", now_ms=0)
    fleet.announced(record(sessions=1, max_sessions=1), now_ms=1_000)
    assert only(fleet).full
    fleet.closed("w", "a", now_ms=1_100)
    assert not only(fleet).full
    fleet.announced(record(sessions=0, max_sessions=1), now_ms=2_000)
    assert only(fleet).sessions == 0


def test_a_session_that_came_and_went_between_heartbeats_leaves_no_trace() -> None:
    fleet = Fleet()
    fleet.announced(record(sessions=1, max_sessions=1), now_ms=1_000)
    fleet.opened("w", "a", now_ms=1_100)
    fleet.closed("w", "a", now_ms=1_200)
    fleet.closed("w", "a", now_ms=1_300)
    assert only(fleet).sessions == 1
    assert only(fleet).full


def test_local_sessions_fill_a_worker_before_it_says_so() -> None:
    fleet = Fleet()
    fleet.announced(record(max_sessions=2), now_ms=1_000)
    fleet.opened("w", "a", now_ms=1_001)
    assert not only(fleet).full
    fleet.opened("w", "b", now_ms=1_002)
    assert only(fleet).full
    assert not fleet.over_limit("w")
    fleet.opened("w", "c", now_ms=1_003)
    assert fleet.over_limit("w")


def test_sessions_outlive_the_announcement_of_their_worker() -> None:
    fleet = Fleet()
    fleet.announced(record(), now_ms=1_000)
    fleet.opened("w", "a", now_ms=1_001)
    fleet.gone("w")
    assert fleet.view() == ()
    assert fleet.sessions() == [("w", "a")]
    fleet.announced(record(), now_ms=9_000)
    assert only(fleet).open_here == 1


def test_avoidance_is_not_shortened_and_can_be_forgiven() -> None:
    clock = ManualClock(1_000)
    registry = Registry(NOWHERE, clock)
    registry.fleet.announced(record(), clock.now_ms())
    registry.failed("w", avoid_ms=10_000)
    registry.failed("w")
    assert registry.view()[0].avoid_until_ms == 11_000
    registry.recovered("w")
    assert registry.view()[0].avoid_until_ms == 0
    registry.failed("w")
    assert registry.view()[0].avoid_until_ms == 1_000 + AVOID_MS


def test_the_view_is_in_the_order_of_names() -> None:
    fleet = Fleet()
    for name in ("c", "a", "b"):
        fleet.announced(record(name), now_ms=0)
    assert [view.name for view in fleet.view()] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"not json", "Invalid JSON"),
        (b"\xff\xfe", "Invalid JSON"),
        (b'{"name": "w"}', "Field required"),
        (b'{"name": "w", "addr": "grpc://w:1", "metrics": {"sessions": "many"}}', "valid integer"),
        (b'{"name": "other", "addr": "grpc://w:1"}', "names itself 'other'"),
    ],
)
def test_a_malformed_announcement_is_ignored_and_named_once(
    raw: bytes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(NOWHERE)
    for _ in range(3):
        registry._hear(KEY_PREFIX + "w", raw)
    assert registry.view() == ()
    (line,) = caplog.records
    assert line.__dict__["key"] == "duplex:workers:w"
    assert reason in line.__dict__["reason"]


def test_a_worker_newer_than_this_reader_is_understood() -> None:
    registry = Registry(NOWHERE)
    registry._hear(KEY_PREFIX + "w", b'{"name": "w", "addr": "grpc://h:1", "moods": ["calm"]}')
    assert registry.view()[0].announcement.target == "h:1"


async def test_without_redis_claims_are_counted_here() -> None:
    registry = Registry(NOWHERE)
    registry.fleet.announced(record(max_sessions=1), 0.0)
    assert await registry.claim("w", "a")
    assert registry.stale_since_ms is not None
    assert not await registry.claim("w", "b")
    assert registry.fleet.sessions() == [("w", "a")]
    await registry.release("w", "a")
    assert await registry.claim("w", "b")
    await registry.aclose()
