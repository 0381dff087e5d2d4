"""The engine and its threads: who waits, who is woken, and what is left when somebody goes."""

from __future__ import annotations

import gc
import logging
import sys
import threading
import tracemalloc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager

import pytest

from src.audio.pcm import Float32
from src.rpc.errors import (
    Exhausted,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    Unavailable,
)
from src.tts.families.csm.context import MIN_ROOM
from src.tts.families.csm.engine import Engine
from src.tts.families.csm.outlet import Outlet
from src.tts.families.csm.ports import Row, Voice
from src.tts.families.csm.ticker import Ticker
from src.tts.tts_base import CancelToken
from tests.fake_csm import FakeCsmModel, expected, prefix_of_size, said

LONG = "a text that takes quite a while to say"
PATIENCE_S = 30.0


@contextmanager
def running(model: FakeCsmModel, **options: int) -> Iterator[Engine]:
    engine = Engine(model, name="fake", **options)  # type: ignore[arg-type]
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


def open_slot(engine: Engine, cancel: CancelToken | None = None, *, seed: int = 1) -> ExitStack:
    """Entered already; `stack.slot` is not needed by most."""
    stack = ExitStack()
    stack.enter_context(engine.slot(Voice(), seed=seed, cancel=cancel or CancelToken()))
    return stack


def settle(engine: Engine, model: FakeCsmModel) -> int:
    """Wait until the engine has nothing to do; how much it has done."""
    seen = -1
    while seen != (done := engine.run(lambda _: len(model.calls))):
        seen = done
    return done


class Worker:
    """A thread, and what came of it."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.error: BaseException | None = None
        self.result: object = None
        self._work = work
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._work()
        except BaseException as error:
            self.error = error

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> Worker:
        self._thread.join(PATIENCE_S)
        assert self.done, "somebody waits for ever"
        return self


class Hold:
    """Stops the engine in its next tick until let go."""

    def __init__(self, model: FakeCsmModel) -> None:
        self.reached = threading.Event()
        self._go = threading.Event()
        self._model = model
        model.before_tick = self._tick

    def _tick(self, rows: Sequence[Row]) -> None:
        self.reached.set()
        assert self._go.wait(PATIENCE_S)

    def wait(self) -> None:
        assert self.reached.wait(PATIENCE_S)

    def go(self) -> None:
        self._model.before_tick = lambda rows: None
        self._go.set()


def until(true: Callable[[], bool]) -> None:
    turn = threading.Event()
    for _ in range(int(PATIENCE_S * 1000)):
        if true():
            return
        turn.wait(0.001)
    raise AssertionError("it never comes true")


def say_all(engine: Engine, texts: Sequence[str], *, seed: int = 1) -> list[list[float]]:
    with engine.slot(Voice(), seed=seed, cancel=CancelToken()) as slot:
        return [said(slot.say(text)) for text in texts]


# --- speaking ---


def test_texts_become_their_frames() -> None:
    texts = ["hello", "how are you", LONG]
    with running(FakeCsmModel()) as engine:
        assert say_all(engine, texts) == expected(texts, seed=1)


def test_nothing_comes_of_nothing() -> None:
    model = FakeCsmModel()
    with running(model) as engine, engine.slot(Voice(), seed=1, cancel=CancelToken()) as slot:
        done = settle(engine, model)
        assert [said(slot.say(text)) for text in ("", "  ", "?!", "...", "—")] == [[]] * 5
        assert settle(engine, model) == done


def test_one_character_is_a_text_and_five_thousand_are() -> None:
    with running(FakeCsmModel(positions=600)) as engine:
        assert say_all(engine, ["a"]) == expected(["a"], seed=1)
        (long,) = say_all(engine, ["Say it once more. " * 280])
    # A frame for every character but the spaces where it was cut.
    assert 4900 < len(long) < 5040


def test_many_speak_at_once_each_as_if_alone() -> None:
    """64 threads on 16 slots, at random: every frame is the one that it would be alone."""
    model = FakeCsmModel(slots=16)
    with running(model, max_waiting=64, max_wait_ms=60_000) as engine:
        texts = {seed: ["hello there", "x" * (seed % 17 + 1)][: seed % 3] for seed in range(64)}
        workers = {
            seed: Worker(lambda seed=seed: say_all(engine, texts[seed], seed=seed))  # type: ignore[misc]
            for seed in texts
        }
        for seed, worker in workers.items():
            assert worker.join().error is None
            assert worker.result == expected(texts[seed], seed=seed)
        stats = engine.stats
    assert stats.active == stats.waiting == stats.failed == 0
    assert stats.frames == sum(map(len, model.batches()))
    assert stats.ticks == len(model.batches())


def test_a_voice_prompt_is_there_before_the_first_text() -> None:
    model = FakeCsmModel()
    voice = Voice(speaker=3, prefix=prefix_of_size(40))
    with running(model) as engine, engine.slot(voice, seed=1, cancel=CancelToken()) as slot:
        settle(engine, model)
        assert model.count("assign") == 1
        frames = said(slot.say("hello"))
    prompt = prefix_of_size(40).items
    assert [frames] == expected(["hello"], seed=1, prompt=prompt, voice=voice)


def test_a_voice_prompt_that_leaves_no_room_is_refused() -> None:
    voice = Voice(prefix=prefix_of_size(512 - MIN_ROOM + 1))
    with running(FakeCsmModel(positions=512)) as engine:
        with (
            pytest.raises(InvalidArgument, match="449 of the model's 512"),
            engine.slot(voice, seed=1, cancel=CancelToken()),
        ):
            pass
        assert engine.stats.active == 0


# --- waiting, pausing, going ---


def test_while_nobody_takes_nothing_is_computed() -> None:
    model = FakeCsmModel()
    with running(model) as engine, engine.slot(Voice(), seed=1, cancel=CancelToken()) as slot:
        frames = slot.say(LONG)
        heard = said([next(frames)])
        paused = settle(engine, model)
        assert model.count("tick") <= 1 + 3
        assert say_all(engine, ["someone else"], seed=2) == expected(["someone else"], seed=2)
        assert model.count("tick", 0) <= 1 + 3
        assert paused < settle(engine, model)
        heard += said(frames)
    assert [heard] == expected([LONG], seed=1)


def test_while_nobody_takes_the_engine_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[None] = []
    step = Ticker.step

    def counted(ticker: Ticker) -> bool:
        steps.append(None)
        return step(ticker)

    monkeypatch.setattr(Ticker, "step", counted)
    model = FakeCsmModel()
    with running(model) as engine, engine.slot(Voice(), seed=1, cancel=CancelToken()) as slot:
        frames = slot.say(LONG)
        next(frames)
        settle(engine, model)
        # The job that has settled it is followed by a step, and that by none.
        before = len(steps)
        threading.Event().wait(0.05)
        assert len(steps) <= before + 2


def test_a_cancelled_slot_draws_one_more_frame_at_most_and_is_free() -> None:
    model = FakeCsmModel(slots=1)
    with running(model) as engine:
        cancel, hold = CancelToken(), Hold(model)
        with engine.slot(Voice(), seed=1, cancel=cancel) as slot:
            worker = Worker(lambda: said(slot.say(LONG)))
            hold.wait()
            cancel.cancel()
            assert worker.join().result == []
            hold.go()
            settle(engine, model)
            assert model.count("tick", 0) == 1
            assert said(slot.say("more")) == []
        assert say_all(engine, ["hello"], seed=2) == expected(["hello"], seed=2)


def test_a_text_cancelled_while_it_is_read_is_not_read_on() -> None:
    model = FakeCsmModel(slots=2, positions=4000)
    with running(model, prefill_per_tick=8) as engine, ExitStack() as stack:
        cancel, hold = CancelToken(), Hold(model)
        first = stack.enter_context(engine.slot(Voice(), seed=1, cancel=CancelToken()))
        second = stack.enter_context(engine.slot(Voice(), seed=2, cancel=cancel))
        speaker = Worker(lambda: said(first.say("a")))
        hold.wait()
        reader = Worker(lambda: said(second.say("word " * 200)))
        until(lambda: second._outlet.turn == 1)
        cancel.cancel()
        assert reader.join().result == []
        hold.go()
        assert speaker.join().error is None
        settle(engine, model)
        assert model.count("prefill", 1) == 0


def test_cancelled_before_anything_it_says_nothing() -> None:
    cancel = CancelToken()
    cancel.cancel()
    model = FakeCsmModel()
    with running(model) as engine:
        with engine.slot(Voice(), seed=1, cancel=cancel) as slot:
            assert said(slot.say(LONG)) == []
        settle(engine, model)
        assert model.count("tick") == 0


def test_what_is_not_heard_to_its_end_is_given_up() -> None:
    model = FakeCsmModel()
    with running(model) as engine, engine.slot(Voice(), seed=1, cancel=CancelToken()) as slot:
        with closing(slot.say(LONG)) as frames:  # type: ignore[type-var]
            next(frames)
        drawn = settle(engine, model)
        assert model.count("tick") <= 1 + 3
        assert settle(engine, model) == drawn
        assert len(said(slot.say("hello"))) == 5


def test_one_text_at_a_time() -> None:
    with (
        running(FakeCsmModel()) as engine,
        engine.slot(Voice(), seed=1, cancel=CancelToken()) as slot,
    ):
        first = slot.say(LONG)
        next(first)
        with pytest.raises(FailedPrecondition, match="one text at a time"):
            next(slot.say("hello"))
        assert len(said(first)) == len(LONG) - 1
        assert len(said(slot.say("hello"))) == 5


# --- more sessions than slots ---


def test_who_comes_first_gets_the_slot_first() -> None:
    with running(FakeCsmModel(slots=1), max_wait_ms=60_000) as engine:
        order: list[int] = []

        def visit(number: int) -> None:
            with engine.slot(Voice(), seed=1, cancel=CancelToken()):
                order.append(number)

        workers = []
        with open_slot(engine):
            for number in range(6):
                workers.append(Worker(lambda number=number: visit(number)))  # type: ignore[misc]
                until(lambda: engine.stats.waiting == len(workers))
        for worker in workers:
            assert worker.join().error is None
    assert order == list(range(6))


def test_a_full_queue_refuses_and_says_where_one_would_stand() -> None:
    with running(FakeCsmModel(slots=1), max_waiting=2, max_wait_ms=60_000) as engine:
        with open_slot(engine):
            waiting = [Worker(lambda: open_slot(engine).close()) for _ in range(2)]
            until(lambda: engine.stats.waiting == 2)
            with pytest.raises(Exhausted, match="at most 1 utterances") as refused:
                open_slot(engine)
            assert refused.value.queue_position == 3
            assert refused.value.retry_after_ms == 60_000
        for worker in waiting:
            assert worker.join().error is None


def test_where_nobody_may_wait_a_free_slot_is_given_all_the_same() -> None:
    with (
        running(FakeCsmModel(slots=1), max_waiting=0) as engine,
        open_slot(engine),
        pytest.raises(Exhausted),
    ):
        open_slot(engine)


def test_who_waits_too_long_is_told_where_they_stood() -> None:
    with running(FakeCsmModel(slots=1), max_wait_ms=20) as engine, open_slot(engine):
        with pytest.raises(Exhausted) as refused:
            open_slot(engine)
        assert refused.value.queue_position == 1
        assert engine.stats.waiting == 0


def test_cancelled_in_the_queue_is_no_error_and_holds_nobody_up() -> None:
    with running(FakeCsmModel(slots=1), max_wait_ms=60_000) as engine:
        cancel = CancelToken()

        def visit() -> list[float]:
            with engine.slot(Voice(), seed=1, cancel=cancel) as slot:
                return said(slot.say("hello"))

        with open_slot(engine):
            gone = Worker(visit)
            until(lambda: engine.stats.waiting == 1)
            next_one = Worker(lambda: say_all(engine, ["hello"]))
            until(lambda: engine.stats.waiting == 2)
            cancel.cancel()
            assert gone.join().result == []
        assert next_one.join().result == expected(["hello"], seed=1)


def test_a_slot_given_to_somebody_who_was_cancelled_goes_to_the_next() -> None:
    """The two may come at the same time, in either order."""
    with running(FakeCsmModel(slots=1), max_waiting=4, max_wait_ms=60_000) as engine:
        for _ in range(50):
            cancel = CancelToken()
            held = open_slot(engine)
            gone = Worker(lambda cancel=cancel: open_slot(engine, cancel).close())  # type: ignore[misc]
            until(lambda: engine.stats.waiting == 1)
            leaving = Worker(held.close)
            cancel.cancel()
            leaving.join()
            assert gone.join().error is None
            assert say_all(engine, ["a"]) == expected(["a"], seed=1)


# --- the model, between ticks ---


def test_work_is_done_on_the_engines_thread_while_others_speak() -> None:
    model = FakeCsmModel(slots=2)
    with running(model) as engine, engine.slot(Voice(), seed=1, cancel=CancelToken()) as slot:
        frames = slot.say(LONG)
        heard = said([next(frames)])
        # The fake refuses every other thread.
        prefix = engine.run(lambda m: m.prefix_of(m.embed_text("a prompt", 0), 0))
        heard += said(frames)
    assert prefix.positions == 10
    assert [heard] == expected([LONG], seed=1)


def test_what_work_raises_is_its_callers() -> None:
    with running(FakeCsmModel()) as engine:
        with pytest.raises(ZeroDivisionError):
            engine.run(lambda model: 1 // 0)
        assert say_all(engine, ["hello"]) == expected(["hello"], seed=1)


def test_the_engine_does_not_wait_for_itself() -> None:
    with running(FakeCsmModel()) as engine, pytest.raises(FailedPrecondition):
        engine.run(lambda model: engine.run(lambda _: None))


# --- the end ---


def test_a_closed_engine_leaves_nobody_waiting() -> None:
    model = FakeCsmModel(slots=1)
    engine = Engine(model, name="fake", max_wait_ms=60_000)
    engine.start()
    hold = Hold(model)
    ready = threading.Event()

    def speak() -> None:
        with engine.slot(Voice(), seed=1, cancel=CancelToken()) as slot:
            ready.set()
            said(slot.say(LONG))

    speaker = Worker(speak)
    ready.wait(PATIENCE_S)
    waiter = Worker(lambda: open_slot(engine))
    until(lambda: engine.stats.waiting == 1)
    hold.wait()
    job = Worker(lambda: engine.run(lambda _: None))
    closer = Worker(engine.close)
    hold.go()
    closer.join()
    assert model.closed
    for worker in (speaker, waiter):
        assert isinstance(worker.join().error, Unavailable)
    assert isinstance(job.join().error, Unavailable) or job.error is None
    for call in (lambda: open_slot(engine), lambda: engine.run(lambda _: None)):
        with pytest.raises(Unavailable, match="is closed"):
            call()
    engine.close()
    assert engine.stats.active == 0


def test_nobody_waits_for_ever_for_a_tick_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.tts.families.csm.engine.CLOSE_PATIENCE_S", 0.05)
    model = FakeCsmModel(slots=1)
    engine = Engine(model, name="fake")
    engine.start()
    hold = Hold(model)
    speaker = Worker(lambda: say_all(engine, ["hello"]))
    hold.wait()
    with pytest.raises(Internal, match="restart the worker"):
        engine.close()
    assert isinstance(speaker.join().error, Unavailable), "the speaker does not wait either"
    hold.go()
    monkeypatch.undo()
    engine.close()
    assert model.closed


def test_an_engine_that_never_started_is_closed_all_the_same() -> None:
    model = FakeCsmModel()
    engine = Engine(model, name="fake")
    for call in (lambda: open_slot(engine), lambda: engine.run(lambda _: None)):
        with pytest.raises(Unavailable, match="not started"):
            call()
    engine.close()
    assert model.closed


def test_a_closed_engine_holds_its_model_no_more() -> None:
    model = FakeCsmModel()
    gone = weakref.ref(model)
    engine = Engine(model, name="fake")
    engine.start()
    say_all(engine, ["hello"])
    engine.close()
    del model
    gc.collect()
    assert gone() is None


def test_an_engine_that_dies_says_so_to_everybody(caplog: pytest.LogCaptureFixture) -> None:
    model = FakeCsmModel(slots=1)
    secret = "what a user said"

    def die(rows: Sequence[Row]) -> None:
        raise SystemExit(secret)

    model.before_tick = die
    with running(model) as engine, caplog.at_level(logging.CRITICAL):
        with pytest.raises(Unavailable, match="has died \\(SystemExit\\)"):
            say_all(engine, [LONG])
        with pytest.raises(Unavailable, match="has died"):
            engine.run(lambda _: None)
        with pytest.raises(Unavailable, match="has died"):
            open_slot(engine)
    assert "has died" in caplog.text
    assert secret not in str([vars(record) for record in caplog.records])
    assert model.closed


def test_a_failed_slot_is_given_back_and_serves_the_next() -> None:
    model = FakeCsmModel(slots=1)
    model.sick = lambda row: row.seed == 1
    with running(model) as engine:
        for _ in range(3):
            with pytest.raises(Internal):
                say_all(engine, ["hello"], seed=1)
        assert say_all(engine, ["hello"], seed=2) == expected(["hello"], seed=2)
        assert engine.stats.failed == 3


def test_bounds_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="an engine needs"):
        Engine(FakeCsmModel(), name="fake", credit_frames=0)
    with pytest.raises(ValueError, match="an engine needs"):
        Engine(FakeCsmModel(), name="fake", prefill_per_tick=0)


# --- memory ---


def test_memory_is_flat_over_many_utterances() -> None:
    model = FakeCsmModel(slots=2)
    cancel = CancelToken()

    def utterances(engine: Engine, count: int) -> None:
        for number in range(count):
            with engine.slot(Voice(), seed=number, cancel=cancel) as slot:
                said(slot.say("hello"))
                if number % 3 == 0:
                    next(slot.say(LONG))
            model.calls.clear()

    with running(model) as engine:
        utterances(engine, 20)
        tracemalloc.start()
        try:
            utterances(engine, 20)
            before = _traced()
            utterances(engine, 200)
            grown = _traced() - before
        finally:
            tracemalloc.stop()
    # The interpreter's own lists take up to 100 bytes for each; a slot's outlet alone is 2,000.
    assert grown < 60_000, f"{grown} bytes more after 200 utterances"
    assert not cancel._callbacks


def test_errors_told_again_and_again_do_not_grow() -> None:
    """An exception that is raised twice carries both tracebacks, with all their locals."""
    engine = Engine(FakeCsmModel(), name="fake")
    engine.start()
    engine.close()
    depths = []
    for _ in range(5):
        with pytest.raises(Unavailable) as told:
            engine.run(lambda _: None)
        depths.append(len(told.traceback))
    assert len(set(depths)) == 1


def test_an_iterator_dropped_inside_the_engines_lock_does_not_block_it() -> None:
    """The garbage collector runs anywhere, also where the lock is held."""
    model = FakeCsmModel()
    with running(model) as engine, engine.slot(Voice(), seed=1, cancel=CancelToken()) as slot:
        frames = slot.say(LONG)
        next(frames)

        def drop() -> None:
            with engine._lock:
                _close(frames)

        Worker(drop).join()
        assert len(said(slot.say("hello"))) == 5


def test_a_consumer_is_woken_for_its_own_frames_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 32 sleeps on its own condition: one wake for a frame, not 32."""
    looked: list[None] = []
    takes: list[None] = []
    something, take = Outlet._something, Outlet.take

    def look(outlet: Outlet) -> bool:
        looked.append(None)
        return something(outlet)

    def counted(outlet: Outlet) -> Float32 | None:
        takes.append(None)
        return take(outlet)

    monkeypatch.setattr(Outlet, "_something", look)
    monkeypatch.setattr(Outlet, "take", counted)
    with running(FakeCsmModel(slots=32)) as engine:
        workers = [Worker(lambda: say_all(engine, [LONG])) for _ in range(32)]
        assert all(worker.join().error is None for worker in workers)
    # Once when it comes, once when it is woken; the end of a text may wake it once more.
    assert len(looked) <= 2 * len(takes) + 2 * 32


def _close(frames: Iterator[object]) -> None:
    assert hasattr(frames, "close")
    frames.close()


def _traced() -> int:
    gc.collect()
    sys.stdout.flush()
    return tracemalloc.get_traced_memory()[0]
