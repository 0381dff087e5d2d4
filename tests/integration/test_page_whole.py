"""The page, the orchestrator, a worker and a room server, all real: written, told, stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.async_api import expect

from src.common.livekit_server import LiveKitServer
from tests.audio_fixtures import has_piper
from tests.integration.browser import chromium, needs_chromium
from tests.integration.live import has_whisper, installation
from tests.integration.page_site import WEB, shown

STORY = (
    "Once upon a time a farmer had a horse that would rather have been a philosopher. Every "
    "evening it looked over the fence, counted the stars, and asked the farmer what they were for."
)
PATIENCE_MS = 30_000


@needs_chromium
@pytest.mark.skipif(
    not (has_piper() and has_whisper()), reason="the local-models group is not installed"
)
@pytest.mark.parametrize("transport", ["ws", "livekit"])
async def test_a_story_is_told_until_somebody_says_stop(
    transport: str, livekit: LiveKitServer, tmp_path: Path
) -> None:
    if transport == "livekit" and not (WEB / "vendor/livekit-client.esm.mjs").is_file():
        pytest.skip("no livekit-client on this machine; just web-deps")
    async with (
        installation(tmp_path, livekit=livekit) as one,
        chromium() as browser,
        shown(browser, one.url, scripted=False) as ui,
    ):
        word = ui.page.locator("#state-word")
        await ui.page.locator(f"input[value={transport}]").check(force=True)
        # Nobody tells a story into Chromium's beeps.
        await ui.page.click("#mute")
        await ui.page.click("#control")
        await expect(word).to_have_text("Listening", timeout=PATIENCE_MS)
        await ui.page.check("#verbatim")
        await ui.page.fill("#text", STORY)
        await ui.page.keyboard.press("Enter")
        await expect(word).to_have_text("Speaking", timeout=PATIENCE_MS)
        await expect(ui.page.locator(".agent .words")).to_contain_text("philosopher")
        await ui.page.wait_for_timeout(1500)
        await ui.page.get_by_role("button", name="“Stop”", exact=True).click()
        await expect(ui.page.locator("#barge-ins li").first).to_contain_text(
            "Stopped", timeout=PATIENCE_MS
        )
        await expect(ui.page.locator(".turn s")).to_contain_text("stars")
        await ui.page.click("#control")
        await expect(word).to_have_text("Ended")
        assert not [line for line in ui.complaints if "Uncaught" in line]
