"""What a user may type while a session runs, and the line that it is typed in. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from src.common.names import nearest_hint

HELP = """\
plain text        your turn, typed instead of spoken
/say TEXT         the agent says TEXT word for word
/model ID [VOICE] speak with another model from the next reply on
/quit             end the session
/help             this"""


@dataclass(frozen=True, slots=True)
class Turn:
    text: str


@dataclass(frozen=True, slots=True)
class Say:
    text: str


@dataclass(frozen=True, slots=True)
class Model:
    model: str
    voice: str = ""


@dataclass(frozen=True, slots=True)
class Quit:
    pass


@dataclass(frozen=True, slots=True)
class Note:
    """Nothing for the server: something to tell the user."""

    text: str


Command = Turn | Say | Model | Quit | Note
MAX_TEXT = 20_000


def parse_command(line: str) -> Command | None:
    """None for an empty line."""
    line = line.strip()
    if not line:
        return None
    if len(line) > MAX_TEXT:
        return Note(f"too long: {len(line)} characters, at most {MAX_TEXT} in one turn")
    if not line.startswith("/"):
        return Turn(line)
    name, _, rest = line[1:].partition(" ")
    return _slash(name, rest.strip())


def _slash(name: str, rest: str) -> Command:
    if name == "say":
        return Say(rest) if rest else Note("say what? /say TEXT")
    if name == "model":
        model, _, voice = rest.partition(" ")
        return Model(model, voice.strip()) if model else Note("which one? /model ID [VOICE]")
    if name in ("quit", "exit", "q"):
        return Quit()
    if name in ("help", "?"):
        return Note(HELP)
    known = ("say", "model", "quit", "help")
    return Note(f"unknown command /{name}{nearest_hint(name, known)}")


class LineEditor:
    """Keys in, finished lines out: the terminal's own line would be drawn over by the live one."""

    def __init__(self) -> None:
        self.text = ""
        self._escape = False

    def feed(self, keys: str) -> list[str]:
        """Lines completed by these keys. Ctrl-D on an empty line is `/quit`."""
        return [line for key in keys if (line := self._key(key)) is not None]

    def _key(self, key: str) -> str | None:
        if self._escape:
            # Arrows and the like: ESC [ … letter. There is no cursor to move.
            self._escape = not (key.isalpha() or key == "~")
        elif key == "\x1b":
            self._escape = True
        elif key in "\r\n":
            line, self.text = self.text, ""
            return line
        elif key in "\x7f\b":
            self.text = self.text[:-1]
        elif key == "\x15":
            self.text = ""
        elif key == "\x04" and not self.text:
            return "/quit"
        elif key.isprintable():
            self.text = (self.text + key)[:MAX_TEXT]
        return None
