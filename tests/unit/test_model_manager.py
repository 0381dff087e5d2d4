"""The ModelManager's promises, on a fake loader and a clock that is turned by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from src.common.clock import ManualClock
from src.common.tasks import cancel_and_wait, timeout
from src.rpc.errors import (
    CorruptModel,
    DuplexError,
    Exhausted,
    FailedPrecondition,
    InUse,
    InvalidArgument,
    NotFound,
    Unavailable,
    UnknownName,
)
from src.rpc.generated import tts_pb2
from src.tts.catalog import Catalog, ModelMeta
from src.tts.config import ModelManagerSettings
from src.tts.loader import LoadedModel
from src.tts.model_manager import ModelManager, ModelState, ModelStatus
from src.tts.residency import Eviction
from src.tts.sources import Progress
from src.tts.tts_base import (
    AdapterCapabilities,
    CancelToken,
    Model,
    PcmChunk,
    Segment,
    VoiceSpec,
)

DEFAULT, OTHER, THIRD = "piper-en-joe", "espeak-en", "cosyvoice2-en-base"


class FakeModel:
    native_sample_rate = 22_050
    max_streams = 4
    voices: tuple[str, ...] = ("joe",)
    languages: tuple[str, ...] = ("en-US",)

    def __init__(self, model_id: str) -> None:
        self.model_id = model_id

    def check_voice(self, spec: VoiceSpec) -> VoiceSpec:
        return spec

    def stream(
        self, segments: Iterable[Segment], spec: VoiceSpec, cancel: CancelToken
    ) -> Iterator[PcmChunk]:
        return iter(())

    def unload(self) -> None:
        raise AssertionError("the manager unloads through its loader")


class FakeLoader:
    """Loads at once, or when `gate` opens; writes down what it was asked to do, in order."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.failures: dict[str, DuplexError] = {}
        self.fallback_reason = ""
        self.gate = asyncio.Event()
        self.gate.set()
        self.unload_gate = asyncio.Event()
        self.unload_gate.set()
        self.now = self.most_at_once = 0
        self.unload_error: Exception | None = None

    async def load(self, meta: ModelMeta, progress: Progress) -> LoadedModel:
        self.done.append(f"load {meta.model_id}")
        self.now += 1
        self.most_at_once = max(self.most_at_once, self.now)
        progress(0.5)
        try:
            await self.gate.wait()
        finally:
            self.now -= 1
        if meta.model_id in self.failures:
            raise self.failures[meta.model_id]
        model = FakeModel(meta.model_id)
        return LoadedModel(model, meta.family, "cpu", AdapterCapabilities(), self.fallback_reason)

    async def unload(self, model: Model) -> None:
        assert isinstance(model, FakeModel)
        await self.unload_gate.wait()
        self.done.append(f"unload {model.model_id}")
        if self.unload_error is not None:
            raise self.unload_error


class Observed:
    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def loaded(self, model_id: str, ms: float, outcome: str) -> None:
        self.events.append(("loaded", model_id, ms, outcome))

    def evicted(self, model_id: str, reason: str) -> None:
        self.events.append(("evicted", model_id, reason))


class World:
    def __init__(self, **settings: Any) -> None:
        self.clock = ManualClock(1_000_000)
        self.loader = FakeLoader()
        self.observed = Observed()
        self.manager = ModelManager(
            catalog(),
            ModelManagerSettings(**{"default_model_id": DEFAULT, **settings}),
            self.loader,
            clock=self.clock,
            observer=self.observed,
        )

    def status(self, model_id: str) -> ModelStatus:
        return next(s for s in self.manager.list_catalog() if s.meta.model_id == model_id)

    async def evict_after(self, ms: float) -> list[Eviction]:
        return await self.manager.evict_idle(self.clock.advance(ms))

    @property
    def resident(self) -> list[str]:
        return [model.model_id for model in self.manager.list_resident()]


def catalog(**changed: dict[str, Any]) -> Catalog:
    families = {DEFAULT: "piper", OTHER: "espeak", THIRD: "cosyvoice2", "a": "x", "b": "x"}
    return Catalog.of(
        [
            ModelMeta(model_id=model_id, family=family, **changed.get(model_id, {}))
            for model_id, family in families.items()
        ]
    )


async def until(true: Callable[[], bool]) -> None:
    async with timeout(10):
        while not true():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0)


async def turns(count: int = 10) -> None:
    """Let everything that can run, run."""
    for _ in range(count):
        await asyncio.sleep(0)


# --- start ---


async def test_the_default_is_loaded_before_the_preloads_and_start_ends_when_all_are_there() -> (
    None
):
    world = World(preload_model_ids=[OTHER, THIRD], max_parallel_loads=2)
    await world.manager.start()
    assert world.loader.done[0] == f"load {DEFAULT}"
    assert sorted(world.resident) == sorted([DEFAULT, OTHER, THIRD])
    assert [model.is_default for model in world.manager.list_resident()] == [True, False, False]


async def test_an_unknown_default_or_preload_stops_the_start_before_anything_is_loaded() -> None:
    for settings in ({"default_model_id": "piper-en-jo"}, {"preload_model_ids": ["espeak-e"]}):
        world = World(**settings)
        with pytest.raises(UnknownName, match="did you mean"):
            await world.manager.start()
        assert world.loader.done == []


async def test_a_default_that_fails_stops_the_start() -> None:
    world = World()
    world.loader.failures[DEFAULT] = CorruptModel("truncated")
    with pytest.raises(CorruptModel, match="truncated"):
        await world.manager.start()


async def test_a_preload_that_fails_is_shown_and_the_worker_starts() -> None:
    world = World(preload_model_ids=[THIRD, OTHER])
    world.loader.failures[THIRD] = CorruptModel("truncated")
    await world.manager.start()
    assert sorted(world.resident) == sorted([DEFAULT, OTHER])
    assert world.status(THIRD).state is ModelState.FAILED
    assert world.status(THIRD).error == "truncated"


@pytest.mark.parametrize("limit", [1, 2])
async def test_no_more_than_max_parallel_loads_at_once(limit: int) -> None:
    world = World(max_parallel_loads=limit, resident_cap=5)
    world.loader.gate.clear()
    for model_id in (OTHER, THIRD, "a", "b"):
        world.manager.load_in_background(model_id)
    await turns()
    assert world.loader.now == limit
    world.loader.gate.set()
    await world.manager.close()
    assert world.loader.most_at_once == limit
    assert sum(done.startswith("load") for done in world.loader.done) == limit


# --- acquire: single flight ---


async def test_ten_callers_make_one_load_and_hold_ten_leases_on_one_model() -> None:
    world = World()
    world.loader.gate.clear()
    calls = [
        asyncio.create_task(world.manager.acquire(OTHER, session_id=f"s{n}")) for n in range(10)
    ]
    await turns()
    world.loader.gate.set()
    leases = await asyncio.gather(*calls)
    assert world.loader.done == [f"load {OTHER}"]
    assert len({id(lease.model) for lease in leases}) == 1
    assert world.status(OTHER).refcount == 10


async def test_a_failed_load_fails_all_who_wait_alike_and_the_next_call_tries_again() -> None:
    world = World()
    world.loader.failures[OTHER] = CorruptModel("wrong hash")
    world.loader.gate.clear()
    calls = [asyncio.create_task(world.manager.acquire(OTHER, session_id=str(n))) for n in range(3)]
    await turns()
    world.loader.gate.set()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [(type(r), str(r)) for r in results] == [(CorruptModel, "wrong hash")] * 3
    assert world.status(OTHER).state is ModelState.FAILED
    world.loader.failures.clear()
    async with await world.manager.acquire(OTHER, session_id="again"):
        assert world.status(OTHER).error == ""
    assert world.loader.done == [f"load {OTHER}"] * 2
    await world.manager.unload(OTHER, ignore_ttl=True)
    assert world.status(OTHER).state is ModelState.COLD


async def test_a_waiter_that_leaves_does_not_end_the_load_for_the_others() -> None:
    world = World()
    world.loader.gate.clear()
    leaves = asyncio.create_task(world.manager.acquire(OTHER, session_id="leaves"))
    stays = asyncio.create_task(world.manager.acquire(OTHER, session_id="stays"))
    await turns()
    await cancel_and_wait(leaves)
    world.loader.gate.set()
    lease = await stays
    assert lease.held
    assert [held.session_id for held in world.status(OTHER).leases] == ["stays"]


async def test_a_load_whose_only_waiter_left_ends_in_a_model_that_nobody_holds() -> None:
    world = World()
    world.loader.gate.clear()
    leaves = asyncio.create_task(world.manager.acquire(OTHER, session_id="leaves"))
    await turns()
    await cancel_and_wait(leaves)
    world.loader.gate.set()
    await turns()
    assert (world.status(OTHER).state, world.status(OTHER).refcount) == (ModelState.RESIDENT, 0)


async def test_a_model_cannot_leave_between_its_load_and_the_lease_of_who_waited() -> None:
    world = World(ttl_ms=0, min_residency_ms=0)
    world.loader.gate.clear()
    waits = asyncio.create_task(world.manager.acquire(OTHER, session_id="s"))
    await turns()
    world.loader.gate.set()
    await until(lambda: OTHER in world.resident)
    assert await world.evict_after(1) == []
    assert (await waits).held


async def test_an_empty_id_is_the_default_and_an_unknown_one_names_the_nearest() -> None:
    world = World()
    lease = await world.manager.acquire("", session_id="s")
    assert lease.meta.model_id == DEFAULT
    with pytest.raises(UnknownName, match="did you mean 'espeak-en'"):
        await world.manager.acquire("espeek-en", session_id="s")


async def test_a_fallback_is_told_to_the_lease_the_list_and_the_metrics() -> None:
    world = World()
    world.loader.fallback_reason = "cosyvoice2 is not installed"
    lease = await world.manager.acquire(THIRD, session_id="s")
    assert lease.fallback_reason == "cosyvoice2 is not installed"
    assert world.status(THIRD).fallback
    assert world.observed.events == [("loaded", THIRD, 0.0, "fallback")]


# --- leases ---


async def test_releasing_twice_counts_once_and_a_context_manager_releases_on_error() -> None:
    world = World()
    first = await world.manager.acquire(OTHER, session_id="one")

    async def fails_while_it_holds() -> None:
        async with await world.manager.acquire(OTHER, session_id="two"):
            assert world.status(OTHER).refcount == 2
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        await fails_while_it_holds()
    assert world.status(OTHER).refcount == 1
    await first.release()
    await first.release()
    assert world.status(OTHER).refcount == 0


async def test_a_lease_that_nobody_renews_ends_and_says_whose_it_was() -> None:
    world = World(lease_ttl_ms=60_000)
    gone: list[str] = []
    world.manager.on_lease_expired = gone.append
    silent = await world.manager.acquire(OTHER, session_id="silent", owner="orchestrator-1")
    alive = await world.manager.acquire(OTHER, session_id="alive", lease_ttl_ms=90_000)
    world.clock.advance(50_000)
    alive.touch()
    info = {lease.session_id: lease for lease in world.status(OTHER).leases}
    assert (info["silent"].owner, info["silent"].held_ms) == ("orchestrator-1", 50_000)
    assert (info["silent"].expires_in_ms, info["alive"].expires_in_ms) == (10_000, 90_000)
    assert world.manager.expire_leases(world.clock.now_ms() + 9_999) == []
    assert world.manager.expire_leases(world.clock.advance(10_000)) == ["silent"]
    assert gone == ["silent"]
    assert (silent.held, alive.held, world.status(OTHER).refcount) == (False, True, 1)
    with pytest.raises(NotFound, match="start a new session"):
        silent.touch()
    await silent.release()
    assert world.status(OTHER).refcount == 1


async def test_a_stream_keeps_its_model_when_its_lease_runs_out_under_it() -> None:
    world = World(ttl_ms=0, min_residency_ms=0)
    lease = await world.manager.acquire(OTHER, session_id="s")
    with lease.streaming() as model:
        assert model is lease.model
        assert world.manager.expire_leases(world.clock.advance(60_000)) == ["s"]
        assert await world.evict_after(1_000) == []
        with pytest.raises(InUse):
            await world.manager.unload(OTHER, ignore_ttl=True)
    assert await world.evict_after(1) == [Eviction(OTHER, "ttl")]


async def test_the_evictor_expires_leases_and_unloads_until_it_is_cancelled() -> None:
    world = World(ttl_ms=0, min_residency_ms=0, evict_check_interval_ms=1, lease_ttl_ms=5)
    lease = await world.manager.acquire(OTHER, session_id="s")
    evictor = asyncio.create_task(world.manager.run_evictor())
    world.clock.advance(6)
    await until(lambda: not lease.held)
    world.clock.advance(1)
    await until(lambda: not world.resident)
    await cancel_and_wait(evictor)
    assert world.observed.events[-1] == ("evicted", OTHER, "ttl")


# --- eviction ---


async def test_an_idle_model_leaves_after_its_ttl_and_a_held_one_and_the_default_stay() -> None:
    world = World(ttl_ms=600_000)
    await world.manager.start()
    await world.manager.load(OTHER)
    held = await world.manager.acquire(THIRD, session_id="s")
    assert await world.evict_after(600_000) == []
    assert await world.evict_after(1) == [Eviction(OTHER, "ttl")]
    await held.release()
    assert world.status(THIRD).ttl_left_ms == 600_000
    assert await world.evict_after(600_000) == []
    assert await world.evict_after(1) == [Eviction(THIRD, "ttl")]
    assert world.resident == [DEFAULT]
    assert world.status(DEFAULT).ttl_left_ms == -1
    assert ("evicted", OTHER, "ttl") in world.observed.events


async def test_a_load_over_the_cap_waits_until_the_oldest_idle_is_gone() -> None:
    world = World(resident_cap=3, min_residency_ms=0)
    await world.manager.start()
    for model_id in (OTHER, THIRD):
        async with await world.manager.acquire(model_id, session_id="s"):
            world.clock.advance(1_000)
    world.loader.unload_gate.clear()
    call = asyncio.create_task(world.manager.acquire("a", session_id="s"))
    await turns()
    assert world.status(OTHER).state is ModelState.UNLOADING
    assert world.status("a").state is ModelState.LOADING
    assert "load a" not in world.loader.done
    world.loader.unload_gate.set()
    await call
    assert world.loader.done[-2:] == [f"unload {OTHER}", "load a"]
    assert world.observed.events[-2] == ("evicted", OTHER, "lru")
    assert world.resident == [DEFAULT, THIRD, "a"]


async def test_a_cap_full_of_leases_is_exhausted_and_nothing_is_evicted() -> None:
    world = World(resident_cap=2, min_residency_ms=0)
    await world.manager.start()
    await world.manager.acquire(OTHER, session_id="s")
    with pytest.raises(Exhausted, match="espeak-en is in use") as full:
        await world.manager.acquire(THIRD, session_id="t")
    assert full.value.retry_after_ms is not None
    with pytest.raises(Exhausted):
        world.manager.load_in_background(THIRD)
    assert world.resident == [DEFAULT, OTHER]


async def test_a_cap_full_of_young_models_says_when_one_may_leave() -> None:
    world = World(resident_cap=2, min_residency_ms=120_000)
    await world.manager.start()
    await world.manager.load(OTHER)
    world.clock.advance(20_000)
    with pytest.raises(Exhausted, match="within its minimum residency") as full:
        await world.manager.load(THIRD)
    assert full.value.retry_after_ms == 100_000
    world.clock.advance(100_000)
    await world.manager.load(THIRD)
    assert world.resident == [DEFAULT, THIRD]


async def test_an_unload_that_fails_is_logged_and_the_model_is_gone() -> None:
    world = World(ttl_ms=0, min_residency_ms=0)
    await world.manager.load(OTHER)
    world.loader.unload_error = RuntimeError("driver")
    assert await world.evict_after(1) == [Eviction(OTHER, "ttl")]
    assert world.resident == []


# --- load and unload on request ---


async def test_load_keeps_no_lease_and_says_how_long_it_took() -> None:
    world = World()
    world.loader.gate.clear()
    call = asyncio.create_task(world.manager.load(OTHER))
    await turns()
    assert world.status(OTHER).state is ModelState.LOADING
    assert world.status(OTHER).load_progress == 0.5
    world.clock.advance(2_400)
    world.loader.gate.set()
    assert await call == 2_400
    assert await world.manager.load(OTHER) == 0
    assert world.status(OTHER).refcount == 0
    assert world.observed.events == [("loaded", OTHER, 2_400.0, "ok")]


async def test_unload_while_in_use_names_the_holders() -> None:
    world = World()
    async with await world.manager.acquire(OTHER, session_id="s1", owner="orchestrator-1"):
        with pytest.raises(InUse, match=r"session s1 \(orchestrator-1\)"):
            await world.manager.unload(OTHER, ignore_ttl=True)
    assert world.resident == [OTHER]


async def test_unload_of_a_recently_used_model_needs_ignore_ttl() -> None:
    world = World(ttl_ms=600_000)
    await world.manager.load(OTHER)
    world.clock.advance(200_000)
    with pytest.raises(FailedPrecondition, match="ignore_ttl") as early:
        await world.manager.unload(OTHER)
    assert early.value.retry_after_ms == 400_000
    await world.manager.unload(OTHER, ignore_ttl=True)
    assert world.status(OTHER).state is ModelState.COLD
    assert world.observed.events[-1] == ("evicted", OTHER, "asked")


async def test_unload_after_the_ttl_needs_nothing() -> None:
    world = World(ttl_ms=600_000)
    await world.manager.load(OTHER)
    world.clock.advance(600_000)
    await world.manager.unload(OTHER)
    assert world.resident == []


async def test_the_default_leaves_when_asked_and_comes_back_when_needed() -> None:
    world = World()
    await world.manager.start()
    await world.manager.unload(DEFAULT, ignore_ttl=True)
    assert world.resident == []
    async with await world.manager.acquire("", session_id="s"):
        assert world.status(DEFAULT).is_default


async def test_unload_of_what_is_not_there() -> None:
    world = World()
    await world.manager.unload(OTHER)
    with pytest.raises(UnknownName):
        await world.manager.unload("espeak-e")
    world.loader.gate.clear()
    world.manager.load_in_background(OTHER)
    with pytest.raises(FailedPrecondition, match="loading"):
        await world.manager.unload(OTHER)
    world.loader.gate.set()
    await world.manager.close()


# --- a new catalog ---


async def test_a_new_catalog_says_what_changed_and_leaves_live_leases_alone() -> None:
    world = World()
    await world.manager.start()
    held = await world.manager.acquire(OTHER, session_id="s")
    await world.manager.load(THIRD)
    new = catalog(**{OTHER: {"tags": ["new"]}, THIRD: {"tags": ["new"]}})
    models = {**new.models, "c": ModelMeta(model_id="c", family="x")}
    del models["b"]
    lines = await world.manager.reload_catalog(Catalog.of(list(models.values()), ["bad pack"]))
    assert lines == [
        f"changed {OTHER}: in use, unloaded when the last session ends",
        f"changed {THIRD}: unloaded",
        "removed b",
        "added c",
        "left out: bad pack",
    ]
    assert (held.held, held.meta.tags) == (True, [])
    assert world.resident == [DEFAULT, OTHER]
    await held.release()
    async with await world.manager.acquire(OTHER, session_id="t") as renewed:
        assert renewed.meta.tags == ["new"]
    assert ("evicted", OTHER, "reload") in world.observed.events


async def test_a_changed_default_is_loaded_anew_as_soon_as_nobody_holds_it() -> None:
    world = World()
    await world.manager.start()
    held = await world.manager.acquire("", session_id="s")
    await world.manager.reload_catalog(catalog(**{DEFAULT: {"tags": ["new"]}}))
    assert await world.evict_after(0) == []
    await held.release()
    assert await world.evict_after(0) == [Eviction(DEFAULT, "reload")]
    await turns()
    assert world.loader.done == [f"load {DEFAULT}", f"unload {DEFAULT}", f"load {DEFAULT}"]
    assert world.status(DEFAULT).meta.tags == ["new"]
    assert world.status(DEFAULT).state is ModelState.RESIDENT


async def test_a_model_whose_entry_changed_while_it_loaded_is_replaced_at_the_next_use() -> None:
    world = World()
    world.loader.gate.clear()
    world.manager.load_in_background(OTHER)
    await turns()
    await world.manager.reload_catalog(catalog(**{OTHER: {"tags": ["new"]}}))
    world.loader.gate.set()
    await turns()
    async with await world.manager.acquire(OTHER, session_id="s") as lease:
        assert lease.meta.tags == ["new"]


async def test_a_catalog_without_the_default_is_refused_and_the_old_one_stays() -> None:
    world = World()
    with pytest.raises(InvalidArgument, match="lacks the default model"):
        await world.manager.reload_catalog(Catalog.of([]))
    await world.manager.load(OTHER)


async def test_a_removed_model_that_is_held_stays_listed_until_it_is_gone() -> None:
    world = World()
    held = await world.manager.acquire(OTHER, session_id="s")
    models = [m for m in catalog().models.values() if m.model_id != OTHER]
    await world.manager.reload_catalog(Catalog.of(models))
    assert world.status(OTHER).state is ModelState.RESIDENT
    with pytest.raises(UnknownName):
        await world.manager.acquire(OTHER, session_id="t")
    await held.release()
    assert await world.evict_after(0) == [Eviction(OTHER, "reload")]


# --- close ---


async def test_close_waits_for_loads_and_unloads_all_that_nobody_holds() -> None:
    world = World(max_parallel_loads=1)
    await world.manager.start()
    held = await world.manager.acquire(OTHER, session_id="s")
    world.loader.gate.clear()
    world.manager.load_in_background(THIRD)
    await turns()
    closing = asyncio.create_task(world.manager.close())
    await turns()
    assert not closing.done()
    world.loader.gate.set()
    await closing
    assert sorted(d for d in world.loader.done if d.startswith("unload")) == sorted(
        [f"unload {DEFAULT}", f"unload {THIRD}"]
    )
    assert held.held
    with pytest.raises(Unavailable, match="shutting down"):
        await world.manager.acquire("a", session_id="late")


def test_states_have_the_numbers_of_the_contract() -> None:
    assert {state.name: int(state) for state in ModelState} == {
        name: number
        for name, number in tts_pb2.ModelState.items()
        if name != "MODEL_STATE_UNSPECIFIED"
    }
