"""The worker's heartbeat in the registry: a record that vanishes by itself when the worker dies.

The registry may be away, at the start or later: the worker serves on, tries again, and logs each
change once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from redis.asyncio import Redis
from redis.exceptions import RedisError

from src.common.tasks import timeout
from src.rpc.announcement import CHANNEL, HEARTBEAT_MS, TTL_MS, Announcement

log = logging.getLogger(__name__)

_ANSWER_S = 1.0
_LONGEST_BACKOFF_MS = 10_000
_AWAY = (RedisError, OSError, asyncio.TimeoutError)


class Announcer:
    """`describe` makes the record anew for every beat."""

    def __init__(self, redis_url: str, describe: Callable[[], Announcement]) -> None:
        self._redis_url = redis_url
        self._describe = describe
        self._reachable: bool | None = None
        self._now = asyncio.Event()

    def announce_now(self) -> None:
        """Something that routers should know has changed: do not wait for the next beat."""
        self._now.set()

    async def run(self) -> None:
        """Beat until cancelled, then say so and take the record away. Empty URL: nothing."""
        if not self._redis_url:
            log.info("announced nowhere: redis.url is empty")
            return
        # Time-outs are ours: redis-py's go through `wait_for`, which before Python 3.12 may swallow
        # the cancellation of whoever awaits it.
        redis = Redis.from_url(self._redis_url, socket_timeout=None, socket_connect_timeout=None)
        async with redis:
            try:
                await self._beat_for_ever(redis)
            finally:
                await self._withdraw(redis)

    async def _beat_for_ever(self, redis: Redis) -> None:
        backoff_ms = HEARTBEAT_MS
        while True:
            if await self._beat(redis):
                backoff_ms = HEARTBEAT_MS
            else:
                backoff_ms = min(2 * backoff_ms, _LONGEST_BACKOFF_MS)
            await self._pause(backoff_ms)

    async def _pause(self, ms: int) -> None:
        try:
            async with timeout(ms / 1000.0):
                await self._now.wait()
        except asyncio.TimeoutError:
            return
        self._now.clear()

    async def _beat(self, redis: Redis) -> bool:
        record = self._describe()
        body = record.model_dump_json()
        try:
            async with timeout(_ANSWER_S), redis.pipeline(transaction=True) as pipe:
                pipe.set(record.key, body, px=TTL_MS)
                pipe.publish(CHANNEL, body)
                await pipe.execute()
        except _AWAY as error:
            self._note(reachable=False, why=type(error).__name__)
            return False
        self._note(reachable=True)
        return True

    def _note(self, *, reachable: bool, why: str = "") -> None:
        if reachable == self._reachable:
            return
        self._reachable = reachable
        if reachable:
            log.info("announced in the registry", extra={"worker": self._describe().name})
        else:
            log.warning(
                "the registry is not reachable; serving on and trying again", extra={"why": why}
            )

    async def _withdraw(self, redis: Redis) -> None:
        if not self._reachable:
            return
        try:
            record = self._describe()
            async with timeout(_ANSWER_S), redis.pipeline(transaction=True) as pipe:
                pipe.delete(record.key)
                pipe.publish(CHANNEL, record.model_dump_json())
                await pipe.execute()
        except _AWAY as error:
            log.warning("the record could not be deleted", extra={"why": type(error).__name__})
