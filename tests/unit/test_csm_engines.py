"""Sharing one engine between models: made once, closed once, freed."""

from __future__ import annotations

import gc
import operator
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from src.tts.families.csm.engines import Lease, OtherTerms, SharedEngines

WAIT_S = 10


class FakeEngine:
    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def test_two_models_of_one_base_share_one_engine() -> None:
    engines = SharedEngines()
    base, voice = engines.lease("base", FakeEngine), engines.lease("base", FakeEngine)
    assert base.engine is voice.engine
    assert engines.lease("another", FakeEngine).engine is not base.engine


def test_only_the_last_to_leave_closes_the_engine() -> None:
    engines = SharedEngines()
    first, second = engines.lease("base", FakeEngine), engines.lease("base", FakeEngine)
    engine = first.engine
    first.release()
    first.release()
    assert engine.closed == 0
    second.release()
    assert engine.closed == 1
    assert len(engines) == 0


def test_a_lease_given_back_gives_no_engine() -> None:
    lease = SharedEngines().lease("base", FakeEngine)
    lease.release()
    with pytest.raises(RuntimeError, match="given back"):
        _ = lease.engine


def test_ten_callers_make_one_engine() -> None:
    engines, made = SharedEngines(), list[FakeEngine]()
    together = threading.Barrier(10)

    def make() -> FakeEngine:
        made.append(FakeEngine())
        return made[-1]

    def ask() -> Lease[FakeEngine]:
        together.wait(WAIT_S)
        return engines.lease("base", make)

    with ThreadPoolExecutor(10) as threads:
        asked = [threads.submit(ask) for _ in range(10)]
        leases = [future.result(WAIT_S) for future in asked]
    assert len(made) == 1
    for lease in leases:
        lease.release()
    assert made[0].closed == 1


def test_after_a_failed_make_the_next_caller_tries_anew() -> None:
    engines = SharedEngines()

    def fail() -> FakeEngine:
        raise MemoryError

    with pytest.raises(MemoryError):
        engines.lease("base", fail)
    assert len(engines) == 0
    assert engines.lease("base", FakeEngine).engine.closed == 0


def test_nobody_gets_an_engine_on_other_terms_than_he_asked_for() -> None:
    engines = SharedEngines()
    held = engines.lease("base", FakeEngine, {"slots": 8})
    assert engines.lease("base", FakeEngine, {"slots": 8}).engine is held.engine
    with pytest.raises(OtherTerms) as refused:
        engines.lease("base", FakeEngine, {"slots": 4})
    assert refused.value.terms == {"slots": 8}


def test_what_serves_is_for_the_caller_to_say() -> None:
    engines = SharedEngines()
    held = engines.lease("base", FakeEngine, 8)
    assert engines.lease("base", FakeEngine, 4, operator.ge).engine is held.engine
    with pytest.raises(OtherTerms):
        engines.lease("base", FakeEngine, 16, operator.ge)


def test_a_refusal_keeps_no_engine_alive() -> None:
    engines = SharedEngines()
    held = engines.lease("base", FakeEngine, 8)
    engine = held.engine
    with pytest.raises(OtherTerms):
        engines.lease("base", FakeEngine, 4)
    held.release()
    assert engine.closed == 1
    assert engines.lease("base", FakeEngine, 4).engine is not engine


def test_a_newcomer_waits_until_the_old_engine_is_closed() -> None:
    """Else both would be in the device's memory at once."""
    engines, order = SharedEngines(), list[str]()
    closing, go_on = threading.Event(), threading.Event()

    class Slow(FakeEngine):
        def close(self) -> None:
            closing.set()
            assert go_on.wait(WAIT_S)
            order.append("closed")

    def make() -> FakeEngine:
        order.append("made")
        return FakeEngine()

    old = engines.lease("base", Slow)
    with ThreadPoolExecutor(2) as threads:
        leaving = threads.submit(old.release)
        assert closing.wait(WAIT_S)
        coming = threads.submit(engines.lease, "base", make)
        _until(lambda: engines._places["base"].users == 1)
        go_on.set()
        leaving.result(WAIT_S)
        heir = coming.result(WAIT_S)
    assert order == ["closed", "made"]
    assert len(engines) == 1
    heir.release()
    assert len(engines) == 0


def test_an_engine_that_cannot_close_is_forgotten_all_the_same() -> None:
    class Stuck(FakeEngine):
        def close(self) -> None:
            raise OSError("stuck")

    engines = SharedEngines()
    with pytest.raises(OSError, match="stuck"):
        engines.lease("base", Stuck).release()
    assert len(engines) == 0


def test_fifty_cycles_leave_nothing_behind() -> None:
    engines, refs = SharedEngines(), list[weakref.ref[FakeEngine]]()
    kept = list[Lease[FakeEngine]]()
    for _ in range(50):
        kept.append(engines.lease("base", FakeEngine))
        refs.append(weakref.ref(kept[-1].engine))
        kept[-1].release()
    gc.collect()
    assert [ref() for ref in refs] == [None] * 50
    assert len(engines) == 0


def _until(holds: Callable[[], bool]) -> None:
    patience = threading.Event()
    for _ in range(WAIT_S * 100):
        if holds():
            return
        patience.wait(0.01)
    raise AssertionError("did not come about")
