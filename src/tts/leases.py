"""A model in memory, the leases on it, and how both look from outside."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from types import TracebackType

from src.common.clock import Clock
from src.rpc.errors import NotFound
from src.tts.catalog import ModelMeta
from src.tts.loader import LoadedModel
from src.tts.residency import ResidencyPolicy, ResidentModel, ttl_left_ms
from src.tts.tts_base import AdapterCapabilities, Model


class ModelState(IntEnum):
    """The numbers of `ModelState` in tts.proto."""

    COLD = 1
    LOADING = 2
    RESIDENT = 3
    UNLOADING = 4
    FAILED = 5


@dataclass(frozen=True, slots=True)
class LeaseInfo:
    session_id: str
    owner: str
    held_ms: int
    expires_in_ms: int


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One catalog entry as ListModels shows it."""

    meta: ModelMeta
    state: ModelState
    is_default: bool
    refcount: int = 0
    idle_ms: int = 0
    ttl_left_ms: int = -1
    """Until idleness unloads it; -1: never, or not resident."""
    native_sample_rate: int = 0
    languages: tuple[str, ...] = ()
    voices: tuple[str, ...] = ()
    max_streams: int = 0
    load_progress: float = 0.0
    error: str = ""
    """Why the last load failed; empty once one worked."""
    fallback_reason: str = ""
    leases: tuple[LeaseInfo, ...] = ()

    @property
    def fallback(self) -> bool:
        return bool(self.fallback_reason)


class Lease:
    """One session's hold on one model, which stays in memory until the release.

    An async context manager. It ends by itself `ttl_ms` after the last `touch`, so that a caller
    who vanished does not pin a model for ever.
    """

    def __init__(
        self, resident: Resident, session_id: str, owner: str, ttl_ms: int, clock: Clock
    ) -> None:
        self.session_id = session_id
        self.owner = owner
        self.ttl_ms = ttl_ms
        self._resident = resident
        self._clock = clock
        self._since = self._touched = clock.now_ms()
        resident.leases.append(self)

    @property
    def model(self) -> Model:
        return self._resident.loaded.model

    @property
    def meta(self) -> ModelMeta:
        return self._resident.meta

    @property
    def family(self) -> str:
        """Who really speaks: the stand-in's family on fallback."""
        return self._resident.loaded.family

    @property
    def capabilities(self) -> AdapterCapabilities:
        return self._resident.loaded.capabilities

    @property
    def fallback_reason(self) -> str:
        return self._resident.loaded.fallback_reason

    @property
    def held(self) -> bool:
        return self in self._resident.leases

    def touch(self) -> None:
        """Renew. Raises NotFound when the lease has ended already."""
        if not self.held:
            raise NotFound(
                f"the lease of session {self.session_id!r} on {self.meta.model_id} is over "
                f"(released, or {self.ttl_ms} ms without a call); start a new session"
            )
        self._touched = self._clock.now_ms()

    async def release(self) -> None:
        """Let go. A second release is no error."""
        self.drop()

    def drop(self) -> None:
        """`release` for callers that cannot await."""
        if self.held:
            self._resident.leases.remove(self)
            self._resident.last_used_ts = self._clock.now_ms()

    @contextmanager
    def streaming(self) -> Iterator[Model]:
        """The model stays for as long as this is open, even if the lease ends in the meantime."""
        self._resident.streams += 1
        try:
            yield self.model
        finally:
            self._resident.streams -= 1
            self._resident.last_used_ts = self._clock.now_ms()

    def expires_in_ms(self, now_ms: float) -> float:
        return self._touched + self.ttl_ms - now_ms

    def info(self, now_ms: float) -> LeaseInfo:
        left = max(0, round(self.expires_in_ms(now_ms)))
        return LeaseInfo(self.session_id, self.owner, round(now_ms - self._since), left)

    async def __aenter__(self) -> Lease:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self.release()


@dataclass(slots=True, eq=False)
class Load:
    """A load under way. The task belongs to the manager: a waiter that leaves does not end it."""

    meta: ModelMeta
    waiters: int = 0
    progress: float = 0.0
    task: asyncio.Task[Resident] = field(init=False)

    def show(self, progress: float) -> None:
        self.progress = progress


@dataclass(slots=True, eq=False)
class Resident:
    meta: ModelMeta
    loaded: LoadedModel
    load: Load
    is_default: bool
    loaded_at: float
    last_used_ts: float
    stale: bool = False
    streams: int = 0
    leases: list[Lease] = field(default_factory=list)

    def snapshot(self) -> ResidentModel:
        return ResidentModel(
            model_id=self.meta.model_id,
            family=self.meta.family,
            loaded_at=self.loaded_at,
            last_used_ts=self.last_used_ts,
            refcount=self.refcount,
            device=self.loaded.device,
            tags=tuple(self.meta.tags),
            is_default=self.is_default,
            stale=self.stale,
            estimated_vram_gb=self.meta.estimated_vram_gb,
        )

    def status(self, policy: ResidencyPolicy, now_ms: float) -> ModelStatus:
        snapshot, model = self.snapshot(), self.loaded.model
        return ModelStatus(
            self.meta,
            ModelState.RESIDENT,
            self.is_default,
            refcount=snapshot.refcount,
            idle_ms=round(snapshot.idle_ms(now_ms)),
            ttl_left_ms=ttl_left_ms(snapshot, policy, now_ms),
            native_sample_rate=model.native_sample_rate,
            languages=model.languages,
            voices=model.voices,
            max_streams=model.max_streams,
            load_progress=1.0,
            fallback_reason=self.loaded.fallback_reason,
            leases=tuple(lease.info(now_ms) for lease in self.leases),
        )

    @property
    def refcount(self) -> int:
        # Whoever waits for the load is about to hold a lease; a stream may outlive its lease.
        return max(len(self.leases) + self.load.waiters, self.streams)

    @property
    def in_use(self) -> bool:
        return self.refcount > 0

    @property
    def holders(self) -> str:
        """'session s1 (owner), session s2', for messages."""
        names = [
            f"session {lease.session_id}" + (f" ({lease.owner})" if lease.owner else "")
            for lease in self.leases
        ]
        return ", ".join(names) or "a session that starts or ends"

    @property
    def why_it_stays(self) -> str:
        """For the message that there is no room."""
        if self.in_use:
            return f"{self.meta.model_id} is in use"
        reason = "the default" if self.is_default else "within its minimum residency"
        return f"{self.meta.model_id} is {reason}"
