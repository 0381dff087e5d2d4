"""The duplex machine: pause first, judge after. Pure: `step(state, event) -> (state, actions)`.

    LISTENING                                          SPEAKING               BARGED_IN
    IDLE ─words──▶ DRAFTING ──end of turn──▶ PREPARING ──first frame──▶ SPEAKING ──edge──▶ BARGED_IN
     ▲                 │ user goes on             │ user goes on            ▲                 │
     └─────────────────┴──────────────────────────┴─────────────────────── │ ◀──── real ─────┤
                                                                            └────── false ────┘

Beside the phase stands what the user is doing (`User`). A frame may leave only in SPEAKING, so the
gate is a property of the state: it closes in the very step that leaves SPEAKING. While the user is
away (`Presence`) it stays closed, and nobody begins to speak.
"""

from __future__ import annotations

from dataclasses import replace

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
    Step,
    Typed,
    User,
    Voice,
    Words,
)
from src.orchestrator.phrases import joined, same_words
from src.orchestrator.vad import VadPhase

_OPEN_TURN = (User.TALKING, User.PAUSING)
_AWAITING_WORDS = (User.ENDED, User.AGAIN)


def step(state: DuplexState, event: Event) -> Step:
    """Total: an event that means nothing in a state changes nothing."""
    match event:
        case Voice(phase):
            after = _VOICE[phase](state)
        case Judged():
            after = _judged(state, event)
        case Words(text, final=False):
            after = _known_so_far(state, text)
        case Words():
            after = _final_words(state, event)
        case Typed(text):
            after = _typed(state, text)
        case Say(text):
            after = replace(state, queued=(*state.queued, text)), []
        case Ready(reply_id):
            after = (replace(state, ready=True) if reply_id == state.reply_id else state), []
        case Finished():
            after = _finished(state, event)
        case Presence(here):
            after = _present(state) if here else _absent(state)
    return _settle(*after)


def _settle(state: DuplexState, actions: list[Do]) -> Step:
    """What follows from the state alone, whatever led to it."""
    waiting = state.phase is Phase.PREPARING and state.user is User.SILENT
    if waiting and state.ready and not state.away:
        return replace(state, phase=Phase.SPEAKING), [*actions, Do(Act.PLAY, state.reply_id)]
    if state.phase is not Phase.IDLE:
        return state, actions
    if state.user is User.PAUSING and state.words:
        text = joined(state.carried, state.words)
        return _start(state, actions, Act.DRAFT, Phase.DRAFTING, text)
    if state.user is User.SILENT and state.carried:
        return _start(
            replace(state, carried=""), actions, Act.REPLY, Phase.PREPARING, state.carried
        )
    if state.user is User.SILENT and state.queued:
        text, *rest = state.queued
        return _start(replace(state, queued=tuple(rest)), actions, Act.SAY, Phase.PREPARING, text)
    return state, actions


def _start(state: DuplexState, actions: list[Do], act: Act, phase: Phase, text: str) -> Step:
    number = state.replies + 1
    state = replace(
        state, phase=phase, reply_id=f"u{number}", replies=number, ready=False,
        asked="" if act is Act.SAY else text,
    )  # fmt: skip
    return state, [*actions, Do(act, state.reply_id, text)]


# --- the user's voice ---


def _edge(state: DuplexState) -> Step:
    if state.user is User.PAUSING:
        return _voiced_again(state)
    state, actions = _interrupt(state)
    if state.user is User.ENDED:
        state, dropped = _drop_draft(state)
        return replace(state, user=User.AGAIN), [*actions, *dropped, Do(Act.BEGIN_TURN)]
    if state.user is User.SILENT:
        state, begun = _begin_turn(state)
        return state, actions + begun
    return state, actions


def _voiced_again(state: DuplexState) -> Step:
    if state.user is User.SILENT:
        return _edge(state)
    if state.user is not User.PAUSING:
        return state, []
    state, actions = _interrupt(state)
    state, dropped = _drop_draft(state)
    state = replace(state, user=User.TALKING, words=None)
    return state, [*actions, *dropped, Do(Act.REVOKE)]


def _interrupt(state: DuplexState) -> Step:
    if state.phase is not Phase.SPEAKING:
        return state, []
    return replace(state, phase=Phase.BARGED_IN), _silence(state)


def _begin_turn(state: DuplexState) -> Step:
    # What may go on with a turn that is not answered yet is no turn of its own.
    unanswered = state.carried or (state.phase is Phase.PREPARING and state.asked)
    turns = state.turns if unanswered else state.turns + 1
    return replace(state, user=User.TALKING, words=None, turns=turns), [Do(Act.BEGIN_TURN)]


def _drop_draft(state: DuplexState) -> Step:
    if state.phase is not Phase.DRAFTING:
        return state, []
    return _without_reply(state), [Do(Act.STOP, state.reply_id)]


def _without_reply(state: DuplexState) -> DuplexState:
    return replace(state, phase=Phase.IDLE, reply_id="", ready=False, asked="")


def _confirmed(state: DuplexState) -> Step:
    if state.phase is not Phase.PREPARING or state.user not in _OPEN_TURN:
        return state, []
    merged = replace(_without_reply(state), carried=state.asked)
    return merged, [Do(Act.STOP, state.reply_id)]


def _rejected(state: DuplexState) -> Step:
    if state.user is User.AGAIN:
        return replace(state, user=User.ENDED), [Do(Act.DROP_TURN)]
    if state.user not in _OPEN_TURN:
        return state, []
    state, stopped = _drop_draft(state)
    state, dropped = _drop_turn(state)
    return state, stopped + dropped


def _drop_turn(state: DuplexState) -> Step:
    """The user counts as silent, whatever was heard of them."""
    actions = [Do(Act.DROP_TURN)] if state.user in (*_OPEN_TURN, User.AGAIN) else []
    if state.user in _AWAITING_WORDS:
        actions.append(Do(Act.FORGET_WORDS))
    return replace(state, user=User.SILENT, words=None), actions


def _quiet(state: DuplexState) -> Step:
    if state.user is not User.TALKING:
        return state, []
    return replace(state, user=User.PAUSING, words=None), [Do(Act.SPECULATE)]


def _ended(state: DuplexState) -> Step:
    if state.user is User.AGAIN:
        return replace(state, user=User.ENDED), [Do(Act.FINISH_TURN)]
    if state.user not in _OPEN_TURN:
        return state, []
    if state.phase is Phase.PREPARING:
        # Speech that was never confirmed does not take back a turn that had ended.
        return _drop_turn(state)
    return replace(state, user=User.ENDED, words=None), [Do(Act.FINISH_TURN)]


_VOICE = {
    VadPhase.EDGE: _edge,
    VadPhase.CONFIRMED: _confirmed,
    VadPhase.REJECTED: _rejected,
    VadPhase.QUIET: _quiet,
    VadPhase.VOICED_AGAIN: _voiced_again,
    VadPhase.ENDED: _ended,
}


# --- the user's words ---


def _known_so_far(state: DuplexState, text: str) -> Step:
    usable = state.user is User.PAUSING and state.phase in (Phase.IDLE, Phase.BARGED_IN)
    return (replace(state, words=text) if usable else state), []


def _final_words(state: DuplexState, event: Words) -> Step:
    if state.user not in _AWAITING_WORDS:
        return state, []
    if state.user is User.AGAIN:
        return _carry_on(state, event)
    match state.phase:
        case Phase.DRAFTING:
            return _settle_draft(state, joined(state.carried, event.text))
        case Phase.BARGED_IN:
            return replace(state, words=event.text), []
        case Phase.SPEAKING if not state.carried and (event.back_channel or not event.text):
            return replace(state, user=User.SILENT), []
        case Phase.SPEAKING:
            return _take_turn(replace(state, words=event.text), unheard=False)
        case _:
            return _hand_over(replace(state, words=event.text)), []


def _carry_on(state: DuplexState, event: Words) -> Step:
    """The turn of these words is not over: a later one goes on with it."""
    said = "" if event.back_channel and state.phase is not Phase.IDLE else event.text
    carried = joined(state.carried, said)
    return replace(state, user=User.TALKING, words=None, carried=carried), []


def _hand_over(state: DuplexState) -> DuplexState:
    """The turn is over and its words are known; `_settle` answers what is carried."""
    carried = joined(state.carried, state.words or "")
    return replace(state, user=User.SILENT, words=None, carried=carried)


def _settle_draft(state: DuplexState, text: str) -> Step:
    state = replace(state, user=User.SILENT, words=None, carried="")
    if text and same_words(text, state.asked):
        promoted = replace(state, phase=Phase.PREPARING, asked=text)
        return promoted, [Do(Act.PROMOTE, state.reply_id, text)]
    stop = Do(Act.STOP, state.reply_id)
    return replace(_without_reply(state), carried=text), [stop]


# --- verdicts ---


def _judged(state: DuplexState, event: Judged) -> Step:
    if state.phase is Phase.BARGED_IN and not event.real:
        return _go_on(state)
    late = state.phase is Phase.SPEAKING and state.user in _OPEN_TURN
    if event.real and (state.phase is Phase.BARGED_IN or late):
        return _take_turn(state, unheard=event.unheard)
    return state, []


def _go_on(state: DuplexState) -> Step:
    answered = state.user is User.ENDED and state.words is not None
    if answered or state.user is User.SILENT:
        state = replace(state, user=User.SILENT, carried="")
    state = replace(state, phase=Phase.SPEAKING, words=None)
    return state, _speech(state)


def _take_turn(state: DuplexState, *, unheard: bool) -> Step:
    """The user has the floor. A reply of which nothing was heard answers nothing: its question is
    carried into the new turn."""
    reply_id, asked = state.reply_id, state.asked
    actions = [Do(Act.SHUT, reply_id)] if state.gate else []
    state = replace(_without_reply(state), queued=())
    if unheard and asked:
        state = replace(state, carried=joined(asked, state.carried))
    else:
        actions.append(Do(Act.CUT, reply_id))
    actions.append(Do(Act.STOP, reply_id))
    if state.user is User.ENDED and state.words is not None:
        state = _hand_over(state)
    return state, actions


# --- the user's presence ---


def _absent(state: DuplexState) -> Step:
    return replace(state, away=True), _silence(state)


def _present(state: DuplexState) -> Step:
    if not state.away:
        return state, []
    state = replace(state, away=False)
    return state, _speech(state)


def _silence(state: DuplexState) -> list[Do]:
    """Nothing when it is silent already: it does not speak, or the user is away."""
    return [Do(Act.SHUT, state.gate), Do(Act.PAUSE, state.gate)] if state.gate else []


def _speech(state: DuplexState) -> list[Do]:
    """Nothing when it stays silent."""
    return [Do(Act.RESUME, state.gate), Do(Act.PLAY, state.gate)] if state.gate else []


# --- text, and the end of a reply ---


def _typed(state: DuplexState, text: str) -> Step:
    actions: list[Do] = []
    if state.phase in (Phase.SPEAKING, Phase.BARGED_IN):
        state, actions = _take_turn(replace(state, words=None), unheard=False)
    elif state.phase is not Phase.IDLE:
        before = state.asked if state.phase is Phase.PREPARING else state.carried
        actions = [Do(Act.STOP, state.reply_id)]
        state = replace(_without_reply(state), carried=before)
    if state.user is not User.SILENT:
        state, dropped = _drop_turn(state)
        actions = actions + dropped
    turns = state.turns if state.carried else state.turns + 1
    return replace(state, carried=joined(state.carried, text), turns=turns), actions


def _finished(state: DuplexState, event: Finished) -> Step:
    if event.reply_id != state.reply_id or not state.reply_id:
        return state, []
    match state.phase:
        case Phase.DRAFTING:
            # What failed before the turn was over is tried once more with its final words.
            return replace(_without_reply(state), words=None), [Do(Act.STOP, state.reply_id)]
        case Phase.BARGED_IN:
            return _take_turn(state, unheard=False)
        case _:
            end = Act.COMPLETE if event.ok else Act.CUT
            return _without_reply(state), [Do(end, state.reply_id)]
