"""Connections to a speech server that another thread can cut, and the clock that does so.

A blocked read has no other end than its socket's: a cancelled utterance and a server that has
fallen silent both shut the socket down, and the reader finds out why.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from enum import Enum, auto
from typing import Any

import httpx

_IDLE_S = 30.0
# Room for about a second of sound. The system's own would let megabytes of it arrive for a session
# that is paused, and the server compute them.
_RECEIVE_BYTES = 64 * 1024
_STREAMS = ("connection.connect_tcp.complete", "connection.start_tls.complete")


class Cut(Enum):
    """Why a line was cut."""

    CANCELLED = auto()
    SILENT = auto()


class Line:
    """One connection at a time, made when it is needed and kept for the next request."""

    def __init__(self, context: Any, headers: Mapping[str, str]) -> None:
        self._client = httpx.Client(
            transport=httpx.HTTPTransport(
                verify=context,
                limits=httpx.Limits(
                    max_connections=1, max_keepalive_connections=1, keepalive_expiry=_IDLE_S
                ),
                socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)],
            ),
            headers=headers,
        )
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._handle: socket.socket | None = None
        self.cut_by: Cut | None = None

    def send(self, url: str, body: Mapping[str, Any], connect_s: float) -> httpx.Response:
        """The answer's head; its body is still to come. Raises httpx.TransportError."""
        self._take_hold()
        request = self._client.build_request(
            "POST",
            url,
            json=body,
            # The watch, not the socket, times what comes after the connection.
            timeout=httpx.Timeout(None, connect=connect_s),
            extensions={"trace": self._traced},
        )
        return self._client.send(request, stream=True)

    def cut(self, why: Cut) -> None:
        """End what is going on, from any thread; the first reason stays."""
        with self._lock:
            self.cut_by = self.cut_by or why
            self._shut()

    def let_go(self) -> None:
        """The answer is over: nothing here keeps the connection open any more."""
        with self._lock:
            if self._handle is not None:
                self._handle.close()
                self._handle = None

    def close(self) -> None:
        self.let_go()
        self._client.close()

    def _traced(self, event: str, info: Mapping[str, Any]) -> None:
        """httpx tells of a new connection here, before the request is written to it."""
        if event in _STREAMS:
            self._socket = info["return_value"].get_extra_info("socket")
            self._take_hold()

    def _take_hold(self) -> None:
        """A descriptor of our own, which no other thread can close while we shut it down."""
        self.let_go()
        with self._lock:
            if self._socket is not None and self._socket.fileno() >= 0:
                self._handle = socket.socket(fileno=os.dup(self._socket.fileno()))
            if self.cut_by is not None:
                self._shut()

    def _shut(self) -> None:
        if self._handle is not None:
            with contextlib.suppress(OSError):
                self._handle.shutdown(socket.SHUT_RDWR)


class Lines:
    """Lines to one server; those that are not needed now are kept for the next."""

    def __init__(self, headers: Mapping[str, str], most_idle: int) -> None:
        self._headers = headers
        self._context = httpx.create_ssl_context()
        self._most_idle = most_idle
        self._lock = threading.Lock()
        self._idle: list[Line] = []

    @contextlib.contextmanager
    def lend(self) -> Iterator[Line]:
        """A line for one request. It is closed unless it was left with nothing under way."""
        with self._lock:
            line = self._idle.pop() if self._idle else None
        line = line or Line(self._context, self._headers)
        kept = False
        try:
            yield line
            line.let_go()
            kept = line.cut_by is None and self._keep(line)
        finally:
            if not kept:
                line.close()

    def close(self) -> None:
        with self._lock:
            self._most_idle = 0
            idle, self._idle = self._idle, []
        for line in idle:
            line.close()

    def _keep(self, line: Line) -> bool:
        with self._lock:
            if len(self._idle) >= self._most_idle:
                return False
            self._idle.append(line)
            return True


class Watch:
    """Cuts lines that have been silent for too long. One thread for all of a model's."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due_s: dict[Line, float] = {}
        self._wakes_s = 0.0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="http-speech-watch", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def until(self, line: Line, due_s: float) -> Iterator[None]:
        """Inside, the line is cut at this time of `time.monotonic`."""
        with self._changed:
            self._due_s[line] = due_s
            # Times mostly grow: the thread is woken for few of them.
            if due_s < self._wakes_s:
                self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._due_s.pop(line, None)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                for line in [line for line, due in self._due_s.items() if due <= now]:
                    del self._due_s[line]
                    line.cut(Cut.SILENT)
                self._wakes_s = min(self._due_s.values(), default=float("inf"))
                wait_s = None if self._wakes_s == float("inf") else self._wakes_s - now
                self._changed.wait(wait_s)
