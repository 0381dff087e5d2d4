"""Which workers are alive, how loaded they are, and who may open the next session on one.

`Fleet` is what is known, a plain object that is told the time. `Registry` is the shell around it:
it reads the workers' announcements from Redis and holds the claims there. While Redis is away,
routing goes on by the last view and claims are counted locally.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.client import Pipeline, PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from src.common.clock import Clock, MonotonicClock
from src.common.tasks import timeout
from src.orchestrator.routing import WorkerView
from src.rpc.announcement import CHANNEL, KEY_PREFIX, TTL_MS, Announcement

log = logging.getLogger(__name__)

CLAIM_PREFIX = "duplex:claims:"
CLAIM_TTL_MS = 30_000
RENEW_MS = CLAIM_TTL_MS // 3
CHECK_MS = 1_000
SCAN_MS = 10_000
AVOID_MS = 2_000
# An announcement may have been written before the worker saw a session that we opened by then.
SETTLE_MS = 250
_ANSWER_S = 2.0
_AWAY = (RedisError, OSError, asyncio.TimeoutError)
_BACKOFF_MS = (100, 3_000)

# KEYS[1]: the worker's claims, a sorted set of session ids by the time they lapse, so that those of
# an orchestrator that died do. ARGV: session id, limit (0: none), lifetime in ms. Renewing is
# claiming again.
_CLAIM = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local limit = tonumber(ARGV[2])
if limit > 0 and not redis.call('ZSCORE', KEYS[1], ARGV[1])
    and redis.call('ZCARD', KEYS[1]) >= limit then
  return 0
end
redis.call('ZADD', KEYS[1], now + ARGV[3], ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
"""


class Fleet:
    """The workers that announced themselves, and what we did with them since."""

    def __init__(self) -> None:
        self._records: dict[str, Announcement] = {}
        self._heard_ms: dict[str, float] = {}
        self._opened_ms: defaultdict[str, dict[str, float]] = defaultdict(dict)
        self._closed_ms: defaultdict[str, list[float]] = defaultdict(list)
        self._avoid_until_ms: dict[str, float] = {}

    def announced(self, record: Announcement, now_ms: float) -> None:
        self._records[record.name] = record
        self._heard_ms[record.name] = now_ms
        self._closed_ms[record.name] = [
            at for at in self._closed_ms[record.name] if at > now_ms - SETTLE_MS
        ]

    def gone(self, name: str) -> None:
        """Its sessions stay counted: they may outlive the announcement."""
        self._records.pop(name, None)
        self._heard_ms.pop(name, None)
        self._closed_ms.pop(name, None)
        self._avoid_until_ms.pop(name, None)

    def record(self, name: str) -> Announcement | None:
        return self._records.get(name)

    def names(self) -> list[str]:
        return sorted(self._records)

    def opened(self, name: str, session_id: str, now_ms: float) -> None:
        self._opened_ms[name][session_id] = now_ms

    def closed(self, name: str, session_id: str, now_ms: float) -> None:
        opened = self._opened_ms[name].pop(session_id, None)
        if not self._opened_ms[name]:
            del self._opened_ms[name]
        if opened is not None and not self._unseen(name, opened) and name in self._records:
            self._closed_ms[name].append(now_ms)

    def sessions(self) -> list[tuple[str, str]]:
        """(worker, session id) of all that are open here."""
        return [(name, one) for name, ids in self._opened_ms.items() for one in ids]

    def over_limit(self, name: str) -> bool:
        limit = self.limit(name)
        return 0 < limit < len(self._opened_ms.get(name, ()))

    def limit(self, name: str) -> int:
        record = self._records.get(name)
        return record.max_sessions if record else 0

    def avoid(self, name: str, until_ms: float) -> None:
        self._avoid_until_ms[name] = max(until_ms, self._avoid_until_ms.get(name, 0.0))

    def forgive(self, name: str) -> None:
        self._avoid_until_ms.pop(name, None)

    def view(self) -> tuple[WorkerView, ...]:
        return tuple(self._view(name) for name in self.names())

    def _view(self, name: str) -> WorkerView:
        opened = self._opened_ms.get(name, {})
        unseen = sum(self._unseen(name, at) for at in opened.values())
        return WorkerView(
            self._records[name],
            unseen=unseen - len(self._closed_ms[name]),
            open_here=len(opened),
            avoid_until_ms=self._avoid_until_ms.get(name, 0.0),
        )

    def _unseen(self, name: str, opened_ms: float) -> bool:
        return opened_ms > self._heard_ms.get(name, 0.0) - SETTLE_MS


class Registry:
    """`run` watches Redis until cancelled; the rest may be called meanwhile, or without it."""

    def __init__(self, url: str, clock: Clock | None = None) -> None:
        self.fleet = Fleet()
        self.stale_since_ms: float | None = None
        self._clock = clock or MonotonicClock()
        # A plain pool raises when all its connections are busy; this one waits for one.
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=8,
            timeout=None,
            # Time-outs are ours: redis-py's go through `wait_for`, which before Python 3.12 may
            # swallow the cancellation of whoever awaits it.
            socket_timeout=None,
            socket_connect_timeout=None,
            # Once, and at once: a connection that idled through a restart of Redis.
            retry=Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
        )
        self._redis: Redis = Redis.from_pool(pool)
        self._claim_script = self._redis.register_script(_CLAIM)
        self._looked = asyncio.Event()
        self._connected_ms = 0.0
        self._check_ms = self._scan_ms = self._renew_ms = 0.0
        self._malformed: dict[str, bytes] = {}

    def view(self) -> tuple[WorkerView, ...]:
        """As of the last word from Redis, however old: `stale_since_ms` says since when."""
        return self.fleet.view()

    async def first_look(self, timeout_ms: int = 2_000) -> None:
        """Returns once Redis has been read, or could not be, or after the time is up."""
        with contextlib.suppress(asyncio.TimeoutError):
            async with timeout(timeout_ms / 1000):
                await self._looked.wait()

    def failed(self, worker: str, avoid_ms: int | None = None) -> None:
        """It refused or could not be reached: take others first for a while."""
        self.fleet.avoid(
            worker, self._clock.now_ms() + (AVOID_MS if avoid_ms is None else avoid_ms)
        )

    def recovered(self, worker: str) -> None:
        self.fleet.forgive(worker)

    # --- claims ---

    async def claim(self, worker: str, session_id: str) -> bool:
        """Take one of the worker's `max_sessions` places, atomically among all orchestrators.

        False: none is left. Without Redis, only the sessions of this process are counted.
        """
        # Counted before anything is awaited, so that the next decision sees it.
        self.fleet.opened(worker, session_id, self._clock.now_ms())
        granted = False
        try:
            granted = await self._claim(worker, session_id)
        finally:
            if not granted:
                self.fleet.closed(worker, session_id, self._clock.now_ms())
        return granted

    async def _claim(self, worker: str, session_id: str) -> bool:
        if self.stale_since_ms is None:
            try:
                async with timeout(_ANSWER_S):
                    return bool(await self._run_claim(worker, session_id, self.fleet.limit(worker)))
            except _AWAY as error:
                self._went_away(error)
        return not self.fleet.over_limit(worker)

    async def release(self, worker: str, session_id: str) -> None:
        """Idempotent. A claim that cannot be removed lapses by itself."""
        self.fleet.closed(worker, session_id, self._clock.now_ms())
        if self.stale_since_ms is not None:
            return
        try:
            async with timeout(_ANSWER_S):
                await self._redis.zrem(CLAIM_PREFIX + worker, session_id)
        except _AWAY as error:
            self._went_away(error)

    async def _renew_claims(self) -> None:
        async with self._redis.pipeline(transaction=False) as pipe:
            for worker, session_id in self.fleet.sessions():
                await self._run_claim(worker, session_id, 0, pipe)
            await pipe.execute()

    async def _run_claim(
        self, worker: str, session_id: str, limit: int, pipe: Pipeline | None = None
    ) -> Any:
        args: list[str | int] = [session_id, limit, CLAIM_TTL_MS]
        return await self._claim_script(keys=[CLAIM_PREFIX + worker], args=args, client=pipe)

    # --- watching ---

    async def run(self) -> None:
        shortest, longest = _BACKOFF_MS
        wait_ms = shortest
        while True:
            try:
                await self._watch()
            except _AWAY as error:
                wait_ms = shortest if self.stale_since_ms is None else min(wait_ms * 2, longest)
                self._went_away(error)
            self._looked.set()
            await asyncio.sleep(wait_ms / 1000 * random.uniform(0.8, 1.2))

    async def _watch(self) -> None:
        async with self._redis.pubsub() as channel:
            async with timeout(_ANSWER_S):
                await channel.subscribe(CHANNEL)
            self._came_back()
            while True:
                async with timeout(_ANSWER_S):
                    await self._do_what_is_due()
                self._looked.set()
                await self._listen(channel)

    async def _listen(self, channel: PubSub) -> None:
        wait_ms = max(1.0, self._check_ms - self._clock.now_ms())
        message = await channel.get_message(ignore_subscribe_messages=True, timeout=wait_ms / 1000)
        if message is not None:
            self._hear(f"channel {CHANNEL}", message["data"])

    async def _do_what_is_due(self) -> None:
        now = self._clock.now_ms()
        if now >= self._scan_ms:
            self._scan_ms = now + SCAN_MS
            await self._scan()
        if now >= self._check_ms:
            self._check_ms = now + CHECK_MS
            await self._check()
        if now >= self._renew_ms:
            self._renew_ms = now + RENEW_MS
            await self._renew_claims()

    async def _scan(self) -> None:
        """Find workers whose announcements were published before we listened, or got lost."""
        keys = [key async for key in self._redis.scan_iter(match=KEY_PREFIX + "*", count=500)]
        for key, raw in await self._read(sorted(key.decode() for key in keys)):
            if raw is not None:
                self._hear(key, raw)

    async def _check(self) -> None:
        """Forget the workers whose record has lapsed: they sent no heartbeat for its lifetime."""
        # A Redis that has just come back may be empty until the next heartbeats.
        settled = self._clock.now_ms() - self._connected_ms > TTL_MS
        for key, raw in await self._read([KEY_PREFIX + name for name in self.fleet.names()]):
            if raw is not None:
                self._hear(key, raw)
            elif settled:
                name = key.removeprefix(KEY_PREFIX)
                log.warning("worker is gone: its announcement lapsed", extra={"worker": name})
                self.fleet.gone(name)
        if self.stale_since_ms is not None:  # a claim had failed, but this connection holds
            self._came_back()

    async def _read(self, keys: list[str]) -> Iterable[tuple[str, Any]]:
        return zip(keys, await self._redis.mget(keys), strict=True) if keys else ()

    def _hear(self, source: str, raw: bytes) -> None:
        try:
            record = Announcement.model_validate_json(raw)
            if source.startswith(KEY_PREFIX) and record.key != source:
                raise ValueError(f"it names itself {record.name!r}")
        except ValueError as error:  # pydantic's is one
            self._malformed_once(source, raw, error)
            return
        known = self.fleet.record(record.name)
        if known is None:
            log.info("worker found", extra={"worker": record.name, "addr": record.addr})
        # A key read again between two heartbeats is no news of what happened since the first.
        if record != known or not source.startswith(KEY_PREFIX):
            self.fleet.announced(record, self._clock.now_ms())

    def _malformed_once(self, source: str, raw: bytes, error: ValueError) -> None:
        if self._malformed.get(source) != raw:
            self._malformed[source] = raw
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            log.warning(
                "malformed worker announcement is ignored",
                extra={"key": source, "reason": reason},
            )

    def _went_away(self, error: Exception) -> None:
        if self.stale_since_ms is None:
            self.stale_since_ms = self._clock.now_ms()
            log.warning(
                "Redis is away: routing goes on by the last view", extra={"reason": repr(error)}
            )

    def _came_back(self) -> None:
        now = self._clock.now_ms()
        self._connected_ms = now
        self._scan_ms = self._check_ms = self._renew_ms = now
        if self.stale_since_ms is not None:
            log.info("Redis is back", extra={"away_ms": round(now - self.stale_since_ms)})
        self.stale_since_ms = None

    async def aclose(self) -> None:
        await self._redis.aclose()
