"""A real Chromium, headless, with a WAV file for a microphone."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from playwright.async_api import Browser, async_playwright

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

_QUIET = (
    "--no-first-run --disable-background-networking --disable-component-update --disable-sync "
    "--disable-quic --disable-gpu"
).split()


@asynccontextmanager
async def chromium(
    microphone: Path | None = None, *, refuse: bool = False
) -> AsyncIterator[Browser]:
    """`microphone`: any WAV, played once from the moment the page asks for a microphone, then
    silence; None: Chromium's own beeps. `refuse`: the user says no to the microphone."""
    args = ["--no-sandbox", *_QUIET, "--use-fake-device-for-media-stream"]
    args.append("--deny-permission-prompts" if refuse else "--use-fake-ui-for-media-stream")
    if microphone is not None:
        args.append(f"--use-file-for-fake-audio-capture={microphone}%noloop")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=args)
        try:
            yield browser
        finally:
            await browser.close()
