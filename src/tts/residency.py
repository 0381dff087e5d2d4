"""Which models leave memory, and whether another may come in.

Pure functions of (residents, policy, now). Times are milliseconds of the manager's clock. A model
that somebody holds never leaves; the default leaves only when asked, or to be replaced by its own
reloaded self; ttl and lru also respect the minimum residency, so that two models which take turns
do not push each other out all day.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

EvictionReason = Literal["ttl", "lru", "asked", "reload", "shutdown"]

# A leased model is free again when its session ends, which nobody can foretell.
RETRY_WHEN_LEASED_MS = 1_000


@dataclass(frozen=True, slots=True)
class ResidencyPolicy:
    """The three limits of the `model_manager` section."""

    ttl_ms: int
    min_residency_ms: int
    resident_cap: int


@dataclass(frozen=True, slots=True)
class ResidentModel:
    """One model in memory, as it is now. `loaded_at` and `last_used_ts` are clock milliseconds."""

    model_id: str
    family: str
    loaded_at: float
    last_used_ts: float
    refcount: int = 0
    device: str = ""
    tags: tuple[str, ...] = ()
    is_default: bool = False
    stale: bool = False
    """Its catalog entry or files changed since: it goes as soon as nobody holds it."""
    estimated_vram_gb: float = 0.0

    def idle_ms(self, now_ms: float) -> float:
        return 0.0 if self.refcount else max(0.0, now_ms - self.last_used_ts)


@dataclass(frozen=True, slots=True)
class Eviction:
    model_id: str
    reason: EvictionReason


@dataclass(frozen=True, slots=True)
class Admission:
    """Whether one more load may start, and who has to leave first.

    A refusal evicts nobody. Its `retry_after_ms` is None when waiting cannot help.
    """

    admitted: bool
    evict: tuple[Eviction, ...] = ()
    retry_after_ms: int | None = None


def evictions(
    residents: Sequence[ResidentModel], policy: ResidencyPolicy, now_ms: float
) -> list[Eviction]:
    """What the evictor unloads in this pass: replaced, idle too long, or over the cap."""
    gone: dict[str, EvictionReason] = {}
    for resident in _oldest_idle_first(residents):
        if resident.stale:
            gone[resident.model_id] = "reload"
        elif _movable(resident, policy, now_ms) and resident.idle_ms(now_ms) > policy.ttl_ms:
            gone[resident.model_id] = "ttl"
    left = [resident for resident in residents if resident.model_id not in gone]
    for resident in _movables(left, policy, now_ms)[: max(0, len(left) - policy.resident_cap)]:
        gone[resident.model_id] = "lru"
    return [Eviction(model_id, reason) for model_id, reason in gone.items()]


def admit(
    residents: Sequence[ResidentModel], loading: int, policy: ResidencyPolicy, now_ms: float
) -> Admission:
    """May one more model load, next to the residents and the `loading` ones already under way?"""
    excess = len(residents) + loading + 1 - policy.resident_cap
    if excess <= 0:
        return Admission(admitted=True)
    movable = _movables(residents, policy, now_ms)
    if len(movable) < excess:
        return Admission(False, retry_after_ms=_retry_after_ms(residents, loading, policy, now_ms))
    victims = movable[:excess]
    return Admission(
        True, tuple(Eviction(v.model_id, "reload" if v.stale else "lru") for v in victims)
    )


def kept_for_ms(resident: ResidentModel, policy: ResidencyPolicy, now_ms: float) -> int:
    """How long its TTL and minimum residency still keep an idle model; 0: it may go."""
    ttl_left = policy.ttl_ms - resident.idle_ms(now_ms)
    return math.ceil(max(0.0, ttl_left, _residency_left_ms(resident, policy, now_ms)))


def ttl_left_ms(resident: ResidentModel, policy: ResidencyPolicy, now_ms: float) -> int:
    """Until idleness alone makes the evictor take it; -1: it never will."""
    return -1 if resident.is_default else kept_for_ms(resident, policy, now_ms)


def _oldest_idle_first(residents: Sequence[ResidentModel]) -> list[ResidentModel]:
    idle = (resident for resident in residents if resident.refcount == 0)
    return sorted(idle, key=lambda resident: resident.last_used_ts)


def _movables(
    residents: Sequence[ResidentModel], policy: ResidencyPolicy, now_ms: float
) -> list[ResidentModel]:
    return [r for r in _oldest_idle_first(residents) if _movable(r, policy, now_ms)]


def _movable(resident: ResidentModel, policy: ResidencyPolicy, now_ms: float) -> bool:
    if resident.refcount or resident.stale:
        return resident.refcount == 0
    return not resident.is_default and _residency_left_ms(resident, policy, now_ms) <= 0


def _residency_left_ms(resident: ResidentModel, policy: ResidencyPolicy, now_ms: float) -> float:
    return resident.loaded_at + policy.min_residency_ms - now_ms


def _retry_after_ms(
    residents: Sequence[ResidentModel], loading: int, policy: ResidencyPolicy, now_ms: float
) -> int | None:
    others = [resident for resident in residents if not resident.is_default]
    if not others and not loading:
        return None
    waits = [_residency_left_ms(r, policy, now_ms) for r in others if not r.refcount]
    soonest = min((wait for wait in waits if wait > 0), default=RETRY_WHEN_LEASED_MS)
    return math.ceil(soonest)
