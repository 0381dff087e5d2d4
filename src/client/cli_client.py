"""Talk from a terminal: `python -m src.client.cli_client --host ws://localhost:8080`."""

from __future__ import annotations

import argparse
import asyncio
import codecs
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from src.audio.pcm import Int16, level_dbfs
from src.client.commands import LineEditor, Model, Note, Quit, Say, Turn, parse_command
from src.client.devices import (
    MIC_FRAME_MS,
    MIC_RATE,
    DeviceMicrophone,
    DeviceSpeaker,
    FileMicrophone,
    Microphone,
    NoRecorder,
    Recorder,
    Silence,
    WavRecorder,
    load_sounddevice,
    read_clip,
)
from src.client.goodbye import Goodbye
from src.client.screen import Display, JsonLines, Screen
from src.client.session import Flushed, SessionFailed, VoiceClient, connect
from src.common.tasks import TaskGroup, leaves, timeout
from src.rpc.errors import DuplexError, Unavailable
from src.rpc.ws_events import ServerEvent, SessionStart

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_REFUSED = 4
EXIT_FULL = 5
EXIT_LOST = 6
EXIT_NO_REPLY = 7

EPILOG = """\
while it runs, type:
  plain text          your turn, typed instead of spoken
  /say TEXT           the agent says TEXT word for word
  /model ID [VOICE]   speak with another model from the next reply on
  /quit, /help

exit status:
  0  ended by you, by /quit, or after the reply to --in
  1  the session failed             2  bad arguments or an unreadable file
  3  no server there                4  the API key was refused
  5  the server is full             6  the connection was lost
  7  --in was played to its end and no reply came
"""

_CODES = {
    "unauthenticated": EXIT_REFUSED,
    "exhausted": EXIT_FULL,
    "unavailable": EXIT_UNREACHABLE,
    "invalid_argument": EXIT_USAGE,
    "unknown_name": EXIT_USAGE,
}
_GOODBYE_S = 3.0


class ConnectionLost(DuplexError):
    """The socket closed and nobody said why."""


def exit_status(error: DuplexError) -> int:
    if isinstance(error, ConnectionLost):
        return EXIT_LOST
    code = error.error.code if isinstance(error, SessionFailed) else error.code
    return _CODES.get(code, EXIT_FAILED)


@dataclass(frozen=True, slots=True)
class Options:
    host: str
    start: SessionStart
    api_key: str = ""
    clip: Path | None = None
    out: Path | None = None
    stereo: bool = False
    json: bool = False
    devices: bool = True


def parse_args(argv: list[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m src.client.cli_client",
        description="A spoken conversation from a terminal. Without microphone and speaker, give "
        "it --in talk.wav and --out reply.wav, or type.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default="ws://localhost:8080", help="default: %(default)s")
    parser.add_argument(
        "--in", dest="clip", type=Path, help="speak this file instead of a microphone"
    )
    parser.add_argument("--out", type=Path, help="write the agent's voice here (48 kHz WAV)")
    parser.add_argument("--stereo", action="store_true", help="--out: you left, the agent right")
    parser.add_argument("--model", default="", help="the voice's model (default: the server's)")
    parser.add_argument("--voice", default="")
    parser.add_argument("--language", default="")
    parser.add_argument("--mode", default="default", help="routing mode (default: %(default)s)")
    parser.add_argument(
        "--api_key", default=os.environ.get("DUPLEX_API_KEY", ""), help="default: $DUPLEX_API_KEY"
    )
    parser.add_argument(
        "--no_devices", action="store_true", help="never open microphone or speaker"
    )
    parser.add_argument("--json", action="store_true", help="one event a line on stdout")
    args = parser.parse_args(argv)
    if args.stereo and args.out is None:
        parser.error("--stereo needs --out")
    return Options(
        host=args.host,
        start=SessionStart(
            sample_rate=MIC_RATE,
            language=args.language,
            mode=args.mode,
            model=args.model,
            voice=args.voice,
        ),
        api_key=args.api_key,
        clip=args.clip,
        out=args.out,
        stereo=args.stereo,
        json=args.json,
        devices=not args.no_devices,
    )


class Conversation:
    """One session at the terminal: what it hears, shows, records, and when it is over."""

    def __init__(
        self, mic: Microphone, display: Display, recorder: Recorder, speak: Callable[[Int16], None]
    ) -> None:
        self._mic = mic
        self._display = display
        self._recorder = recorder
        self._speak = speak
        self._goodbye = Goodbye()
        self._shown_silences = 0
        self._stop = asyncio.Event()
        self._stopped_by_user = False

    @property
    def replies(self) -> int:
        return self._goodbye.replies

    @property
    def stopped_by_user(self) -> bool:
        return self._stopped_by_user

    def stop(self) -> None:
        """The user wants to leave."""
        self._stopped_by_user = True
        self._stop.set()

    # --- called by the session ---

    def on_event(self, at_ms: float, event: ServerEvent) -> None:
        self._goodbye.see(at_ms, event)
        self._display.event(at_ms, event)

    def on_audio(self, samples: Int16) -> None:
        self._recorder.agent(samples)
        self._speak(samples)

    # --- the session's life ---

    async def run(self, client: VoiceClient, keys: asyncio.Queue[str]) -> None:
        """Until the user, the end of the file or the server ends it. Raises ConnectionLost."""
        async with TaskGroup() as tasks:
            hearing = tasks.create_task(self._hear(client), name="microphone")
            typing = tasks.create_task(self._obey(client, keys), name="typing")
            watching = tasks.create_task(self._watch(client), name="end")
            await self._stop.wait()
            for task in (hearing, typing, watching):
                task.cancel()
        self._show_silences(client.flushes)
        if client.closed.is_set():
            if client.ended is None:
                raise ConnectionLost("the connection was lost; the server did not say why")
            return
        await client.end()
        with suppress(asyncio.TimeoutError):
            async with timeout(_GOODBYE_S):
                await client.closed.wait()

    async def _watch(self, client: VoiceClient) -> None:
        await client.closed.wait()
        self._stop.set()

    async def _hear(self, client: VoiceClient) -> None:
        """20 ms of sound every 20 ms, gapless on the session's time line."""
        sent = 0
        while not client.closed.is_set():
            await asyncio.sleep(max(0.0, sent * MIC_FRAME_MS - client.now_ms()) / 1000)
            frame = self._mic.read()
            sent += 1
            self._recorder.user(frame)
            self._display.level(level_dbfs(frame))
            with suppress(ConnectionError):
                await client.send_mic(frame.tobytes())
            self._show_silences(client.flushes)
            if self._mic.exhausted:
                self._goodbye.spoken_out(client.now_ms())
            if self._goodbye.due(client.now_ms(), playing=client.player.playing):
                self._stop.set()

    def _show_silences(self, flushes: list[Flushed]) -> None:
        for flush in flushes[self._shown_silences :]:
            if flush.silent_ms is None:
                return
            self._shown_silences += 1
            self._display.local(
                flush.silent_ms,
                "silence",
                utterance_id=flush.utterance_id,
                edge_ms=flush.edge_ms,
                heard_seq=flush.heard_seq,
                after_ms=round(flush.silent_ms - flush.received_ms, 2),
            )

    # --- typing ---

    async def _obey(self, client: VoiceClient, keys: asyncio.Queue[str]) -> None:
        """Keys as they are pressed, or whole lines from a pipe. "" is the end of the pipe."""
        editor = LineEditor()
        await client.started.wait()
        while chunk := await keys.get():
            for line in editor.feed(chunk):
                if not self._stop.is_set():
                    await self._command(client, line)
            self._display.typing(editor.text)
        if isinstance(self._mic, Silence):
            self._goodbye.spoken_out(client.now_ms())

    async def _command(self, client: VoiceClient, line: str) -> None:
        command = parse_command(line)
        if isinstance(command, Turn | Say):
            self._goodbye.asked(client.now_ms())
            await client.send_text(command.text, speak=isinstance(command, Say))
        elif isinstance(command, Model):
            await client.switch_model(command.model, command.voice)
        elif isinstance(command, Quit):
            self.stop()
        elif isinstance(command, Note):
            self._display.note(command.text)


# --- the terminal ---


@contextmanager
def keyboard(loop: asyncio.AbstractEventLoop) -> Iterator[asyncio.Queue[str]]:
    """What is typed, key by key on a terminal; as it comes from a pipe."""
    # Bounded: a pipe with more than 4 MB to say is not a person, and is not read any further.
    keys: asyncio.Queue[str] = asyncio.Queue(maxsize=1_000)
    try:
        descriptor = sys.stdin.fileno()
    except (AttributeError, OSError, ValueError):
        yield keys
        return
    decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def readable() -> None:
        data = os.read(descriptor, 4096)
        text = decoder.decode(data)
        if text or not data:
            keys.put_nowait(text)
        if not data or keys.qsize() > 990:
            loop.remove_reader(descriptor)

    with _cbreak(descriptor):
        try:
            loop.add_reader(descriptor, readable)
        except (PermissionError, NotImplementedError):
            # A plain file on stdin (epoll refuses it) has all its lines at once.
            for text in (sys.stdin.read(), ""):
                keys.put_nowait(text)
        try:
            yield keys
        finally:
            loop.remove_reader(descriptor)


@contextmanager
def _cbreak(descriptor: int) -> Iterator[None]:
    """Keys at once and without echo; Ctrl-C stays a signal."""
    if not os.isatty(descriptor):
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


# --- putting it together ---


@dataclass(slots=True)
class _Sound:
    mic: Microphone
    speaker: DeviceSpeaker | None = None

    def play(self, samples: Int16) -> None:
        if self.speaker is not None:
            self.speaker.play(samples)

    def close(self) -> None:
        self.mic.close()
        if self.speaker is not None:
            self.speaker.close()


def open_sound(options: Options, display: Display) -> _Sound:
    """A file's clip wins over the microphone; without either the user types."""
    clip = FileMicrophone(read_clip(options.clip)) if options.clip else None
    if not options.devices:
        return _Sound(clip or Silence())
    try:
        sounddevice = load_sounddevice()
    except Unavailable as missing:
        if clip is None:
            display.note(f"{missing.message}. Type to talk, or use --in talk.wav --out reply.wav.")
        return _Sound(clip or Silence())
    mic = clip or DeviceMicrophone(sounddevice, asyncio.get_running_loop())
    return _Sound(mic, DeviceSpeaker(sounddevice))


async def talk(options: Options, display: Display) -> int:
    """One session, from connecting to the exit status. Raises DuplexError, alone or in a group."""
    loop = asyncio.get_running_loop()
    sound = open_sound(options, display)
    recorder: Recorder = NoRecorder()
    try:
        if options.out is not None:
            recorder = WavRecorder(options.out, stereo=options.stereo)
        conversation = Conversation(sound.mic, display, recorder, sound.play)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, conversation.stop)
        with keyboard(loop) as keys:
            async with connect(
                options.host,
                options.start,
                api_key=options.api_key,
                on_event=conversation.on_event,
                on_audio=conversation.on_audio,
            ) as client:
                await conversation.run(client, keys)
    finally:
        recorder.close()
        sound.close()
    unanswered = options.clip is not None and not conversation.replies
    return EXIT_NO_REPLY if unanswered and not conversation.stopped_by_user else EXIT_OK


def main(argv: list[str] | None = None) -> int:
    options = parse_args(argv)
    display: Display = JsonLines() if options.json else Screen(Console())
    try:
        status = asyncio.run(talk(options, display))
    except BaseException as error:
        display.close()
        faults = [leaf for leaf in leaves(error) if not isinstance(leaf, asyncio.CancelledError)]
        if not faults or not all(isinstance(fault, DuplexError) for fault in faults):
            raise
        first = faults[0]
        assert isinstance(first, DuplexError)  # noqa: S101 - checked above
        print(f"cli: {first.message}", file=sys.stderr)
        return exit_status(first)
    display.close()
    if status == EXIT_NO_REPLY:
        print("cli: no reply came; was there speech in the file?", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
