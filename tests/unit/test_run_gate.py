from __future__ import annotations

import threading

from src.tts.run_gate import Deadline, RunGate
from src.tts.tts_base import CancelToken


class Turns:
    """Threads at a gate; `order` is who was let in, in order."""

    def __init__(self, gate: RunGate) -> None:
        self.gate = gate
        self.order: list[str] = []
        self.threads: list[threading.Thread] = []

    def queue(self, name: str, deadline: Deadline, cancel: CancelToken) -> None:
        def run() -> None:
            with self.gate.turn(deadline, cancel) as admitted:
                self.order.append(name if admitted else f"{name} cancelled")

        waiting = len(self.gate.waiting)
        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()
        while self.threads[-1].is_alive() and len(self.gate.waiting) == waiting:
            pass

    def join(self) -> None:
        for thread in self.threads:
            thread.join(20)
            assert not thread.is_alive()


def due(seconds: float) -> Deadline:
    deadline = Deadline()
    if seconds:
        deadline.played(seconds)
    return deadline


def test_the_stream_that_runs_dry_first_goes_first() -> None:
    turns = Turns(RunGate(1))
    with turns.gate.turn(due(0), CancelToken()):
        for name, seconds in (("late", 9.0), ("soon", 1.0), ("later", 12.0)):
            turns.queue(name, due(seconds), CancelToken())
    turns.join()
    assert turns.order == ["soon", "late", "later"]


def test_a_first_piece_does_not_wait_for_a_long_sentence() -> None:
    turns = Turns(RunGate(2))
    with turns.gate.turn(due(5), CancelToken()):
        turns.queue("another sentence", due(1), CancelToken())
        turns.queue("first piece", due(0), CancelToken())
        turns.threads[-1].join(20)
        assert turns.order == ["first piece"]
    turns.join()
    assert turns.order == ["first piece", "another sentence"]


def test_a_cancelled_stream_leaves_the_queue_at_once() -> None:
    turns = Turns(RunGate(1))
    cancel = CancelToken()
    with turns.gate.turn(due(0), CancelToken()):
        turns.queue("gone", due(1), cancel)
        cancel.cancel()
        turns.threads[-1].join(20)
        assert turns.order == ["gone cancelled"]
    with turns.gate.turn(due(0), CancelToken()) as admitted:
        assert admitted


def test_cancel_calls_back_inside_the_block_only() -> None:
    calls: list[str] = []
    cancel = CancelToken()
    with cancel.calling(lambda: calls.append("before")):
        pass
    with cancel.calling(lambda: calls.append("during")):
        cancel.cancel()
        cancel.cancel()
    with cancel.calling(lambda: calls.append("already")):
        assert calls == ["during", "already"]
