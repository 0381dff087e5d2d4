from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from src.audio.opus import OpusEncoder, opus_available
from src.common.clock import ManualClock
from src.orchestrator.ports import SpeechFrame
from src.orchestrator.ws_inbound import Inbound, InboundLimits, Refused, parse_event
from src.orchestrator.ws_transport import Message, OutboundLimits, SendQueue, WsTransport
from src.rpc.errors import Exhausted, InvalidArgument, UnknownName
from src.rpc.ws_events import Playback, SessionStart, State, TextInput, parse_server

FRAME = bytes(1920)


def frame(seq: int, utterance_id: str = "u1") -> SpeechFrame:
    return SpeechFrame(utterance_id, seq, seq * 20, FRAME)


class FakeSocket:
    """Takes everything, or nothing while `blocked`."""

    def __init__(self) -> None:
        self.sent: list[str | bytes] = []
        self.open = asyncio.Event()
        self.open.set()

    async def send_str(self, data: str) -> None:
        await self.open.wait()
        self.sent.append(data)

    async def send_bytes(self, data: bytes) -> None:
        await self.open.wait()
        self.sent.append(data)

    def names(self) -> list[str]:
        return ["audio" if isinstance(m, bytes) else json.loads(m)["type"] for m in self.sent]


def transport(**limits: int) -> tuple[WsTransport, ManualClock]:
    clock = ManualClock()
    return WsTransport(clock, OutboundLimits(**limits)), clock


async def write_all(sender: WsTransport, socket: FakeSocket) -> None:
    sender.finish()
    await asyncio.wait_for(sender.write_to(socket), 5)


# --- out ---


async def test_events_and_frames_leave_in_the_order_they_were_sent() -> None:
    sender, _ = transport()
    socket = FakeSocket()
    sender.send_event(State(state="speaking", at_ms=0))
    sender.begin_audio("u1", 0, resumed=False)
    sender.send_frame(frame(0))
    sender.send_frame(frame(1))
    sender.end_audio("u1", 2)
    await write_all(sender, socket)
    assert socket.names() == ["state", "audio.begin", "audio", "audio", "audio.end"]


async def test_a_flush_overtakes_queued_audio_and_takes_it_back() -> None:
    sender, _ = transport()
    socket = FakeSocket()
    sender.begin_audio("u1", 0, resumed=False)
    for seq in range(5):
        sender.send_frame(frame(seq))
    sender.send_event(State(state="barged_in", at_ms=7))
    sender.flush("u1", 7)
    await write_all(sender, socket)
    assert socket.names() == ["flush", "state"]


async def test_a_flush_leaves_other_utterances_alone() -> None:
    sender, _ = transport()
    socket = FakeSocket()
    sender.begin_audio("u2", 0, resumed=False)
    sender.send_frame(frame(0, "u2"))
    sender.flush("u1", 0)
    await write_all(sender, socket)
    assert socket.names() == ["flush", "audio.begin", "audio"]


async def test_a_late_frame_after_a_flush_is_dropped_until_audio_begins_again() -> None:
    sender, _ = transport()
    socket = FakeSocket()
    sender.begin_audio("u1", 0, resumed=False)
    sender.flush("u1", 0)
    sender.send_frame(frame(1))
    sender.begin_audio("u1", 1, resumed=True)
    sender.send_frame(frame(1))
    await write_all(sender, socket)
    assert socket.names() == ["flush", "audio.begin", "audio"]


async def test_a_gap_in_the_numbers_is_announced() -> None:
    sender, _ = transport()
    socket = FakeSocket()
    sender.begin_audio("u1", 0, resumed=False)
    sender.send_frame(frame(0))
    sender.send_frame(frame(4))
    await write_all(sender, socket)
    assert socket.names() == ["audio.begin", "audio", "audio.begin", "audio"]
    again = parse_server(socket.sent[2])
    assert (again.type, again.seq) == ("audio.begin", 4)  # type: ignore[union-attr]


async def test_the_heard_position_is_what_the_client_says_but_never_more_than_was_sent() -> None:
    sender, _ = transport()
    sender.begin_audio("u1", 0, resumed=False)
    for seq in range(3):
        sender.send_frame(frame(seq))
    assert sender.acknowledge("u1", 2) == -1, "nothing was written yet"
    await write_all(sender, FakeSocket())
    assert sender.acknowledge("u1", 1) == 1
    assert sender.acknowledge("u1", 99) == 2
    assert sender.acknowledge("u1", 0) == 2, "never back"
    assert sender.heard_seq("u1") == 2
    assert sender.acknowledge("never-spoken", 5) == -1
    assert sender.heard_seq("never-spoken") == -1


async def test_sending_never_blocks_and_a_full_queue_cuts_the_client_off() -> None:
    sender, _ = transport(max_queue_bytes=10 * len(FRAME))
    sender.begin_audio("u1", 0, resumed=False)
    for seq in range(1000):
        sender.send_frame(frame(seq))
    assert sender.queued <= 11
    with pytest.raises(Exhausted, match="does not read"):
        await asyncio.wait_for(sender.watch(), 5)


async def test_a_client_that_takes_nothing_for_too_long_is_cut_off() -> None:
    sender, clock = transport(stall_ms=10_000)
    socket = FakeSocket()
    socket.open.clear()
    writer = asyncio.create_task(sender.write_to(socket))
    watcher = asyncio.create_task(sender.watch())
    sender.send_event(State(state="speaking", at_ms=0))
    await asyncio.sleep(0)
    clock.advance(9_000)
    await asyncio.sleep(0.3)
    assert not watcher.done()
    clock.advance(2_000)
    with pytest.raises(Exhausted):
        await asyncio.wait_for(watcher, 5)
    writer.cancel()


async def test_an_idle_writer_is_not_a_stalled_client() -> None:
    sender, clock = transport(stall_ms=10)
    socket = FakeSocket()
    writer = asyncio.create_task(sender.write_to(socket))
    watcher = asyncio.create_task(sender.watch())
    sender.send_event(State(state="speaking", at_ms=0))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert socket.names() == ["state"]
    clock.advance(60_000)
    await asyncio.sleep(0.3)
    assert not watcher.done()
    writer.cancel()
    watcher.cancel()


def test_the_queue_counts_its_bytes_through_puts_flushes_and_pops() -> None:
    box = SendQueue(max_bytes=100)
    assert box.put(Message(b"x" * 60, "u1", 0))
    assert not box.put(Message(b"x" * 60, "u1", 1))
    assert box.overtake(Message("f" * 10), "u1") == 1
    assert box.put(Message(b"x" * 90, "u1", 1))
    assert not box.put(Message(b"x", "u1", 2))
    assert [box.pop(), box.pop(), box.pop()] == [
        Message("f" * 10),
        Message(b"x" * 90, "u1", 1),
        None,
    ]
    assert box.put(Message(b"x" * 100))


# --- in ---


def started(rate: int = 16_000, **limits: int) -> Inbound:
    inbound = Inbound(InboundLimits(**limits), 0.0)
    inbound.text(json.dumps({"type": "session.start", "sample_rate": rate}), 0.0)
    return inbound


def refused(inbound: Inbound, message: Any, now_ms: float = 0.0) -> Refused:
    take: Callable[[Any, float], Any] = inbound.text
    if isinstance(message, bytes):
        take = inbound.binary
    elif not isinstance(message, str):
        message = json.dumps(message)
    with pytest.raises(Refused) as caught:
        take(message, now_ms)
    return caught.value


def test_events_are_parsed_once_the_session_has_started() -> None:
    inbound = Inbound(InboundLimits(), 0.0)
    start = inbound.text('{"type":"session.start","sample_rate":48000}', 0.0)
    assert start == SessionStart(sample_rate=48_000)
    assert inbound.text('{"type":"text","text":"hi"}', 0.0) == TextInput(text="hi")
    playback = inbound.text('{"type":"playback","utterance_id":"u","seq":3}', 0.0)
    assert playback == Playback(utterance_id="u", seq=3)


def test_before_session_start_everything_else_is_fatal() -> None:
    for message in (b"\0\0", {"type": "text", "text": "hi"}, "not json", {"type": "nonsense"}):
        refusal = refused(Inbound(InboundLimits(), 0.0), message)
        assert refusal.fatal, message
    early = refused(Inbound(InboundLimits(), 0.0), b"\0\0")
    assert early.error.code == "failed_precondition"
    assert "session.start first" in early.error.message


@pytest.mark.parametrize(
    ("message", "code", "hint"),
    [
        ({"type": "playbak", "utterance_id": "u", "seq": 1}, "unknown_name", "'playback'"),
        ({"type": "text", "text": "a", "speek": True}, "unknown_name", "'speak'"),
        ({"type": "playback", "utterance_id": "u", "seq": "x"}, "invalid_argument", "seq"),
        ({"type": "playback", "utterance_id": "u", "seq": -2}, "invalid_argument", "seq"),
        ({"type": "text", "text": ""}, "invalid_argument", "text"),
        ({"type": "text", "text": "x" * 20_001}, "invalid_argument", "20000"),
        ({"text": "no type"}, "invalid_argument", "'type'"),
        ([1, 2], "invalid_argument", "object"),
        ("{", "invalid_argument", "JSON"),
        ("[" * 5000, "invalid_argument", "JSON"),
        ({"type": "session.start"}, "failed_precondition", "started already"),
        ({"type": "text", "text": "y" * 70_000}, "invalid_argument", "65536"),
        (b"\0" * 641, "invalid_argument", "two bytes"),
        (b"\0" * 64_000, "invalid_argument", "longer than 1000 ms"),
    ],
)
def test_a_bad_message_is_refused_with_a_reason_and_the_session_goes_on(
    message: Any, code: str, hint: str
) -> None:
    inbound = started()
    refusal = refused(inbound, message)
    assert (refusal.error.code, refusal.fatal) == (code, False)
    assert hint in refusal.error.message
    assert inbound.binary(bytes(640), 0.0).size == 320


@pytest.mark.parametrize("rate", [11_025, 0, "16000"])
def test_a_rate_we_do_not_speak_is_refused_by_name(rate: Any) -> None:
    refusal = refused(Inbound(InboundLimits(), 0.0), {"type": "session.start", "sample_rate": rate})
    assert refusal.fatal
    assert "sample_rate" in refusal.error.message
    assert "44100" in refusal.error.message


def test_another_protocol_version_is_refused() -> None:
    refusal = refused(Inbound(InboundLimits(), 0.0), {"type": "session.start", "protocol": 2})
    assert refusal.fatal
    assert "protocol 2" in refusal.error.message


def test_user_text_never_enters_an_error_message() -> None:
    for event in ({"type": "text", "text": ["my secret"]}, {"type": "text", "text": "x", "my": 1}):
        with pytest.raises(InvalidArgument) as caught:
            parse_event(json.dumps(event), 65536)
        assert "secret" not in caught.value.message


def test_the_nearest_known_event_is_named() -> None:
    with pytest.raises(UnknownName, match=r"did you mean 'session.end'"):
        parse_event('{"type":"sesion.end"}', 100)


@pytest.mark.parametrize("rate", [8_000, 16_000, 24_000, 32_000, 44_100, 48_000])
def test_every_rate_arrives_as_16_khz(rate: int) -> None:
    inbound = started(rate)
    tone = (np.sin(2 * np.pi * 440 * np.arange(rate) / rate) * 8000).astype("<i2")
    steps = [inbound.binary(part.tobytes(), 0.0) for part in np.split(tone, 50)]
    assert [samples.size for samples in steps] == [320] * 50
    peak = np.argmax(np.abs(np.fft.rfft(np.concatenate(steps).astype(np.float64))))
    assert abs(int(peak) - 440) <= 2


@pytest.mark.skipif(not opus_available(), reason="PyAV is not installed")
def test_opus_packets_arrive_as_16_khz_and_junk_is_refused() -> None:
    inbound = Inbound(InboundLimits(), 0.0)
    inbound.text('{"type":"session.start","codec":"opus"}', 0.0)
    encoder = OpusEncoder()
    tone = (np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000) * 8000).astype(np.int16)
    packets = [encoder.encode(frame) for frame in np.split(tone, 50)]
    samples = np.concatenate([inbound.binary(packet, 0.0) for packet in packets])
    assert abs(samples.size - 16_000) < 400
    assert not refused(inbound, b"\xff\xff\xff").fatal


def test_audio_may_catch_up_but_not_run_ahead_of_real_time() -> None:
    inbound = started(mic_burst_ms=2_000)
    second = bytes(32_000)
    inbound.binary(second, 0.0)
    inbound.binary(second, 0.0)
    flood = refused(inbound, second, now_ms=500.0)
    assert flood.fatal
    assert flood.error.code == "exhausted"


def test_real_time_audio_never_counts_as_a_flood() -> None:
    inbound = started(mic_burst_ms=1_000)
    for step in range(60 * 50):
        inbound.binary(bytes(640), step * 20.0)


def test_silence_does_not_save_up_an_endless_burst() -> None:
    inbound = started(mic_burst_ms=1_000)
    inbound.binary(bytes(32_000), 3_600_000.0)
    assert refused(inbound, bytes(640), now_ms=3_600_001.0).fatal


def test_a_flood_of_events_is_fatal() -> None:
    inbound = started(events_per_s=10)
    for _ in range(19):
        inbound.text('{"type":"playback","utterance_id":"u","seq":1}', 0.0)
    flood = refused(inbound, '{"type":"playback","utterance_id":"u","seq":1}')
    assert (flood.fatal, flood.error.code) == (True, "exhausted")


def test_a_client_that_only_sends_nonsense_is_shown_the_door() -> None:
    inbound = started(max_bad_messages=3)
    assert [refused(inbound, b"\0").fatal for _ in range(3)] == [False, False, True]
