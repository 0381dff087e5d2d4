"""The residency core: tables for what a person would ask, properties for what must never happen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.tts.residency import (
    RETRY_WHEN_LEASED_MS,
    Eviction,
    ResidencyPolicy,
    ResidentModel,
    admit,
    evictions,
    kept_for_ms,
    ttl_left_ms,
)

POLICY = ResidencyPolicy(ttl_ms=600_000, min_residency_ms=120_000, resident_cap=3)
NOW = 1_000_000.0


def resident(
    model_id: str,
    *,
    age_ms: float = 900_000,
    idle_ms: float = 0,
    refcount: int = 0,
    is_default: bool = False,
    stale: bool = False,
) -> ResidentModel:
    return ResidentModel(
        model_id=model_id,
        family="fake",
        loaded_at=NOW - age_ms,
        last_used_ts=NOW - idle_ms,
        refcount=refcount,
        is_default=is_default,
        stale=stale,
    )


@st.composite
def _residents(draw: st.DrawFn) -> list[ResidentModel]:
    count = draw(st.integers(0, 6))
    default = draw(st.integers(-1, count - 1)) if count else -1
    models = []
    for place in range(count):
        age = draw(st.integers(0, 1000))
        models.append(
            resident(
                f"m{place}",
                age_ms=age,
                idle_ms=draw(st.integers(0, age)),
                refcount=draw(st.sampled_from([0, 0, 1, 3])),
                is_default=place == default,
                stale=draw(st.sampled_from([False, False, False, True])),
            )
        )
    return models


_policies = st.builds(
    ResidencyPolicy,
    ttl_ms=st.integers(0, 1000),
    min_residency_ms=st.integers(0, 1000),
    resident_cap=st.integers(1, 6),
)


@given(_residents(), _policies)
def test_nothing_that_must_stay_is_evicted(
    models: list[ResidentModel], policy: ResidencyPolicy
) -> None:
    by_id = {model.model_id: model for model in models}
    for eviction in evictions(models, policy, NOW):
        model = by_id[eviction.model_id]
        assert model.refcount == 0
        if eviction.reason == "reload":
            assert model.stale
        else:
            assert not model.is_default
            assert NOW - model.loaded_at >= policy.min_residency_ms
        if eviction.reason == "ttl":
            assert model.idle_ms(NOW) > policy.ttl_ms


@given(_residents(), _policies)
def test_the_cap_is_reached_as_far_as_possible_and_never_undershot(
    models: list[ResidentModel], policy: ResidencyPolicy
) -> None:
    gone = evictions(models, policy, NOW)
    left = [m for m in models if m.model_id not in {e.model_id for e in gone}]
    could_go = [
        m
        for m in left
        if not m.refcount and not m.is_default and NOW - m.loaded_at >= policy.min_residency_ms
    ]
    assert len(left) <= policy.resident_cap or not could_go
    if any(eviction.reason == "lru" for eviction in gone):
        assert len(left) >= policy.resident_cap


@given(_residents(), _policies)
def test_the_oldest_idle_goes_first(models: list[ResidentModel], policy: ResidencyPolicy) -> None:
    by_id = {model.model_id: model for model in models}
    gone = evictions(models, policy, NOW)
    lru = [by_id[eviction.model_id] for eviction in gone if eviction.reason == "lru"]
    gone_ids = {eviction.model_id for eviction in gone}
    for stayed in models:
        free_to_go = not stayed.refcount and not stayed.is_default
        old_enough = NOW - stayed.loaded_at >= policy.min_residency_ms
        if stayed.model_id not in gone_ids and free_to_go and old_enough:
            assert all(model.idle_ms(NOW) >= stayed.idle_ms(NOW) for model in lru)


@given(_residents(), _policies)
def test_an_eviction_pass_leaves_nothing_for_the_next(
    models: list[ResidentModel], policy: ResidencyPolicy
) -> None:
    gone = {eviction.model_id for eviction in evictions(models, policy, NOW)}
    assert evictions([m for m in models if m.model_id not in gone], policy, NOW) == []


@given(_residents(), st.integers(0, 3), _policies)
def test_an_admitted_load_keeps_the_cap_and_a_refused_one_evicts_nobody(
    models: list[ResidentModel], loading: int, policy: ResidencyPolicy
) -> None:
    admission = admit(models, loading, policy, NOW)
    by_id = {model.model_id: model for model in models}
    if admission.admitted:
        left = len(models) - len(admission.evict) + loading + 1
        assert left <= policy.resident_cap
        assert admission.evict == () or left == policy.resident_cap
        for eviction in admission.evict:
            model = by_id[eviction.model_id]
            assert model.refcount == 0
            assert model.stale or not model.is_default
            assert model.stale or NOW - model.loaded_at >= policy.min_residency_ms
    else:
        assert admission.evict == ()
        assert admission.retry_after_ms is None or admission.retry_after_ms > 0


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        pytest.param(resident("m", idle_ms=600_000), [], id="at its ttl"),
        pytest.param(
            resident("m", idle_ms=600_001), [Eviction("m", "ttl")], id="one millisecond past"
        ),
        pytest.param(resident("m", idle_ms=700_000, refcount=1), [], id="held"),
        pytest.param(resident("m", idle_ms=700_000, is_default=True), [], id="the default"),
        pytest.param(
            resident("m", is_default=True, stale=True), [Eviction("m", "reload")], id="replaced"
        ),
        pytest.param(resident("m", stale=True, refcount=1), [], id="replaced but held"),
    ],
)
def test_ttl(model: ResidentModel, expected: list[Eviction]) -> None:
    assert evictions([model], POLICY, NOW) == expected


def test_min_residency_outlasts_a_short_ttl() -> None:
    policy = ResidencyPolicy(ttl_ms=1_000, min_residency_ms=120_000, resident_cap=3)
    young = resident("m", age_ms=119_999, idle_ms=60_000)
    assert evictions([young], policy, NOW) == []
    assert evictions([young], policy, NOW + 1) == [Eviction("m", "ttl")]


def test_a_load_over_the_cap_sends_the_longest_idle_out() -> None:
    models = [
        resident("default", idle_ms=500_000, is_default=True),
        resident("recent", idle_ms=1_000),
        resident("older", idle_ms=9_000),
    ]
    assert admit(models, 0, POLICY, NOW).evict == (Eviction("older", "lru"),)


def test_a_refusal_says_when_the_minimum_residency_ends() -> None:
    models = [
        resident("default", is_default=True),
        resident("young", age_ms=100_000, idle_ms=1),
        resident("held", refcount=2),
    ]
    admission = admit(models, 0, POLICY, NOW)
    assert (admission.admitted, admission.retry_after_ms) == (False, 20_000)


def test_a_refusal_because_of_leases_says_try_soon() -> None:
    models = [resident(name, refcount=1) for name in "abc"]
    assert admit(models, 0, POLICY, NOW).retry_after_ms == RETRY_WHEN_LEASED_MS


def test_waiting_for_the_default_to_leave_is_said_to_be_pointless() -> None:
    policy = ResidencyPolicy(ttl_ms=1, min_residency_ms=1, resident_cap=1)
    assert admit([resident("d", is_default=True)], 0, policy, NOW).retry_after_ms is None


def test_loads_under_way_count_towards_the_cap() -> None:
    assert admit([resident("a", refcount=1)], 1, POLICY, NOW).admitted
    assert not admit([resident("a", refcount=1)], 2, POLICY, NOW).admitted


def test_what_still_keeps_a_model_is_the_longer_of_ttl_and_min_residency() -> None:
    assert kept_for_ms(resident("m", idle_ms=590_000), POLICY, NOW) == 10_000
    policy = ResidencyPolicy(ttl_ms=1_000, min_residency_ms=120_000, resident_cap=3)
    assert kept_for_ms(resident("m", age_ms=20_000, idle_ms=20_000), policy, NOW) == 100_000
    assert kept_for_ms(resident("m", idle_ms=600_000), POLICY, NOW) == 0


def test_the_default_has_no_ttl_to_show() -> None:
    assert ttl_left_ms(resident("d", is_default=True), POLICY, NOW) == -1
    assert ttl_left_ms(resident("m", idle_ms=590_000), POLICY, NOW) == 10_000
