"""A call on a thread of its own, iterated: order, bound, errors, and an end that leaves nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from src.tts.generation import AHEAD, Put, Stopped, generated

LIVENESS_S = 10.0
# What is broken here hangs.
pytestmark = pytest.mark.timeout(20)


def numbers(count: int) -> Callable[[Put[int]], None]:
    def run(put: Put[int]) -> None:
        for number in range(count):
            put(number)

    return run


def alive(name: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == name]


def test_all_results_come_in_order_and_then_the_end() -> None:
    assert list(generated(numbers(50), "t-order")) == list(range(50))
    assert not alive("t-order")


def test_no_results_are_an_end() -> None:
    assert list(generated(numbers(0), "t-none")) == []


def test_what_the_call_raises_reaches_the_caller_after_its_results() -> None:
    def run(put: Put[int]) -> None:
        put(1)
        put(2)
        raise OSError("the disk is gone")

    stream = generated(run, "t-error")
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
    assert not alive("t-error")


def test_an_error_before_the_first_result_reaches_the_caller() -> None:
    def run(_: Put[int]) -> None:
        raise ValueError("no such voice")

    with pytest.raises(ValueError, match="no such voice"):
        list(generated(run, "t-early"))


def test_an_error_that_is_no_exception_reaches_the_caller_too() -> None:
    """A family that ends its thread with SystemExit must not leave anybody waiting."""

    def run(_: Put[int]) -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        list(generated(run, "t-exit"))


def test_the_call_runs_no_further_ahead_than_its_bound() -> None:
    handed: list[int] = []
    more = threading.Event()

    def run(put: Put[int]) -> None:
        for number in range(100):
            put(number)
            handed.append(number)
            if len(handed) == AHEAD + 1:
                more.set()

    stream = generated(run, "t-bound")
    assert next(stream) == 0
    # One was taken and AHEAD wait; the next put can only return once another is taken.
    assert more.wait(LIVENESS_S)
    time.sleep(0.05)
    assert len(handed) == AHEAD + 1
    stream.close()
    assert len(handed) == AHEAD + 1


def test_closing_ends_a_call_that_waits_in_put() -> None:
    raised: list[type[BaseException]] = []

    def run(put: Put[int]) -> None:
        try:
            numbers(100)(put)
        except BaseException as error:
            raised.append(type(error))
            raise

    stream = generated(run, "t-close")
    next(stream)
    stream.close()
    assert raised == [Stopped]
    assert not alive("t-close")


def test_closing_ends_a_call_that_only_looks_at_its_steps() -> None:
    steps = 0

    def run(put: Put[int]) -> None:
        nonlocal steps
        put(0)
        while not put.stopped:
            steps += 1

    stream = generated(run, "t-steps")
    next(stream)
    stream.close()
    seen = steps
    assert not alive("t-steps")
    assert steps == seen


def test_code_that_eats_exceptions_does_not_eat_the_stop() -> None:
    eaten = 0

    def run(put: Put[int]) -> None:
        nonlocal eaten
        for number in range(1000):
            try:
                put(number)
            except Exception:
                eaten += 1

    stream = generated(run, "t-eats")
    next(stream)
    stream.close()
    assert not eaten


def test_an_error_after_the_close_is_nobodys() -> None:
    def run(put: Put[int]) -> None:
        put(0)
        while not put.stopped:
            pass
        raise RuntimeError("too late")

    stream = generated(run, "t-late")
    next(stream)
    stream.close()
    assert not alive("t-late")


def test_closed_before_the_first_next_nothing_runs() -> None:
    ran = threading.Event()

    def run(_: Put[int]) -> None:
        ran.set()

    stream = generated(run, "t-never")
    stream.close()
    assert list(stream) == []
    assert not ran.is_set()
    assert not alive("t-never")


def test_a_stop_of_its_own_is_a_quiet_end() -> None:
    def run(put: Put[int]) -> None:
        put(7)
        raise Stopped

    assert list(generated(run, "t-own")) == [7]


def test_two_calls_do_not_mix() -> None:
    def run(sign: int) -> Callable[[Put[int]], None]:
        def counting(put: Put[int]) -> None:
            for number in range(1, 40):
                put(sign * number)

        return counting

    one, two = generated(run(1), "t-one"), generated(run(-1), "t-two")
    pairs = list(zip(one, two, strict=True))
    assert pairs == [(n, -n) for n in range(1, 40)]
