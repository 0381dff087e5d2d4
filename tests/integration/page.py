"""The page's sound without its looks: one VoiceSession in Chromium, and a log of all it says."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import soundfile
from playwright.async_api import Browser, Error, Page

from src.audio.pcm import Float32
from tests.audio_fixtures import RATE

PATIENCE_MS = 30_000
Detail = dict[str, Any]

_HTML = """<!doctype html><meta charset="utf-8"><title>page under test</title>
<button>Start</button>
<script type="module">
import { VoiceSession, available } from '/web/session.js';
import { listDevices } from '/web/devices.js';
Object.assign(window, { available, listDevices });
const session = window.session = new VoiceSession();
const log = window.log = [];
for (const type of ['status', 'event', 'level', 'played', 'silence', 'trouble']) {
  session.addEventListener(type, ({ detail }) => log.push({ type, at: performance.now(), detail }));
}
window.told = (type, fields = {}) => log
  .filter((entry) => entry.type === type)
  .map(({ detail }) => (type === 'event' ? detail.event : detail))
  .filter((detail) => Object.entries(fields).every(([key, value]) => detail[key] === value));
window.level = () => log.findLast((entry) => entry.type === 'level')?.detail ?? {};
// What the microphone sent over the WebSocket: bytes, and seconds of the sound card's clock.
window.sent = [];
const Context = window.AudioContext;
let clock;
window.AudioContext = class extends Context {
  constructor(options) { super(options); clock = this; }
};
const send = WebSocket.prototype.send;
WebSocket.prototype.send = function (data) {
  if (typeof data !== 'string') window.sent.push({ bytes: data.byteLength, at: clock.currentTime });
  send.call(this, data);
};
window.streams = [];
const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
navigator.mediaDevices.getUserMedia = async (wanted) => {
  const stream = await ask(wanted);
  streams.push(Object.assign(stream, { since: performance.now() }));
  return stream;
};
const wav = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer;
window.injectWav = (text) => session.inject(wav(text));
document.querySelector('button').onclick = () => session.start(window.options);
</script>"""


@dataclass
class TalkingPage:
    """`told(type, …)` is what `session` dispatched: the details, or the server's events."""

    page: Page
    transport: str = "ws"
    hosts: set[str] = field(default_factory=set)
    """Everything that the page talked to."""
    complaints: list[str] = field(default_factory=list)
    """Uncaught exceptions, and what it wrote to the console as errors."""

    async def start(self, **options: Any) -> None:
        """Click, and wait until it is live or has ended."""
        options = {"transport": self.transport, **options}
        await self.page.evaluate("options => { window.options = options }", options)
        await self.page.click("button")
        await self.until("['live', 'ended'].includes(session.phase)", "the session's start")

    async def live(self, **options: Any) -> None:
        await self.start(**options)
        assert await self.run("session.phase") == "live", await self.told("trouble")

    async def run(self, script: str) -> Any:
        return await self.page.evaluate(script)

    async def say(self, text: str, *, speak: bool = True) -> None:
        """Have the agent speak a text; without `speak`, type it as the user."""
        await self.page.evaluate("([text, speak]) => session.sendText(text, speak)", [text, speak])

    async def talk(self, samples: Float32) -> None:
        """Into the microphone's way up; returns when it has been said."""
        file = io.BytesIO()
        soundfile.write(file, samples, RATE, format="WAV", subtype="PCM_16")
        await self.page.evaluate("injectWav", base64.b64encode(file.getvalue()).decode())

    async def inject(self, name: str) -> None:
        await self.page.evaluate("name => session.inject(name)", name)

    async def told(self, kind: str, **fields: Any) -> list[Detail]:
        found: list[Detail] = await self.page.evaluate(
            "([kind, fields]) => told(kind, fields)", [kind, fields]
        )
        return found

    async def until(self, condition: str, what: str, patience_ms: int = PATIENCE_MS) -> None:
        """`condition` is JavaScript."""
        try:
            await self.page.wait_for_function(condition, timeout=patience_ms, polling=20)
        except Error:
            # Neither levels nor positions: there are too many of them.
            last = await self.run("log.filter(({ type }) => !/level|played/.test(type)).slice(-20)")
            raise AssertionError(
                f"waited in vain for {what}; {self.complaints}; last: {json.dumps(last)}"
            ) from None

    async def until_told(
        self, kind: str, *, more_than: int = 0, patience_ms: int = PATIENCE_MS, **fields: Any
    ) -> Detail:
        """The newest one, once there are more than so many."""
        condition = f"told('{kind}', {json.dumps(fields)}).length > {more_than}"
        await self.until(condition, f"{kind} {fields}", patience_ms)
        return (await self.told(kind, **fields))[-1]

    async def event(self, name: str, *, more_than: int = 0, **fields: Any) -> Detail:
        return await self.until_told("event", more_than=more_than, type=name, **fields)


@asynccontextmanager
async def talking_page(
    browser: Browser, url: str, transport: str = "ws"
) -> AsyncIterator[TalkingPage]:
    """A page at the orchestrator's origin, in a context of its own."""
    context = await browser.new_context()
    page = await context.new_page()
    talking = TalkingPage(page, transport)
    page.on("request", lambda request: talking.hosts.add(urlsplit(request.url).netloc))
    page.on("websocket", lambda socket: talking.hosts.add(urlsplit(socket.url).netloc))
    page.on("pageerror", lambda error: talking.complaints.append(str(error)))
    page.on(
        "console",
        lambda line: talking.complaints.append(line.text) if line.type == "error" else None,
    )

    try:
        # Any answer of the server's own will do: a document that a test made up may not connect to
        # the loopback (Chromium's local network access checks).
        await page.goto(f"{url}/healthz")
        await page.set_content(_HTML)
        await page.wait_for_function("window.session")
        yield talking
    finally:
        await context.close()
