"""The engine's steps, made one by one: bounded, fair, nothing for nobody, and every frame right."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.common.clock import ManualClock
from src.rpc.errors import FailedPrecondition, Internal, Unavailable
from src.tts.families.csm.context import Context, Pace
from src.tts.families.csm.outlet import Outlet
from src.tts.families.csm.ports import Embeddings, Row, Voice
from src.tts.families.csm.scheduler import low_water
from src.tts.families.csm.speaker import Speaker
from src.tts.families.csm.ticker import Counters, Seats, Ticker
from tests.fake_csm import CODEBOOKS, FakeCsmModel, expected, prefix_of_size, said

CREDIT = 3
BUDGET = 16
MANY = 10_000


@dataclass
class Consumer:
    speaker: Speaker
    prompt: int
    asked: list[str] = field(default_factory=list)
    heard: list[list[float]] = field(default_factory=list)
    dropped: bool = False

    @property
    def outlet(self) -> Outlet:
        return self.speaker.outlet

    def say(self, text: str) -> None:
        self.asked.append(text)
        self.heard.append([])
        self.outlet.ask([text])

    def take(self, most: int = MANY) -> int:
        """What is there; blocks never."""
        taken = min(most, self.outlet.undelivered)
        for _ in range(taken):
            frame = self.outlet.take()
            assert frame is not None
            self.heard[-1] += said([frame])
        return taken

    @property
    def speaks(self) -> bool:
        return not self.outlet.ready or self.outlet.undelivered > 0


class Hand:
    """A ticker without a thread, and consumers that take when told to."""

    def __init__(self, model: FakeCsmModel, *, credit: int = CREDIT, budget: int = BUDGET) -> None:
        self.model = model
        self.credit = credit
        self.lock = threading.RLock()
        self.counters = Counters()
        self.seats = Seats(model.slots)
        self.ticker = Ticker(
            model,
            self.seats,
            self.lock,
            self.counters,
            ManualClock(),
            name="by hand",
            credit=credit,
            prefill_per_tick=budget,
            pace=Pace(),
        )

    def open(self, slot: int = 0, *, seed: int = 7, prompt: int = 0) -> Consumer:
        outlet = Outlet(self.lock, lambda: None, low_water(self.credit))
        context = Context(self.model.positions, prompt, CODEBOOKS)
        voice = Voice(prefix=prefix_of_size(prompt) if prompt else None)
        consumer = Consumer(Speaker(slot, voice, seed, outlet, context), prompt)
        self.seats.sit(consumer.speaker)
        return consumer

    def steps(self, most: int = MANY) -> int:
        """Until there is nothing to do; how many did something."""
        done = 0
        while self.ticker.step():
            done += 1
            assert done < most, "it never rests"
        return done

    def drain(self, consumers: Sequence[Consumer]) -> None:
        for _ in range(MANY):
            taken = sum([consumer.take() for consumer in consumers])
            if not self.steps() and not taken:
                return
        raise AssertionError("somebody speaks for ever")


def close(hand: Hand, consumer: Consumer) -> None:
    consumer.outlet.close()
    hand.seats.leave(consumer.speaker)


def sounds(consumer: Consumer, seed: int = 7) -> list[list[float]]:
    prompt = prefix_of_size(consumer.prompt).items
    return expected(consumer.asked, seed=seed, prompt=prompt)


# --- one slot ---


def test_texts_are_read_after_each_other_and_never_twice() -> None:
    hand = Hand(FakeCsmModel())
    consumer = hand.open(prompt=20)
    for text in ("hello", "how are you"):
        consumer.say(text)
        hand.drain([consumer])
    assert consumer.heard == sounds(consumer)
    assert hand.model.rows[0].read[:20] == prefix_of_size(20).items
    # Two texts with two marks each, one end mark between; the last position of a text is ticked.
    assert hand.counters.positions_read == (5 + 1) + (1 + 11 + 1)


def test_a_text_is_one_reading_with_the_mark_before_it() -> None:
    hand = Hand(FakeCsmModel(), budget=256)
    consumer = hand.open()
    for text in ("hello", "how are you"):
        consumer.say(text)
        hand.drain([consumer])
    assert hand.model.count("prefill") == 2


def test_at_its_credit_a_slot_costs_nothing() -> None:
    hand = Hand(FakeCsmModel())
    consumer = hand.open()
    consumer.say("a text that goes on for a while")
    hand.steps()
    drawn = len(hand.model.calls)
    assert consumer.outlet.undelivered == low_water(CREDIT) + 1 <= CREDIT
    assert not any(hand.ticker.step() for _ in range(50))
    assert len(hand.model.calls) == drawn
    hand.drain([consumer])
    assert consumer.heard == sounds(consumer)


def test_text_without_anything_to_say_asks_nothing_of_the_model() -> None:
    hand = Hand(FakeCsmModel())
    consumer = hand.open()
    hand.steps()
    calls = len(hand.model.calls)
    consumer.say(" ... ")
    hand.drain([consumer])
    assert consumer.outlet.ready
    assert len(hand.model.calls) == calls


def test_a_text_without_an_end_is_cut_and_the_next_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hand = Hand(FakeCsmModel(positions=2000, ends=lambda text: None if text == "lost" else 4))
    consumer = hand.open()
    with caplog.at_level(logging.WARNING):
        consumer.say("lost")
        hand.drain([consumer])
    assert len(consumer.heard[0]) == Pace().most("lost")
    assert hand.counters.cut == 1
    assert "cut" in caplog.text
    assert "lost" not in str([vars(record) for record in caplog.records])
    consumer.say("found")
    hand.drain([consumer])
    assert len(consumer.heard[1]) == 4
    read = hand.model.rows[0].read
    last = read.index("begin 0", 1)
    assert read[last - 1] == "frame 0 0 0 0"
    assert read[last - 2].startswith("frame ")
    assert read[last - 2] != "frame 0 0 0 0"
    # Begin, four letters, end; the frames; the end mark.
    assert last == 6 + len(consumer.heard[0]) + 1


def test_without_room_the_prompt_and_the_last_texts_are_read_again() -> None:
    hand = Hand(FakeCsmModel(positions=400))
    consumer = hand.open(prompt=50)
    spoken: dict[str, list[str]] = {}
    for number in range(12):
        text = f"text number {number}"
        consumer.say(text)
        hand.drain([consumer])
        assert len(consumer.heard[-1]) == len(text)
        spoken[text] = hand.model.rows[0].read[-len(text) :]
    read = hand.model.rows[0].read
    assert read[:50] == prefix_of_size(50).items
    texts = [item[4:] for item in read if item.startswith("end ")]
    assert texts == [f"text number {n}" for n in range(12 - len(texts), 12)]
    assert 2 <= len(texts) < 12
    for text in texts:
        first = read.index(f"end {text}") + 1
        assert read[first : first + len(text)] == spoken[text]
    assert hand.model.count("assign") == 1


def test_what_the_positions_cannot_hold_is_spoken_in_pieces() -> None:
    model = FakeCsmModel(positions=150)
    spoken: list[str] = []

    def ends(text: str) -> int:
        spoken.append(text)
        return 10

    model.ends = ends
    hand = Hand(model)
    consumer = hand.open(prompt=20)
    text = "One sentence is here. And another is there. The third one comes last."
    consumer.say(text)
    hand.drain([consumer])
    assert " ".join(spoken) == text
    assert len(spoken) > 1
    assert len(consumer.heard[0]) == 10 * len(spoken)


def test_what_was_dropped_while_it_was_read_leaves_no_trace() -> None:
    hand = Hand(FakeCsmModel(positions=1000), budget=4)
    consumer = hand.open()
    consumer.say("hello")
    hand.drain([consumer])
    consumer.outlet.ask(["a text that is too long to be read in one step"])
    hand.ticker.step()
    consumer.outlet.drop(consumer.outlet.turn)
    consumer.say("there")
    hand.drain([consumer])
    read = hand.model.rows[0].read
    assert [item for item in read if item.startswith("end ")] == ["end hello", "end there"]


def test_what_was_dropped_while_it_was_spoken_ends_after_its_last_frame() -> None:
    hand = Hand(FakeCsmModel(positions=1000))
    consumer = hand.open()
    consumer.say("hello")
    hand.steps()
    drawn = hand.model.count("tick")
    consumer.outlet.drop(consumer.outlet.turn)
    hand.steps()
    assert hand.model.count("tick") == drawn
    consumer.say("there")
    hand.drain([consumer])
    read = hand.model.rows[0].read
    last = read.index("begin 0", 1)
    assert last == 7 + drawn + 1
    assert len(consumer.heard[-1]) == 5


def test_a_frame_of_a_text_that_was_dropped_is_not_heard_in_the_next() -> None:
    """The consumer drops one text and asks for another while the tick runs."""
    model = FakeCsmModel(positions=1000)
    hand = Hand(model)
    consumer = hand.open()
    consumer.outlet.ask(["hello"])

    def drop(rows: Sequence[Row]) -> None:
        model.before_tick = lambda rows: None
        consumer.outlet.drop(consumer.outlet.turn)
        consumer.say("there")

    model.before_tick = drop
    hand.drain([consumer])
    assert len(consumer.heard[0]) == 5


def test_what_a_consumer_has_not_taken_is_not_taken_for_the_next_text() -> None:
    hand = Hand(FakeCsmModel())
    consumer = hand.open()
    consumer.say("a")
    hand.steps()
    assert consumer.outlet.ready
    with pytest.raises(FailedPrecondition):
        consumer.outlet.ask(["b"])
    consumer.take()
    consumer.say("b")
    hand.drain([consumer])
    assert consumer.heard == sounds(consumer)


# --- many slots ---


def test_frames_do_not_depend_on_who_else_speaks() -> None:
    hand = Hand(FakeCsmModel(slots=8))
    consumers = [hand.open(slot, seed=slot, prompt=slot) for slot in range(8)]
    for slot, consumer in enumerate(consumers):
        consumer.say("some text " * (slot + 1))
    hand.drain(consumers)
    for slot, consumer in enumerate(consumers):
        assert consumer.heard == sounds(consumer, seed=slot)
    assert hand.counters.frames / hand.counters.ticks > 2


@settings(deadline=None)
@given(st.integers(0, 7), st.integers(1, 8), st.integers(1, 6), st.booleans())
def test_who_joins_is_heard_after_the_step_that_is_running_and_one_of_his_own(
    others: int, most: int, steps: int, again: bool
) -> None:
    """However many speak, as fast as they are given frames, and however few fit into a tick."""
    hand = Hand(FakeCsmModel(slots=8, positions=4096, ends=lambda text: MANY), budget=256)
    hand.ticker._most_rows = most
    crowd = [hand.open(slot) for slot in range(others)]
    joins = hand.open(7)
    if again:
        joins.say("before")
        hand.ticker.step()
        joins.outlet.drop(joins.outlet.turn)
    for consumer in crowd:
        consumer.say("a text that goes on")
    for _ in range(steps + others):
        hand.ticker.step()
        for consumer in crowd:
            consumer.take()
    joins.say("hello")
    hand.ticker.step()
    assert joins.outlet.undelivered == 1


@pytest.mark.parametrize("how", ["close", "drop"])
def test_who_goes_in_the_middle_of_a_step_takes_no_more_part_in_it(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FakeCsmModel()
    hand = Hand(model, budget=256)
    speaks, reads, goes = (hand.open(slot) for slot in (0, 1, 2))
    speaks.say("hello")
    hand.steps()
    speaks.take()
    drawn = model.count("tick", 0)
    reads.say("some text")
    goes.say("a longer text")
    prefill = model.prefill

    def leave(slot: int, position: int, embeddings: Embeddings) -> None:
        prefill(slot, position, embeddings)
        for consumer in (speaks, goes):
            if how == "close":
                consumer.outlet.close()
            else:
                consumer.outlet.drop(consumer.outlet.turn)

    monkeypatch.setattr(model, "prefill", leave)
    hand.ticker.step()
    assert model.count("prefill", 1) == 1
    assert model.count("prefill", 2) == 0
    assert model.count("tick", 0) == drawn


def test_a_tick_that_fails_is_made_again_in_halves() -> None:
    model = FakeCsmModel(slots=8)

    def too_many(rows: Sequence[Row]) -> None:
        if len(rows) > 4:
            raise MemoryError("out of memory")

    model.before_tick = too_many
    hand = Hand(model)
    consumers = [hand.open(slot) for slot in range(8)]
    for consumer in consumers:
        consumer.say("hello")
    hand.drain(consumers)
    assert all(consumer.heard == sounds(consumer) for consumer in consumers)
    assert [len(batch) > 4 for batch in model.batches()].count(True) == 1
    assert hand.counters.failed == 0


def test_small_ticks_grow_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.tts.families.csm.ticker._TICKS_TO_RECOVER", 10)
    model = FakeCsmModel()
    hand = Hand(model, budget=256)
    failing = iter([True])

    def once(rows: Sequence[Row]) -> None:
        if next(failing, False):
            raise MemoryError

    model.before_tick = once
    consumers = [hand.open(slot) for slot in range(4)]
    for consumer in consumers:
        consumer.say("a text of some length")
    hand.drain(consumers)
    sizes = [len(batch) for batch in model.batches()]
    assert sizes[:3] == [4, 2, 2]
    assert max(sizes[3:12]) == 2
    assert max(sizes[12:]) == 4


def test_a_device_that_fails_fails_the_slots_of_the_tick_and_no_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = FakeCsmModel()
    hand = Hand(model)
    broken, later = hand.open(0), hand.open(1)
    broken.say("secret")
    model.before_tick = _raise(RuntimeError("secret"))
    hand.steps()
    with pytest.raises(Internal, match="RuntimeError") as failure:
        broken.outlet.take()
    assert "secret" not in str(failure.value) + str([vars(one) for one in caplog.records])
    model.before_tick = lambda rows: None
    later.say("hello")
    hand.drain([later])
    assert later.heard == sounds(later)
    assert hand.counters.failed == 1


def test_logits_that_are_no_numbers_end_their_slot_only() -> None:
    model = FakeCsmModel()
    model.sick = lambda row: row.slot == 1 and row.frame == 2
    hand = Hand(model)
    consumers = [hand.open(slot) for slot in range(3)]
    for consumer in consumers:
        consumer.say("hello")
    for _ in range(40):
        hand.ticker.step()
        for consumer in consumers:
            consumer.take()
    assert [consumer.heard == sounds(consumer) for consumer in consumers] == [True, False, True]
    # What was drawn before it is heard.
    assert consumers[1].heard[0] == sounds(consumers[1])[0][:2]
    with pytest.raises(Internal, match="not a number"):
        consumers[1].outlet.take()
    assert model.count("tick", 1) == 3


def test_an_error_told_twice_does_not_grow() -> None:
    """An exception that is raised again carries both tracebacks, with all their locals."""
    model = FakeCsmModel()
    hand = Hand(model)
    consumer = hand.open()
    consumer.say("hello")
    model.before_tick = _raise(RuntimeError())
    hand.steps()
    depths = []
    for _ in range(3):
        with pytest.raises(Internal) as told:
            consumer.outlet.take()
        depths.append(len(told.traceback))
    assert len(set(depths)) == 1


@pytest.mark.parametrize("method", ["assign", "embed_text", "prefill", "set_input", "join"])
def test_what_one_slot_breaks_is_its_own(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeCsmModel()
    hand = Hand(model)
    well = hand.open(1)
    well.say("hello")
    hand.drain([well])
    broken = hand.open(0)
    if method == "join":
        broken.say("hello")
        hand.drain([broken])
    broken.say("again")
    monkeypatch.setattr(model, method, _raise(Unavailable("the device is gone")))
    hand.steps()
    with pytest.raises(Unavailable, match="the device is gone"):
        broken.outlet.take()
    monkeypatch.undo()
    well.say("how are you")
    hand.drain([well])
    assert well.heard == sounds(well)


def test_a_slot_that_was_closed_is_its_next_owners_alone() -> None:
    hand = Hand(FakeCsmModel(slots=1))
    first = hand.open(seed=1)
    first.say("a text that is not heard to its end")
    hand.steps()
    close(hand, first)
    second = hand.open(seed=2, prompt=5)
    second.say("hello")
    hand.drain([second])
    assert second.heard == sounds(second, seed=2)
    assert first.outlet.take() is None


def _raise(error: Exception):  # type: ignore[no-untyped-def]
    def fail(*args: object) -> None:
        raise error

    return fail


# --- whatever happens ---

_slots = st.integers(0, 3)
_actions = st.one_of(
    st.tuples(st.just("say"), _slots, st.text("abc .", max_size=40)),
    st.tuples(st.just("take"), _slots, st.integers(1, 4)),
    st.tuples(st.just("step"), _slots, st.integers(1, 6)),
    st.tuples(st.just("drop"), _slots, st.none()),
    st.tuples(st.just("close"), _slots, st.none()),
)


class Watch:
    """Looks at every tick: nobody draws without credit, or for nobody."""

    def __init__(self, hand: Hand) -> None:
        self.hand = hand
        self.consumers = [hand.open(slot, seed=slot, prompt=slot) for slot in range(4)]
        hand.model.before_tick = self.tick

    def tick(self, rows: Sequence[Row]) -> None:
        for row in rows:
            outlet = self.consumers[row.slot].outlet
            assert outlet.undelivered < self.hand.credit
            assert not outlet.closed
            assert not outlet.ready

    def step(self) -> None:
        calls = len(self.hand.model.calls)
        self.hand.ticker.step()
        made = self.hand.model.calls[calls:]
        read = sum(size for call in made if call.kind == "prefill" for _, size in call.slots)
        assert read <= BUDGET
        assert sum(call.kind == "tick" for call in made) <= 1

    def do(self, what: str, slot: int, argument: object) -> None:
        consumer = self.consumers[slot]
        if what == "say" and not consumer.speaks:
            consumer.say(str(argument))
        elif what == "take" and consumer.asked:
            consumer.take(int(str(argument)))
        elif what == "step":
            for _ in range(int(str(argument))):
                self.step()
        elif what == "drop" and consumer.speaks:
            consumer.outlet.drop(consumer.outlet.turn)
            consumer.dropped = True
        elif what == "close":
            close(self.hand, consumer)
            self.consumers[slot] = self.hand.open(slot, seed=slot, prompt=slot)


@settings(deadline=None)
@given(st.lists(_actions, max_size=60), st.integers(1, 4))
def test_credit_order_and_sound_hold_whatever_consumers_do(
    actions: list[tuple[str, int, object]], credit: int
) -> None:
    hand = Hand(FakeCsmModel(positions=4096, max_prefill=7), credit=credit)
    watch = Watch(hand)
    for action in actions:
        watch.do(*action)
    hand.drain(watch.consumers)
    for slot, consumer in enumerate(watch.consumers):
        assert not consumer.speaks, "it starves"
        if not consumer.dropped:
            spoken = [text for text in consumer.asked if text.strip(" .")]
            heard = [frames for frames in consumer.heard if frames]
            prompt = prefix_of_size(slot).items
            assert heard == expected(spoken, seed=slot, prompt=prompt)
