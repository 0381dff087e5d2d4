"""The client and its command line against a server that plays a script over a real WebSocket."""

from __future__ import annotations

import asyncio
import io
import json
import wave
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from aiohttp import WSMsgType, web
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from src.audio.pcm import FRAME_SAMPLES, SAMPLE_RATE, Int16
from src.client import cli_client
from src.client.cli_client import Options, main, parse_args, talk
from src.client.commands import LineEditor, Model, Note, Quit, Say, Turn, parse_command
from src.client.devices import MIC_FRAME, MIC_RATE, FileMicrophone, SpeakerQueue, read_clip
from src.client.goodbye import Goodbye
from src.client.screen import JsonLines, Screen, View, meter
from src.client.session import SessionFailed, VoiceClient, connect, session_url
from src.common.tasks import leaves, timeout
from src.rpc.errors import Exhausted, InvalidArgument, Unauthenticated, Unavailable
from src.rpc.ws_events import (
    AudioBegin,
    AudioEnd,
    BargeIn,
    ClientEvent,
    Error,
    Flush,
    Heard,
    Latency,
    ModelSwitch,
    Playback,
    ReplyText,
    ServerEvent,
    SessionEnd,
    SessionEnded,
    SessionStart,
    SessionStarted,
    Speech,
    State,
    TextInput,
    TranscriptEvent,
    parse_client,
)

LIVENESS_S = 10.0


def frame(value: int) -> bytes:
    return np.full(FRAME_SAMPLES, value, dtype="<i2").tobytes()


async def until(condition: Callable[[], object]) -> None:
    async with timeout(LIVENESS_S):
        while not condition():  # noqa: ASYNC110 - the other side has no event to wait for
            await asyncio.sleep(0.005)


class Line:
    """The server's end of one connection, for a script to speak on."""

    def __init__(self, socket: web.WebSocketResponse) -> None:
        self._socket = socket
        self.events: list[ClientEvent] = []
        self.mic: list[bytes] = []

    async def say(self, *events: ServerEvent) -> None:
        for event in events:
            await self._socket.send_str(event.model_dump_json())

    async def sound(self, *values: int) -> None:
        for value in values:
            await self._socket.send_bytes(frame(value))

    async def raw(self, data: str | bytes) -> None:
        if isinstance(data, str):
            await self._socket.send_str(data)
        else:
            await self._socket.send_bytes(data)

    async def hang_up(self, code: int = 1000) -> None:
        await self._socket.close(code=code)

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    async def heard(self, utterance_id: str, seq: int) -> None:
        """Until the client has acknowledged this frame."""
        await until(lambda: (utterance_id, seq) in [(a.utterance_id, a.seq) for a in self.acks])

    @property
    def acks(self) -> list[Playback]:
        return self.of(Playback)

    async def listen(self) -> None:
        async for message in self._socket:
            if message.type is WSMsgType.TEXT:
                self.events.append(parse_client(message.data))
            elif message.type is WSMsgType.BINARY:
                self.mic.append(message.data)


Script = Callable[[Line], Awaitable[None]]
STARTED = SessionStarted(session_id="s1", model="piper-joe", voice="joe", llm="echo")


class ScriptedServer:
    def __init__(self, script: Script, status: int = 101) -> None:
        self._script = script
        self._status = status
        self.headers: dict[str, str] = {}
        self.lines: list[Line] = []
        self.host = ""

    @property
    def line(self) -> Line:
        return self.lines[-1]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.headers = dict(request.headers)
        if self._status != 101:
            body = {"error": {"code": "x", "message": f"because {self._status}"}}
            return web.json_response(body, status=self._status)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        line = Line(socket)
        self.lines.append(line)
        listening = asyncio.create_task(line.listen())
        try:
            await until(lambda: line.of(SessionStart))
            await line.say(STARTED)
            await self._script(line)
            await until(lambda: listening.done() or line.of(SessionEnd))
            if not socket.closed:
                await line.say(SessionEnded(reason="client_ended"))
        finally:
            await socket.close()
            await listening
        return socket

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[ScriptedServer]:
        app = web.Application()
        app.router.add_get("/v1/session", self.handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.host = f"ws://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()


class Ears:
    def __init__(self) -> None:
        self.events: list[ServerEvent] = []
        self.parts: list[Int16] = []

    def on_event(self, at_ms: float, event: ServerEvent) -> None:
        self.events.append(event)

    @property
    def values(self) -> list[int]:
        """The frame values that stood still for 5 ms, in the order they were played."""
        sound = np.concatenate(self.parts)
        runs = np.split(sound, np.flatnonzero(np.diff(sound)) + 1)
        return [int(run[0]) for run in runs if run.size >= 240 and run[0]]


@asynccontextmanager
async def session_with(script: Script) -> AsyncIterator[tuple[VoiceClient, ScriptedServer, Ears]]:
    ears = Ears()
    async with (
        ScriptedServer(script).serving() as server,
        connect(
            server.host, SessionStart(), on_event=ears.on_event, on_audio=ears.parts.append
        ) as client,
    ):
        yield client, server, ears


class TestSession:
    async def test_plays_what_it_is_sent_and_says_what_was_heard(self) -> None:
        async def script(line: Line) -> None:
            await line.say(AudioBegin(utterance_id="u", seq=0))
            await line.sound(*range(1, 11))
            await line.say(AudioEnd(utterance_id="u", frames=10))
            await line.heard("u", 9)

        async with session_with(script) as (client, server, ears):
            await until(lambda: server.line.acks and server.line.acks[-1].seq == 9)
            seqs = [ack.seq for ack in server.line.acks]
            assert seqs == sorted(set(seqs))
            assert len(seqs) > 2
            assert ears.values == list(range(1, 11))
            assert client.player.underruns == 0

    async def test_flush_silences_at_once_and_resume_loses_nothing(self) -> None:
        async def script(line: Line) -> None:
            await line.say(AudioBegin(utterance_id="u", seq=0))
            await line.sound(*range(1, 31))
            await line.heard("u", 2)
            await line.say(Flush(utterance_id="u", at_ms=100))
            await line.sound(77, 78, 79)
            await until(lambda: any(ack.flushed for ack in line.acks))
            await asyncio.sleep(0.05)
            resume = next(ack.seq for ack in line.acks if ack.flushed) + 1
            await line.say(AudioBegin(utterance_id="u", seq=resume, resumed=True))
            await line.sound(*range(1 + resume, 31))
            await line.say(AudioEnd(utterance_id="u", frames=30))
            await line.heard("u", 29)

        async with session_with(script) as (client, server, ears):
            await until(lambda: server.line.acks and server.line.acks[-1].seq == 29)
            values = ears.values
            assert sorted(set(values)) == list(range(1, 31))
            assert values == sorted(values)
            (flush,) = client.flushes
            assert flush.edge_ms == 100
            assert flush.silent_ms is not None
            assert flush.silent_ms >= flush.received_ms
            assert client.player.dropped == 3

    async def test_the_last_word_counts_even_when_the_next_utterance_follows_at_once(self) -> None:
        async def script(line: Line) -> None:
            await line.say(AudioBegin(utterance_id="u", seq=0))
            await line.sound(*range(1, 8))
            await line.say(AudioEnd(utterance_id="u", frames=7))
            await line.say(AudioBegin(utterance_id="v", seq=0))
            await line.sound(*range(8, 12))
            await line.say(AudioEnd(utterance_id="v", frames=4))
            await line.heard("v", 3)

        async with session_with(script) as (_, server, _ears):
            await until(lambda: server.line.acks and server.line.acks[-1].utterance_id == "v")
            last = [ack.seq for ack in server.line.acks if ack.utterance_id == "u"][-1]
            assert last == 6

    async def test_late_frames_are_waited_for_and_counted(self) -> None:
        async def script(line: Line) -> None:
            await line.say(AudioBegin(utterance_id="u", seq=0))
            await line.sound(1, 2, 3)
            await line.heard("u", 2)
            await asyncio.sleep(0.1)
            await line.sound(4, 5, 6)
            await line.say(AudioEnd(utterance_id="u", frames=6))
            await line.heard("u", 5)

        async with session_with(script) as (client, server, ears):
            await until(lambda: server.line.acks and server.line.acks[-1].seq == 5)
            assert client.player.underruns == 1
            assert ears.values == [1, 2, 3, 4, 5, 6]

    async def test_flush_of_what_never_began_is_answered(self) -> None:
        async def script(line: Line) -> None:
            await line.say(Flush(utterance_id="ghost", at_ms=0))

        async with session_with(script) as (_, server, _ears):
            await until(lambda: server.lines and server.line.acks)
            assert server.line.acks[0] == Playback(utterance_id="ghost", seq=-1, flushed=True)

    async def test_the_sound_has_no_gap_on_the_sessions_time_line(self) -> None:
        async def script(line: Line) -> None:
            await asyncio.sleep(0.3)

        async with session_with(script) as (client, _, ears):
            await asyncio.sleep(0.25)
            played_ms = sum(part.size for part in ears.parts) * 1000 / SAMPLE_RATE
            # The clock may be one tick and the machine's own lateness ahead, never behind.
            assert 0 < played_ms <= client.now_ms() + 10

    @pytest.mark.parametrize("data", ['{"type":"nonsense"}', "no json", b"\x00\x01\x02"])
    async def test_a_server_of_another_kind_is_told_apart(self, data: str | bytes) -> None:
        async def script(line: Line) -> None:
            await line.raw(data)

        with pytest.raises(BaseException) as caught:  # noqa: PT011 - the group is looked into
            async with session_with(script) as (client, _, _ears):
                await asyncio.wait_for(client.closed.wait(), LIVENESS_S)
        assert any(isinstance(leaf, Unavailable) for leaf in leaves(caught.value))

    async def test_a_fatal_error_ends_it_with_the_servers_words(self) -> None:
        async def script(line: Line) -> None:
            await line.say(Error(code="exhausted", message="all 4 are taken", fatal=True))
            await line.hang_up(4429)

        with pytest.raises(BaseException) as caught:  # noqa: PT011 - the group is looked into
            async with session_with(script) as (client, _, _ears):
                await asyncio.wait_for(client.closed.wait(), LIVENESS_S)
        (failed,) = [leaf for leaf in leaves(caught.value) if isinstance(leaf, SessionFailed)]
        assert failed.error.code == "exhausted"
        assert failed.message == "all 4 are taken"

    @pytest.mark.parametrize(
        ("status", "kind"),
        [(401, Unauthenticated), (429, Exhausted), (503, Unavailable)],
    )
    async def test_a_refused_handshake_is_worded(self, status: int, kind: type[Exception]) -> None:
        async def never(line: Line) -> None:
            raise AssertionError("nobody was let in")

        async with ScriptedServer(never, status).serving() as server:
            with pytest.raises(kind, match="API key" if status == 401 else f"because {status}"):
                async with connect(server.host, SessionStart(), api_key="k"):
                    pass
            assert server.headers["Authorization"] == "Bearer k"

    @pytest.mark.parametrize(
        ("typed", "url"),
        [
            ("ws://h:1", "ws://h:1/v1/session"),
            ("h:8080", "ws://h:8080/v1/session"),
            ("https://h/", "wss://h/v1/session"),
            ("wss://h/v1/session", "wss://h/v1/session"),
            ("http://h/prefix", "ws://h/prefix/v1/session"),
        ],
    )
    def test_addresses(self, typed: str, url: str) -> None:
        assert session_url(typed) == url

    @pytest.mark.parametrize("typed", ["", "ftp://h", "ws://"])
    def test_what_is_no_address(self, typed: str) -> None:
        with pytest.raises(InvalidArgument, match="ws://HOST:PORT"):
            session_url(typed)


# --- the command line ---


def clip_at(path: Path, seconds: float = 0.3, rate: int = 44_100, channels: int = 2) -> Path:
    tone = 0.3 * np.sin(np.arange(int(seconds * rate)) * 2 * np.pi * 440 / rate)
    soundfile.write(str(path), np.repeat(tone[:, None], channels, axis=1), rate)
    return path


def speaks_after_the_clip(frames: int = 10) -> Script:
    """Hears something, answers, and sees to it that the answer was played."""

    async def script(line: Line) -> None:
        await until(lambda: len(line.mic) > 5)
        await line.say(
            State(state="listening", at_ms=0),
            Speech(phase="edge", at_ms=10),
            Speech(phase="ended", at_ms=20),
            TranscriptEvent(turn_id="t", text="Hello?", final=True, at_ms=20),
            AudioBegin(utterance_id="u", seq=0),
        )
        await line.sound(*range(1, frames + 1))
        await line.say(AudioEnd(utterance_id="u", frames=frames))
        await line.heard("u", frames - 1)
        await line.say(Heard(turn_id="t", utterance_id="u", heard="Hi there.", completed=True))

    return script


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The goodbye of the real thing waits for seconds that no test needs."""
    monkeypatch.setattr(cli_client, "Goodbye", lambda: Goodbye(settle_ms=150, patience_ms=600))


def options_for(server: ScriptedServer, **more: Any) -> Options:
    return Options(host=server.host, start=SessionStart(), devices=False, **more)


class TestTalking:
    async def test_a_file_in_and_a_file_out(self, tmp_path: Path) -> None:
        out = io.StringIO()
        async with ScriptedServer(speaks_after_the_clip()).serving() as server:
            options = options_for(
                server, clip=clip_at(tmp_path / "in.wav"), out=tmp_path / "out.wav"
            )
            async with timeout(LIVENESS_S):
                assert await talk(options, JsonLines(out)) == 0
            assert server.line.of(SessionEnd)
            spoken = np.frombuffer(b"".join(server.line.mic), dtype="<i2")
        assert set(map(len, server.line.mic)) == {MIC_FRAME * 2}
        assert np.abs(spoken[:4800]).max() > 8_000
        assert not spoken[4800 + MIC_FRAME :].any()
        with wave.open(str(tmp_path / "out.wav")) as file:
            assert (file.getnchannels(), file.getframerate()) == (1, SAMPLE_RATE)
            played = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
        assert set(np.unique(played)) == set(range(11))
        lines = [json.loads(line) for line in out.getvalue().splitlines()]
        assert [line["type"] for line in lines][:2] == ["session.started", "state"]
        assert lines[-1]["type"] == "session.ended"
        times = [line["t_ms"] for line in lines]
        assert times == sorted(times)

    async def test_stereo_has_the_user_left_and_the_agent_right(self, tmp_path: Path) -> None:
        async with ScriptedServer(speaks_after_the_clip()).serving() as server:
            options = options_for(
                server,
                clip=clip_at(tmp_path / "in.wav"),
                out=tmp_path / "out.wav",
                stereo=True,
            )
            async with timeout(LIVENESS_S):
                assert await talk(options, JsonLines(io.StringIO())) == 0
        samples, rate = soundfile.read(str(tmp_path / "out.wav"), dtype="int16")
        assert rate == SAMPLE_RATE
        assert np.abs(samples[: SAMPLE_RATE // 5, 0]).max() > 8_000
        assert set(np.unique(samples[:, 1])) == set(range(11))

    async def test_no_reply_has_its_own_status(self, tmp_path: Path) -> None:
        async def silent(line: Line) -> None:
            await until(lambda: line.of(SessionEnd))

        async with ScriptedServer(silent).serving() as server, timeout(LIVENESS_S):
            options = options_for(server, clip=clip_at(tmp_path / "in.wav"))
            assert await talk(options, JsonLines(io.StringIO())) == cli_client.EXIT_NO_REPLY

    async def test_what_is_typed_goes_to_the_server(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        async def answers(line: Line) -> None:
            await until(lambda: line.of(SessionEnd))

        typed = tmp_path / "typed"
        typed.write_text("Time?\n/say Hello.\n/model espeak en\n/sya x\n/quit\nlost\n")
        stdin = typed.open()
        monkeypatch.setattr("sys.stdin", stdin)
        notes: list[str] = []
        display = JsonLines(io.StringIO())
        monkeypatch.setattr(display, "note", notes.append)
        async with ScriptedServer(answers).serving() as server, timeout(LIVENESS_S):
            assert await talk(options_for(server), display) == 0
        assert server.line.events[1:-1] == [
            TextInput(text="Time?"),
            TextInput(text="Hello.", speak=True),
            ModelSwitch(model="espeak", voice="en"),
        ]
        assert notes[-1] == "unknown command /sya; did you mean 'say'?"
        stdin.close()

    async def test_silence_after_a_flush_is_reported(self, tmp_path: Path) -> None:
        async def interrupted(line: Line) -> None:
            await line.say(AudioBegin(utterance_id="u", seq=0))
            await line.sound(*range(1, 20))
            await line.heard("u", 2)
            await line.say(Flush(utterance_id="u", at_ms=70))
            await until(lambda: any(ack.flushed for ack in line.acks))
            await line.say(
                Heard(turn_id="t", utterance_id="u", heard="One", cut="two", completed=False)
            )

        out = io.StringIO()
        async with ScriptedServer(interrupted).serving() as server, timeout(LIVENESS_S):
            options = options_for(server, clip=clip_at(tmp_path / "in.wav"))
            assert await talk(options, JsonLines(out)) == 0
        lines = [json.loads(line) for line in out.getvalue().splitlines()]
        (silence,) = [line for line in lines if line["type"] == "client.silence"]
        assert silence["edge_ms"] == 70
        assert silence["after_ms"] >= 0


class TestFailing:
    def run(self, script: Script, status: int, capsys: pytest.CaptureFixture[str]) -> str:
        """Run the whole program against a server in another thread's loop; returns stderr."""
        import threading

        ready, done = threading.Event(), asyncio.Event()
        found: list[Any] = []

        async def serve() -> None:
            async with ScriptedServer(script).serving() as server:
                found.extend((server.host, asyncio.get_running_loop()))
                ready.set()
                await done.wait()

        thread = threading.Thread(target=lambda: asyncio.run(serve()))
        thread.start()
        assert ready.wait(LIVENESS_S)
        try:
            assert main(["--host", found[0], "--no_devices", "--json"]) == status
        finally:
            found[1].call_soon_threadsafe(done.set)
            thread.join()
        return capsys.readouterr().err

    def test_the_connection_is_lost(self, capsys: pytest.CaptureFixture[str]) -> None:
        async def vanishes(line: Line) -> None:
            await line.hang_up()

        assert "connection was lost" in self.run(vanishes, cli_client.EXIT_LOST, capsys)

    def test_the_server_is_full(self, capsys: pytest.CaptureFixture[str]) -> None:
        async def full(line: Line) -> None:
            await line.say(Error(code="exhausted", message="all 4 are taken", fatal=True))
            await line.hang_up(4429)

        assert "all 4 are taken" in self.run(full, cli_client.EXIT_FULL, capsys)

    def test_nobody_listens(self, capsys: pytest.CaptureFixture[str]) -> None:
        status = main(["--host", "ws://127.0.0.1:9", "--no_devices", "--json"])
        assert status == cli_client.EXIT_UNREACHABLE
        assert "no server at ws://127.0.0.1:9/v1/session" in capsys.readouterr().err

    @pytest.mark.parametrize("argument", ["--in", "--out"])
    def test_files_that_cannot_be(
        self, argument: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = str(tmp_path / "nowhere" / "x.wav")
        assert main(["--no_devices", "--json", argument, path]) == cli_client.EXIT_USAGE
        assert path in capsys.readouterr().err

    def test_help_tells_the_exit_codes(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            parse_args(["--help"])
        shown = capsys.readouterr().out
        assert "the API key was refused" in shown
        assert "/model ID [VOICE]" in shown


# --- the pure parts ---


class TestTyping:
    @pytest.mark.parametrize(
        ("line", "command"),
        [
            ("  ", None),
            ("hello there", Turn("hello there")),
            ("/say  Good morning ", Say("Good morning")),
            ("/model piper-joe", Model("piper-joe")),
            ("/model espeak en-us", Model("espeak", "en-us")),
            ("/quit", Quit()),
        ],
    )
    def test_commands(self, line: str, command: object) -> None:
        assert parse_command(line) == command

    @pytest.mark.parametrize("line", ["/say", "/model", "/help", "/quti", "x" * 20_001])
    def test_notes(self, line: str) -> None:
        assert isinstance(parse_command(line), Note)

    def test_editing(self) -> None:
        editor = LineEditor()
        assert editor.feed("helo\x7flo\x1b[D\x1b[3~") == []
        assert editor.text == "hello"
        assert editor.feed("\rnext") == ["hello"]
        assert editor.feed("\x15\x04") == ["/quit"]

    @given(st.text(alphabet="ab \x7f\r\x15é", max_size=40), st.data())
    def test_any_chunking_types_the_same(self, keys: str, data: st.DataObject) -> None:
        whole, parts = LineEditor(), LineEditor()
        lines, rest = [], keys
        while rest:
            size = data.draw(st.integers(1, len(rest)))
            lines += parts.feed(rest[:size])
            rest = rest[size:]
        assert (lines, parts.text) == (whole.feed(keys), whole.text)


class TestView:
    def test_states_and_partials_are_on_the_line(self) -> None:
        view = View()
        assert "connecting" in view.line().plain
        view.see(State(state="barged_in", at_ms=0))
        view.see(TranscriptEvent(turn_id="t", text="what is", final=False, at_ms=0))
        line = view.line().plain
        assert "barged in" in line
        assert "what is" in line
        view.typed = "/say"
        assert "> /say" in view.line().plain

    def test_the_last_turns_latency_and_the_barge_in(self) -> None:
        view = View()
        view.see(
            Latency(
                turn_id="t",
                endpoint_ms=210,
                transcript_ms=260,
                first_token_ms=350,
                first_clause_ms=380,
                first_audio_ms=431,
            )
        )
        view.see(BargeIn(utterance_id="u", verdict="real", at_ms=0))
        view.silent(7.4)
        assert "431 ms" in view.line().plain
        assert "you interrupted, silent 7 ms" in view.line().plain

    def test_words_nobody_heard_are_struck_through(self) -> None:
        event = Heard(turn_id="t", utterance_id="u", heard="One", cut="two three", completed=False)
        (caption,) = View().see(event)
        assert caption.plain == "agent  One two three"
        struck = [caption.plain[s.start : s.end] for s in caption.spans if "strike" in str(s.style)]
        assert struck == ["two three"]

    def test_markup_in_what_was_said_is_only_text(self) -> None:
        event = TranscriptEvent(turn_id="t", text="[red]x[/red]", final=True, at_ms=0)
        out = io.StringIO()
        Screen(Console(file=out)).event(0, event)
        assert "[red]x[/red]" in out.getvalue()

    def test_a_partial_is_no_caption(self) -> None:
        view = View()
        assert view.see(TranscriptEvent(turn_id="t", text="what", final=False, at_ms=0)) == []
        assert view.see(ReplyText(turn_id="t", utterance_id="u", text="Well")) == []
        assert "what" in view.line().plain

    def test_the_meter(self) -> None:
        assert meter(-120, 4) == "    "
        assert meter(-33, 4) == "██  "
        assert meter(0, 4) == "████"


class TestGoodbye:
    def ended(self, *events: ServerEvent, now_ms: float, playing: bool = False) -> bool:
        goodbye = Goodbye(settle_ms=100, patience_ms=1_000)
        goodbye.spoken_out(0)
        for at_ms, event in enumerate(events):
            goodbye.see(at_ms, event)
        return goodbye.due(now_ms, playing=playing)

    ASKED = TranscriptEvent(turn_id="t", text="Hello?", final=True, at_ms=0)
    BEGUN = AudioBegin(utterance_id="u", seq=0)
    HEARD = Heard(turn_id="t", utterance_id="u", heard="Hi.", completed=True)

    def test_not_before_the_user_has_finished(self) -> None:
        assert not Goodbye().due(1e9, playing=False)

    def test_waits_for_the_answer_to_be_heard(self) -> None:
        assert not self.ended(self.ASKED, now_ms=500)
        assert not self.ended(self.ASKED, self.BEGUN, now_ms=500)
        assert self.ended(self.ASKED, self.BEGUN, self.HEARD, now_ms=500)
        assert not self.ended(self.ASKED, self.BEGUN, self.HEARD, now_ms=500, playing=True)

    def test_but_not_for_ever(self) -> None:
        assert self.ended(self.ASKED, now_ms=1_100)

    def test_an_error_is_an_answer(self) -> None:
        assert self.ended(self.ASKED, Error(code="unavailable", message="down"), now_ms=500)

    def test_speech_that_is_still_listened_to_is_not_silence(self) -> None:
        assert not self.ended(Speech(phase="confirmed", at_ms=0), now_ms=500)
        assert self.ended(Speech(phase="rejected", at_ms=0), now_ms=500)


class TestDevices:
    @pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (44_100, 2), (48_000, 6)])
    def test_any_file_becomes_16_khz_mono(self, rate: int, channels: int, tmp_path: Path) -> None:
        clip = read_clip(clip_at(tmp_path / "x.wav", 1.0, rate, channels))
        assert abs(clip.size - MIC_RATE) < 50
        crossings = np.count_nonzero(np.diff(np.signbit(clip)))
        assert abs(crossings - 880) < 10

    def test_a_file_that_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "x.wav").write_bytes(b"not sound")
        with pytest.raises(InvalidArgument, match=r"x\.wav"):
            read_clip(tmp_path / "x.wav")

    def test_a_clip_is_followed_by_silence(self) -> None:
        mic = FileMicrophone(np.full(MIC_FRAME + 1, 5, dtype=np.int16))
        assert mic.read().all()
        assert not mic.exhausted
        assert np.count_nonzero(mic.read()) == 1
        assert mic.exhausted
        assert not mic.read().any()

    def test_the_speakers_queue_stays_short(self) -> None:
        queue = SpeakerQueue(max_samples=4)
        queue.put(np.array([1, 2, 3], dtype=np.int16))
        queue.put(np.array([4, 5, 6], dtype=np.int16))
        assert queue.take(3).tolist() == [3, 4, 5]
        assert queue.take(3).tolist() == [6, 0, 0]
