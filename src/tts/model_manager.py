"""Which models are in memory: load once, lease, let go (design document §4).

The decisions are in `residency.py`; this is the shell that carries them out. Everything here runs
on the event loop, and no state changes across an await without being looked at again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from src.common.clock import Clock
from src.common.tasks import TaskGroup
from src.rpc.errors import (
    DuplexError,
    Exhausted,
    FailedPrecondition,
    InUse,
    InvalidArgument,
    Unavailable,
)
from src.tts import residency
from src.tts.catalog import Catalog, ModelMeta
from src.tts.config import ModelManagerSettings
from src.tts.leases import Lease, LeaseInfo, Load, ModelState, ModelStatus, Resident
from src.tts.loader import LoadedModel, Loader
from src.tts.residency import Eviction, EvictionReason, ResidencyPolicy, ResidentModel

__all__ = [
    "Lease",
    "LeaseInfo",
    "ManagerObserver",
    "ModelManager",
    "ModelState",
    "ModelStatus",
    "ResidentModel",
]
_log = logging.getLogger(__name__)


class ManagerObserver(Protocol):
    """Where metrics come from."""

    def loaded(self, model_id: str, ms: float, outcome: str) -> None:
        """`outcome` is 'ok', 'fallback' or the code of the error."""
        ...

    def evicted(self, model_id: str, reason: str) -> None: ...


class ModelManager:
    """Loads on demand, once for all callers; unloads what nobody holds.

    Owns its load and unload tasks: they end in `close`. `on_lease_expired` hears the session id of
    each lease that ran out; it is called on the event loop and must not block.
    """

    def __init__(
        self,
        catalog: Catalog,
        settings: ModelManagerSettings,
        loader: Loader,
        *,
        clock: Clock,
        observer: ManagerObserver,
    ) -> None:
        self.on_lease_expired: Callable[[str], None] = lambda session_id: None
        self._catalog = catalog
        self._settings = settings
        self._policy = ResidencyPolicy(
            settings.ttl_ms, settings.min_residency_ms, settings.resident_cap
        )
        self._loader = loader
        self._clock = clock
        self._observer = observer
        self._load_slots = asyncio.Semaphore(settings.max_parallel_loads)
        self._residents: dict[str, Resident] = {}
        self._loading: dict[str, Load] = {}
        self._unloading: dict[str, asyncio.Task[None]] = {}
        self._failures: dict[str, str] = {}
        self._closing = False

    @property
    def default_model_id(self) -> str:
        return self._settings.default_model_id

    async def start(self) -> None:
        """Load and warm the default, then the preloads. A preload that fails is logged, no more.

        Raises UnknownName for an id that the catalog does not have, and whatever stops the default.
        """
        wanted = dict.fromkeys([self.default_model_id, *self._settings.preload_model_ids])
        for model_id in wanted:
            self._catalog.get(model_id)
        await self.load(self.default_model_id)
        async with TaskGroup() as group:
            for model_id in list(wanted)[1:]:
                group.create_task(self._preload(model_id), name=f"preload {model_id}")

    async def run_evictor(self) -> None:
        """Every `evict_check_interval_ms`, until cancelled."""
        while True:
            await asyncio.sleep(self._settings.evict_check_interval_ms / 1000)
            now_ms = self._clock.now_ms()
            self.expire_leases(now_ms)
            await self.evict_idle(now_ms)

    async def acquire(
        self, model_id: str, *, session_id: str, owner: str = "", lease_ttl_ms: int = 0
    ) -> Lease:
        """Hold a model ('' is the default), loading it first if need be.

        Raises UnknownName, CorruptModel, Unavailable, and Exhausted when the cap is reached and no
        resident may leave yet.
        """
        resident = await self._ensure(self._catalog.get(model_id or self.default_model_id))
        ttl_ms = lease_ttl_ms or self._settings.lease_ttl_ms
        return Lease(resident, session_id, owner, ttl_ms, self._clock)

    async def load(self, model_id: str) -> int:
        """Make it resident without holding it. The milliseconds that took; 0: it was there."""
        meta = self._catalog.get(model_id or self.default_model_id)
        if self._present(meta.model_id):
            return 0
        started = self._clock.now_ms()
        await self._ensure(meta)
        return max(1, round(self._clock.now_ms() - started))

    def load_in_background(self, model_id: str) -> None:
        """Begin to load and return; the outcome shows in `list_catalog`.

        Raises at once what can be known at once: UnknownName, Exhausted, Unavailable.
        """
        meta = self._catalog.get(model_id or self.default_model_id)
        if not self._present(meta.model_id):
            self._load_of(meta)

    def expire_leases(self, now_ms: float) -> list[str]:
        """Release the leases that nobody renewed; their session ids."""
        over = [
            lease
            for resident in self._residents.values()
            for lease in resident.leases
            if lease.expires_in_ms(now_ms) <= 0
        ]
        for lease in over:
            _log.warning(
                "lease expired",
                extra={"model_id": lease.meta.model_id, "session_id": lease.session_id},
            )
            lease.drop()
            self.on_lease_expired(lease.session_id)
        return [lease.session_id for lease in over]

    async def evict_idle(self, now_ms: float) -> list[Eviction]:
        """Unload what the policy says, and wait until it is gone."""
        gone = residency.evictions(self.list_resident(), self._policy, now_ms)
        unloads = [self._begin_unload(each) for each in gone]
        if Eviction(self.default_model_id, "reload") in gone and not self._closing:
            # Only begun here: the load itself waits until the old one has gone.
            self._load_of(self._catalog.get(self.default_model_id))
        await _all_done(unloads)
        return gone

    async def unload(self, model_id: str, *, ignore_ttl: bool = False) -> None:
        """Unload on request; one that is not resident is no error.

        Raises UnknownName, InUse (says who), and FailedPrecondition while it loads or, unless
        `ignore_ttl`, while its TTL or minimum residency lasts.
        """
        resident = self._residents.get(model_id)
        if resident is None:
            await self._unload_absent(model_id)
            return
        self._refuse_unload(resident, ignore_ttl)
        await _all_done([self._begin_unload(Eviction(model_id, "asked"))])

    async def reload_catalog(self, catalog: Catalog) -> list[str]:
        """Take a new catalog; what changed, for people.

        A changed model that nobody holds is replaced at once (if it is the default) or on its next
        use; one that is held speaks on as it is until its last lease ends. Raises InvalidArgument,
        and keeps the old catalog, when the new one lacks the default model.
        """
        if self.default_model_id not in catalog.models:
            raise InvalidArgument(
                f"the new catalog lacks the default model {self.default_model_id!r}; "
                "nothing was changed"
            )
        changes = self._catalog.changes_to(catalog)
        self._catalog = catalog
        lines = [self._take_over(model_id, change) for model_id, change in changes.items()]
        await self.evict_idle(self._clock.now_ms())
        return lines + [f"left out: {problem}" for problem in catalog.problems]

    def list_resident(self) -> list[ResidentModel]:
        return [resident.snapshot() for resident in self._residents.values()]

    def list_catalog(self) -> list[ModelStatus]:
        """All of the catalog, and residents that have left it."""
        now_ms = self._clock.now_ms()
        metas = {model_id: resident.meta for model_id, resident in self._residents.items()}
        metas = {**self._catalog.models, **metas}
        return [self._status(meta, now_ms) for meta in metas.values()]

    async def close(self) -> None:
        """Wait for loads under way, then unload everything that nobody holds."""
        self._closing = True
        await _all_done(load.task for load in self._loading.values())
        for resident in list(self._residents.values()):
            if resident.in_use:
                held = {"model_id": resident.meta.model_id, "holders": resident.holders}
                _log.warning("still held at the end, not unloaded", extra=held)
            else:
                self._begin_unload(Eviction(resident.meta.model_id, "shutdown"))
        await _all_done(self._unloading.values())

    async def _preload(self, model_id: str) -> None:
        try:
            await self.load(model_id)
        except DuplexError as error:
            why = {"model_id": model_id, "why": error.message}
            _log.error("preload failed; the worker goes on without it", extra=why)

    async def _ensure(self, meta: ModelMeta) -> Resident:
        """The caller must take its lease before the next await."""
        resident = self._present(meta.model_id)
        if resident is not None:
            return resident
        load = self._load_of(meta)
        load.waiters += 1
        try:
            return await asyncio.shield(load.task)
        finally:
            load.waiters -= 1

    def _present(self, model_id: str) -> Resident | None:
        """The resident, unless it waits to be replaced and nobody holds it."""
        resident = self._residents.get(model_id)
        if resident is not None and resident.stale and not resident.in_use:
            self._begin_unload(Eviction(model_id, "reload"))
            return None
        return resident

    def _load_of(self, meta: ModelMeta) -> Load:
        """Join the load of this model, or begin one. Raises Exhausted or Unavailable."""
        load = self._loading.get(meta.model_id)
        if load is None:
            self._make_room(meta)
            load = self._loading[meta.model_id] = Load(meta)
            load.task = asyncio.create_task(self._run_load(load), name=f"load {meta.model_id}")
            load.task.add_done_callback(_retrieve)
        return load

    def _make_room(self, meta: ModelMeta) -> None:
        if self._closing:
            raise Unavailable("the worker is shutting down; go to another one")
        admission = residency.admit(
            self.list_resident(), len(self._loading), self._policy, self._clock.now_ms()
        )
        if not admission.admitted:
            raise Exhausted(
                f"no room for {meta.model_id}: resident_cap is {self._policy.resident_cap} and "
                f"none may leave yet ({self._who_stays()})",
                retry_after_ms=admission.retry_after_ms,
            )
        for eviction in admission.evict:
            self._begin_unload(eviction)

    async def _run_load(self, load: Load) -> Resident:
        model_id, started = load.meta.model_id, self._clock.now_ms()
        self._failures.pop(model_id, None)
        try:
            loaded = await self._load_in_turn(load)
        except DuplexError as error:
            self._failures[model_id] = error.message
            self._observer.loaded(model_id, self._clock.now_ms() - started, error.code)
            raise
        finally:
            del self._loading[model_id]
        now_ms = self._clock.now_ms()
        is_default = model_id == self.default_model_id
        resident = Resident(load.meta, loaded, load, is_default, now_ms, now_ms)
        # The catalog may have been reloaded meanwhile.
        resident.stale = self._catalog.models.get(model_id) != load.meta
        self._residents[model_id] = resident
        outcome = "fallback" if loaded.fallback_reason else "ok"
        self._observer.loaded(model_id, now_ms - started, outcome)
        return resident

    async def _load_in_turn(self, load: Load) -> LoadedModel:
        async with self._load_slots:
            # What was sent out to make room must be gone before this comes in.
            await _all_done(self._unloading.values())
            if self._closing:
                raise Unavailable("the worker is shutting down; go to another one")
            return await self._loader.load(load.meta, load.show)

    def _begin_unload(self, eviction: Eviction) -> asyncio.Task[None]:
        resident = self._residents.pop(eviction.model_id)
        task = asyncio.create_task(
            self._run_unload(resident, eviction.reason), name=f"unload {eviction.model_id}"
        )
        self._unloading[eviction.model_id] = task
        return task

    async def _run_unload(self, resident: Resident, reason: EvictionReason) -> None:
        model_id = resident.meta.model_id
        try:
            await self._loader.unload(resident.loaded.model)
        except Exception:
            # An adapter that fails to clean up must not take the evictor with it.
            _log.exception("unload failed", extra={"model_id": model_id})
        finally:
            del self._unloading[model_id]
        _log.info("model unloaded", extra={"model_id": model_id, "reason": reason})
        self._observer.evicted(model_id, reason)

    async def _unload_absent(self, model_id: str) -> None:
        if model_id in self._loading:
            raise FailedPrecondition(f"{model_id} is loading; unload it when it is there")
        if model_id in self._unloading:
            await _all_done([self._unloading[model_id]])
        else:
            self._catalog.get(model_id)

    def _refuse_unload(self, resident: Resident, ignore_ttl: bool) -> None:
        model_id, now_ms = resident.meta.model_id, self._clock.now_ms()
        if resident.in_use:
            raise InUse(f"{model_id} is in use by {resident.holders}; end these sessions first")
        kept_ms = residency.kept_for_ms(resident.snapshot(), self._policy, now_ms)
        if kept_ms and not ignore_ttl:
            raise FailedPrecondition(
                f"{model_id} was used recently and is kept for another {kept_ms} ms; "
                "set ignore_ttl to unload it now",
                retry_after_ms=kept_ms,
            )

    def _take_over(self, model_id: str, change: str) -> str:
        resident = self._residents.get(model_id)
        if resident is None:
            return f"{change} {model_id}"
        resident.stale = True
        if not resident.in_use:
            return f"{change} {model_id}: unloaded"
        return f"{change} {model_id}: in use, unloaded when the last session ends"

    def _who_stays(self) -> str:
        loading = [f"{model_id} is loading" for model_id in self._loading]
        return "; ".join([*(each.why_it_stays for each in self._residents.values()), *loading])

    def _status(self, meta: ModelMeta, now_ms: float) -> ModelStatus:
        model_id, is_default = meta.model_id, meta.model_id == self.default_model_id
        resident, load = self._residents.get(model_id), self._loading.get(model_id)
        if resident is not None:
            return resident.status(self._policy, now_ms)
        state = ModelState.COLD
        error = self._failures.get(model_id, "")
        if load is not None:
            state = ModelState.LOADING
        elif model_id in self._unloading:
            state = ModelState.UNLOADING
        elif error:
            state = ModelState.FAILED
        return ModelStatus(
            meta,
            state,
            is_default,
            native_sample_rate=meta.native_sr,
            languages=tuple(meta.languages),
            voices=tuple(meta.voices),
            load_progress=load.progress if load else 0.0,
            error=error,
        )


async def _all_done(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Wait without taking over the tasks' errors or cancelling them."""
    waited = list(tasks)
    if waited:
        await asyncio.wait(waited)


def _retrieve(task: asyncio.Task[Resident]) -> None:
    """A failure is kept for ListModels even when every waiter has gone."""
    if not task.cancelled():
        task.exception()
