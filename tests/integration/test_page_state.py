"""The page's reducer, in the browser that runs it: tables of events, and what they come to."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Page

from src.rpc.ws_events import json_schema
from tests.integration.browser import chromium, needs_chromium
from tests.integration.page_site import WEB, Event, shown, site

pytestmark = [pytest.mark.asyncio(loop_scope="module"), needs_chromium]

# Every state is frozen through and through before the next event: who writes to it throws.
FOLD = """async (events) => {
  const { initial, reduce } = await import('/web/state.js');
  const readings = await import('/web/readings.js');
  const { reasonOf } = await import('/web/words.js');
  const { describe } = await import('/web/timeline.js');
  const freeze = (value) => {
    if (value === null || typeof value !== 'object' || Object.isFrozen(value)) return value;
    Object.freeze(value);
    Object.values(value).forEach(freeze);
    return value;
  };
  let state = initial;
  let now = 0;
  for (const [at, event] of events) {
    state = freeze(reduce(state, { event, at }));
    now = at;
  }
  const name = readings.stateName(state, now);
  return {
    state, name, floor: readings.floor(name),
    waterfalls: readings.timedTurns(state).map(readings.waterfall),
    medians: readings.medians(state, false),
    headphones: readings.needsHeadphones(state),
    reasons: state.bargeIns.map(reasonOf),
    described: describe(state, now, 24000),
  };
}"""
LIVE: list[Event] = [
    {"type": "client.status", "phase": "connecting"},
    {"type": "session.started", "session_id": "s1", "model": "m", "voice": "v"},
    {"type": "client.status", "phase": "live"},
]
ASK: list[Event] = [
    {"type": "speech", "phase": "edge"},
    {"type": "speech", "phase": "confirmed"},
    {"type": "transcript", "turn_id": "t1", "text": "What time", "final": False},
]
ENDED: Event = {"type": "speech", "phase": "ended"}
FINAL: Event = {"type": "transcript", "turn_id": "t1", "text": "What time is it?", "final": True}
WRITTEN: Event = {
    "type": "reply.text",
    "turn_id": "t1",
    "utterance_id": "u1",
    "text": "It is noon.",
}
SPEAK: list[Event] = [
    WRITTEN,
    {"type": "state", "state": "speaking"},
    {"type": "audio.begin", "utterance_id": "u1", "seq": 0, "resumed": False},
]
CUT_IN: list[Event] = [
    {"type": "flush", "utterance_id": "u1"},
    {"type": "state", "state": "barged_in"},
    {"type": "barge_in", "utterance_id": "u1", "verdict": "pending"},
    {"type": "speech", "phase": "edge"},
]
HEARD: Event = {
    "type": "heard",
    "turn_id": "t1",
    "utterance_id": "u1",
    "heard": "It is",
    "cut": "noon.",
    "completed": False,
}
SPOKEN = LIVE + ASK + [ENDED, FINAL] + SPEAK


def verdict(name: str, reason: str = "words") -> Event:
    return {"type": "barge_in", "utterance_id": "u1", "verdict": name, "reason": reason}


def latency(turn: str, first_audio_ms: int, endpoint_ms: int = 200) -> Event:
    stages = {"transcript_ms": endpoint_ms, "first_token_ms": 300, "first_clause_ms": 350}
    figures = {"endpoint_ms": endpoint_ms, "first_audio_ms": first_audio_ms, **stages}
    return {"type": "latency", "turn_id": turn, **figures}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def page() -> AsyncIterator[Page]:
    async with site() as one, chromium() as browser, shown(browser, one.url) as it:
        yield it.page


async def fold(page: Page, events: list[Event], every_ms: int = 100) -> dict[str, Any]:
    """One event each so often; an event may bring its own `at`."""
    timed = [(event.get("at", (i + 1) * every_ms), event) for i, event in enumerate(events)]
    result: dict[str, Any] = await page.evaluate(FOLD, timed)
    return result


@pytest.mark.parametrize(
    ("events", "name", "floor"),
    [
        ([], "idle", ""),
        (LIVE[:1], "connecting", ""),
        (LIVE, "listening", "you"),
        (LIVE + ASK[:1], "hearing", "you"),
        (LIVE + ASK[:1] + [{"type": "speech", "phase": "rejected"}], "listening", "you"),
        (LIVE + ASK + [ENDED], "thinking", ""),
        (LIVE + ASK + [ENDED, FINAL], "thinking", ""),
        (LIVE + ASK + [ENDED, FINAL, {"type": "error", "code": "unavailable"}], "listening", "you"),
        (LIVE + ASK + [ENDED, FINAL, {"type": "speech", "phase": "edge"}], "hearing", "you"),
        (LIVE + ASK + [ENDED, FINAL, {"type": "none", "at": 20_000}], "listening", "you"),
        (LIVE + ASK[:1] + [ENDED], "listening", "you"),
        (SPOKEN, "speaking", "agent"),
        (SPOKEN + CUT_IN, "barged_in", "you"),
        ([*SPOKEN, {"type": "client.status", "phase": "reconnecting"}], "reconnecting", ""),
        ([*SPOKEN, {"type": "client.status", "phase": "ended"}], "ended", ""),
    ],
)
async def test_the_state_has_one_name_and_one_owner_of_the_floor(
    page: Page, events: list[Event], name: str, floor: str
) -> None:
    result = await fold(page, events)
    assert (result["name"], result["floor"]) == (name, floor)


@pytest.mark.parametrize(
    ("reason", "outcome", "words"),
    [
        ("stop_word", "real", "you told it to stop"),
        ("words", "real", "you said something"),
        ("sustained", "real", "you kept talking"),
        ("typed", "real", "you wrote instead"),
        ("not_speech", "false", "that was no voice"),
        ("back_channel", "false", "you were only agreeing"),
        ("no_words", "false", "a voice, but no words"),
        ("short", "false", "too short to be meant"),
        ("some_news", "real", "some news"),
    ],
)
async def test_every_verdict_has_its_reason_in_words(
    page: Page, reason: str, outcome: str, words: str
) -> None:
    result = await fold(page, SPOKEN + CUT_IN + [verdict(outcome, reason)])
    assert result["reasons"] == [words]
    assert result["state"]["bargeIns"][0]["verdictMs"] == 200


@pytest.mark.parametrize("before", [True, False], ids=["silence first", "barge-in first"])
async def test_the_silence_belongs_to_the_barge_in_around_it(page: Page, before: bool) -> None:
    silence = {"type": "client.silence", "onset_to_silence_ms": 123}
    cut = [*CUT_IN[:1], silence, *CUT_IN[1:]] if before else [*CUT_IN, silence]
    result = await fold(page, SPOKEN + cut)
    assert [barge["silenceMs"] for barge in result["state"]["bargeIns"]] == [123]


async def test_a_verdict_that_nobody_had_waited_for_is_an_interruption_of_its_own(
    page: Page,
) -> None:
    first = [*CUT_IN, verdict("false", "short"), {"type": "state", "state": "speaking"}]
    result = await fold(page, SPOKEN + first + [verdict("real", "words")])
    assert [barge["verdict"] for barge in result["state"]["bargeIns"]] == ["false", "real"]


async def test_what_was_cut_is_kept_apart_from_what_was_heard(page: Page) -> None:
    late = {**WRITTEN, "text": " And late."}
    result = await fold(page, SPOKEN + CUT_IN + [verdict("real"), HEARD, late])
    (turn,) = result["state"]["turns"]
    assert turn["you"] == {"text": "What time is it?", "final": True, "stable": 0}
    (reply,) = turn["replies"]
    assert (reply["heard"], reply["cut"], reply["text"]) == ("It is", "noon.", "It is noon.")


@pytest.mark.parametrize("told", ["the next answer", "more of the question"])
async def test_an_answer_that_came_too_early_is_taken_back(page: Page, told: str) -> None:
    again = {**WRITTEN, "utterance_id": "u2"} if told == "the next answer" else ASK[-1]
    result = await fold(page, LIVE + ASK + [ENDED, FINAL, WRITTEN, again])
    (turn,) = result["state"]["turns"]
    assert "u1" not in [reply["id"] for reply in turn["replies"]]


async def test_a_false_alarm_leaves_two_spans_and_the_marks_between_them(page: Page) -> None:
    resumed = {"type": "audio.begin", "utterance_id": "u1", "seq": 9, "resumed": True}
    rejected = {"type": "speech", "phase": "rejected"}
    result = await fold(page, SPOKEN + CUT_IN + [rejected, verdict("false", "short"), resumed])
    spans = result["state"]["spans"]
    assert [(span["lane"], span["kind"], span["to"] is None) for span in spans] == [
        ("you", "confirmed", False),
        ("agent", "speech", False),
        ("you", "rejected", False),
        ("agent", "resumed", True),
    ]
    assert [mark["kind"] for mark in result["state"]["marks"]] == ["flush", "pause", "resume"]
    assert "the agent 2 times" in result["described"]
    assert "1 false alarm" in result["described"]


async def test_the_last_frame_played_ends_the_span_and_its_cursor_stays(page: Page) -> None:
    played = {"type": "client.played", "utterance_id": "u1"}
    rest = [
        {**played, "seq": 2},
        {"type": "audio.end", "utterance_id": "u1", "frames": 10},
        {**played, "seq": 9},
    ]
    result = await fold(page, SPOKEN + rest)
    span = result["state"]["spans"][-1]
    assert span["to"] == span["heardAt"] == 100 * len(SPOKEN + rest)


async def test_heard_counts_on_from_the_first_audio(page: Page) -> None:
    begun_ms = 100 * len(SPOKEN)
    played = {"type": "client.played", "utterance_id": "u1", "seq": 2, "at": begun_ms + 150}
    result = await fold(page, [*SPOKEN, played, latency("t1", 400)])
    # Three frames of 20 ms had been heard by then: the first one began after 90 ms.
    assert result["waterfalls"][0]["heard"] == 490


async def test_typed_turns_do_not_count_among_the_spoken_ones(page: Page) -> None:
    turns = [latency("t1", 400), latency("t2", 500), latency("t3", 450), latency("t4", 90, 0)]
    result = await fold(page, LIVE + turns)
    assert result["medians"]["first_audio"] == 450
    assert result["medians"]["heard"] is None


async def test_the_agents_own_words_out_of_the_microphone_call_for_headphones(page: Page) -> None:
    told = [*CUT_IN, verdict("real"), {**FINAL, "text": "it is noon"}]
    assert not (await fold(page, SPOKEN + told * 2))["headphones"]
    assert (await fold(page, SPOKEN + told * 3))["headphones"]


@pytest.mark.parametrize("reason", ["short", "back_channel"])
async def test_false_alarms_call_for_headphones_unless_somebody_spoke(
    page: Page, reason: str
) -> None:
    alarm = [*CUT_IN, verdict("false", reason)]
    assert (await fold(page, SPOKEN + alarm * 3))["headphones"] == (reason == "short")
    tested = [{"type": "client.injected", "sound": "cough"}, *alarm]
    assert not (await fold(page, SPOKEN + tested * 3))["headphones"]


async def test_after_a_lost_line_turns_of_the_same_name_are_others(page: Page) -> None:
    again = {**LIVE[1], "session_id": "s2"}
    result = await fold(page, [*SPOKEN, again, LIVE[2], {**FINAL, "text": "Hello?"}])
    assert [turn["id"] for turn in result["state"]["turns"]] == ["s1/t1", "t1"]
    assert result["name"] == "thinking"


async def test_a_failed_switch_keeps_the_voice_that_speaks(page: Page) -> None:
    failed = {"type": "model", "model": "x", "voice": "", "state": "failed", "message": "no memory"}
    result = await fold(page, [*LIVE, {"type": "client.wanted", "model": "x"}, failed])
    assert result["state"]["voice"] == {
        "model": "m",
        "voice": "v",
        "state": "failed",
        "message": "no memory",
    }


async def test_memory_is_bounded_however_long_one_talks(page: Page) -> None:
    hour = [
        {**event, "turn_id": f"t{i}", "utterance_id": f"u{i}"}
        for i in range(700)
        for event in [*SPEAK, *CUT_IN, verdict("real")]
    ]
    state = (await fold(page, LIVE + hour))["state"]
    sizes = {part: len(state[part]) for part in ("turns", "bargeIns", "spans", "marks", "troubles")}
    assert sizes["turns"] == 100
    assert sizes["bargeIns"] == 50
    assert 0 < sizes["spans"] <= 400
    assert 0 < sizes["marks"] <= 400
    now = 100 * len(LIVE + hour)
    assert all(mark["at"] >= now - 61_000 for mark in state["marks"])


@pytest.mark.parametrize("seed", range(20))
async def test_no_order_of_events_breaks_it(page: Page, seed: int) -> None:
    """Rooms and sockets may drop, double and swap what one script never does."""
    script = SPOKEN + CUT_IN + [verdict("real"), HEARD, latency("t1", 400), ENDED]
    script += [
        {"type": "client.played", "utterance_id": "u1", "seq": 5},
        {"type": "client.silence", "onset_to_silence_ms": 100},
        {"type": "audio.end", "utterance_id": "u1", "frames": 3},
        {"type": "session.ended", "reason": "idle"},
        {"type": "something.new"},
    ]
    result = await fold(page, random.Random(seed).choices(script, k=80))
    assert result["name"]
    for span in result["state"]["spans"]:
        assert span["to"] is None or span["to"] >= span["from"]


async def test_every_event_of_the_protocol_is_known() -> None:
    mapping = json_schema()["$defs"]["ServerEvent"]["discriminator"]["mapping"]
    source = (WEB / "state.js").read_text()
    handlers = source[source.index("const HANDLERS") : source.index("export function reduce")]
    missing = [
        name for name in mapping if f"  {name}:" not in handlers and f"'{name}':" not in handlers
    ]
    assert not missing
