"""The duplex machine: named paths by table, and every path by property."""

from __future__ import annotations

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from src.orchestrator.duplex import step
from src.orchestrator.duplex_state import (
    Act,
    Do,
    DuplexState,
    Event,
    Finished,
    Judged,
    Phase,
    Presence,
    Ready,
    Say,
    Typed,
    User,
    Voice,
    Words,
)
from src.orchestrator.outbox import Outbox
from src.orchestrator.phrases import joined, same_words
from src.orchestrator.ports import SpeechFrame
from src.orchestrator.vad import VadPhase

EDGE, CONFIRMED, REJECTED = (
    Voice(VadPhase.EDGE),
    Voice(VadPhase.CONFIRMED),
    Voice(VadPhase.REJECTED),
)
QUIET, AGAIN, ENDED = (
    Voice(VadPhase.QUIET),
    Voice(VadPhase.VOICED_AGAIN),
    Voice(VadPhase.ENDED),
)


def run(*events: Event, state: DuplexState | None = None) -> tuple[DuplexState, list[str]]:
    """The state at the end, and every action on the way as `act[:reply][=text]`."""
    state = state or DuplexState()
    told: list[str] = []
    for event in events:
        state, actions = step(state, event)
        told += [
            do.act.value
            + (f":{do.reply_id}" if do.reply_id else "")
            + (f"={do.text}" if do.text else "")
            for do in actions
        ]
    return state, told


def speaking() -> DuplexState:
    state, _ = run(Typed("hi"), Ready("u1"))
    assert state.phase is Phase.SPEAKING
    return state


def barged_in() -> DuplexState:
    state, _ = run(EDGE, CONFIRMED, state=speaking())
    assert state.phase is Phase.BARGED_IN
    return state


def test_a_turn_without_speculation() -> None:
    state, told = run(EDGE, CONFIRMED, QUIET, ENDED, Words("hello", True), Ready("u1"))
    assert told == ["begin_turn", "speculate", "finish_turn", "reply:u1=hello", "play:u1"]
    assert (state.mode, state.gate, state.turn_id) == ("speaking", "u1", "t1")


def test_a_draft_that_was_right_plays_as_soon_as_the_turn_is_over() -> None:
    state, told = run(EDGE, QUIET, Words("Hello", False), Ready("u1"))
    assert told[2:] == ["draft:u1=Hello"]
    assert state.gate == ""
    state, told = run(ENDED, Words("hello.", True), state=state)
    assert told == ["finish_turn", "promote:u1=hello.", "play:u1"]
    assert state.gate == "u1"


def test_a_draft_that_was_wrong_is_never_heard() -> None:
    state, told = run(EDGE, QUIET, Words("hello", False), Ready("u1"), ENDED, Words("yellow", True))
    assert told[-2:] == ["stop:u1", "reply:u2=yellow"]
    assert state.gate == ""


def test_a_draft_ends_when_the_user_goes_on() -> None:
    state, told = run(EDGE, QUIET, Words("hello", False), Ready("u1"), AGAIN)
    assert told[-2:] == ["stop:u1", "revoke"]
    assert (state.phase, state.user) == (Phase.IDLE, User.TALKING)


def test_going_on_before_the_answer_joins_the_turn() -> None:
    state, _ = run(EDGE, QUIET, ENDED, Words("tell me", True))
    assert state.phase is Phase.PREPARING
    state, told = run(EDGE, Ready("u1"), CONFIRMED, QUIET, ENDED, Words("more", True), state=state)
    assert told == ["begin_turn", "stop:u1", "speculate", "finish_turn", "reply:u2=tell me more"]
    assert state.turn_id == "t1"


def test_a_noise_before_the_answer_only_delays_it() -> None:
    state, _ = run(EDGE, QUIET, ENDED, Words("tell me", True))
    state, told = run(EDGE, Ready("u1"), state=state)
    assert (told, state.gate) == (["begin_turn"], "")
    state, told = run(REJECTED, state=state)
    assert (told, state.gate) == (["drop_turn", "play:u1"], "u1")


def test_an_edge_while_speaking_closes_the_gate_first() -> None:
    state, told = run(EDGE, state=speaking())
    assert told == ["shut:u1", "pause:u1", "begin_turn"]
    assert (state.mode, state.gate) == ("barged_in", "")


def test_a_false_alarm_goes_on() -> None:
    state, told = run(REJECTED, Judged(False), state=barged_in())
    assert told == ["drop_turn", "resume:u1", "play:u1"]
    assert (state.gate, state.user) == ("u1", User.SILENT)


def test_a_real_one_cuts_stops_and_goes_on_listening() -> None:
    state, told = run(Judged(True), QUIET, ENDED, Words("stop", True), state=barged_in())
    assert told == ["cut:u1", "stop:u1", "speculate", "finish_turn", "reply:u2=stop"]
    assert state.turn_id == "t2"


def test_a_real_one_whose_words_are_known_is_answered_at_once() -> None:
    state, told = run(QUIET, ENDED, Words("no", True), Judged(True), state=barged_in())
    assert told[2:] == ["cut:u1", "stop:u1", "reply:u2=no"]
    assert state.user is User.SILENT


def test_a_real_one_in_its_pause_is_drafted() -> None:
    _, told = run(QUIET, Words("no", False), Judged(True), state=barged_in())
    assert told[1:] == ["cut:u1", "stop:u1", "draft:u2=no"]


def test_an_answer_nobody_heard_gives_its_question_back() -> None:
    state, told = run(
        Judged(True, unheard=True), QUIET, ENDED, Words("there", True), state=barged_in()
    )
    assert told == ["stop:u1", "speculate", "finish_turn", "reply:u2=hi there"]
    assert state.turn_id == "t2"


def test_a_back_channel_leaves_no_turn() -> None:
    state, told = run(
        QUIET, Judged(False), ENDED, Words("yeah", True, back_channel=True), state=barged_in()
    )
    assert told == ["speculate", "resume:u1", "play:u1", "finish_turn"]
    assert (state.gate, state.user) == ("u1", User.SILENT)


def test_words_that_come_after_the_verdict_can_overrule_it() -> None:
    _, told = run(QUIET, Judged(False), ENDED, Words("stop", True), state=barged_in())
    assert told[-4:] == ["shut:u1", "cut:u1", "stop:u1", "reply:u2=stop"]


def test_going_on_after_a_false_alarm_is_a_new_alarm_with_the_same_turn() -> None:
    state, told = run(QUIET, Judged(False), AGAIN, state=barged_in())
    assert told[-3:] == ["shut:u1", "pause:u1", "revoke"]
    assert state.mode == "barged_in"


def test_typing_takes_the_turn_in_every_phase() -> None:
    assert run(Typed("x"), state=speaking())[1] == ["shut:u1", "cut:u1", "stop:u1", "reply:u2=x"]
    assert run(Typed("x"), state=barged_in())[1] == ["cut:u1", "stop:u1", "drop_turn", "reply:u2=x"]
    preparing, _ = run(Typed("a"))
    assert run(Typed("b"), state=preparing)[1] == ["stop:u1", "reply:u2=a b"]
    waiting, _ = run(EDGE, QUIET, ENDED)
    assert run(Typed("x"), state=waiting)[1] == ["forget_words", "reply:u1=x"]


def test_the_agents_own_words_wait_for_their_turn_and_die_with_an_interruption() -> None:
    state, told = run(Say("one"), Say("two"), Ready("u1"), Finished("u1"))
    assert told == ["say:u1=one", "play:u1", "complete:u1", "say:u2=two"]
    state, _ = run(Say("three"), Ready("u2"), EDGE, Judged(True), REJECTED, state=state)
    assert (state.phase, state.queued) == (Phase.IDLE, ())


def test_a_reply_that_fails_is_cut_where_it_was() -> None:
    assert run(Finished("u1", ok=False), state=speaking())[1] == ["cut:u1"]
    state, told = run(Finished("u1", ok=False), state=barged_in())
    assert told == ["cut:u1", "stop:u1"]
    assert state.user is User.TALKING


def test_a_draft_that_fails_is_tried_again_with_the_final_words() -> None:
    _, told = run(
        EDGE, QUIET, Words("hello", False), Finished("u1", ok=False), ENDED, Words("hello", True)
    )
    assert told[2:] == ["draft:u1=hello", "stop:u1", "finish_turn", "reply:u2=hello"]


def test_nothing_is_said_to_nobody() -> None:
    state, told = run(Presence(False), Presence(False), state=speaking())
    assert (told, state.gate) == (["shut:u1", "pause:u1"], "")
    assert run(Presence(True), state=state)[1] == ["resume:u1", "play:u1"]
    away, told = run(Presence(False), Typed("hi"), Ready("u1"))
    assert (told, away.mode) == (["reply:u1=hi"], "listening")
    assert run(Presence(True), state=away)[1] == ["play:u1"]


def test_an_alarm_while_the_user_is_away_stays_silent() -> None:
    state, told = run(Presence(False), EDGE, REJECTED, Judged(False), state=speaking())
    assert (told, state.gate) == (["shut:u1", "pause:u1", "begin_turn", "drop_turn"], "")
    assert run(Presence(True), state=state)[1] == ["resume:u1", "play:u1"]


def test_late_news_of_an_old_reply_is_ignored() -> None:
    state = speaking()
    assert run(Ready("u0"), Finished("u0"), Finished(""), state=state) == (state, [])


def test_same_words() -> None:
    assert same_words("What's the time?", "what’s the time")
    assert not same_words("what is the time", "what is time")
    assert joined(" a ", "", "b") == "a b"


# --- every path ---

EVENTS = st.one_of(
    st.sampled_from([EDGE, CONFIRMED, REJECTED, QUIET, AGAIN, ENDED]),
    st.builds(Judged, st.booleans(), st.booleans()),
    st.builds(Words, st.sampled_from(["", "stop", "what now"]), st.booleans(), st.just(False)),
    st.builds(Words, st.just("yeah"), st.booleans(), st.just(True)),
    st.builds(Typed, st.just("typed")),
    st.builds(Say, st.just("said")),
    st.builds(Presence, st.booleans()),
)
_LEGAL_USERS = {
    Phase.IDLE: set(User),
    Phase.DRAFTING: {User.PAUSING, User.ENDED},
    Phase.PREPARING: {User.SILENT, User.TALKING, User.PAUSING},
    Phase.SPEAKING: set(User),
    Phase.BARGED_IN: set(User),
}


class AnyConversation(RuleBasedStateMachine):
    """Any event at any time, beside a worker, a listener and their frames."""

    def __init__(self) -> None:
        super().__init__()
        self.state = DuplexState()
        self.alive = ""
        self.over = False
        self.paused = False
        self.turn_open = False
        self.outbox = Outbox("", 40)
        self.on_the_way: list[int] = []
        self.ears: list[tuple[str, int]] = []
        self.replies: set[str] = set()

    @rule(event=EVENTS)
    def something_happens(self, event: Event) -> None:
        self.apply(event)

    @precondition(lambda self: self.alive and not self.outbox.full)
    @rule(count=st.integers(1, 4))
    def the_worker_speaks(self, count: int) -> None:
        for _ in range(min(count, 40 - self.outbox.kept)):
            seq = self.outbox.produced
            assert self.outbox.push(SpeechFrame(self.alive, seq, seq * 20, b""))
        self.apply(Ready(self.alive))
        self.pump()

    @precondition(lambda self: self.on_the_way)
    @rule(count=st.integers(1, 6))
    def the_listener_hears(self, count: int) -> None:
        for seq in self.on_the_way[:count]:
            self.ears.append((self.outbox.utterance_id, seq))
            self.outbox.heard(seq)
        del self.on_the_way[:count]

    @precondition(lambda self: self.alive)
    @rule(ok=st.booleans())
    def the_reply_is_over(self, ok: bool) -> None:
        if not ok or (self.state.gate and self.outbox.all_heard):
            self.apply(Finished(self.alive, ok))

    def apply(self, event: Event) -> None:
        before = self.state
        self.state, actions = step(before, event)
        # A reply that failed is over by itself; one that is cut by the user is stopped next.
        self.over = isinstance(event, Finished) and before.phase is not Phase.BARGED_IN
        for do in actions:
            self.obey(do)
        left_speaking = before.gate and self.state.gate != before.gate
        if left_speaking and not isinstance(event, Finished):
            assert actions[0] == Do(Act.SHUT, before.reply_id), "silence comes first"
        assert self.alive == self.state.reply_id
        self.pump()

    def obey(self, do: Do) -> None:
        if do.reply_id and do.act not in (Act.DRAFT, Act.REPLY, Act.SAY):
            assert do.reply_id == self.alive
        match do.act:
            case Act.DRAFT | Act.REPLY | Act.SAY:
                assert not self.alive, "one reply at a time"
                assert do.reply_id not in self.replies
                assert do.text
                self.replies.add(do.reply_id)
                self.alive, self.paused = do.reply_id, False
                self.outbox, self.on_the_way = Outbox(do.reply_id, 40), []
            case Act.SHUT:
                self.outbox.rewind()
                self.on_the_way = []
            case Act.PAUSE:
                assert not self.paused
                self.paused = True
            case Act.RESUME:
                assert self.paused
                self.paused = False
            case Act.STOP | Act.COMPLETE:
                self.alive, self.paused = "", False
            case Act.CUT if self.over:
                self.alive, self.paused = "", False
            case Act.BEGIN_TURN:
                assert not self.turn_open
                self.turn_open = True
            case Act.FINISH_TURN | Act.DROP_TURN:
                assert self.turn_open
                self.turn_open = False
            case Act.SPECULATE | Act.REVOKE:
                assert self.turn_open
            case _:
                pass

    def pump(self) -> None:
        while self.state.gate and self.outbox.peek() is not None:
            assert self.state.gate == self.outbox.utterance_id
            self.on_the_way.append(self.outbox.sent().seq)

    @invariant()
    def the_state_is_legal(self) -> None:
        state = self.state
        assert state.user in _LEGAL_USERS[state.phase]
        speaking = state.phase is Phase.SPEAKING
        assert bool(state.gate) == (speaking and not state.away)
        assert bool(state.reply_id) == (state.phase is not Phase.IDLE)
        assert self.paused == (state.phase is Phase.BARGED_IN or (speaking and state.away))
        assert self.turn_open == (state.user in (User.TALKING, User.PAUSING, User.AGAIN))
        assert state.phase is not Phase.IDLE or state.user is not User.SILENT or not state.queued

    @invariant()
    def nothing_is_lost_repeated_or_mixed(self) -> None:
        assert self.outbox.heard_frames + self.outbox.kept == self.outbox.produced
        for reply_id in self.replies:
            heard = [seq for name, seq in self.ears if name == reply_id]
            assert heard == list(range(len(heard)))


TestAnyConversation = AnyConversation.TestCase
TestAnyConversation.settings = hypothesis_settings(
    max_examples=150, stateful_step_count=60, deadline=None
)
