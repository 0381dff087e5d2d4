"""One speech server: a text goes out, its sound comes in as the server makes it.

Tries again only while no sound has come. Whoever stops reading stops the server too, by TCP's own
flow control; whoever cancels, or closes the iterator, closes the request.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from src.audio.pcm import Float32
from src.rpc.errors import DuplexError, Internal, Unavailable
from src.tts.families.http_speech.answers import (
    MAX_ERROR_BYTES,
    PASSING,
    is_sound,
    not_sound,
    rate_of,
    refusal,
    wav_promised,
)
from src.tts.families.http_speech.audio import SpeechDecoder
from src.tts.families.http_speech.line import Cut, Line, Lines, Watch
from src.tts.families.http_speech.settings import HttpSettings
from src.tts.tts_base import CancelToken

_BACKOFF_S = 0.1
# A server that asks for a longer pause is not waited for: somebody listens.
_MOST_WAIT_S = 1.0
_MOST_IDLE = 16
# No segment takes this long to say: a server that goes on has lost its way.
_MOST_S, _MOST_S_PER_CHAR = 30.0, 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sound:
    """A piece of an answer: mono samples at the rate that the server says."""

    samples: Float32
    rate: int


class _Passing(Exception):
    """No sound has come, and it may the next time."""

    def __init__(self, error: DuplexError) -> None:
        super().__init__(error.message)
        self.error = error


class SpeechServer:
    """Any number of `say` at once, each on a thread of its own."""

    def __init__(self, settings: HttpSettings) -> None:
        self._settings = settings
        headers = {"Accept": "audio/*", "Accept-Encoding": "identity"}
        if settings.api_key:
            headers["Authorization"] = f"Bearer {settings.api_key}"
        self._lines = Lines(headers, min(settings.max_streams or _MOST_IDLE, _MOST_IDLE))
        self._watch = Watch()

    def close(self) -> None:
        self._lines.close()
        self._watch.close()

    def say(
        self, text: str, voice: str, speed: str, cancel: CancelToken, *, ours: bool = False
    ) -> Generator[Sound, None, None]:
        """Pieces as they arrive. Ends early and quietly when cancelled.

        `ours`: the text is no user's, so that what the server says about it may be told. Raises
        Unavailable, Exhausted, InvalidArgument and, for a sound that breaks off, Internal.
        """
        body = self._body(text, voice, speed)
        due_s = time.monotonic() + self._settings.first_byte_ms / 1000.0
        for tries in range(self._settings.retries + 1):
            try:
                yield from self._try(body, cancel, due_s, quote=ours)
                return
            except _Passing as passing:
                wait_s = _wait_s(tries, passing.error)
                last = tries == self._settings.retries or time.monotonic() + wait_s >= due_s
                if last or wait_s > _MOST_WAIT_S:
                    raise passing.error from passing.__cause__
                log.info("the speech server is tried again", extra={"tries": tries + 1})
            if not _rest(wait_s, cancel):
                return

    def _body(self, text: str, voice: str, speed: str) -> dict[str, Any]:
        settings = self._settings
        body = {**settings.body, "input": text, "response_format": settings.response_format}
        if settings.model:
            body["model"] = settings.model
        if voice:
            body["voice"] = voice
        if speed:
            body["speed"] = float(speed)
        return body

    def _try(
        self, body: Mapping[str, Any], cancel: CancelToken, due_s: float, *, quote: bool
    ) -> Generator[Sound, None, None]:
        """Raises _Passing where another try may help."""
        begun = False
        with self._lines.lend() as line, cancel.calling(lambda: line.cut(Cut.CANCELLED)):
            try:
                with contextlib.closing(self._answer(line, body, due_s, quote=quote)) as sounds:
                    for sound in sounds:
                        begun = True
                        yield sound
            except httpx.HTTPError as error:
                if line.cut_by is not Cut.CANCELLED:
                    raise self._lost(line, error, begun=begun) from error

    def _answer(
        self, line: Line, body: Mapping[str, Any], due_s: float, *, quote: bool
    ) -> Generator[Sound, None, None]:
        """One request to the end of its answer. The network's mishaps are httpx's errors."""
        with self._watch.until(line, due_s):
            left_s = max(0.001, due_s - time.monotonic())
            connect_s = min(self._settings.connect_ms / 1000.0, left_s)
            response = line.send(self._settings.url, body, connect_s)
        with contextlib.closing(response):
            with self._watch.until(line, due_s):
                decoder = self._accepted(response, quote=quote)
            most_s = _MOST_S + _MOST_S_PER_CHAR * len(body["input"])
            for samples in self._decoded(line, response, decoder, due_s):
                most_s -= samples.size / decoder.rate
                if most_s < 0:
                    raise Internal(f"{self._who} does not stop speaking")
                yield Sound(samples, decoder.rate)

    def _accepted(self, response: httpx.Response, *, quote: bool) -> SpeechDecoder:
        """What reads this answer. Raises its error if it is no sound."""
        where, headers = self._settings.where, response.headers
        kind = headers.get("content-type", "")
        if not response.is_success:
            error = refusal(where, response.status_code, headers, _start_of(response), quote=quote)
            raise _Passing(error) if response.status_code in PASSING else error
        if not is_sound(kind):
            raise not_sound(where, kind, _start_of(response), quote=quote)
        rate = rate_of(headers) or self._settings.sample_rate
        return SpeechDecoder(rate, wav=wav_promised(kind))

    def _decoded(
        self, line: Line, response: httpx.Response, decoder: SpeechDecoder, due_s: float
    ) -> Iterator[Float32]:
        parts = response.iter_bytes()
        while (part := self._next(parts, line, due_s)) is not None:
            samples = decoder.push(part)
            if samples.size:
                yield samples
                # Counted from here: while nobody reads, nobody waits.
                due_s = time.monotonic() + self._settings.chunk_ms / 1000.0
        if line.cut_by is not None or decoder.broken_off:
            # Where an answer ends with its connection, a cut looks like its end.
            raise httpx.RemoteProtocolError("the answer is shorter than it should be")
        samples = decoder.finish()
        if samples.size:
            yield samples

    def _next(self, parts: Iterator[bytes], line: Line, due_s: float) -> bytes | None:
        with self._watch.until(line, due_s):
            return next(parts, None)

    def _lost(self, line: Line, error: httpx.HTTPError, *, begun: bool) -> Exception:
        settings = self._settings
        if line.cut_by is Cut.SILENT:
            if begun:
                return Unavailable(f"{self._who} fell silent for {settings.chunk_ms} ms")
            return Unavailable(f"{self._who} sent no sound within {settings.first_byte_ms} ms")
        if begun:
            return Internal(f"{self._who} broke off in mid-speech")
        if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
            why = "" if isinstance(error, httpx.ConnectTimeout) else f": {error}"
            return _Passing(Unavailable(f"{self._who} cannot be reached{why}"))
        return _Passing(Unavailable(f"{self._who} hung up before it spoke"))

    @property
    def _who(self) -> str:
        return f"the speech server {self._settings.where}"


def _start_of(response: httpx.Response) -> bytes:
    """Enough of a body to learn what is wrong."""
    start = bytearray()
    for part in response.iter_bytes():
        start += part
        if len(start) >= MAX_ERROR_BYTES:
            break
    return bytes(start[:MAX_ERROR_BYTES])


def _wait_s(tries: int, error: DuplexError) -> float:
    """What the server asks for, else twice as long each time, in no step with others."""
    if error.retry_after_ms is not None:
        return error.retry_after_ms / 1000.0
    return _BACKOFF_S * 2.0**tries * random.uniform(0.5, 1.0)


def _rest(seconds: float, cancel: CancelToken) -> bool:
    """False: cancelled meanwhile."""
    woken = threading.Event()
    with cancel.calling(woken.set):
        return not woken.wait(seconds)
