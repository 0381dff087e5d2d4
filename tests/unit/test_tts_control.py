"""PAUSE, RESUME, STOP and RELOAD over a real gRPC server, and what bad requests get."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import grpc
import pytest

from src.rpc import errors
from src.rpc.errors import DuplexError, from_rpc_error
from src.rpc.generated import tts_pb2 as pb
from src.tts.intake import MAX_TEXT_CHARS, TextIntake
from src.tts.playout import Overflow, PlayoutPolicy
from src.tts.pool import MAX_WAITING
from src.tts.segmenter import SegmenterLimits
from src.tts.sessions import MAX_LEAD_MS
from tests.unit.tone_worker import (
    FRAMES_PER_WORD,
    Call,
    ToneModel,
    ToneWorker,
    chunk,
    tone_worker,
)

LONG = " ".join(f"word{i}" for i in range(40))
QUICK = PlayoutPolicy(queue_ms=400, burst_ms=60, lead_ms=60)


@pytest.fixture
async def worker() -> AsyncIterator[ToneWorker]:
    async with tone_worker(policy=QUICK) as running:
        await running.start()
        yield running


async def refusal(call: Awaitable[Any]) -> DuplexError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


def seqs(frames: list[pb.AudioFrame]) -> list[int]:
    return [frame.seq for frame in frames]


# --- one utterance ---


async def test_words_come_out_as_numbered_frames_and_an_end_marker(worker: ToneWorker) -> None:
    frames = await worker.speak("one two three").rest()
    *audio, end = frames
    assert seqs(audio) == list(range(3 * FRAMES_PER_WORD))
    assert {(len(f.pcm), f.sample_rate, f.frame_ms, f.last) for f in audio} == {
        (1920, 48_000, 20, False)
    }
    assert [f.media_time_ms for f in audio] == [20 * f.seq for f in audio]
    assert (end.last, end.pcm, end.seq) == (True, b"", len(audio))
    words = {w.text: (f.seq, w.start_ms, w.char_start) for f in frames for w in f.words}
    assert words == {"one": (0, 0, 0), "two": (5, 100, 4), "three": (10, 200, 8)}


async def test_text_may_arrive_as_it_is_written(worker: ToneWorker) -> None:
    call = Call(worker.stub)
    await call.rpc.write(chunk("one t", "u1", "s1"))
    await call.rpc.write(chunk("wo three. fo"))
    await call.rpc.write(pb.TextChunk(text="ur", flush=True))
    # Less than one frame is held back until more text or the end comes.
    heard = await call.take(4 * FRAMES_PER_WORD - 1)
    assert [w.text for f in heard for w in f.words] == ["one", "two", "three.", "four"]
    await call.rpc.write(chunk(" five", is_final=True))
    assert (await call.rest())[-1].seq == 5 * FRAMES_PER_WORD


async def test_a_writer_that_goes_away_without_is_final_is_heard_out(worker: ToneWorker) -> None:
    call = Call(worker.stub, [chunk("one two", "u1", "s1")])
    assert (await call.rest())[-1].seq == 2 * FRAMES_PER_WORD


@pytest.mark.parametrize("text", ["", "   \n\t", "🙂🎉👍🏽", "\x00\x01\x02\x7f", "…!?—"])
async def test_text_without_a_word_in_it_is_silence(worker: ToneWorker, text: str) -> None:
    (end,) = await worker.speak(text).rest()
    assert end.last
    assert end.seq == 0


async def test_mixed_scripts_and_control_characters_keep_their_places(worker: ToneWorker) -> None:
    text = "hello\x00 мир 世界 🙂 end"
    frames = await worker.speak(text).rest()
    words = [w for f in frames for w in f.words]
    assert [text[w.char_start : w.char_end] for w in words][-1] == "end"
    assert len(words) >= 4


async def test_a_session_may_ask_for_a_lead_of_its_own(worker: ToneWorker) -> None:
    await worker.start("s2", lead_ms=MAX_LEAD_MS)
    # Eight seconds of speech; less than one of them passes.
    frames = await asyncio.wait_for(worker.speak(LONG * 2, "u1", "s2").rest(), 5)
    assert len(frames) > 2 * 40 * FRAMES_PER_WORD - FRAMES_PER_WORD
    greedy = await refusal(worker.start("s3", lead_ms=MAX_LEAD_MS + 1))
    assert isinstance(greedy, errors.InvalidArgument)


# --- control ---


async def test_pause_holds_and_resume_goes_on_with_the_next_frame(worker: ToneWorker) -> None:
    call = worker.speak(LONG)
    await call.take(10)
    paused = await worker.control(pb.PAUSE)
    assert paused.state == pb.PAUSED
    assert paused.utterance_id == "u1"
    await call.take(paused.last_seq + 1 - len(call.frames))
    waiting = asyncio.ensure_future(call.next())
    await asyncio.sleep(0.3)
    assert not waiting.done()
    resumed = await worker.control(pb.RESUME)
    assert (resumed.state, resumed.last_seq) == (pb.SPEAKING, paused.last_seq)
    assert (await waiting).seq == paused.last_seq + 1
    *audio, end = await call.rest()
    assert seqs(audio) == list(range(40 * FRAMES_PER_WORD))
    assert end.seq == 40 * FRAMES_PER_WORD


async def test_pause_keeps_the_generator_hot(worker: ToneWorker) -> None:
    worker.model.go.clear()
    call = worker.speak("one two")
    await asyncio.sleep(0.05)
    await worker.control(pb.PAUSE)
    worker.model.go.set()
    await worker.quiet()
    assert worker.model.spoken == ["one", "two"]
    await worker.control(pb.RESUME)
    assert (await call.rest())[-1].seq == 2 * FRAMES_PER_WORD


async def test_pause_before_the_first_audio_holds_it_from_the_first_frame(
    worker: ToneWorker,
) -> None:
    worker.model.go.clear()
    call = worker.speak("one")
    await asyncio.sleep(0.05)
    before = await worker.control(pb.PAUSE, "u1")
    assert (before.state, before.last_seq) == (pb.PAUSED, -1)
    worker.model.go.set()
    first = asyncio.ensure_future(call.next())
    await asyncio.sleep(0.2)
    assert not first.done()
    await worker.control(pb.RESUME)
    assert (await first).seq == 0


async def test_a_pause_that_overtakes_its_utterance_still_holds_it(worker: ToneWorker) -> None:
    early = await worker.control(pb.PAUSE, "u7")
    assert (early.state, early.utterance_id, early.last_seq) == (pb.IDLE, "", -1)
    call = worker.speak("one", "u7")
    first = asyncio.ensure_future(call.next())
    await asyncio.sleep(0.2)
    assert not first.done()
    assert (await worker.control(pb.RESUME, "u7")).state == pb.SPEAKING
    assert (await first).seq == 0


async def test_stop_ends_the_stream_with_the_end_marker_and_leaves_nothing_running(
    worker: ToneWorker,
) -> None:
    call = worker.speak(LONG)
    await call.take(10)
    stopped = await worker.control(pb.STOP)
    assert stopped.state == pb.IDLE
    *audio, end = await call.rest()
    assert end.last
    assert end.seq == len(audio) == stopped.last_seq + 1
    await worker.quiet()
    assert len(worker.model.spoken) < 40


async def test_stop_while_paused_and_the_session_speaks_on(worker: ToneWorker) -> None:
    call = worker.speak(LONG)
    await call.take(5)
    await worker.control(pb.PAUSE)
    await worker.control(pb.STOP)
    assert (await call.rest())[-1].last
    assert (await worker.speak("again", "u2").rest())[-1].seq == FRAMES_PER_WORD


async def test_the_next_utterance_may_start_as_soon_as_the_end_marker_is_seen(
    worker: ToneWorker,
) -> None:
    for turn in range(20):
        call = worker.speak(LONG, f"u{turn}")
        await call.next()
        await worker.control(pb.STOP)
        while not (await call.next()).last:
            pass


async def test_repeated_and_late_controls_change_nothing(worker: ToneWorker) -> None:
    call = worker.speak("one two three four")
    await call.take(3)
    assert (await worker.control(pb.RESUME)).state == pb.SPEAKING
    first, second = await worker.control(pb.PAUSE), await worker.control(pb.PAUSE)
    assert (first.state, second.state) == (pb.PAUSED, pb.PAUSED)
    assert first.last_seq == second.last_seq
    await worker.control(pb.RESUME)
    await call.rest()
    for action in (pb.STOP, pb.PAUSE, pb.RESUME, pb.STOP):
        late = await worker.control(action, "u1")
        assert (late.state, late.utterance_id, late.last_seq) == (pb.IDLE, "", 19)


async def test_a_control_for_another_utterance_does_not_touch_this_one(worker: ToneWorker) -> None:
    await worker.speak("one", "u1").rest()
    call = worker.speak("two three", "u2")
    await call.next()
    stale = await worker.control(pb.STOP, "u1")
    assert (stale.state, stale.utterance_id) == (pb.SPEAKING, "")
    assert (await call.rest())[-1].seq == 2 * FRAMES_PER_WORD


async def test_control_before_any_audio_is_a_no_op(worker: ToneWorker) -> None:
    for action in (pb.PAUSE, pb.RESUME, pb.STOP):
        idle = await worker.control(action)
        assert (idle.state, idle.utterance_id, idle.last_seq) == (pb.IDLE, "", -1)
    assert (await worker.speak("one").rest())[-1].seq == FRAMES_PER_WORD


async def test_reload_tells_what_changed_and_disturbs_nobody(worker: ToneWorker) -> None:
    call = worker.speak("one two")
    await call.next()
    assert list((await worker.control(pb.RELOAD)).changes) == worker.reloads
    alone = await worker.control(pb.RELOAD, session_id="")
    assert (list(alone.changes), alone.last_seq) == (worker.reloads, -1)
    assert (await call.rest())[-1].seq == 2 * FRAMES_PER_WORD


# --- the end of clients ---


async def test_a_cancelled_call_leaves_nothing_running(worker: ToneWorker) -> None:
    call = worker.speak(LONG)
    await call.take(5)
    call.rpc.cancel()
    await worker.quiet()
    assert (await worker.speak("again", "u2").rest())[-1].last


async def test_a_client_that_stops_writing_can_still_be_stopped(worker: ToneWorker) -> None:
    call = Call(worker.stub)
    await call.rpc.write(chunk("one two", "u1", "s1"))
    await call.rpc.write(pb.TextChunk(flush=True))
    await call.take(2 * FRAMES_PER_WORD - 1)
    await worker.control(pb.STOP)
    assert (await call.rest())[-1].seq == 2 * FRAMES_PER_WORD - 1
    await worker.quiet()


async def test_ending_a_session_ends_its_speech_and_counts_its_frames(worker: ToneWorker) -> None:
    call = worker.speak(LONG)
    await call.take(5)
    ended = await worker.stub.EndSession(pb.EndSessionReq(session_id="s1"))
    frames = await call.rest()
    assert frames[-1].last
    assert ended.frames == len(frames) - 1
    await worker.quiet()
    assert worker.manager.list_resident()[0].refcount == 0
    gone = await refusal(worker.stub.EndSession(pb.EndSessionReq(session_id="s1")))
    assert isinstance(gone, errors.NotFound)


async def test_an_expired_lease_ends_the_session(worker: ToneWorker) -> None:
    worker.manager.expire_leases(worker.lease_clock.advance(61_000))
    assert isinstance(await refusal(worker.control(pb.PAUSE)), errors.NotFound)
    assert worker.manager.list_resident()[0].refcount == 0


async def test_a_lease_that_runs_out_in_mid_word_ends_the_call(worker: ToneWorker) -> None:
    call = worker.speak(LONG)
    await call.take(5)
    await worker.control(pb.PAUSE)
    worker.manager.expire_leases(worker.lease_clock.advance(61_000))
    assert isinstance(await refusal(call.rest()), errors.NotFound)
    await worker.quiet()


async def test_a_client_that_reads_nothing_does_not_hold_the_session() -> None:
    flood = PlayoutPolicy(queue_ms=400, burst_ms=600_000, lead_ms=600_000)
    async with tone_worker(policy=flood) as worker:
        await worker.start()
        call = worker.speak("word " * 6_000)
        await call.next()
        await _until(lambda: _stalled(worker))
        await worker.stub.EndSession(pb.EndSessionReq(session_id="s1"))
        await worker.quiet()
        await worker.start()
        assert (await worker.speak("again").rest())[-1].seq == FRAMES_PER_WORD
        assert isinstance(await refusal(call.rest()), errors.NotFound)


async def _stalled(worker: ToneWorker) -> bool:
    """gRPC takes no more frames."""
    before = (await worker.control(pb.RESUME)).last_seq
    await asyncio.sleep(0.2)
    return (await worker.control(pb.RESUME)).last_seq == before


async def test_speaking_keeps_the_lease_alive(worker: ToneWorker) -> None:
    worker.lease_clock.advance(59_000)
    await worker.speak("one").rest()
    worker.manager.expire_leases(worker.lease_clock.advance(59_000))
    assert (await worker.control(pb.PAUSE)).state == pb.IDLE


# --- failures ---


async def test_a_failing_engine_is_a_typed_error_after_what_it_said(worker: ToneWorker) -> None:
    worker.model.fail_at = "three"
    call = worker.speak("one two three four")
    error = await refusal(call.rest())
    assert isinstance(error, errors.Internal)
    assert "RuntimeError" in error.message
    assert "three" not in error.message
    assert seqs(call.frames) == list(range(2 * FRAMES_PER_WORD - 1))
    await worker.quiet()


async def test_text_after_is_final_is_refused(worker: ToneWorker) -> None:
    call = Call(worker.stub, [chunk(LONG, "u1", "s1", is_final=True), chunk("more")])
    error = await refusal(call.rest())
    assert isinstance(error, errors.InvalidArgument)
    assert "after is_final" in error.message
    await worker.quiet()


async def test_a_megabyte_of_text_is_refused_with_the_limit(worker: ToneWorker) -> None:
    error = await refusal(worker.speak("words " * 175_000).rest())
    assert isinstance(error, errors.InvalidArgument)
    assert str(MAX_TEXT_CHARS) in error.message
    await worker.quiet()


def test_the_limit_counts_all_chunks_together() -> None:
    intake = TextIntake("s1", "u1", SegmenterLimits())
    half = "word " * (MAX_TEXT_CHARS // 10)
    assert list(intake.take(chunk(half)))
    assert list(intake.take(chunk(half)))
    with pytest.raises(errors.InvalidArgument, match=str(MAX_TEXT_CHARS)):
        list(intake.take(chunk("!")))


def test_a_family_that_takes_text_as_it_is_written_gets_it_unchanged() -> None:
    intake = TextIntake("s1", "u1", None)
    taken = [*intake.take(chunk("Hel")), *intake.take(chunk("lo, wor", is_final=True))]
    assert [(segment.text, segment.char_start) for segment in taken] == [("Hel", 0), ("lo, wor", 3)]


async def test_more_text_than_is_spoken_in_time_waits_at_the_writer(worker: ToneWorker) -> None:
    call = Call(worker.stub, [chunk("word " * 15_000, "u1", "s1", is_final=True)])
    await call.take(3)
    await worker.control(pb.STOP)
    assert (await call.rest())[-1].last
    await worker.quiet()


async def test_two_utterances_at_once_are_refused_and_the_first_goes_on(
    worker: ToneWorker,
) -> None:
    first = worker.speak("one two", "u1")
    await first.next()
    error = await refusal(worker.speak("three", "u2").rest())
    assert isinstance(error, errors.FailedPrecondition)
    assert "'u1'" in error.message
    assert (await first.rest())[-1].seq == 2 * FRAMES_PER_WORD


@pytest.mark.parametrize(
    ("first", "kind"),
    [
        (chunk("hi", "u1", "nobody"), errors.NotFound),
        (chunk("hi", "u1", ""), errors.InvalidArgument),
        (chunk("hi", "", "s1"), errors.InvalidArgument),
        (chunk("hi", "u" * 200, "s1"), errors.InvalidArgument),
    ],
)
async def test_the_first_chunk_must_name_a_session_and_an_utterance(
    worker: ToneWorker, first: pb.TextChunk, kind: type[DuplexError]
) -> None:
    assert type(await refusal(Call(worker.stub, [first]).rest())) is kind


async def test_an_utterance_keeps_its_name(worker: ToneWorker) -> None:
    """Many times over: the refusal may come while the first frame is still being written."""
    for _ in range(60):
        call = Call(worker.stub, [chunk(LONG, "u1", "s1"), chunk("more", "u2", "s1")])
        assert isinstance(await refusal(call.rest()), errors.InvalidArgument)


@pytest.mark.parametrize(
    ("asked", "kind", "says"),
    [
        ({"model_id": "tune"}, errors.UnknownName, "'tone'"),
        ({"voice": "hihg"}, errors.UnknownName, "'high'"),
        ({"language": "eno"}, errors.UnknownName, "'en'"),
        ({"settings": {"sped": "1"}}, errors.UnknownName, "'speed'"),
        ({"codec": 7}, errors.InvalidArgument, "codec"),
    ],
)
async def test_unknown_names_get_the_nearest_known_one(
    worker: ToneWorker, asked: dict[str, object], kind: type[DuplexError], says: str
) -> None:
    error = await refusal(worker.start("s2", **asked))
    assert type(error) is kind
    assert says in error.message
    assert worker.manager.list_resident()[0].refcount == 1


async def test_starting_again_renews_and_another_model_is_refused(worker: ToneWorker) -> None:
    again = await worker.start("s1", model_id="tone", voice="high")
    assert (again.session_id, again.voice) == ("s1", "high")
    assert worker.manager.list_resident()[0].refcount == 1
    error = await refusal(worker.start("s1", model_id="hum"))
    assert type(error) is errors.FailedPrecondition


async def test_a_full_worker_says_when_to_come_back(worker: ToneWorker) -> None:
    for number in range(2, 9):
        await worker.start(f"s{number}")
    error = await refusal(worker.start("s9"))
    assert isinstance(error, errors.Exhausted)
    assert error.retry_after_ms
    await worker.stub.EndSession(pb.EndSessionReq(session_id="s1"))
    assert (await worker.start("s9")).session_id == "s9"


async def test_control_needs_an_action_and_a_session(worker: ToneWorker) -> None:
    nothing = await refusal(worker.control(pb.CONTROL_ACTION_UNSPECIFIED))
    nobody = await refusal(worker.control(pb.PAUSE, session_id="nobody"))
    unnamed = await refusal(worker.control(pb.PAUSE, session_id=""))
    assert [type(e) for e in (nothing, nobody, unnamed)] == [
        errors.InvalidArgument,
        errors.NotFound,
        errors.InvalidArgument,
    ]


async def test_a_draining_worker_refuses_new_work_and_finishes_what_it_says(
    worker: ToneWorker,
) -> None:
    await worker.start("s2")
    call = worker.speak("one two")
    await call.next()
    draining = asyncio.ensure_future(worker.sessions.drain(10_000))
    await asyncio.sleep(0)
    assert isinstance(await refusal(worker.start("s3")), errors.Unavailable)
    assert isinstance(await refusal(worker.speak("no", "u1", "s2").rest()), errors.Unavailable)
    assert (await call.rest())[-1].seq == 2 * FRAMES_PER_WORD
    await draining
    assert len(worker.sessions) == 0


# --- a model that serves one stream at a time ---


async def test_streams_take_turns_on_a_model_that_serves_one() -> None:
    async with tone_worker(ToneModel(max_streams=1), policy=QUICK) as worker:
        for session in ("s1", "s2"):
            await worker.start(session)
        worker.model.go.clear()
        first, second = worker.speak("one", session_id="s1"), worker.speak("two", session_id="s2")
        await _until(lambda: worker.pool.waiting == 1)
        assert worker.pool.running == 1
        worker.model.go.set()
        assert (await first.rest())[-1].seq == FRAMES_PER_WORD
        assert (await second.rest())[-1].seq == FRAMES_PER_WORD
        assert worker.model.spoken == ["one", "two"]


async def test_a_waiting_stream_can_be_stopped_and_a_long_queue_is_refused() -> None:
    count = MAX_WAITING + 2
    async with tone_worker(ToneModel(max_streams=1), max_sessions=count, policy=QUICK) as worker:
        for number in range(count):
            await worker.start(f"s{number}")
        worker.model.go.clear()
        calls = [worker.speak("hello", session_id="s0")]
        await _until(lambda: worker.pool.running == 1)
        calls += [worker.speak("hi", session_id=f"s{n}") for n in range(1, count - 1)]
        await _until(lambda: worker.pool.waiting == MAX_WAITING)
        full = await refusal(worker.speak("hi", session_id=f"s{count - 1}").rest())
        assert isinstance(full, errors.Exhausted)
        assert full.queue_position == MAX_WAITING + 1
        assert full.retry_after_ms
        await worker.control(pb.STOP, session_id="s1")
        (end,) = await calls[1].rest()
        assert end.last
        assert worker.pool.waiting == MAX_WAITING - 1


# --- overflow ---


async def test_drop_loses_no_speech_to_an_engine_that_is_merely_fast() -> None:
    policy = PlayoutPolicy(queue_ms=100, burst_ms=40, lead_ms=40, overflow=Overflow.DROP)
    async with tone_worker(policy=policy) as worker:
        await worker.start()
        *audio, _ = await worker.speak("one two three four").rest()
        assert seqs(audio) == list(range(4 * FRAMES_PER_WORD))


# --- models ---


async def test_models_are_listed_loaded_and_unloaded(worker: ToneWorker) -> None:
    tone, hum = (await worker.stub.ListModels(pb.ListModelsReq())).models
    assert (tone.model_id, tone.state, tone.is_default, tone.refcount) == (
        "tone",
        pb.RESIDENT,
        True,
        1,
    )
    assert [lease.session_id for lease in tone.leases] == ["s1"]
    assert list(tone.voices) == ["low", "high"]
    assert hum.state == pb.COLD
    loaded = await worker.stub.LoadModel(pb.LoadModelReq(model_id="hum", wait=True))
    assert loaded.state == pb.RESIDENT
    request = pb.UnloadModelReq(model_id="hum", ignore_ttl=True)
    assert (await worker.stub.UnloadModel(request)).state == pb.COLD
    later = await worker.stub.LoadModel(pb.LoadModelReq(model_id="hum"))
    assert later.state in (pb.LOADING, pb.RESIDENT)


async def test_a_model_in_use_is_not_unloaded_and_the_error_says_by_whom(
    worker: ToneWorker,
) -> None:
    request = pb.UnloadModelReq(model_id="tone", ignore_ttl=True)
    error = await refusal(worker.stub.UnloadModel(request))
    assert isinstance(error, errors.InUse)
    assert "s1" in error.message


async def test_capabilities_are_complete(worker: ToneWorker) -> None:
    told = await worker.stub.GetCapabilities(pb.GetCapReq())
    assert (told.name, told.adapter, told.default_model_id) == ("tts-fake@test", "fake", "tone")
    assert (told.sample_rate, told.frame_ms) == (48_000, 20)
    assert told.streaming
    assert told.cpu_ok
    assert list(told.resident_models) == ["tone"]
    assert list(told.languages) == ["en"]
    assert told.codecs[0] == pb.CODEC_PCM_S16LE
    assert (told.sessions, told.draining, told.fallback) == (1, False, False)


async def _until(condition: Any) -> None:
    for _ in range(2_000):
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came to that")
