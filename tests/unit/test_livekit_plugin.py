"""The plugin for stock LiveKit agents, against workers in this process over real gRPC."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata
from hypothesis import given
from hypothesis import strategies as st
from livekit import rtc
from livekit.agents import APIConnectionError, APIError, APIStatusError, APITimeoutError, tts
from livekit.agents.types import USERDATA_TIMED_TRANSCRIPT, APIConnectOptions, TimedString

from scripts.build_plugin import build
from src.common.processes import free_port
from src.livekit_plugin import TTS, fleet
from src.livekit_plugin.errors import api_error
from src.livekit_plugin.rota import Rota
from src.livekit_plugin.transcript import Transcript
from src.rpc import errors
from src.rpc.generated import tts_pb2 as pb
from src.tts.catalog import Catalog, ModelMeta
from tests.unit.tone_worker import WORD_MS, ToneWorker, tone_worker

ROOT = Path(__file__).resolve().parents[2]
LONG = " ".join(f"word{i}" for i in range(40))
ONE_TRY = APIConnectOptions(max_retry=0, timeout=5)
IMPATIENT = APIConnectOptions(max_retry=0, timeout=0.3)


@dataclass
class Heard:
    frames: list[rtc.AudioFrame] = field(default_factory=list)
    words: list[TimedString] = field(default_factory=list)

    @property
    def length_ms(self) -> int:
        """Without the 10 ms of silence in which LiveKit says that it was all, when the last frame
        had gone before it knew."""
        frames = self.frames
        if frames and frames[-1].duration == 0.01 and not any(bytes(frames[-1].data)):
            frames = frames[:-1]
        return round(sum(frame.duration for frame in frames) * 1000)

    def take(self, event: tts.SynthesizedAudio) -> None:
        self.frames.append(event.frame)
        self.words += event.frame.userdata.get(USERDATA_TIMED_TRANSCRIPT, [])


@pytest.fixture
async def worker() -> AsyncIterator[ToneWorker]:
    async with tone_worker() as running:
        yield running


@asynccontextmanager
async def voice(*targets: str, **options: Any) -> AsyncIterator[TTS]:
    made = TTS(target=",".join(targets), ahead_ms=5_000, **options)
    try:
        yield made
    finally:
        await made.aclose()


async def say(speaker: TTS, *texts: str, options: APIConnectOptions = ONE_TRY) -> Heard:
    heard = Heard()
    async with speaker.stream(conn_options=options) as stream:
        for text in texts:
            stream.push_text(text)
        stream.end_input()
        async for event in stream:
            heard.take(event)
    return heard


def lacks_hum(worker: ToneWorker) -> None:
    worker.manager._catalog = Catalog.of([ModelMeta(model_id="tone", family="fake")])


async def until(condition: Callable[[], Any]) -> None:
    for _ in range(2_000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("waited in vain")


# --- speaking ---


async def test_text_in_pieces_becomes_audio_and_timed_words(worker: ToneWorker) -> None:
    async with voice(worker.target) as speaker:
        heard = await say(speaker, "One t", "wo, thr", 'ee "four"!')
    assert (speaker.sample_rate, speaker.num_channels) == (48_000, 1)
    assert heard.length_ms == 4 * WORD_MS
    assert {frame.sample_rate for frame in heard.frames} == {48_000}
    assert [str(word) for word in heard.words] == ["One", " two,", " three", ' "four"!']
    assert [word.start_time for word in heard.words] == [0.0, 0.1, 0.2, 0.3]
    assert [word.end_time for word in heard.words] == [0.1, 0.2, 0.3, 0.4]


async def test_the_first_words_are_heard_while_more_are_written(worker: ToneWorker) -> None:
    async with voice(worker.target) as speaker, speaker.stream(conn_options=ONE_TRY) as stream:
        stream.push_text("This is heard now. And this")
        await stream.__anext__()
        stream.push_text(" comes later.")
        stream.end_input()
        heard = Heard()
        async for event in stream:
            heard.take(event)
    assert "".join(heard.words).endswith("later.")


async def test_frames_are_20_ms_and_the_first_is_not_held_back(worker: ToneWorker) -> None:
    async with voice(worker.target) as speaker:
        heard = await say(speaker, LONG)
    lengths = [round(frame.duration * 1000) for frame in heard.frames]
    assert lengths[0] <= 10
    assert max(lengths) == 20


async def test_synthesize_takes_a_whole_text(worker: ToneWorker) -> None:
    async with voice(worker.target) as speaker:
        frame = await speaker.synthesize("one two three", conn_options=ONE_TRY).collect()
    # LiveKit closes a segment with 10 ms of silence.
    assert round(frame.duration * 1000) == 3 * WORD_MS + 10


@pytest.mark.parametrize("text", ["…!?", "🙂", "   "])
async def test_text_without_a_word_in_it_is_silence_and_no_failure(
    worker: ToneWorker, text: str
) -> None:
    async with voice(worker.target) as speaker:
        heard = await say(speaker, text)
    assert heard.length_ms <= 30
    assert not any(bytes(frame.data).strip(b"\0") for frame in heard.frames)


async def test_nothing_said_is_no_failure(worker: ToneWorker) -> None:
    async with voice(worker.target) as speaker:
        assert not (await say(speaker)).frames


async def test_what_is_asked_for_reaches_the_worker(worker: ToneWorker) -> None:
    asked = {"model": "hum", "voice": "high", "settings": {"speed": "1.5"}}
    async with voice(worker.target, **asked) as speaker, speaker.stream() as stream:
        await until(lambda: len(worker.sessions))
        (session,) = worker.sessions._sessions.values()
        assert (session.lease.meta.model_id, session.spec.voice) == ("hum", "high")
        assert (dict(session.spec.settings), session.lead_ms) == ({"speed": "1.5"}, 5_000)
        assert session.lease.owner == "livekit-agents"
        assert (speaker.model, speaker.provider) == ("hum", "duplex")
        await stream.aclose()


async def test_options_may_change_between_utterances(worker: ToneWorker) -> None:
    async with voice(worker.target, voice="high") as speaker:
        speaker.update_options(model="hum")
        speaker.update_options(settings={"speed": "2"})
        request = speaker._options.request()
        assert (request.model_id, request.voice, dict(request.settings)) == (
            "hum",
            "",
            {"speed": "2"},
        )
        assert (await say(speaker, "one")).length_ms == WORD_MS


# --- leases ---


async def test_ten_utterances_leave_nothing_behind(worker: ToneWorker) -> None:
    async with voice(worker.target) as speaker:
        for _ in range(10):
            await say(speaker, "one two")
        await until(lambda: not len(worker.sessions))
    await worker.quiet()


async def test_an_interruption_stops_the_worker_and_ends_the_session(worker: ToneWorker) -> None:
    async with voice(worker.target) as speaker:
        stream = speaker.stream(conn_options=ONE_TRY)
        stream.push_text(LONG * 10)
        stream.end_input()
        await stream.__anext__()
        await stream.aclose()
        await until(lambda: not len(worker.sessions))
    await worker.quiet()
    assert len(worker.model.spoken) < 400


async def test_an_interruption_does_not_wait_for_the_worker(worker: ToneWorker) -> None:
    ended = asyncio.Event()
    end = worker.sessions.end

    async def slow_end(session_id: str) -> int:
        await ended.wait()
        return await end(session_id)

    worker.sessions.end = slow_end  # type: ignore[method-assign]
    async with voice(worker.target) as speaker:
        stream = speaker.stream(conn_options=ONE_TRY)
        stream.push_text(LONG)
        await stream.__anext__()
        await stream.aclose()
        assert len(worker.sessions) == 1
        ended.set()
    assert not len(worker.sessions)


async def test_closing_stops_what_is_being_said(worker: ToneWorker) -> None:
    async with voice(worker.target) as speaker:
        stream = speaker.stream(conn_options=ONE_TRY)
        stream.push_text(LONG)
        await stream.__anext__()
    assert not len(worker.sessions)
    await worker.quiet()


async def test_the_lease_is_kept_while_text_is_awaited(
    worker: ToneWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "LEASE_TTL_MS", 300)
    async with voice(worker.target) as speaker, speaker.stream() as stream:
        await until(lambda: len(worker.sessions))
        (session,) = worker.sessions._sessions.values()
        now = worker.lease_clock.advance(200)
        await until(lambda: session.lease.expires_in_ms(now) == 300)
        await stream.aclose()


# --- several workers ---


async def test_workers_take_turns() -> None:
    async with tone_worker() as first, tone_worker() as second:
        async with voice(first.target, second.target) as speaker:
            for _ in range(4):
                await say(speaker, "one")
        assert [len(w.model.spoken) for w in (first, second)] == [2, 2]


async def test_a_worker_that_is_down_or_full_is_passed_over(worker: ToneWorker) -> None:
    down = f"127.0.0.1:{free_port()}"
    async with tone_worker(max_sessions=1) as full:
        await full.start("somebody else's")
        async with voice(down, full.target, worker.target) as speaker:
            for _ in range(4):
                assert (await say(speaker, "one")).length_ms == WORD_MS


async def test_a_model_that_only_one_worker_has_is_found_there(worker: ToneWorker) -> None:
    async with tone_worker() as other:
        lacks_hum(other)
        async with voice(other.target, worker.target, model="hum") as speaker:
            for _ in range(2):
                assert (await say(speaker, "one")).length_ms == WORD_MS


async def test_a_failure_before_any_audio_is_retried_elsewhere() -> None:
    async with tone_worker() as broken, tone_worker() as whole:
        broken.model.fail_at = "one"
        async with voice(broken.target, whole.target) as speaker:
            heard = await say(speaker, "one two", options=APIConnectOptions(max_retry=1))
        assert heard.length_ms == 2 * WORD_MS
        assert "".join(heard.words) == "one two"
        assert whole.model.spoken == ["one", "two"]


def test_every_worker_is_asked_once_and_each_one_first_in_turn() -> None:
    rota = Rota(["a", "b", "c"])
    assert [rota.order(0) for _ in range(3)] == [list("abc"), list("bca"), list("cab")]


def test_a_worker_that_failed_is_asked_last_until_it_has_rested_or_worked() -> None:
    rota = Rota(["a", "b", "c"])
    rota.rest("a", 0, for_ms=100)
    assert rota.order(99) == ["b", "c", "a"]
    assert rota.order(100) == ["b", "c", "a"]
    rota.rest("c", 100, for_ms=100)
    rota.worked("c")
    assert rota.order(101) == ["c", "a", "b"]


# --- errors ---


def rpc_error(status: grpc.StatusCode, typed: errors.DuplexError | None = None) -> AioRpcError:
    trailing = Metadata(*errors.to_metadata(typed)) if typed else Metadata()
    return AioRpcError(status, Metadata(), trailing, details=str(typed or "from gRPC"))


@pytest.mark.parametrize(
    ("typed", "kind", "status", "retryable"),
    [
        (errors.Unavailable("draining"), APIConnectionError, 0, True),
        (errors.NotFound("no session"), APIConnectionError, 0, True),
        (errors.Exhausted("full", retry_after_ms=7), APIStatusError, 429, True),
        (errors.UnknownName("no model"), APIStatusError, 404, False),
        (errors.InvalidArgument("bad"), APIStatusError, 400, False),
        (errors.Unauthenticated("who"), APIStatusError, 401, False),
        (errors.Internal("ours"), APIStatusError, 500, True),
    ],
)
def test_a_workers_error_is_one_that_livekit_knows(
    typed: errors.DuplexError, kind: type[APIError], status: int, retryable: bool
) -> None:
    error = api_error(rpc_error(typed.status, typed), "w:1")
    assert type(error) is kind
    assert error.retryable is retryable
    assert typed.message in error.message
    assert getattr(error, "status_code", 0) == status
    if isinstance(typed, errors.Exhausted):
        assert error.body == {"code": "exhausted", "worker": "w:1", "retry_after_ms": 7}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, APIConnectionError),
        (grpc.StatusCode.CANCELLED, APIConnectionError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, APITimeoutError),
        (grpc.StatusCode.UNIMPLEMENTED, APIStatusError),
    ],
)
def test_where_no_worker_answered_it_is_the_connection(
    status: grpc.StatusCode, kind: type[APIError]
) -> None:
    assert type(api_error(rpc_error(status), "w:1")) is kind


async def test_nobody_there_is_a_connection_error() -> None:
    async with voice(f"127.0.0.1:{free_port()}") as speaker:
        with pytest.raises(APIConnectionError, match="is lost"):
            await say(speaker, "one")


async def test_full_everywhere_is_429_even_beside_one_that_lacks_the_model() -> None:
    async with tone_worker(max_sessions=1) as full, tone_worker() as other:
        await full.start("somebody else's")
        lacks_hum(other)
        async with voice(other.target, full.target, model="hum") as speaker:
            with pytest.raises(APIStatusError) as caught:
                await say(speaker, "one")
    assert caught.value.status_code == 429
    assert caught.value.retryable


@pytest.mark.parametrize(
    ("asked", "status"), [({"model": "tune"}, 404), ({"settings": {"sped": "1"}}, 404)]
)
async def test_a_wrong_name_is_refused_and_not_retried(
    worker: ToneWorker, asked: dict[str, Any], status: int
) -> None:
    async with voice(worker.target, **asked) as speaker:
        with pytest.raises(APIStatusError) as caught:
            await say(speaker, "one", options=APIConnectOptions(max_retry=3, retry_interval=60))
    assert (caught.value.status_code, caught.value.retryable) == (status, False)
    assert "did you mean" in caught.value.message


async def test_a_worker_that_stops_in_mid_utterance_times_out(worker: ToneWorker) -> None:
    worker.model.go.clear()
    async with voice(worker.target) as speaker:
        with pytest.raises(APITimeoutError):
            await say(speaker, "one", options=IMPATIENT)
        worker.model.go.set()
        await until(lambda: not len(worker.sessions))


async def test_waiting_for_text_is_no_fault_of_the_worker(worker: ToneWorker) -> None:
    async with voice(worker.target) as speaker, speaker.stream(conn_options=IMPATIENT) as stream:
        stream.push_text("Some of it. ")
        await stream.__anext__()
        await asyncio.sleep(1)
        stream.push_text("The rest.")
        stream.end_input()
        heard = Heard()
        async for event in stream:
            heard.take(event)
    assert "".join(heard.words).endswith("rest.")


# --- settings ---


@pytest.mark.parametrize("target", [" , ", "localhost", "http://localhost:7001", "a:1;b:2"])
def test_a_target_that_is_none_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        TTS(target=target)


@pytest.mark.parametrize("ahead_ms", [-1, 10_001])
def test_a_lead_out_of_range_is_refused(ahead_ms: int) -> None:
    with pytest.raises(ValueError, match="ahead_ms"):
        TTS(ahead_ms=ahead_ms)


def test_the_target_comes_from_the_argument_then_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("DUPLEX_TTS_TARGET", raising=False)
    assert TTS()._targets == ("127.0.0.1:7001",)
    monkeypatch.setenv("DUPLEX_TTS_TARGET", "a.local:1, [::1]:2,a.local:1")
    assert TTS()._targets == ("a.local:1", "[::1]:2")
    assert TTS(target="c:3")._targets == ("c:3",)


def test_another_event_loop_gets_connections_of_its_own() -> None:
    speaker = TTS(target="a:1")

    async def own() -> object:
        return speaker._fleet()

    first, second = asyncio.run(own()), asyncio.run(own())
    assert first is not second
    assert list(speaker._fleets.values()) == [second]


# --- the transcript ---


@given(
    st.text(st.characters(codec="utf-8"), max_size=60),
    st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), max_size=12),
)
def test_the_pieces_joined_are_the_text_whatever_the_marks_say(
    text: str, marks: list[tuple[int, int]]
) -> None:
    transcript = Transcript()
    transcript.write(text)
    said = [
        transcript.word(pb.WordMark(char_start=min(a, b), char_end=max(a, b), start_ms=20 * i))
        for i, (a, b) in enumerate(marks)
    ]
    assert "".join(piece for piece in [*said, transcript.rest()] if piece is not None) == text


# --- the distribution ---

NO_CALLS = """
import grpc, sys
def refuse(*args, **kwargs): raise AssertionError("a channel was made")
for module in (grpc, grpc.aio):
    module.insecure_channel = module.secure_channel = refuse
from livekit.plugins import duplex
from livekit.agents import Plugin
plugins = [(p.package, p.version) for p in Plugin.registered_plugins]
assert plugins == [("livekit.plugins.duplex", duplex.__version__)], plugins
duplex.TTS(target="127.0.0.1:1").prewarm()
assert not [name for name in sys.modules if name.partition(".")[0] == "src"]
print(duplex.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (os.environ.get("UV") or shutil.which("uv")):
        pytest.skip("uv is not installed")
    return build(tmp_path_factory.mktemp("dist"))


def test_the_wheel_is_a_typed_namespace_package_with_nothing_of_ours_outside(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        sources = {n: archive.read(n).decode() for n in names if n.endswith(".py")}
    package = "livekit/plugins/duplex/"
    assert all(n.startswith((package, "livekit_plugins_duplex-")) for n in names)
    assert {package + "py.typed", package + "__init__.py"} <= set(names)
    assert not [n for n, text in sources.items() if "import src" in text or "src." in text]


def test_importing_the_installed_wheel_opens_no_connection(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", NO_CALLS],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(tmp_path))
