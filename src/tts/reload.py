"""RELOAD: configuration, catalog and voice packs are read again; live sessions speak on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator

from src.common.config import ConfigError
from src.rpc.errors import InvalidArgument
from src.tts.config import WorkerConfig, WorkerSettings, read_catalog
from src.tts.model_manager import ModelManager
from src.tts.playout import Overflow, PlayoutPolicy
from src.tts.sessions import Sessions

# Everything else was built into something that is running.
_LIVE = frozenset(
    {"max_sessions", "queue_ms", "burst_ms", "lead_ms", "overflow", "loudness_dbfs", "log_level"}
)


def playout_policy(settings: WorkerSettings) -> PlayoutPolicy:
    return PlayoutPolicy(
        queue_ms=settings.queue_ms,
        burst_ms=settings.burst_ms,
        lead_ms=settings.lead_ms,
        overflow=Overflow(settings.overflow),
    )


class Reloader:
    """`read` gives the configuration as it is now on disk, flags laid over it."""

    def __init__(
        self,
        config: WorkerConfig,
        read: Callable[[], WorkerConfig],
        manager: ModelManager,
        sessions: Sessions,
    ) -> None:
        self._config = config
        self._read = read
        self._manager = manager
        self._sessions = sessions
        self._one_at_a_time = asyncio.Lock()

    async def __call__(self) -> list[str]:
        """What changed, for people. Raises InvalidArgument, and then nothing has changed."""
        async with self._one_at_a_time:
            try:
                config = await asyncio.to_thread(self._read)
                catalog = await asyncio.to_thread(read_catalog, config)
            except ConfigError as error:
                raise InvalidArgument(f"nothing was reloaded: {error}") from error
            changes = await self._manager.reload_catalog(catalog)
            return [*self._apply(config), *changes]

    def _apply(self, config: WorkerConfig) -> list[str]:
        changes = list(_differences(self._config, config))
        settings = config.worker
        self._sessions.max_sessions = settings.max_sessions
        self._sessions.stage.policy = playout_policy(settings)
        self._sessions.stage.loudness_dbfs = settings.loudness_dbfs
        logging.getLogger().setLevel(settings.log_level.upper())
        self._config = config
        return changes


def _differences(old: WorkerConfig, new: WorkerConfig) -> Iterator[str]:
    for section in WorkerConfig.model_fields:
        before, after = getattr(old, section), getattr(new, section)
        for key in type(before).model_fields:
            was, now = getattr(before, key), getattr(after, key)
            if was != now:
                live = section == "worker" and key in _LIVE
                tail = "from the next utterance on" if live else "after a restart of the worker"
                yield f"{section}.{key}: {was} → {now}, {tail}"
