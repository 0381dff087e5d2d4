"""The page for everybody: screen readers, every eye and theme, no motion, every width."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from PIL import Image
from playwright.async_api import Browser, expect

from tests.integration.browser import chromium, needs_chromium
from tests.integration.page_site import (
    MIC_REFUSED,
    ShownPage,
    Site,
    shown,
    site,
)
from tests.integration.test_page_state import ASK, CUT_IN, ENDED, FINAL, HEARD, SPEAK, verdict

pytestmark = [pytest.mark.asyncio(loop_scope="module"), needs_chromium]


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


async def test_everything_that_can_be_pressed_has_a_name(ui: ShownPage) -> None:
    await ui.start()
    await ui.tell("trouble", **MIC_REFUSED)
    await ui.tell("trouble", **{**MIC_REFUSED, "code": "unauthorized"})
    devtools = await ui.page.context.new_cdp_session(ui.page)
    tree: dict[str, Any] = await devtools.send("Accessibility.getFullAXTree")
    pressed = "button textbox combobox radio checkbox meter img link status alert log group".split()
    found = [node for node in tree["nodes"] if node.get("role", {}).get("value") in pressed]
    needs = [node for node in found if node["role"]["value"] not in ("status", "alert", "group")]
    assert len(needs) > 25
    nameless = [node for node in needs if not node.get("name", {}).get("value", "").strip()]
    assert not nameless


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_every_text_can_be_read(browser: Browser, place: Site, scheme: Any) -> None:
    """WCAG AA: 4.5 to 1 for text, 3 to 1 for the edges of what can be pressed."""
    colours = """() => {
      const probe = document.body.appendChild(document.createElement('i'));
      const rgb = (name) => {
        probe.style.color = `var(--${name})`;
        return getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map(Number);
      };
      const names = ['paper', 'raised', 'ink', 'soft', 'you', 'agent', 'edge'];
      return Object.fromEntries(names.map((name) => [name, rgb(name)]));
    }"""
    async with shown(browser, place.url, color_scheme=scheme) as ui:
        found = await ui.page.evaluate(colours)
    for ground in ("paper", "raised"):
        for name in ("ink", "soft", "you", "agent"):
            assert contrast(found[name], found[ground]) >= 4.5, (name, ground)
        assert contrast(found["edge"], found[ground]) >= 3, ground


def contrast(one: list[float], other: list[float]) -> float:
    """WCAG 2.2's contrast ratio of two sRGB colours, 0 to 255."""
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(rgb: list[float]) -> float:
    parts = [c / 255 for c in rgb]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


async def test_whoever_wants_no_motion_gets_little(browser: Browser, place: Site) -> None:
    count = """
      window.drawn = 0;
      const clear = CanvasRenderingContext2D.prototype.clearRect;
      CanvasRenderingContext2D.prototype.clearRect = function (...box) {
        window.drawn += 1;
        clear.apply(this, box);
      };
    """
    watch = """async () => {
      const before = drawn;
      for (let i = 0; i < 60; i += 1) await new Promise(requestAnimationFrame);
      return drawn - before;
    }"""
    for motion, few in (("reduce", True), ("no-preference", False)):
        wanted: Any = motion
        async with shown(browser, place.url, before=count, reduced_motion=wanted) as ui:
            await ui.start()
            await ui.say(*ASK, ENDED, FINAL)
            assert (await ui.page.evaluate(watch) < 20) == few
            turning = await ui.page.locator(".halo").evaluate(
                "(e) => getComputedStyle(e).animationName"
            )
            assert (turning == "none") == few


@pytest.mark.parametrize("width", [320, 375, 700, 1440])
async def test_no_width_scrolls_sideways(browser: Browser, place: Site, width: int) -> None:
    async with shown(browser, place.url, viewport={"width": width, "height": 800}) as ui:
        await ui.start()
        await ui.tell("status", phase="reconnecting", reason="lost")
        assert await ui.page.evaluate("document.documentElement.scrollWidth") <= width
        await ui.tell("status", phase="live", reason="")
        await ui.say(*ASK, ENDED, FINAL, *SPEAK, verdict("real"), HEARD, *CUT_IN)
        await ui.say({**FINAL, "turn_id": "t2", "text": "Donaudampfschifffahrt" * 9})
        await ui.tell("trouble", **MIC_REFUSED)
        await ui.tell("trouble", **{**MIC_REFUSED, "code": "unauthorized"})
        assert await ui.page.evaluate("document.documentElement.scrollWidth") <= width
        await ui.page.click("#help-button")
        await ui.page.click("#help button")
        outside = """() => [...document.querySelectorAll('button, input, select, textarea, canvas')]
          .map((e) => e.getBoundingClientRect())
          .filter((box) => box.width && (box.left < -1 || box.right > innerWidth + 1)).length"""
        assert await ui.page.evaluate(outside) == 0


async def test_both_themes_are_painted_and_a_choice_is_kept(browser: Browser, place: Site) -> None:
    async with shown(browser, place.url, color_scheme="light") as ui:
        light = await _shades(ui)
        await ui.page.get_by_role("button", name="Theme: automatic").click()
        dark = await _shades(ui)
        await ui.page.reload()
        await expect(ui.page.locator("html")).to_have_attribute("data-theme", "dark")
    assert light.mean() > 200
    assert dark.mean() < 60
    assert len(np.unique(light)) > 50
    assert len(np.unique(dark)) > 50


async def _shades(ui: ShownPage) -> Any:
    await ui.settle()
    return np.asarray(Image.open(io.BytesIO(await ui.page.screenshot())).convert("L"))
