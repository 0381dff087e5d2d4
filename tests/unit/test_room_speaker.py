"""What leaves for a room and when, and what was heard of it: tables, and any order of events."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from src.audio.pcm import FRAME_BYTES, FRAME_MS, FRAME_SAMPLES, Int16, from_bytes
from src.common.tasks import cancel_and_wait
from src.orchestrator.ports import SpeechFrame
from src.orchestrator.rooms.playhead import FADE_SAMPLES, MAX_WAITING_FRAMES, TICK_MS, Playhead
from src.orchestrator.rooms.speaker import RoomSpeaker
from src.rpc.errors import InvalidArgument
from tests.virtual_time import LoopClock, run_virtual

LEAD_MS = 20
LOUD = 8000


def frame(seq: int, utterance_id: str = "u1", level: int = LOUD) -> SpeechFrame:
    pcm = np.full(FRAME_SAMPLES, level, dtype=np.int16).tobytes()
    return SpeechFrame(utterance_id, seq, seq * FRAME_MS, pcm)


def filled(count: int, utterance_id: str = "u1", lead_ms: int = LEAD_MS) -> Playhead:
    playhead = Playhead(lead_ms)
    put(playhead, count, utterance_id)
    return playhead


def put(playhead: Playhead, count: int, utterance_id: str = "u1", seq: int = 0) -> None:
    playhead.begin(utterance_id, seq)
    for place in range(seq, seq + count):
        assert playhead.put(frame(place, utterance_id))


def pumped(playhead: Playhead, now_ms: float) -> int:
    """How many frames are due."""
    count = 0
    while playhead.pop(now_ms) is not None:
        count += 1
    return count


class TestPace:
    @pytest.mark.parametrize(("lead_ms", "at_once"), [(10, 1), (20, 2), (40, 3), (100, 6)])
    def test_a_first_frame_leaves_at_once_and_the_lead_with_it(
        self, lead_ms: int, at_once: int
    ) -> None:
        playhead = filled(10, lead_ms=lead_ms)
        assert pumped(playhead, 1000) == at_once
        assert playhead.next_ms() == 1000 + at_once * FRAME_MS - lead_ms

    def test_then_one_frame_every_20_ms(self) -> None:
        playhead = filled(6)
        assert [pumped(playhead, 1000 + ms) for ms in (0, 10, 20, 40, 60, 80, 100)] == [
            2, 0, 1, 1, 1, 1, 0,
        ]  # fmt: skip

    def test_a_stall_is_not_made_up_for(self) -> None:
        playhead = filled(20)
        assert pumped(playhead, 1000) == 2
        assert pumped(playhead, 1500) == 2
        assert playhead.next_ms() == 1520

    def test_a_delay_within_the_lead_is(self) -> None:
        playhead = filled(20, lead_ms=60)
        assert pumped(playhead, 1000) == 4
        assert pumped(playhead, 1055) == 2
        assert playhead.next_ms() == 1060

    def test_after_a_pause_nothing_waits(self) -> None:
        playhead = filled(2)
        assert pumped(playhead, 1000) == 2
        assert pumped(playhead, 1013) == 0
        put(playhead, 1, seq=2)
        assert pumped(playhead, 3333) == 1
        assert playhead.heard_seq("u1", 3352) == 1
        assert playhead.heard_seq("u1", 3353) == 2

    def test_idle_it_asks_for_nothing(self) -> None:
        playhead = filled(1)
        pumped(playhead, 1000)
        assert playhead.next_ms() == 1020
        playhead.heard_seq("u1", 1020)
        assert playhead.next_ms() is None


class TestWhatIsTaken:
    @pytest.mark.parametrize("taken", ["another's", "nobody's", "after its end", "after its flush"])
    def test_frames_of_an_utterance_that_is_not_open_are_dropped(self, taken: str) -> None:
        playhead = Playhead(LEAD_MS)
        if taken != "nobody's":
            playhead.begin("u0" if taken == "another's" else "u1", 0)
        if taken == "after its end":
            playhead.end("u1")
        if taken == "after its flush":
            playhead.flush("u1", 0)
        assert not playhead.put(frame(0))
        assert (pumped(playhead, 0), playhead.dropped) == (0, 0)

    def test_the_end_of_another_one_means_nothing(self) -> None:
        playhead = Playhead(LEAD_MS)
        playhead.begin("u1", 0)
        playhead.end("u0")
        assert playhead.put(frame(0))

    def test_beyond_two_seconds_the_newest_is_dropped_and_counted(self) -> None:
        playhead = filled(MAX_WAITING_FRAMES)
        assert not playhead.put(frame(MAX_WAITING_FRAMES))
        assert playhead.dropped == 1
        assert pumped(playhead, 0) == 2

    @pytest.mark.parametrize("pcm", [b"", b"opus", bytes(FRAME_BYTES - 2), bytes(2 * FRAME_BYTES)])
    def test_what_is_not_20_ms_of_pcm_is_refused_with_a_reason(self, pcm: bytes) -> None:
        playhead = Playhead(LEAD_MS)
        playhead.begin("u1", 0)
        with pytest.raises(InvalidArgument, match="pcm_s16le"):
            playhead.put(SpeechFrame("u1", 0, 0, pcm))


class TestHeard:
    def test_a_frame_is_heard_when_its_time_is_over(self) -> None:
        playhead = filled(5)
        pumped(playhead, 1000)
        assert [playhead.heard_seq("u1", ms) for ms in (1000, 1019, 1020, 1039, 1040)] == [
            -1, -1, 0, 0, 1,
        ]  # fmt: skip

    def test_what_waits_here_is_not_heard(self) -> None:
        playhead = filled(5)
        pumped(playhead, 1000)
        assert playhead.heard_seq("u1", 9000) == 1

    def test_frames_begin_where_the_session_says(self) -> None:
        playhead = Playhead(LEAD_MS)
        put(playhead, 3, seq=40)
        pumped(playhead, 1000)
        assert playhead.heard_seq("u1", 1020) == 40

    def test_it_never_goes_back(self) -> None:
        playhead = filled(3)
        pumped(playhead, 0)
        pumped(playhead, 20)
        assert playhead.heard_seq("u1", 60) == 2
        put(playhead, 1, seq=1)
        pumped(playhead, 100)
        assert playhead.heard_seq("u1", 200) == 2

    def test_the_last_sixteen_utterances_are_remembered(self) -> None:
        playhead = Playhead(LEAD_MS)
        for place in range(17):
            put(playhead, 1, f"u{place}")
            pumped(playhead, place * 100)
        assert playhead.heard_seq("u16", 9000) == 0
        assert playhead.heard_seq("u1", 9000) == 0
        assert playhead.heard_seq("u0", 9000) == -1
        assert playhead.heard_seq("never", 9000) == -1

    def test_two_utterances_back_to_back_play_without_a_gap(self) -> None:
        playhead = filled(2)
        playhead.end("u1")
        put(playhead, 2, "u2")
        assert [pumped(playhead, ms) for ms in (1000, 1020, 1040)] == [2, 1, 1]
        assert playhead.heard_seq("u2", 1060) == 0

    def test_reports_come_every_40_ms_and_at_the_end(self) -> None:
        playhead = filled(5)
        reports = []
        for ms in range(1000, 1200, 20):
            pumped(playhead, ms)
            reports += [(ms - 1000, *report) for report in playhead.reports(ms)]
        assert reports == [(40, "u1", 1), (80, "u1", 3), (100, "u1", 4)]

    def test_the_last_frame_is_reported_though_another_utterance_follows(self) -> None:
        playhead = filled(3)
        put(playhead, 2, "u2")
        reports = []
        for ms in range(1000, 1200, 20):
            pumped(playhead, ms)
            reports += playhead.reports(ms)
        assert reports == [("u1", 1), ("u1", 2), ("u2", 1)]


class TestFlush:
    def test_it_says_what_was_heard_and_takes_back_the_rest(self) -> None:
        playhead = filled(10)
        for ms in (1000, 1020, 1040):
            pumped(playhead, ms)
        cut = playhead.flush("u1", 1050)
        assert (cut.seq, cut.clear) == (1, True)
        assert pumped(playhead, 1050) == 0
        assert playhead.heard_seq("u1", 9000) == 1
        assert playhead.reports(9000) == []

    def test_a_second_one_changes_nothing(self) -> None:
        playhead = filled(10)
        pumped(playhead, 1000)
        first = playhead.flush("u1", 1025)
        second = playhead.flush("u1", 1030)
        assert (first.seq, first.clear) == (0, True)
        assert (second.seq, second.clear, second.fade) == (0, False, b"")

    def test_what_was_heard_to_its_end_leaves_nothing_to_clear(self) -> None:
        playhead = filled(2)
        pumped(playhead, 1000)
        cut = playhead.flush("u1", 1040)
        assert (cut.seq, cut.clear, cut.fade) == (1, False, b"")

    def test_before_the_first_frame_there_is_nothing_to_clear(self) -> None:
        playhead = filled(2)
        cut = playhead.flush("u1", 1000)
        assert (cut.seq, cut.clear) == (-1, False)
        assert pumped(playhead, 1000) == 0

    def test_of_an_unknown_utterance_it_is_nothing(self) -> None:
        playhead = filled(2)
        assert (playhead.flush("u9", 0).seq, playhead.flush("u9", 0).clear) == (-1, False)
        assert pumped(playhead, 0) == 2

    def test_a_resume_begins_with_the_frame_that_was_cut_and_at_once(self) -> None:
        playhead = filled(10)
        pumped(playhead, 1000)
        assert playhead.flush("u1", 1030).seq == 0
        put(playhead, 2, seq=1)
        # 10 ms of fade are before it.
        assert pumped(playhead, 1030) == 1
        assert playhead.heard_seq("u1", 1059) == 0
        assert playhead.heard_seq("u1", 1060) == 1

    def test_what_follows_in_the_source_is_played_again(self) -> None:
        playhead = filled(1, lead_ms=60)
        playhead.end("u1")
        put(playhead, 5, "u2")
        assert pumped(playhead, 1000) == 4
        assert playhead.flush("u1", 1005).clear
        assert pumped(playhead, 1005) == 3
        assert playhead.heard_seq("u2", 1005 + TICK_MS + 3 * FRAME_MS) == 2

    def test_what_came_before_goes_with_it(self) -> None:
        playhead = filled(2, lead_ms=60)
        playhead.end("u1")
        put(playhead, 5, "u2")
        pumped(playhead, 1000)
        assert playhead.flush("u2", 1025).seq == -1
        assert playhead.heard_seq("u1", 9000) == 0
        assert playhead.next_ms() is None


class TestFades:
    def steps(self, count: int) -> Playhead:
        """Every 10 ms has its own level, so that a fade says where it was taken from."""
        playhead = Playhead(LEAD_MS)
        playhead.begin("u1", 0)
        for seq in range(count):
            ticks = np.repeat(np.array([2 * seq + 1, 2 * seq + 2]) * 1000, FRAME_SAMPLES // 2)
            pcm = ticks.astype(np.int16).tobytes()
            assert playhead.put(SpeechFrame("u1", seq, seq * FRAME_MS, pcm))
        return playhead

    @pytest.mark.parametrize(
        ("at_ms", "next_tick"), [(1001, 1), (1009, 2), (1011, 2), (1029, 4), (1034, 4), (1038, 5)]
    )
    def test_it_goes_on_where_it_was_cut_and_falls_silent(self, at_ms: int, next_tick: int) -> None:
        playhead = self.steps(5)
        pumped(playhead, 1000)
        fade = from_bytes(playhead.flush("u1", at_ms).fade)
        assert fade.size == FRAME_SAMPLES * TICK_MS // FRAME_MS
        assert fade[0] == pytest.approx(next_tick * 1000, rel=0.01)
        assert (np.diff(fade.astype(int)) <= 0).all()
        assert not fade[FADE_SAMPLES:].any()

    def test_where_the_speech_has_run_out_there_is_nothing_to_fade(self) -> None:
        playhead = self.steps(1)
        pumped(playhead, 1000)
        cut = playhead.flush("u1", 1018)
        assert (cut.clear, cut.fade) == (True, b"")

    def test_a_resume_rises_within_5_ms_and_a_beginning_does_not(self) -> None:
        playhead = Playhead(LEAD_MS)
        put(playhead, 1)
        began = playhead.pop(0)
        put(playhead, 2, seq=7)
        resumed, after = playhead.pop(1000), playhead.pop(1000)
        assert began is not None
        assert resumed is not None
        assert after is not None
        assert from_bytes(began)[0] == LOUD
        assert abs(int(from_bytes(resumed)[0])) < 10
        assert (from_bytes(resumed)[FADE_SAMPLES:] == LOUD).all()
        assert from_bytes(after)[0] == LOUD


class Source:
    """What a room's audio source does: takes 10 ms in every 10 ms, silence when it has nothing."""

    def __init__(self) -> None:
        self.queue: list[Int16] = []
        self.played: list[Int16] = []
        self.cleared = 0

    def push(self, pcm: bytes) -> None:
        samples = from_bytes(pcm)
        self.queue += np.split(samples, samples.size // (FRAME_SAMPLES // 2))

    def clear(self) -> None:
        self.queue.clear()
        self.cleared += 1

    def tick(self) -> None:
        silence: Int16 = np.zeros(FRAME_SAMPLES // 2, dtype=np.int16)
        self.played.append(self.queue.pop(0) if self.queue else silence)

    async def run(self) -> None:
        while True:
            self.tick()
            await asyncio.sleep(TICK_MS / 1000)

    @property
    def levels(self) -> list[int]:
        """Of every 10 ms, its loudest sample."""
        return [int(np.abs(tick).max()) for tick in self.played]


@dataclass
class Room:
    """A speaker with its source and its reports, in virtual time."""

    source: Source = field(default_factory=Source)
    reports: list[tuple[str, int]] = field(default_factory=list)
    on_report: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.speaker = RoomSpeaker(
            self.source, LoopClock(), lead_ms=LEAD_MS, on_played=self.on_played
        )

    def on_played(self, utterance_id: str, seq: int) -> None:
        self.reports.append((utterance_id, seq))
        self.on_report()

    def say(self, count: int, utterance_id: str = "u1", seq: int = 0) -> None:
        self.speaker.begin(utterance_id, seq)
        for place in range(seq, seq + count):
            self.speaker.send(frame(place, utterance_id, 1000 * (place + 1)))


async def after(ms: float) -> None:
    await asyncio.sleep(ms / 1000)


def in_room(scenario: Callable[[Room], object]) -> Room:
    """The source ticks 3 ms after the speaker began."""

    async def play() -> Room:
        room = Room()
        running = asyncio.create_task(room.speaker.run())
        await after(3)
        ticking = asyncio.create_task(room.source.run())
        await after(97)
        await scenario(room)  # type: ignore[misc]
        for task in (running, ticking):
            await cancel_and_wait(task)
        return room

    return run_virtual(play())


class TestSpeaker:
    def test_speech_is_whole_and_in_order_and_idle_pushes_nothing(self) -> None:
        async def scenario(room: Room) -> None:
            room.say(5)
            room.speaker.end("u1")
            await after(500)
            room.say(2, "u2")
            await after(300)

        room = in_room(scenario)
        heard = [level for level in room.source.levels if level]
        assert heard == [1000 * (n + 1) for n in (0, 1, 2, 3, 4, 0, 1) for _ in range(2)]
        first = next(i for i, level in enumerate(room.source.levels) if level)
        assert all(room.source.levels[first : first + 10])
        assert room.reports == [("u1", 1), ("u1", 3), ("u1", 4), ("u2", 1)]
        assert room.source.cleared == 0

    def test_a_first_frame_is_with_the_source_when_the_call_returns(self) -> None:
        async def scenario(room: Room) -> None:
            room.say(1)
            assert len(room.source.queue) == 2

        in_room(scenario)

    def test_frames_that_trickle_in_just_in_time_do_not_starve_it(self) -> None:
        async def scenario(room: Room) -> None:
            room.speaker.begin("u1", 0)
            for seq in range(2):
                room.speaker.send(frame(seq))
            await after(5)
            for seq in range(2, 20):
                room.speaker.send(frame(seq))
                await after(20)

        levels = in_room(scenario).source.levels
        first = next(i for i, level in enumerate(levels) if level)
        assert all(levels[first : first + 36])

    def test_a_flush_is_heard_within_the_tick(self) -> None:
        async def scenario(room: Room) -> None:
            room.say(20)
            await after(95)
            assert room.speaker.flush("u1") == 3
            assert room.speaker.flush("u1") == 3
            count = len(room.source.played)
            await after(200)
            assert not any(room.source.levels[count + 1 :])
            assert room.speaker.heard_seq("u1") == 3

        room = in_room(scenario)
        assert room.source.cleared == 1
        assert max(seq for _, seq in room.reports) <= 3

    def test_a_stalled_loop_makes_a_pause_and_no_burst(self) -> None:
        async def scenario(room: Room) -> None:
            room.say(20)
            await after(40)
            for _ in range(30):
                room.source.tick()
            # The loop did not run for 300 ms, and its clock says so.
            asyncio.get_running_loop()._jumping.now_s += 0.3  # type: ignore[attr-defined]
            await after(0)
            assert len(room.source.queue) <= 2 * (LEAD_MS // FRAME_MS + 1)
            await after(1000)

        room = in_room(scenario)
        heard = [level for level in room.source.levels if level]
        assert heard == [1000 * (n + 1) for n in range(20) for _ in range(2)]

    def test_it_can_be_told_what_to_do_from_its_own_report(self) -> None:
        async def scenario(room: Room) -> None:
            def on_report() -> None:
                room.speaker.flush("u1")
                if len(room.reports) == 1:
                    room.say(1, "u2")

            room.on_report = on_report
            room.say(10)
            await after(500)
            assert room.speaker.heard_seq("u1") == 1
            assert room.speaker.heard_seq("u2") == 0

        in_room(scenario)


@given(
    lead_ms=st.integers(10, 100),
    late_ms=st.lists(st.integers(0, 9), min_size=30, max_size=30),
)
def test_wakeups_that_are_late_by_less_than_the_lead_never_starve_it(
    lead_ms: int, late_ms: list[int]
) -> None:
    playhead = filled(30, lead_ms=lead_ms)
    now_ms = 1000.0
    end_ms = now_ms
    for late in late_ms:
        count = pumped(playhead, now_ms)
        assert end_ms >= now_ms
        end_ms += count * FRAME_MS
        due_ms = playhead.next_ms()
        if count == 0 or due_ms is None or playhead.heard_seq("u1", now_ms) == 29:
            break
        now_ms = max(now_ms, due_ms) + late
    assert end_ms - 1000 <= 30 * FRAME_MS


class AnyOrder(RuleBasedStateMachine):
    """Sessions, sources and stalls in any order: nothing is heard that was not pushed."""

    def __init__(self) -> None:
        super().__init__()
        self.playhead = Playhead(LEAD_MS)
        self.now_ms = 0.0
        self.names = 0
        self.name = ""
        self.seq = 0
        self.pushed: dict[str, int] = {}
        self.heard: dict[str, int] = {}
        self.flushed = ""
        self.queued_ms = 0.0
        self.sent: list[SpeechFrame] = []

    @rule()
    def begin(self) -> None:
        self.names += 1
        self.name, self.seq = f"u{self.names}", 0
        self.playhead.begin(self.name, 0)

    @precondition(lambda self: self.flushed == self.name != "")
    @rule()
    def resume(self) -> None:
        self.seq = self.playhead.heard_seq(self.name, self.now_ms) + 1
        self.playhead.begin(self.name, self.seq)
        self.flushed = ""

    @precondition(lambda self: self.name not in ("", self.flushed))
    @rule(count=st.integers(1, 8), gap=st.integers(0, 2))
    def send(self, count: int, gap: int) -> None:
        self.seq += gap
        for _ in range(count):
            one = frame(self.seq, self.name, level=len(self.sent))
            if self.playhead.put(one):
                self.sent.append(one)
                self.seq += 1

    @rule(ms=st.integers(0, 45))
    def time_goes_on(self, ms: int) -> None:
        self.now_ms += ms
        self.queued_ms = max(0.0, self.queued_ms - ms)

    @rule()
    def pump(self) -> None:
        while (pcm := self.playhead.pop(self.now_ms)) is not None:
            # Its last sample says which one it is: a rise is over by then.
            one = self.sent[int(from_bytes(pcm)[-1])]
            self.pushed[one.utterance_id] = max(one.seq, self.pushed.get(one.utterance_id, -1))
            self.queued_ms += FRAME_MS

    @precondition(lambda self: self.name)
    @rule()
    def flush(self) -> None:
        cut = self.playhead.flush(self.name, self.now_ms)
        self.flushed = self.name
        if cut.clear:
            self.queued_ms = TICK_MS if cut.fade else 0.0
        again = self.playhead.flush(self.name, self.now_ms)
        assert (again.seq, again.clear) == (cut.seq, False)
        assert not self.playhead.put(frame(self.seq, self.name))

    @invariant()
    def heard_is_pushed_and_never_goes_back(self) -> None:
        for name in list(self.pushed)[-10:]:
            heard = self.playhead.heard_seq(name, self.now_ms)
            assert self.heard.get(name, -1) <= heard <= self.pushed[name]
            self.heard[name] = heard

    @invariant()
    def the_source_is_never_more_than_the_lead_and_a_frame_ahead(self) -> None:
        assert self.queued_ms <= LEAD_MS + FRAME_MS + 1

    @invariant()
    def reports_say_what_was_heard(self) -> None:
        for name, seq in self.playhead.reports(self.now_ms):
            assert seq == self.playhead.heard_seq(name, self.now_ms)


TestAnyOrder = AnyOrder.TestCase
