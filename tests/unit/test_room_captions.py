"""What a stock front end is told, event by event."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.orchestrator.heard import split_heard
from src.orchestrator.ports import SpeechFrame, Word
from src.orchestrator.rooms.captions import (
    AgentCaption,
    AgentState,
    Captions,
    Telling,
    UserCaption,
)
from src.rpc.ws_events import (
    AudioEnd,
    Error,
    Heard,
    ReplyText,
    ServerEvent,
    SessionEnded,
    SessionStarted,
    Speech,
    State,
    StateName,
    TranscriptEvent,
)

TEXT = "Well, hello there! Fine, you?"
WORD_MS = 300


def marks(text: str, base_ms: int = 0) -> list[Word]:
    """Every word takes 300 ms; its punctuation does not belong to it."""
    words, place = [], 0
    for index, token in enumerate(text.split()):
        start = text.index(token, place)
        place = start + len(token)
        core = token.rstrip(".,!?")
        begin = base_ms + index * WORD_MS
        if core:
            words.append(Word(core, begin, begin + WORD_MS, start, start + len(core), False))
    return words


def frames(utterance_id: str, words: list[Word], length_ms: int) -> list[SpeechFrame]:
    return [
        SpeechFrame(
            utterance_id, seq, seq * 20, b"", tuple(w for w in words if w.start_ms // 20 == seq)
        )
        for seq in range(length_ms // 20)
    ]


def reply(text: str, utterance_id: str = "u1", *, final: bool = True) -> ReplyText:
    return ReplyText(turn_id="t1", utterance_id=utterance_id, text=text, final=final)


def heard(text: str, cut: str = "", utterance_id: str = "u1") -> Heard:
    return Heard(turn_id="t1", utterance_id=utterance_id, heard=text, cut=cut, completed=not cut)


def said(text: str, *, final: bool = True) -> TranscriptEvent:
    return TranscriptEvent(turn_id="t1", text=text, final=final, stable_chars=0, at_ms=0)


def state(name: StateName) -> State:
    return State(state=name, turn_id="t1", at_ms=0)


def play(captions: Captions, text: str = TEXT, utterance_id: str = "u1") -> None:
    """All of its frames go to the listener."""
    words = marks(text)
    for frame in frames(utterance_id, words, len(text.split()) * WORD_MS):
        captions.on_words(frame)


def agent(told: list[Telling]) -> list[AgentCaption]:
    return [item for item in told if isinstance(item, AgentCaption)]


# --- the agent's state ---


def states(events: list[ServerEvent]) -> list[str]:
    captions = Captions()
    told = [item for event in events for item in captions.on_event(event)]
    return [item.state for item in told if isinstance(item, AgentState)]


def test_a_turn_goes_from_listening_over_thinking_to_speaking_and_back() -> None:
    turn: list[ServerEvent] = [
        state("listening"), said("hi", final=False), said("hi"), reply("Hello."),
        state("speaking"), heard("Hello."), state("listening"),
    ]  # fmt: skip
    assert states(turn) == ["listening", "thinking", "speaking", "listening"]


def test_barged_in_is_listening_and_a_false_alarm_is_speaking_again() -> None:
    alarm: list[ServerEvent] = [state("speaking"), state("barged_in"), state("speaking")]
    assert states(alarm) == ["speaking", "listening", "speaking"]


def test_typed_while_it_speaks_the_agent_thinks_although_the_session_says_listening_last() -> None:
    typed: list[ServerEvent] = [
        state("speaking"),
        heard("Well,", "hello"),
        said("stop"),
        state("listening"),
    ]
    assert states(typed) == ["speaking", "thinking"]


def test_the_user_who_goes_on_before_the_answer_is_listened_to() -> None:
    goes_on: list[ServerEvent] = [state("listening"), said("so"), Speech(phase="edge", at_ms=1)]
    assert states(goes_on) == ["listening", "thinking"]
    assert states([*goes_on, Speech(phase="confirmed", at_ms=2)])[-1] == "listening"
    assert states([*goes_on, Speech(phase="rejected", at_ms=2)])[-1] == "thinking"


@pytest.mark.parametrize("failure", [reply(""), heard("", "Hello.")])
def test_an_answer_that_is_never_heard_ends_the_thinking(failure: ServerEvent) -> None:
    lost: list[ServerEvent] = [
        state("listening"),
        said("hi"),
        Error(code="unavailable", message=""),
        failure,
    ]
    assert states(lost) == ["listening", "thinking", "listening"]


def test_a_draft_whose_last_text_comes_after_the_words_it_answers_is_no_empty_reply() -> None:
    promoted: list[ServerEvent] = [
        state("listening"),
        reply("Hello.", final=False),
        said("hi"),
        reply(""),
    ]
    assert states(promoted) == ["listening", "thinking"]


# --- the user's words ---


def test_partials_and_the_final_are_the_same_segment_in_full() -> None:
    captions = Captions()
    assert captions.on_event(said("turn the", final=False)) == [
        UserCaption("t1", "turn the", final=False)
    ]
    assert captions.on_event(said("Turn the light on.")) == [
        UserCaption("t1", "Turn the light on.", final=True)
    ]


def test_segments_of_two_sessions_in_one_room_have_different_names() -> None:
    captions = Captions()
    captions.on_event(SessionStarted(session_id="s-1", model="m", voice="v"))
    (caption,) = captions.on_event(said("hi", final=False))
    assert caption == UserCaption("s-1.t1", "hi", final=False)


def test_what_was_typed_in_the_front_end_is_not_said_again() -> None:
    captions = Captions()
    captions.on_event(state("listening"))
    captions.on_chat(" hi \n")
    assert captions.on_event(said("hi")) == [AgentState("thinking")]
    assert captions.on_event(said("hi")) == [UserCaption("t1", "hi", final=True)], "spoken"


# --- the agent's words ---


def test_a_word_is_written_when_its_end_was_heard() -> None:
    captions = Captions()
    captions.on_event(reply(TEXT))
    play(captions)
    assert captions.on_heard("u1", 280) == []
    assert captions.on_heard("u1", 300) == [AgentCaption("u1", "Well,")]
    assert captions.on_heard("u1", 300) == []
    assert captions.on_heard("u1", 920) == [AgentCaption("u1", " hello there!")]
    assert captions.on_heard("u1", 600) == [], "never back"


def test_a_reply_heard_to_its_end_closes_with_all_of_it() -> None:
    captions = Captions()
    captions.on_event(reply(TEXT))
    play(captions)
    captions.on_heard("u1", 1200)
    assert agent(captions.on_event(heard(TEXT))) == [AgentCaption("u1", " you?", final=True)]
    assert captions.on_heard("u1", 1500) == [], "it is closed"


def test_a_cut_reply_closes_with_what_was_heard_and_not_a_word_more() -> None:
    captions = Captions()
    captions.on_event(reply(TEXT))
    play(captions)
    captions.on_heard("u1", 300)
    cut = heard("Well, hello", "there! Fine, you?")
    assert agent(captions.on_event(cut)) == [AgentCaption("u1", " hello", final=True)]
    assert captions.on_event(reply("too late")) == []
    assert captions.end() == []


def test_a_reply_of_which_nothing_was_heard_has_no_caption() -> None:
    captions = Captions()
    captions.on_event(reply(TEXT))
    assert agent(captions.on_event(heard("", TEXT))) == []


def test_a_voice_without_word_times_has_its_caption_at_the_end() -> None:
    captions = Captions()
    captions.on_event(reply(TEXT))
    for frame in frames("u1", [], 1500):
        captions.on_words(frame)
    assert captions.on_heard("u1", 1400) == []
    assert agent(captions.on_event(heard("Well, hello", "there!"))) == [
        AgentCaption("u1", "Well, hello", final=True)
    ]


def test_frames_sent_again_after_a_false_alarm_bring_no_word_twice() -> None:
    captions = Captions()
    captions.on_event(reply(TEXT))
    play(captions)
    captions.on_heard("u1", 300)
    play(captions)
    assert captions.on_heard("u1", 620) == [AgentCaption("u1", " hello")]


@pytest.mark.parametrize("told_of_the_end", [True, False])
def test_another_worker_goes_on_in_the_same_segment(told_of_the_end: bool) -> None:
    captions = Captions()
    captions.on_event(reply("Well, hello there! Fine,", final=False))
    for frame in frames("u1", marks("Well, hello"), 2 * WORD_MS):
        captions.on_words(frame)
    assert captions.on_heard("u1", 600) == [AgentCaption("u1", "Well, hello")]
    if told_of_the_end:
        captions.on_event(AudioEnd(utterance_id="u1", frames=30))
    captions.on_event(reply(" you?"))
    play(captions, " there! Fine, you?", "u1.2")
    assert captions.on_heard("u1", 600) == [], "that utterance is over"
    assert captions.on_heard("u1.2", 320) == [AgentCaption("u1", " there!")]
    cut = heard("Well, hello there! Fine,", "you?", "u1.2")
    assert agent(captions.on_event(cut)) == [AgentCaption("u1", " Fine,", final=True)]


def test_the_end_of_the_session_closes_what_is_open_with_the_words_it_has() -> None:
    captions = Captions()
    captions.on_event(reply(TEXT))
    play(captions)
    captions.on_heard("u1", 300)
    assert agent(captions.on_event(SessionEnded(reason="gone"))) == [
        AgentCaption("u1", "", final=True)
    ]


def test_replies_that_never_end_are_not_kept_for_ever() -> None:
    captions = Captions()
    told = []
    for number in range(50):
        name = f"u{number}"
        told += captions.on_event(reply(TEXT, name))
        play(captions, utterance_id=name)
        told += captions.on_heard(name, 300)
    closed = [item for item in agent(told) if item.final]
    assert len(closed) >= 45


# --- whatever happens in between ---

WORDS = st.text("ab", min_size=1, max_size=5)
TOKENS = st.tuples(WORDS, st.sampled_from(["", ",", "!", " —"]), st.booleans())


@st.composite
def replies(draw: st.DrawFn) -> tuple[str, list[Word], int]:
    """A text, the marks of some of its words, as a worker gives them, and its length in ms."""
    text, words, at_ms = draw(st.sampled_from(["", " "])), [], 0
    for core, after, marked in draw(st.lists(TOKENS, min_size=1, max_size=12)):
        length_ms = draw(st.integers(40, 1500))
        if marked:
            start = len(text)
            words.append(Word(core, at_ms, at_ms + length_ms, start, start + len(core), False))
        text += core + after + " "
        at_ms += length_ms + draw(st.integers(0, 60))
    return text, words, -(-at_ms // 20) * 20


@settings(deadline=None, max_examples=200)
@given(data=st.data(), made=replies())
def test_chunks_are_never_taken_back_and_make_up_the_heard_text(
    data: st.DataObject, made: tuple[str, list[Word], int]
) -> None:
    text, words, total_ms = made
    captions, told = Captions(), list[Telling]()
    written = sent = heard_seq = 0
    every = frames("u1", words, total_ms)
    for _ in range(data.draw(st.integers(0, 40))):
        match data.draw(st.sampled_from(["text", "frame", "again", "heard"])):
            case "text":
                more = data.draw(st.integers(written, len(text)))
                told += captions.on_event(reply(text[written:more], final=False))
                written = more
            case "frame":
                sent = data.draw(st.integers(sent, len(every)))
                # A worker speaks only what was written to it.
                while sent and any(w.char_end > written for w in words if w.start_ms < sent * 20):
                    sent -= 1
                sent = max(sent, heard_seq)
                for frame in every[:sent]:
                    captions.on_words(frame)
            case "again":
                for frame in every[heard_seq:sent]:
                    captions.on_words(frame)
            case _:
                heard_seq = data.draw(st.integers(heard_seq, sent))
                told += captions.on_heard("u1", heard_seq * 20)
    told += captions.on_event(reply(text[written:]))
    # The session has seen every frame and may know the length: it never says less.
    known = data.draw(st.sampled_from([None, total_ms]))
    split = split_heard(text, words, data.draw(st.integers(heard_seq, sent)) * 20, known)
    told += captions.on_event(heard(split.heard.strip(), split.cut.strip()))
    chunks = agent(told)
    assert "".join(chunk.text for chunk in chunks) == split.heard.strip()
    assert [chunk.final for chunk in chunks] == [False] * (len(chunks) - 1) + [True] * bool(chunks)
    assert all(chunk.text or chunk.final for chunk in chunks)
