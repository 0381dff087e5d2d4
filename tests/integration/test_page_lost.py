"""The page's session when a part of the installation is missing, full or dies under it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from playwright.async_api import Browser

from src.common.livekit_server import LiveKitServer
from src.common.processes import Child
from tests.integration.browser import chromium, needs_chromium
from tests.integration.live import Installation, installation
from tests.integration.page import TalkingPage, talking_page

pytestmark = needs_chromium

ONE_PLACE = "limits: {max_sessions: 1}\n"
LIBRARY = "**/livekit-client.esm.mjs"
ONE_KEY = {"DUPLEX_API_KEY": "the-right-one"}


@pytest_asyncio.fixture
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as one:
        yield one


async def speaks(page: TalkingPage, utterances: int = 0) -> None:
    """The agent says something to the end; `utterances`: what it has said to the end before."""
    await page.say("One, two, three.")
    await page.event("heard", more_than=utterances, completed=True)


async def test_a_wrong_key_is_refused_and_a_full_server_says_when_to_come_back(
    browser: Browser, tmp_path: Path
) -> None:
    async with installation(tmp_path, config=ONE_PLACE, env=ONE_KEY) as running:
        await a_door_with_a_key(browser, running, "ws")


async def test_the_door_to_the_rooms_has_the_same_key_and_as_many_places(
    browser: Browser, tmp_path: Path, livekit: LiveKitServer
) -> None:
    async with installation(tmp_path, config=ONE_PLACE, env=ONE_KEY, livekit=livekit) as running:
        await a_door_with_a_key(browser, running, "livekit")


async def a_door_with_a_key(browser: Browser, running: Installation, transport: str) -> None:
    async with (
        talking_page(browser, running.url, transport) as page,
        talking_page(browser, running.url, transport) as second,
    ):
        for wrong in ("the-wrong-one", "no such key", ""):
            await page.start(mic=False, apiKey=wrong)
            shown = (await page.told("trouble"))[-1]
            assert (shown["code"], shown["fatal"]) == ("unauthorized", True)
        await page.live(mic=False, apiKey="the-right-one")
        await second.start(mic=False, apiKey="the-right-one")
        shown = await second.until_told("trouble")
        assert (shown["code"], shown["fatal"]) == ("full", True)
        assert shown["retry_after_ms"] > 0


async def test_a_server_that_dies_and_comes_back_is_called_again(
    browser: Browser, tmp_path: Path
) -> None:
    async with (
        installation(tmp_path) as running,
        talking_page(browser, running.url) as page,
    ):
        await page.live(mic=False)
        await speaks(page)
        os.kill(running.orchestrator.pid, signal.SIGKILL)
        await page.until_told("status", phase="reconnecting")
        again = await _orchestrator(running, tmp_path)
        try:
            await page.until_told("status", phase="live", more_than=1, patience_ms=60_000)
            shown = await page.until_told("trouble", code="restarted")
            assert shown["fatal"] is False
            await speaks(page, utterances=1)
        finally:
            await again.stop()


async def _orchestrator(running: Installation, logs: Path) -> Child:
    """Another one at the same address."""
    argv = ["-m", "src.orchestrator.server", "--ws", "--port", str(running.port)]
    env = {"REDIS_URL": running.redis_url, "LLM_BASE_URL": "", "DUPLEX_API_KEY": ""}
    log = logs / "orchestrator-again.log"
    return await Child.start("orchestrator", [sys.executable, *argv], log=log, env=env)


@pytest.mark.parametrize("transport", ["ws", "livekit"])
async def test_a_server_that_is_gone_is_said_so(
    browser: Browser, tmp_path: Path, transport: str
) -> None:
    async with (
        installation(tmp_path) as running,
        talking_page(browser, running.url, transport) as page,
    ):
        os.kill(running.orchestrator.pid, signal.SIGKILL)
        await running.orchestrator.wait()
        await page.start(mic=False)
        shown = await page.until_told("trouble")
        assert (shown["code"], shown["fatal"]) == ("no_server", True)
        assert (await page.told("status"))[-1]["phase"] == "ended"


async def test_a_livekit_server_that_dies_and_comes_back_keeps_the_session(
    browser: Browser, tmp_path: Path, livekit: LiveKitServer
) -> None:
    async with (
        installation(tmp_path, livekit=livekit) as running,
        talking_page(browser, running.url, "livekit") as page,
    ):
        await page.live(mic=False)
        await speaks(page)
        await livekit.kill()
        await page.until_told("status", phase="reconnecting")
        await livekit.restart()
        await page.until_told("status", phase="live", more_than=1, patience_ms=60_000)
        await speaks(page, utterances=1)
        assert len(await page.told("event", type="session.started")) == 1, "the same session"
        assert not await page.told("trouble")


async def test_without_livekits_library_or_server_the_page_says_what_to_do(
    browser: Browser, tmp_path: Path
) -> None:
    async with installation(tmp_path) as running:
        async with talking_page(browser, running.url, "livekit") as page:
            offer = await page.run("available()")
            assert (offer["ws"], offer["livekit"], offer["key"]) == (True, False, False)
            assert "--livekit" in offer["why"]
            # Asked for at the same time as the token, which comes; else either may fail first.
            await page.page.route("**/v1/livekit/token*", lambda route: route.fulfill(json={}))
            await page.page.route(LIBRARY, lambda route: route.abort())
            await page.start(mic=False)
            assert (await page.told("trouble"))[-1]["code"] == "livekit_missing"
            await page.live(mic=False, transport="ws")
        async with talking_page(browser, running.url, "livekit") as page:
            # So much of it as is called before the server has said no.
            await page.page.route(
                LIBRARY,
                lambda route: route.fulfill(
                    content_type="text/javascript", body="export const setLogLevel = () => {};"
                ),
            )
            await page.start(mic=False)
            assert (await page.told("trouble"))[-1]["code"] == "livekit_off"
