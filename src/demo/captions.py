"""Live captions: what is being said, as it happens."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from src.rpc.ws_events import (
    BargeIn,
    Error,
    Heard,
    Latency,
    ModelStatus,
    ServerEvent,
    SessionStarted,
    TranscriptEvent,
)


class Captions:
    """Prints one line for each thing that a listener would notice."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, at_ms: float, event: ServerEvent) -> None:
        line = self._line(event)
        if line is not None:
            self._console.print(Text(f"{at_ms / 1000:6.1f} s  ", style="dim").append_text(line))

    def _line(self, event: ServerEvent) -> Text | None:
        if isinstance(event, SessionStarted):
            voice = f"{event.model}" + (" (stand-in)" if event.fallback else "")
            parts = f"voice {voice}, recogniser {event.recogniser}, language model {event.llm}"
            return Text(f"connected: {parts}", style="dim")
        if isinstance(event, TranscriptEvent) and event.final:
            return Text.from_markup(f"[bold blue]user[/]   {escape(event.text)}")
        if isinstance(event, Heard):
            text = Text.from_markup(f"[bold dark_orange]agent[/]  {escape(event.heard)}")
            return text.append(f" {event.cut}", style="strike dim") if event.cut else text
        return self._mark(event)

    def _mark(self, event: ServerEvent) -> Text | None:
        if isinstance(event, BargeIn) and event.verdict == "pending":
            return Text("  ❚❚ paused: somebody spoke", style="yellow")
        if isinstance(event, BargeIn) and event.verdict == "false":
            return Text(f"  ▶  false alarm ({event.reason}), going on", style="green")
        if isinstance(event, BargeIn):
            return Text(f"  ■  interrupted ({event.reason}), stopped", style="red")
        if isinstance(event, Latency):
            return Text(f"  first audio {event.first_audio_ms} ms after the last word", style="dim")
        if isinstance(event, ModelStatus):
            return Text(f"  voice {event.model}: {event.state} {event.message}", style="magenta")
        if isinstance(event, Error):
            return Text(f"  error {event.code}: {event.message}", style="bold red")
        return None
