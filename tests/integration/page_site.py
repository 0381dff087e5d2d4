"""The page as the orchestrator serves it, with a scripted session in place of its sound."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiohttp.test_utils import TestServer
from playwright.async_api import Browser, ConsoleMessage, Page, Route

from src.orchestrator.app import make_app
from src.orchestrator.auth import ApiKeys
from src.orchestrator.http_api import HttpApi
from src.orchestrator.metrics import Metrics
from src.orchestrator.web_page import WebPage
from src.rpc.errors import InUse

WEB = Path(__file__).resolve().parents[2] / "src/client/web"
SESSION = Path(__file__).with_name("page_session.js").read_text()
Event = dict[str, Any]
DESKTOP: Event = {"viewport": {"width": 1280, "height": 900}}
MIC_REFUSED: Event = {
    "code": "mic_refused",
    "title": "The microphone is blocked",
    "text": "Nobody would hear you.",
    "hint": "Allow it beside the address bar.",
    "fatal": True,
}


def model(model_id: str, state: str, **more: Any) -> dict[str, Any]:
    """As /v1/models lists it."""
    fields = {
        "id": model_id,
        "family": model_id.partition("-")[0],
        "state": state,
        "workers": {"tts@gpu0": state},
        "languages": ["en-US"],
        "voices": ["one"],
        "default_of": [],
        "licence": "MIT",
        "fallback": False,
        "load_progress": 0.0,
        "error": "",
        "refcount": 0,
        "idle_ms": 0,
        "ttl_left_ms": -1,
        "estimated_vram_gb": 0.0,
        "measured_vram_gb": 0.0,
    }
    return fields | more


@dataclass
class Fleet:
    """`ModelAdmin` as a script."""

    shelf: list[dict[str, Any]] = field(
        default_factory=lambda: [
            model("piper-en-joe", "resident", refcount=1, default_of=["tts@gpu0"]),
            model("espeak-en", "resident", idle_ms=60_000, ttl_left_ms=240_000),
            model("cosyvoice2-en-base", "loading", load_progress=0.4, estimated_vram_gb=6.0),
            model("xtts-v2", "cold", estimated_vram_gb=2.5, licence="CPML"),
        ]
    )
    asked: list[str] = field(default_factory=list)

    async def models(self) -> list[dict[str, Any]]:
        self.asked.append("list")
        return self.shelf

    def workers(self) -> list[dict[str, Any]]:
        return [{"name": "tts@gpu0", "vram_gb": 24.0, "sessions": 1, "max_sessions": 8}]

    async def load(self, model_id: str) -> dict[str, Any]:
        self.asked.append(f"load {model_id}")
        found = next(entry for entry in self.shelf if entry["id"] == model_id)
        found["state"] = "resident"
        return found

    async def unload(self, model_id: str) -> dict[str, Any]:
        raise InUse(f"{model_id} is held by another program")


@dataclass
class Site:
    url: str
    fleet: Fleet


@asynccontextmanager
async def site(*keys: str) -> AsyncIterator[Site]:
    fleet, metrics, accepted = Fleet(), Metrics(), ApiKeys(keys)
    api = HttpApi(keys=accepted, checks={}, metrics=metrics, models=fleet, page=WebPage(WEB))
    app = make_app(api=api, sessions=None, keys=accepted, metrics=metrics)
    async with TestServer(app) as server:
        yield Site(str(server.make_url("/")), fleet)


@dataclass
class ShownPage:
    """`page` under test, and everything that it should not have done."""

    page: Page
    hosts: set[str] = field(default_factory=set)
    complaints: list[str] = field(default_factory=list)

    def hear(self, line: ConsoleMessage) -> None:
        if line.type in ("error", "warning"):
            self.complaints.append(line.text)

    async def say(self, *events: Event) -> None:
        """The server's events, one after the other."""
        await self.page.evaluate("events => events.forEach((event) => fake.say(event))", events)
        await self.settle()

    async def tell(self, kind: str, **detail: Any) -> None:
        """What the session itself dispatches."""
        await self.page.evaluate("([kind, detail]) => fake.tell(kind, detail)", [kind, detail])
        await self.settle()

    async def settle(self) -> None:
        """Until everything is drawn."""
        await self.page.evaluate(
            "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
        )

    async def start(self) -> None:
        await self.page.click("#control")
        await self.settle()

    async def text(self, selector: str) -> str:
        return " ".join((await self.page.locator(selector).inner_text()).split())

    async def calls(self, name: str) -> list[list[Any]]:
        """What was asked of the session: [arguments, …]."""
        made: list[list[Any]] = await self.page.evaluate("() => fake.calls")
        return [call[1:] for call in made if call[0] == name]


@asynccontextmanager
async def shown(
    browser: Browser, url: str, *, scripted: bool = True, before: str = "", **context: Any
) -> AsyncIterator[ShownPage]:
    """Open the page. `before` is JavaScript that runs ahead of its own; without `scripted` the
    session is the real one."""
    surroundings = await browser.new_context(**(DESKTOP | context))
    page = await surroundings.new_page()
    one = ShownPage(page)
    page.on("request", lambda request: one.hosts.add(urlsplit(request.url).netloc))
    page.on("websocket", lambda socket: one.hosts.add(urlsplit(socket.url).netloc))
    page.on("pageerror", lambda error: one.complaints.append(str(error)))
    page.on("console", one.hear)
    try:
        if before:
            await page.add_init_script(before)
        if scripted:
            await page.route("**/web/session.js", _scripted)
        await page.goto(url)
        await page.wait_for_selector("#shelf li, .trouble")
        yield one
    finally:
        await surroundings.close()


async def _scripted(route: Route) -> None:
    await route.fulfill(body=SESSION, content_type="text/javascript")
