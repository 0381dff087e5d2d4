"""What the user sees: captions that stay, and one live line under them; or JSON for a machine.

`View` is pure: events in, captions and the live line out. `Screen` and `JsonLines` show it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from src.rpc.ws_events import (
    AudioBegin,
    BargeIn,
    Error,
    Heard,
    Latency,
    ModelStatus,
    ReplyText,
    ServerEvent,
    SessionEnded,
    SessionStarted,
    State,
    TranscriptEvent,
)

STATES = {
    "connecting": ("○", "dim"),
    "listening": ("●", "bold green"),
    "speaking": ("▶", "bold dark_orange"),
    "barged_in": ("❚❚", "bold red"),
}
VERDICTS = {
    "pending": "paused",
    "real": "you interrupted",
    "false": "false alarm, it went on",
}
_BARS = " ▁▂▃▄▅▆▇█"
_QUIET_DBFS, _LOUD_DBFS = -60.0, -6.0


def meter(dbfs: float, width: int = 6) -> str:
    """A level as a bar: empty at -60 dBFS, full at -6."""
    share = (dbfs - _QUIET_DBFS) / (_LOUD_DBFS - _QUIET_DBFS)
    eighths = round(min(1.0, max(0.0, share)) * width * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_BARS[rest] if rest else "")).ljust(width)


@dataclass(slots=True)
class View:
    state: str = "connecting"
    partial: str = ""
    reply: str = ""
    latency_ms: int | None = None
    verdict: str = ""
    silence_ms: float | None = None
    mic_dbfs: float = -120.0
    typed: str = ""

    def see(self, event: ServerEvent) -> list[Text]:
        """The captions that this event is worth."""
        if isinstance(event, State):
            self.state = event.state
        elif isinstance(event, TranscriptEvent):
            return self._transcript(event)
        elif isinstance(event, ReplyText):
            self.reply += event.text
        elif isinstance(event, AudioBegin) and not event.resumed:
            self.verdict, self.silence_ms = "", None
        elif isinstance(event, Latency):
            self.latency_ms = event.first_audio_ms
        elif isinstance(event, BargeIn):
            self.verdict = event.verdict
        elif isinstance(event, Heard):
            self.reply = ""
            return [_spoken(event)]
        else:
            return _announcement(event)
        return []

    def silent(self, after_ms: float) -> None:
        """A flush was obeyed so long after it had come."""
        self.silence_ms = after_ms

    def _transcript(self, event: TranscriptEvent) -> list[Text]:
        self.partial = "" if event.final else event.text
        if not event.final or not event.text:
            return []
        return [_line("you", "bold blue", event.text)]

    def line(self) -> Text:
        symbol, style = STATES.get(self.state, ("?", ""))
        out = Text(no_wrap=True, overflow="ellipsis")
        out.append(f"{symbol} {self.state.replace('_', ' '):<10}", style=style)
        out.append(f" [{meter(self.mic_dbfs)}]", style="cyan")
        if self.latency_ms is not None:
            out.append(f"  {self.latency_ms} ms", style="bold")
        if self.verdict:
            out.append(f"  {VERDICTS[self.verdict]}", style="yellow")
            if self.silence_ms is not None:
                out.append(f", silent {self.silence_ms:.0f} ms after the flush", style="yellow")
        if self.typed:
            return out.append("  > " + self.typed[-200:])
        if self.partial:
            return out.append("  " + self.partial, style="italic blue")
        return out.append("  " + self.reply[-200:], style="dim")


def _spoken(event: Heard) -> Text:
    text = _line("agent", "bold dark_orange", event.heard)
    if event.cut:
        text.append(" " if event.heard else "").append(event.cut.strip(), style="strike dim")
    return text


def _line(who: str, style: str, text: str) -> Text:
    return Text(f"{who:<6} ", style=style).append(text.strip(), style="not bold default")


def _announcement(event: ServerEvent) -> list[Text]:
    if isinstance(event, SessionStarted):
        facts = [event.model, event.voice, event.recogniser, event.llm]
        note = f"; stand-in voice: {event.fallback_reason}" if event.fallback else ""
        return [Text("connected: " + ", ".join(f for f in facts if f) + note, style="dim")]
    if isinstance(event, ModelStatus):
        return [
            Text(f"model {event.model}: {event.state} {event.message}".strip(), style="magenta")
        ]
    if isinstance(event, Error):
        wait = f" (try again in {event.retry_after_ms} ms)" if event.retry_after_ms else ""
        return [Text(f"{event.code}: {event.message}{wait}", style="bold red")]
    if isinstance(event, SessionEnded):
        return [Text(f"session ended: {event.reason}", style="dim")]
    return []


class Display(Protocol):
    def event(self, at_ms: float, event: ServerEvent) -> None: ...

    def local(self, at_ms: float, kind: str, **facts: Any) -> None:
        """Something only the client knows; JSON calls it `client.KIND`."""
        ...

    def note(self, text: str) -> None: ...

    def level(self, dbfs: float) -> None: ...

    def typing(self, text: str) -> None: ...

    def close(self) -> None: ...


class Screen:
    def __init__(self, console: Console) -> None:
        self._view = View()
        self._console = console
        self._live = Live(
            get_renderable=self._view.line, console=console, refresh_per_second=12, transient=True
        )
        # On a pipe the live line would be printed over and over.
        if console.is_terminal:
            self._live.start()

    def event(self, at_ms: float, event: ServerEvent) -> None:
        for caption in self._view.see(event):
            self._console.print(caption)

    def local(self, at_ms: float, kind: str, **facts: Any) -> None:
        if kind == "silence":
            self._view.silent(facts["after_ms"])

    def note(self, text: str) -> None:
        self._console.print(Text(text, style="dim"))

    def level(self, dbfs: float) -> None:
        self._view.mic_dbfs = dbfs

    def typing(self, text: str) -> None:
        self._view.typed = text

    def close(self) -> None:
        self._live.stop()


class JsonLines:
    """One object a line: the server's events with `t_ms` (the client's clock), and `client.*`."""

    def __init__(self, out: TextIO = sys.stdout) -> None:
        self._out = out

    def event(self, at_ms: float, event: ServerEvent) -> None:
        self._write({"t_ms": round(at_ms, 1), **event.model_dump()})

    def local(self, at_ms: float, kind: str, **facts: Any) -> None:
        self._write({"t_ms": round(at_ms, 1), "type": f"client.{kind}", **facts})

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)

    def level(self, dbfs: float) -> None:
        pass

    def typing(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass

    def _write(self, line: dict[str, Any]) -> None:
        print(json.dumps(line, ensure_ascii=False), file=self._out, flush=True)
