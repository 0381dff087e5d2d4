"""The registry against a real server: what is seen, what is claimed, and what an outage does."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from redis.asyncio import Redis

from src.common.embedded_redis import EmbeddedRedis, RedisUnavailable, find_binary
from src.common.tasks import cancel_and_wait, timeout
from src.orchestrator import registry as registry_module
from src.orchestrator.registry import CLAIM_PREFIX, Registry
from src.rpc.announcement import CHANNEL, KEY_PREFIX, Announcement

try:
    find_binary()
except RedisUnavailable as missing:
    pytest.skip(str(missing), allow_module_level=True)


@pytest.fixture
async def server() -> AsyncIterator[EmbeddedRedis]:
    started = await EmbeddedRedis.start()
    yield started
    await started.close()


@pytest.fixture
async def client(server: EmbeddedRedis) -> AsyncIterator[Redis]:
    async with Redis.from_url(server.url) as opened:
        yield opened


@asynccontextmanager
async def watching(server: EmbeddedRedis) -> AsyncIterator[Registry]:
    registry = Registry(server.url)
    task = asyncio.create_task(registry.run(), name="registry")
    try:
        await registry.first_look()
        yield registry
    finally:
        await cancel_and_wait(task)
        await registry.aclose()


def record(name: str, **fields: object) -> Announcement:
    return Announcement.model_validate({"name": name, "addr": f"grpc://{name}:7001", **fields})


async def announce(client: Redis, announcement: Announcement, ttl_ms: int = 60_000) -> None:
    raw = announcement.model_dump_json()
    await client.set(announcement.key, raw, px=ttl_ms)
    await client.publish(CHANNEL, raw)


def names(registry: Registry) -> list[str]:
    return [view.name for view in registry.view()]


async def until(condition: Callable[[], bool], within_s: float = 15) -> None:
    async with timeout(within_s):
        while not condition():  # noqa: ASYNC110  (it may come from another process)
            await asyncio.sleep(0.01)


async def test_workers_announced_before_are_found_at_the_first_look(
    server: EmbeddedRedis, client: Redis
) -> None:
    for name in ("a", "b"):
        await announce(client, record(name))
    await client.set("duplex:claims:a", "not an announcement")
    async with watching(server) as registry:
        assert names(registry) == ["a", "b"]
        assert registry.stale_since_ms is None


async def test_an_announcement_is_heard_at_once(server: EmbeddedRedis, client: Redis) -> None:
    async with watching(server) as registry:
        assert names(registry) == []
        await announce(client, record("late"))
        # Sooner than any re-reading of keys could bring it.
        await until(lambda: names(registry) == ["late"], within_s=0.9)
        await announce(client, record("late", draining=True))
        await until(lambda: registry.view()[0].announcement.draining)


async def test_a_worker_whose_key_lapses_is_gone(
    server: EmbeddedRedis, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_module, "TTL_MS", 50)
    monkeypatch.setattr(registry_module, "CHECK_MS", 50)
    await announce(client, record("dying"), ttl_ms=2_000)
    await announce(client, record("living"))
    async with watching(server) as registry:
        assert names(registry) == ["dying", "living"]
        await until(lambda: names(registry) == ["living"])


async def test_a_key_that_was_never_published_is_found_by_the_next_scan(
    server: EmbeddedRedis, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_module, "CHECK_MS", 20)
    monkeypatch.setattr(registry_module, "SCAN_MS", 50)
    async with watching(server) as registry:
        await client.set(KEY_PREFIX + "quiet", record("quiet").model_dump_json())
        await until(lambda: names(registry) == ["quiet"])


async def test_a_malformed_key_is_named_and_the_others_are_used(
    server: EmbeddedRedis, client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    await client.set(KEY_PREFIX + "broken", '{"name": "broken"')
    await announce(client, record("fine"))
    async with watching(server) as registry:
        assert names(registry) == ["fine"]
    assert [r.__dict__["key"] for r in caplog.records if "malformed" in r.message] == [
        "duplex:workers:broken"
    ]


async def test_claims_are_atomic_among_orchestrators(server: EmbeddedRedis, client: Redis) -> None:
    await announce(client, record("w", max_sessions=5))
    async with watching(server) as one, watching(server) as two:
        granted = await asyncio.gather(
            *((one, two)[n % 2].claim("w", f"s{n}") for n in range(40)),
        )
        assert sum(granted) == 5
        assert await client.zcard(CLAIM_PREFIX + "w") == 5
        winner = granted.index(True)
        await (one, two)[winner % 2].release("w", f"s{winner}")
        assert await two.claim("w", "next")
        assert not await one.claim("w", "one too many")


async def test_claiming_again_is_renewing(server: EmbeddedRedis, client: Redis) -> None:
    await announce(client, record("w", max_sessions=1))
    async with watching(server) as registry:
        assert await registry.claim("w", "s")
        assert await registry.claim("w", "s")
        assert await client.zcard(CLAIM_PREFIX + "w") == 1


async def test_a_claim_of_an_orchestrator_that_died_lapses(
    server: EmbeddedRedis, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Long enough that a machine that hesitates renews in time.
    monkeypatch.setattr(registry_module, "CLAIM_TTL_MS", 3_000)
    monkeypatch.setattr(registry_module, "RENEW_MS", 20)
    monkeypatch.setattr(registry_module, "CHECK_MS", 10)
    await announce(client, record("w", max_sessions=1))

    async def expiry() -> float:
        return await client.zscore(CLAIM_PREFIX + "w", "s") or 0.0

    async with watching(server) as survivor:
        async with watching(server) as dying:
            assert await dying.claim("w", "s")
            granted = await expiry()
            async with timeout(10):
                # Renewed for as long as its owner lives.
                while await expiry() <= granted:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert not await survivor.claim("w", "t")
        async with timeout(20):
            while not await survivor.claim("w", "t"):  # noqa: ASYNC110
                await asyncio.sleep(0.05)


async def test_two_hundred_claims_at_once_wait_for_a_connection(
    server: EmbeddedRedis, client: Redis
) -> None:
    """redis-py's plain pool raises here instead."""
    await announce(client, record("w"))
    async with watching(server) as registry:
        granted = await asyncio.gather(*(registry.claim("w", f"s{n}") for n in range(200)))
        assert all(granted)
        assert registry.stale_since_ms is None
        assert await client.zcard(CLAIM_PREFIX + "w") == 200


async def test_an_outage_keeps_the_view_and_the_claims(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(registry_module, "CHECK_MS", 50)
    first = await EmbeddedRedis.start()
    async with watching(first) as registry:
        async with Redis.from_url(first.url) as client:
            await announce(client, record("w", max_sessions=2))
        await until(lambda: names(registry) == ["w"])
        assert await registry.claim("w", "before")
        await first.close()
        await until(lambda: registry.stale_since_ms is not None)
        assert names(registry) == ["w"]
        assert await registry.claim("w", "during")
        assert not await registry.claim("w", "one too many")

        second = await EmbeddedRedis.start(first.port)
        try:
            await until(lambda: registry.stale_since_ms is None)
            assert names(registry) == ["w"], "kept until its next heartbeat had time to come"
            async with Redis.from_url(second.url) as client:
                async with timeout(15):
                    while await client.zcard(CLAIM_PREFIX + "w") < 2:  # noqa: ASYNC110
                        await asyncio.sleep(0.02)
                await announce(client, record("v"))
                await until(lambda: names(registry) == ["v", "w"])
        finally:
            await second.close()
    said = [r.message for r in caplog.records if r.name == registry_module.__name__]
    assert said.count("Redis is back") == 1
    assert sum("Redis is away" in line for line in said[: said.index("Redis is back")]) == 1


async def test_a_redis_that_hangs_is_an_outage_too(
    server: EmbeddedRedis, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_module, "_ANSWER_S", 1.0)
    await announce(client, record("w", max_sessions=1))
    async with watching(server) as registry:
        os.kill(server.pid, signal.SIGSTOP)
        try:
            assert await registry.claim("w", "s")
            assert registry.stale_since_ms is not None
            assert names(registry) == ["w"]
        finally:
            os.kill(server.pid, signal.SIGCONT)
        await until(lambda: registry.stale_since_ms is None)


async def test_unreachable_from_the_start_is_not_an_error() -> None:
    registry = Registry("redis://127.0.0.1:1/0")
    task = asyncio.create_task(registry.run())
    await registry.first_look()
    assert registry.view() == ()
    assert registry.stale_since_ms is not None
    assert not task.done()
    await cancel_and_wait(task)
    await registry.aclose()


async def test_can_be_cancelled_at_any_moment(
    server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """redis-py's own time-outs swallow a cancellation now and then, on Python 3.11 and before."""
    monkeypatch.setattr(registry_module, "CHECK_MS", 2)
    monkeypatch.setattr(registry_module, "RENEW_MS", 2)
    for attempt in range(60):
        registry = Registry(server.url)
        task = asyncio.create_task(registry.run())
        await registry.first_look()
        await registry.claim("w", "s")
        await asyncio.sleep(attempt * 0.000_2)
        async with timeout(5):
            await cancel_and_wait(task)
        await registry.aclose()
