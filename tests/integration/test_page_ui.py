"""The page as one sees, hears and presses it: a real Chromium, and a scripted session."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import AsyncIterator

import aiohttp
import numpy as np
import pytest
import pytest_asyncio
from PIL import Image
from playwright.async_api import Browser, expect

from tests.integration.browser import chromium, needs_chromium
from tests.integration.page_site import MIC_REFUSED, WEB, Event, ShownPage, Site, shown, site
from tests.integration.test_page_state import (
    ASK,
    CUT_IN,
    ENDED,
    FINAL,
    HEARD,
    SPEAK,
    latency,
    verdict,
)

pytestmark = [pytest.mark.asyncio(loop_scope="module"), needs_chromium]

LISTENING: Event = {"type": "state", "state": "listening"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def place() -> AsyncIterator[Site]:
    async with site() as one:
        yield one


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as one:
        yield one


@pytest_asyncio.fixture(loop_scope="module")
async def ui(browser: Browser, place: Site) -> AsyncIterator[ShownPage]:
    async with shown(browser, place.url) as one:
        yield one
        assert not one.complaints


# --- loading ---


async def test_it_loads_without_a_complaint_and_talks_to_nobody_else(
    ui: ShownPage, place: Site
) -> None:
    assert await ui.text("#state-word") == "Ready"
    assert ui.hosts == {place.url.split("/")[2]}
    async with aiohttp.ClientSession() as http, http.get(place.url) as answer:
        policy = answer.headers["Content-Security-Policy"]
    assert "script-src 'self';" in policy
    assert "style-src 'self';" in policy


async def test_no_script_writes_markup() -> None:
    """Everything that is shown came over a network."""
    forbidden = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|srcdoc"
    )
    for script in WEB.glob("*.js"):
        assert not forbidden.search(script.read_text()), script.name
    html = (WEB / "index.html").read_text()
    assert not re.search(r"\sstyle=|\son\w+=|https?://(?!www\.w3\.org)", html)


# --- a conversation ---


async def test_a_conversation_with_an_interruption(ui: ShownPage) -> None:
    await ui.start()
    assert await ui.text("#state-word") == "Listening"
    await ui.say(*ASK)
    assert await ui.text(".turn .you .partial") == "What time"
    await ui.say(ENDED, FINAL)
    assert await ui.text("#state-word") == "Thinking"
    assert await ui.page.locator(".you .partial").count() == 0
    await ui.say(*SPEAK, latency("t1", 400))
    assert await ui.text("#state-word") == "Speaking"
    assert await ui.text(".turn .agent .partial") == "It is noon."
    await ui.say(*CUT_IN)
    assert await ui.text(".state") == "Interrupted You have the floor."
    await ui.tell("silence", onset_to_silence_ms=123.4)
    await ui.say(verdict("real", "stop_word"), HEARD, LISTENING)
    assert await ui.text(".turn .agent .words") == "It is not heard: noon."
    assert await ui.text(".turn s") == "not heard: noon."
    assert await ui.text("#barge-ins strong") == "123 ms"
    assert "Stopped: you told it to stop" in await ui.text("#barge-ins li")
    assert await ui.page.locator("#spoken p").all_inner_texts() == [
        "You: What time is it?",
        "Agent: It is Not heard: noon.",
    ]


async def test_the_waterfall_of_the_newest_turn_beside_the_medians(ui: ShownPage) -> None:
    await ui.start()
    await ui.say(latency("t1", 500), latency("t2", 400))
    assert await ui.text("#latency strong") == "400 ms"
    rows = [" ".join(row.split()) for row in await ui.page.locator("#latency tr").all_inner_texts()]
    assert "end of turn called 200 ms 200 ms" in rows
    assert "first audio 400 ms 450 ms" in rows
    assert "heard – –" in rows
    history = ui.page.locator("#latency [role=img]")
    assert "500, 400" in (await history.get_attribute("aria-label") or "")


async def test_what_is_said_is_text_and_never_markup(ui: ShownPage) -> None:
    await ui.start()
    nasty = "<img src=x onerror=alert(1)><b>hi</b>"
    await ui.say({**FINAL, "text": nasty}, {"type": "session.ended", "reason": nasty})
    assert await ui.page.locator(".turn .words").inner_text() == nasty
    assert await ui.page.locator(".turn img, .turn .words b").count() == 0


async def test_nothing_moves_while_captions_grow(ui: ShownPage) -> None:
    await ui.start()
    where = """() => ['.timeline', '#composer', '.shelf', '.log']
      .map((one) => document.querySelector(one).getBoundingClientRect().top + scrollY)"""
    before = await ui.page.evaluate(where)
    words = " word" * 60
    for i in range(12):
        ids = {"turn_id": f"t{i}", "utterance_id": f"u{i}"}
        await ui.say({**FINAL, **ids, "text": words}, *({**one, **ids} for one in SPEAK))
        await ui.say(*({**one, **ids} for one in CUT_IN), verdict("real"), latency(f"t{i}", 400))
    assert await ui.page.evaluate(where) == before
    box = ui.page.locator("#captions")
    assert await box.evaluate("(e) => e.scrollHeight - e.scrollTop - e.clientHeight") < 2
    await box.evaluate("(e) => { e.scrollTop = 0; }")
    await ui.say({**FINAL, "turn_id": "t99"})
    assert await box.evaluate("(e) => e.scrollTop") == 0, "who reads back is left in peace"


async def test_the_timeline_has_both_colours_and_says_so_in_words(ui: ShownPage) -> None:
    await ui.start()
    await ui.say(*ASK)
    await ui.tell("level", mic=-15, agent=-100)
    await ui.say(ENDED, FINAL, *SPEAK)
    await ui.tell("level", mic=-60, agent=-15)
    await expect(ui.page.locator("#timeline-text")).to_contain_text("the agent 1 time")
    picture = np.asarray(Image.open(io.BytesIO(await ui.page.locator("#canvas").screenshot())))
    red, blue = picture[..., 0].astype(int), picture[..., 2].astype(int)
    assert (blue - red > 40).any()
    assert (red - blue > 40).any()


# --- writing, sounds, keys ---


async def test_enter_sends_and_shift_enter_does_not(ui: ShownPage) -> None:
    box = ui.page.locator("#text")
    await expect(box).to_be_disabled()
    await ui.start()
    await ui.page.keyboard.press("/")
    await ui.page.keyboard.type("Hello")
    await ui.page.keyboard.press("Shift+Enter")
    await ui.page.keyboard.type("there m")
    await ui.page.keyboard.press("Enter")
    await ui.page.keyboard.press("Enter")
    await ui.page.check("#verbatim")
    await box.fill("Say this")
    await ui.page.click("#send")
    assert await ui.calls("text") == [["Hello\nthere m", False], ["Say this", True]]
    assert await ui.calls("muted") == []


async def test_sounds_are_played_into_the_call(ui: ShownPage) -> None:
    await expect(ui.page.get_by_role("button", name="Cough")).to_be_disabled()
    await ui.start()
    for name in ("Cough", "Mm-hmm", "“Stop”"):
        await ui.page.get_by_role("button", name=name, exact=True).click()
    assert await ui.calls("inject") == [["cough"], ["mm-hmm"], ["stop"]]


async def test_a_keyboard_is_enough(ui: ShownPage) -> None:
    for _ in range(20):
        await ui.page.keyboard.press("Tab")
        if await ui.page.evaluate("document.activeElement.id") == "control":
            break
    await ui.page.keyboard.press("Space")
    await ui.settle()
    await expect(ui.page.locator("#control")).to_have_accessible_name("Stop")
    assert len(await ui.calls("start")) == 1
    await ui.page.keyboard.press("m")
    await expect(ui.page.locator("#mute")).to_have_attribute("aria-pressed", "true")
    await expect(ui.page.locator("#state-hint")).to_have_text("Your microphone is muted.")
    await ui.page.keyboard.press("Escape")
    assert await ui.calls("inject") == []
    await ui.say(*SPEAK)
    await ui.page.keyboard.press("Escape")
    assert await ui.calls("inject") == [["stop"]]
    await ui.page.keyboard.press("Enter")
    await ui.settle()
    assert len(await ui.calls("stop")) == 1
    await expect(ui.page.locator("#state-hint")).to_have_text(
        "You hung up. Press start to talk again."
    )


async def test_the_first_tab_skips_to_the_conversation(ui: ShownPage) -> None:
    await ui.page.keyboard.press("Tab")
    await ui.page.keyboard.press("Enter")
    await ui.page.keyboard.press("Tab")
    assert await ui.page.evaluate("document.activeElement.id") == "control"


# --- transports ---


async def test_rooms_come_first_where_there_are_rooms(browser: Browser, place: Site) -> None:
    before = "window.offered = { ws: true, livekit: true, why: '' };"
    async with shown(browser, place.url, before=before) as ui:
        await expect(ui.page.get_by_role("radio", name="LiveKit")).to_be_checked()
        await ui.start()
        assert (await ui.calls("start"))[0][0]["transport"] == "livekit"
        await expect(ui.page.get_by_role("radio", name="WebSocket")).to_be_disabled()


async def test_without_rooms_the_page_says_why(ui: ShownPage) -> None:
    room = ui.page.get_by_role("radio", name="LiveKit")
    await expect(room).to_be_disabled()
    await expect(room).to_have_accessible_description(re.compile("--livekit"))
    await ui.start()
    assert (await ui.calls("start"))[0][0]["transport"] == "ws"


# --- troubles ---


@pytest.mark.parametrize(
    ("code", "remedy", "wish"),
    [
        ("mic_refused", "Go on without a microphone", {"mic": False}),
        ("no_microphone", "Go on without a microphone", {"mic": False}),
        ("livekit_unreachable", "Use WebSocket", {"transport": "ws"}),
        ("no_server", "Try again", {}),
        ("full", "Try again", {}),
        ("insecure_context", "Try again", {}),
    ],
)
async def test_a_trouble_brings_its_remedy(
    browser: Browser, place: Site, code: str, remedy: str, wish: Event
) -> None:
    trouble = {**MIC_REFUSED, "code": code}
    async with shown(browser, place.url) as ui:
        await ui.page.evaluate("trouble => { window.refuse = trouble; }", trouble)
        await ui.start()
        panel = ui.page.get_by_role("alert")
        await expect(panel).to_contain_text("The microphone is blocked")
        await expect(panel).to_contain_text("Allow it beside the address bar.")
        assert await ui.text("#state-word") == "Ended"
        await ui.page.evaluate("window.refuse = null")
        await panel.get_by_role("button", name=remedy).click()
        await expect(panel).to_have_count(0)
        options = (await ui.calls("start"))[-1][0]
        assert wish.items() <= options.items()


async def test_a_key_is_asked_for_only_where_one_is_needed(browser: Browser) -> None:
    async with site("s3cret") as locked, shown(browser, locked.url) as ui:
        field = ui.page.get_by_label("API key")
        await field.fill("wrong")
        await ui.page.keyboard.press("Enter")
        await expect(ui.page.get_by_role("alert")).to_contain_text("The key was refused.")
        await field.fill("s3cret")
        await ui.page.keyboard.press("Enter")
        await expect(ui.page.locator("#shelf .model")).to_have_count(4)
        await expect(field).to_have_count(0)
        assert await ui.page.evaluate("Object.values(sessionStorage)") == ["s3cret"]
        assert await ui.page.evaluate("Object.values(localStorage)") == []
        assert ui.page.url == locked.url
        await ui.start()
        assert (await ui.calls("start"))[0][0]["apiKey"] == "s3cret"


async def test_headphones_are_proposed_to_an_agent_that_hears_itself(ui: ShownPage) -> None:
    await ui.start()
    for _ in range(3):
        assert await ui.page.get_by_role("alert").count() == 0
        await ui.say(*SPEAK, *CUT_IN, verdict("false", "short"))
    await expect(ui.page.get_by_role("alert")).to_contain_text("headphones")
    await ui.page.get_by_role("button", name="Dismiss").click()
    await expect(ui.page.get_by_role("alert")).to_have_count(0)


async def test_a_refused_microphone_with_the_real_session(place: Site) -> None:
    async with chromium(refuse=True) as no, shown(no, place.url, scripted=False) as ui:
        await ui.page.click("#control")
        await expect(ui.page.get_by_role("alert")).to_contain_text("microphone is blocked")
        await expect(ui.page.get_by_role("button", name="Start", exact=True)).to_be_enabled()


# --- the shelf ---


async def test_the_shelf_says_what_is_where(ui: ShownPage) -> None:
    rows = {
        row.split()[0]: " ".join(row.split())
        for row in await ui.page.locator("#shelf .model").all_inner_texts()
    }
    assert "resident default" in rows["piper-en-joe"]
    assert "held by 1 session" in rows["piper-en-joe"]
    assert "idle, leaves in 4 min" in rows["espeak-en"]
    assert "loading 40 %" in rows["cosyvoice2-en-base"]
    assert "cold" in rows["xtts-v2"]
    assert "CPML" in rows["xtts-v2"]
    assert "0.0 of 24 GB" in await ui.text("#shelf .memory")
    assert "1 of 8 sessions" in await ui.text("#shelf .memory")


async def test_a_voice_is_used_loaded_and_kept(browser: Browser) -> None:
    async with site() as own, shown(browser, own.url) as ui:
        press = ui.page.get_by_role("button", name="Load xtts-v2", exact=True)
        await press.click()
        await expect(press).to_be_hidden()
        assert "load xtts-v2" in own.fleet.asked
        await ui.page.get_by_role("button", name="Unload espeak-en").click()
        await expect(ui.page.locator("[data-model=espeak-en] .note")).to_contain_text(
            "held by another program"
        )
        await ui.page.get_by_role("button", name="Speak with espeak-en").click()
        await ui.settle()
        assert (await ui.calls("start"))[0][0]["model"] == "espeak-en"
        await ui.page.get_by_role("button", name="Speak with xtts-v2").click()
        await ui.settle()
        assert await ui.calls("switch") == [["xtts-v2", ""]]
        wanted = ui.page.locator("[data-model=xtts-v2] .actions button").first
        await expect(wanted).to_have_text("Coming")
        await ui.say(
            {"type": "model", "model": "xtts-v2", "voice": "", "state": "ready", "message": ""}
        )
        await expect(wanted).to_have_text("In use")


async def test_the_shelf_asks_only_while_it_can_be_seen(browser: Browser) -> None:
    low = {"width": 1280, "height": 500}
    async with site() as own, shown(browser, own.url, viewport=low) as ui:
        await ui.settle()
        asked = len(own.fleet.asked)
        await asyncio.sleep(2.5)
        assert len(own.fleet.asked) == asked
        await ui.page.locator("#shelf").scroll_into_view_if_needed()
        for _ in range(2):
            async with ui.page.expect_request("**/v1/models"):
                pass


# --- the log ---


async def test_the_log_keeps_the_newest_and_copies_them(browser: Browser, place: Site) -> None:
    async with shown(browser, place.url, permissions=["clipboard-read", "clipboard-write"]) as ui:
        await ui.start()
        await ui.page.click("#log summary")
        await ui.say(*({"type": "speech", "phase": "edge", "at_ms": i} for i in range(700)))
        await expect(ui.page.locator("#log-lines li")).to_have_count(500)
        await ui.page.get_by_role("button", name="Copy as JSONL").click()
        await expect(ui.page.locator("#log-note")).to_have_text("Copied.")
        lines: list[Event] = await ui.page.evaluate(
            "async () => (await navigator.clipboard.readText()).trim().split('\\n').map(JSON.parse)"
        )
    assert len(lines) == 500
    assert lines[-1]["at_ms"] == 699
    assert lines[-1]["type"] == "speech"
    assert "t_ms" in lines[-1]
