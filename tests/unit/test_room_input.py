"""What waits to be told, what a user may send, and what their client recorded."""

from __future__ import annotations

import asyncio
import io
import json
from types import SimpleNamespace
from typing import cast

import av
import numpy as np
import pytest
from livekit import rtc

from src.audio.pcm import Float32, Int16, to_int16
from src.common.clock import ManualClock
from src.orchestrator.rooms.captions import AgentCaption, AgentState, UserCaption
from src.orchestrator.rooms.outgoing import Item, Outgoing, Packet
from src.orchestrator.rooms.recording import decode_recording
from src.orchestrator.rooms.room_events import RoomEvents
from src.orchestrator.rooms.room_input import CHAT_TOPIC, CONTROL_TOPIC, RoomInput
from src.orchestrator.ws_inbound import InboundLimits
from src.rpc.errors import DuplexError, InvalidArgument
from src.rpc.ws_events import ReplyText, Speech

MIC_RATE = 16_000

# --- the queue ---


def speech(at_ms: int) -> Packet:
    return Packet(Speech(phase="edge", at_ms=at_ms))


def reply(text: str, utterance_id: str = "u1") -> Packet:
    return Packet(ReplyText(turn_id="t1", utterance_id=utterance_id, text=text))


def drained(queue: Outgoing) -> list[Item]:
    items = []
    while (item := queue.pop()) is not None:
        items.append(item)
    return items


def test_what_is_told_keeps_its_order_but_a_state_goes_first() -> None:
    queue = Outgoing(10)
    items: list[Item] = [
        speech(1),
        UserCaption("t1", "hi", final=True),
        AgentState("thinking"),
        speech(2),
    ]
    for item in items:
        assert queue.put(item)
    assert drained(queue) == [items[2], items[0], items[1], items[3]]


def test_what_is_newer_takes_the_place_of_what_is_stale() -> None:
    queue = Outgoing(10)
    items: list[Item] = [
        AgentState("listening"),
        UserCaption("t1", "turn", final=False),
        AgentCaption("u1", "Well,"),
        AgentState("thinking"),
        UserCaption("t1", "Turn on.", final=True),
        AgentCaption("u1", " hello", final=True),
        UserCaption("t2", "and", final=False),
    ]
    for item in items:
        assert queue.put(item)
    assert drained(queue) == [
        AgentState("thinking"),
        UserCaption("t1", "Turn on.", final=True),
        AgentCaption("u1", "Well, hello", final=True),
        UserCaption("t2", "and", final=False),
    ]


def test_events_are_never_merged_but_text_goes_on() -> None:
    queue = Outgoing(10)
    packets = [
        speech(1),
        speech(1),
        reply("We"),
        reply("ll"),
        speech(2),
        reply("!"),
        reply("a", "u2"),
    ]
    for packet in packets:
        assert queue.put(packet)
    assert drained(queue) == [
        speech(1), speech(1), reply("Well"), speech(2), reply("!"), reply("a", "u2")
    ]  # fmt: skip


def test_a_full_queue_gives_up_its_partials_first_and_then_takes_no_more() -> None:
    queue = Outgoing(3)
    final = UserCaption("t1", "hi", final=True)
    for item in (speech(1), UserCaption("t2", "and", final=False), final):
        assert queue.put(item)
    assert queue.put(speech(2))
    assert not queue.put(speech(3))
    assert queue.put(UserCaption("t1", "hi there", final=True)), "it needs no room"
    assert queue.drop_packet()
    assert queue.put(speech(3))
    assert drained(queue) == [UserCaption("t1", "hi there", final=True), speech(2), speech(3)]


def test_only_states_can_be_asked_for() -> None:
    queue = Outgoing(3)
    queue.put(speech(1))
    assert queue.pop(states_only=True) is None
    queue.put(AgentState("speaking"))
    assert queue.pop(states_only=True) == AgentState("speaking")


async def test_of_more_events_than_fit_while_the_room_is_away_the_oldest_are_dropped() -> None:
    events = RoomEvents(
        rtc.Room(), "user", events=True, mic_track_sid=str, agent_track_sid=str, max_waiting=5
    )
    for number in range(20):
        events.send(Speech(phase="edge", at_ms=number))
    assert not events.failed.done()
    assert events.dropped == 16, "the state keeps its place"


# --- control events and floods ---


class FakeSession:
    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []

    def on_text(self, text: str, *, speak: bool) -> None:
        self.calls.append(("say" if speak else "text", text))

    def on_model_switch(self, model: str, voice: str) -> None:
        self.calls.append(("switch", (model, voice)))

    def on_preconnect(self, samples: Int16) -> None:
        self.calls.append(("recorded", samples.size))

    def on_end(self, reason: str) -> None:
        self.calls.append(("end", reason))


class Lab:
    """A room that is not connected: its packets are handed over here."""

    def __init__(self, *, started: bool = True, **limits: int) -> None:
        self.room = rtc.Room()
        self.clock = ManualClock()
        self.session = FakeSession()
        self.errors: list[DuplexError] = []
        self.input = RoomInput(
            self.room,
            lambda: "user",
            self.session,
            self.errors.append,
            started=lambda: started,
            clock=self.clock,
            limits=InboundLimits(**limits),
        )

    def send(self, data: object, *, sender: str = "user", topic: str = CONTROL_TOPIC) -> None:
        raw = data if isinstance(data, bytes) else json.dumps(data).encode()
        participant = cast(rtc.RemoteParticipant, SimpleNamespace(identity=sender))
        packet = rtc.DataPacket(raw, 0, participant if sender else None, topic)  # type: ignore[arg-type]
        self.room.emit("data_received", packet)

    @property
    def codes(self) -> list[str]:
        return [error.code for error in self.errors]


async def test_control_events_reach_the_session() -> None:
    lab = Lab()
    lab.send({"type": "text", "text": "hi"})
    lab.send({"type": "text", "text": "hello", "speak": True})
    lab.send({"type": "model.switch", "model": "piper"})
    lab.send({"type": "session.end"})
    assert lab.session.calls == [
        ("text", "hi"), ("say", "hello"), ("switch", ("piper", "")), ("end", "client_ended")
    ]  # fmt: skip
    assert not lab.errors


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"{", "invalid_argument"),
        (b"\xff\xfe", "invalid_argument"),
        (b"[1]", "invalid_argument"),
        ({"type": "txt"}, "unknown_name"),
        ({"type": "text"}, "invalid_argument"),
        ({"type": "text", "text": "x" * 20_001}, "invalid_argument"),
        ({"type": "text", "text": "x" * 70_000}, "invalid_argument"),
        ({"type": "playback", "utterance_id": "u1", "seq": 1}, "invalid_argument"),
        ({"type": "session.start"}, "invalid_argument"),
    ],
)
async def test_nonsense_is_refused_with_a_reason(data: object, code: str) -> None:
    lab = Lab()
    lab.send(data)
    assert lab.codes == [code]
    assert not lab.session.calls


async def test_what_others_send_or_what_goes_to_other_topics_is_left_alone() -> None:
    lab = Lab()
    lab.send({"type": "session.end"}, sender="stranger")
    lab.send({"type": "session.end"}, sender="")
    lab.send({"type": "session.end"}, topic="chat")
    lab.send(b"{", sender="stranger")
    assert not lab.session.calls
    assert not lab.errors


async def test_texts_before_the_session_are_refused_and_its_end_is_not() -> None:
    lab = Lab(started=False)
    lab.send({"type": "text", "text": "hi"})
    lab.send({"type": "session.end"})
    assert lab.codes == ["failed_precondition"]
    assert lab.session.calls == [("end", "client_ended")]


async def test_a_flood_is_refused_until_time_has_passed() -> None:
    lab = Lab(events_per_s=5, max_bad_messages=100)
    for _ in range(15):
        lab.send({"type": "text", "text": "hi"})
    assert len(lab.session.calls) == 10
    assert lab.codes == ["exhausted"] * 5
    lab.clock.advance(1000)
    lab.send({"type": "text", "text": "again"})
    assert lab.session.calls[-1] == ("text", "again")


async def test_a_client_that_sends_nothing_but_nonsense_is_taken_leave_of_once() -> None:
    lab = Lab(max_bad_messages=3)
    for _ in range(10):
        lab.send(b"{")
    assert len(lab.errors) == 3
    assert lab.session.calls == [("end", "refused")]


async def test_a_closed_input_hears_nothing_and_lets_run_return() -> None:
    lab = Lab()
    running = asyncio.create_task(lab.input.run())
    await asyncio.sleep(0)
    lab.input.close()
    lab.input.close()
    lab.send({"type": "session.end"})
    assert not lab.session.calls
    await asyncio.wait_for(running, 5)
    # The topics are free again.
    lab.room.register_text_stream_handler(CHAT_TOPIC, lambda *_: None)


# --- recordings ---


def tone(ms: int, rate: int) -> Float32:
    time = np.arange(rate * ms // 1000) / rate
    return (0.5 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)


def hertz(samples: Int16) -> float:
    spectrum = np.abs(np.fft.rfft(samples.astype(np.float32)))
    return float(np.argmax(spectrum) * MIC_RATE / samples.size)


def in_container(container: str, ms: int) -> bytes:
    """What a browser's recorder makes of a tone."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream("libopus", rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(to_int16(tone(ms, 48_000))[np.newaxis, :], "s16", "mono")
        frame.sample_rate = 48_000
        for packet in (*stream.encode(frame), *stream.encode(None)):
            out.mux(packet)
    return file.getvalue()


@pytest.mark.parametrize("rate", [8_000, 16_000, 24_000, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_raw_audio_of_any_rate_becomes_16_khz_mono(rate: int, channels: int) -> None:
    raw = np.repeat(to_int16(tone(500, rate)), channels).tobytes()
    samples = decode_recording(raw, {"sampleRate": str(rate), "channels": str(channels)})
    assert samples.dtype == np.int16
    assert abs(samples.size - MIC_RATE // 2) <= 1
    assert abs(hertz(samples) - 440) < 3
    assert 10_000 < np.sqrt(np.mean(samples.astype(np.float32) ** 2)) < 12_500


@pytest.mark.parametrize("container", ["webm", "ogg"])
def test_what_a_browser_recorded_needs_no_attributes(container: str) -> None:
    samples = decode_recording(in_container(container, 500), {})
    assert abs(samples.size - MIC_RATE // 2) < 500
    assert abs(hertz(samples) - 440) < 3


def test_of_a_long_recording_the_newest_ten_seconds_are_kept() -> None:
    raw = np.concatenate((np.zeros(MIC_RATE * 5, dtype=np.int16), to_int16(tone(10_000, MIC_RATE))))
    samples = decode_recording(raw.tobytes(), {"sampleRate": "16000", "channels": "1"})
    assert samples.size == 10 * MIC_RATE
    assert np.abs(samples[:100]).max() > 5_000


def test_half_a_sample_at_the_end_is_no_error() -> None:
    assert decode_recording(b"\1\0\2", {"sampleRate": "16000", "channels": "1"}).size == 1
    assert decode_recording(b"", {"sampleRate": "16000", "channels": "1"}).size == 0


@pytest.mark.parametrize(
    ("data", "attributes"),
    [
        (b"\0\0", {}),
        (b"\0\0", {"sampleRate": "16000"}),
        (b"\0\0", {"sampleRate": "-1", "channels": "1"}),
        (b"\0\0", {"sampleRate": "x", "channels": "1"}),
        (b"\0\0", {"sampleRate": "16000", "channels": "0"}),
        (b"\0\0", {"sampleRate": "9" * 9000, "channels": "1"}),
        (b"\x1a\x45\xdf\xa3 and then nothing of the kind", {}),
        (b"OggS" + bytes(100), {}),
        (in_container("ogg", 70_000), {}),
    ],
)
def test_a_recording_that_is_none_is_refused(data: bytes, attributes: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument):
        decode_recording(data, attributes)
