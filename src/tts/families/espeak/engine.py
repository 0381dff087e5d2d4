"""eSpeak NG in this process, through ctypes on the library of the `espeakng-loader` wheel.

The library keeps its state in globals, so every `EspeakEngine` loads a private copy of the file:
each has its own globals, and engines run side by side. The library is GPL-3-or-later and is loaded
only where an engine is made.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import queue
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from src.audio.pcm import Float32, to_float32

_log = logging.getLogger(__name__)

# speak_lib.h
_SYNCHRONOUS = 2
_DONT_EXIT = 0x8000
_CHARS_UTF8 = 1
_POS_CHARACTER = 1
_PARAM_RATE, _PARAM_PITCH = 1, 3
_EVENT_END_OF_LIST, _EVENT_WORD = 0, 1
_PHONEMES_IPA = 2
_BUFFER_MS = 60  # it never hands out less

RATE_WPM = 175
PITCH = 50


class EngineUnavailable(RuntimeError):
    """The library is not there, or cannot be loaded here."""


@dataclass(frozen=True, slots=True)
class Voice:
    """`identifier` is the file that `espeak_SetVoiceByName` always knows; tags are not."""

    tag: str
    name: str
    identifier: str


@dataclass(frozen=True, slots=True)
class WordEvent:
    """A word that begins at `at_ms` of the audio, at text[start : start + length]."""

    at_ms: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Speech:
    samples: Float32
    words: tuple[WordEvent, ...]
    complete: bool
    """False: it was told to stop."""


class _EventId(ctypes.Union):
    _fields_ = [
        ("number", ctypes.c_int),
        ("name", ctypes.c_char_p),
        ("string", ctypes.c_char * 8),
    ]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    ]


class _Voice(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("languages", ctypes.c_char_p),
        ("identifier", ctypes.c_char_p),
        ("gender", ctypes.c_ubyte),
        ("age", ctypes.c_ubyte),
        ("variant", ctypes.c_ubyte),
        ("xx1", ctypes.c_ubyte),
        ("score", ctypes.c_int),
        ("spare", ctypes.c_void_p),
    ]


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


@dataclass(slots=True)
class _Job:
    """What the call that is running has said so far."""

    stop: Callable[[], bool]
    pcm: bytearray
    words: list[WordEvent]
    stopped: bool = False


class EspeakEngine:
    """One engine with a library of its own. One call at a time; make several to speak at once.

    The same calls on a fresh engine give the same samples; a used one varies a little.
    """

    def __init__(self) -> None:
        """Raises EngineUnavailable."""
        library, data = _locate()
        self._lib = _load_copy(library)
        _declare(self._lib)
        rate = self._lib.espeak_Initialize(_SYNCHRONOUS, _BUFFER_MS, data.encode(), _DONT_EXIT)
        if rate <= 0:
            raise EngineUnavailable(f"espeak_Initialize failed ({rate}) with the data at {data}")
        self.sample_rate = int(rate)
        self._job: _Job | None = None
        # The library keeps a pointer to it.
        self._callback = _Callback(self._on_audio)
        self._lib.espeak_SetSynthCallback(self._callback)

    def voices(self) -> list[Voice]:
        """One a language tag, in the library's order."""
        listed = self._lib.espeak_ListVoices(None)
        found: list[Voice] = []
        index = 0
        while listed[index]:
            entry = listed[index].contents
            # A priority byte stands before the tag.
            tag = entry.languages[1:].decode("utf-8", "replace")
            found.append(Voice(tag, entry.name.decode(), entry.identifier.decode()))
            index += 1
        return found

    def speak(
        self,
        text: str,
        identifier: str,
        *,
        rate_wpm: int = RATE_WPM,
        pitch: int = PITCH,
        stop: Callable[[], bool] = lambda: False,
    ) -> Speech:
        """Blocks, about 1 ms for a second of speech. `stop` is asked every 60 ms of audio.

        Raises ValueError for a voice that the library cannot load.
        """
        if self._lib.espeak_SetVoiceByName(identifier.encode()) != 0:
            raise ValueError(f"eSpeak cannot load the voice {identifier!r}")
        self._lib.espeak_SetParameter(_PARAM_RATE, rate_wpm, 0)
        self._lib.espeak_SetParameter(_PARAM_PITCH, pitch, 0)
        job = self._job = _Job(stop, bytearray(), [])
        encoded = text.replace("\0", " ").encode("utf-8", "replace") + b"\0"
        try:
            self._lib.espeak_Synth(
                encoded, len(encoded), 0, _POS_CHARACTER, 0, _CHARS_UTF8, None, None
            )
        finally:
            self._job = None
        samples = to_float32(np.frombuffer(bytes(job.pcm), dtype=np.int16))
        return Speech(samples, tuple(job.words), not job.stopped)

    def phonemes(self, text: str, identifier: str) -> str:
        """How the voice would say it, in IPA; clauses parted by spaces. Raises as `speak` does."""
        if self._lib.espeak_SetVoiceByName(identifier.encode()) != 0:
            raise ValueError(f"eSpeak cannot load the voice {identifier!r}")
        left = ctypes.c_char_p(text.replace("\0", " ").encode("utf-8", "replace"))
        said: list[str] = []
        # It moves the pointer past the clause that it read, and to nothing at the end.
        while left.value is not None:
            clause = self._lib.espeak_TextToPhonemes(ctypes.byref(left), _CHARS_UTF8, _PHONEMES_IPA)
            said.append((clause or b"").decode("utf-8", "replace"))
        return " ".join(said)

    def close(self) -> None:
        """Give the library back; the engine must not be used any more."""
        self._lib.espeak_Terminate()
        if sys.platform != "win32":
            import _ctypes

            _ctypes.dlclose(self._lib._handle)

    def _on_audio(self, wav: object, count: int, events: object) -> int:
        job = self._job
        if job is None or job.stop():
            if job is not None:
                job.stopped = True
            return 1
        job.words.extend(_word_events(events))
        if wav and count > 0:
            job.pcm += ctypes.string_at(wav, 2 * count)  # type: ignore[arg-type]
        return 0


class EnginePool:
    """Up to `size` engines, made when they are needed and lent for one segment each."""

    def __init__(self, size: int, first: EspeakEngine) -> None:
        self._idle: queue.LifoQueue[EspeakEngine] = queue.LifoQueue()
        self._idle.put(first)
        self._lock = threading.Lock()
        self._left_to_make = size - 1

    @contextlib.contextmanager
    def engine(self) -> Iterator[EspeakEngine]:
        lent = self._take()
        try:
            yield lent
        finally:
            self._idle.put(lent)

    def close(self) -> None:
        """Close the engines; none may be lent out."""
        while True:
            try:
                self._idle.get_nowait().close()
            except queue.Empty:
                return

    def _take(self) -> EspeakEngine:
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            pass
        with self._lock:
            may_make = self._left_to_make > 0
            self._left_to_make -= may_make
        if not may_make:
            return self._idle.get()
        try:
            return EspeakEngine()
        except EngineUnavailable:
            _log.warning("no further eSpeak engine; streams share those there are", exc_info=True)
            return self._idle.get()


def _locate() -> tuple[str, str]:
    try:
        import espeakng_loader

        return os.path.realpath(espeakng_loader.get_library_path()), espeakng_loader.get_data_path()
    except (ImportError, RuntimeError) as error:
        raise EngineUnavailable(f"espeakng-loader: {error}") from error


def _load_copy(library: str) -> ctypes.CDLL:
    """A copy is another file to the loader, and so gets globals of its own."""
    folder = tempfile.mkdtemp(prefix="espeak-")
    try:
        copy = shutil.copy(library, Path(folder) / Path(library).name)
        return ctypes.CDLL(str(copy))
    except OSError as error:
        raise EngineUnavailable(f"cannot load {library}: {error}") from error
    finally:
        # Mapped by now; where an open file cannot be removed it stays in the temporary folder.
        shutil.rmtree(folder, ignore_errors=True)


def _declare(lib: ctypes.CDLL) -> None:
    lib.espeak_Initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
    lib.espeak_SetSynthCallback.argtypes = [_Callback]
    lib.espeak_SetSynthCallback.restype = None
    lib.espeak_SetVoiceByName.argtypes = [ctypes.c_char_p]
    lib.espeak_SetParameter.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int]
    lib.espeak_TextToPhonemes.argtypes = [
        ctypes.POINTER(ctypes.c_char_p),
        ctypes.c_int,
        ctypes.c_int,
    ]
    lib.espeak_TextToPhonemes.restype = ctypes.c_char_p
    lib.espeak_ListVoices.argtypes = [ctypes.c_void_p]
    lib.espeak_ListVoices.restype = ctypes.POINTER(ctypes.POINTER(_Voice))
    lib.espeak_Synth.argtypes = [
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_uint,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.c_uint,
        ctypes.POINTER(ctypes.c_uint),
        ctypes.c_void_p,
    ]


def _word_events(events: object) -> Iterator[WordEvent]:
    index = 0
    while True:
        event = events[index]  # type: ignore[index]
        if event.type == _EVENT_END_OF_LIST:
            return
        if event.type == _EVENT_WORD:
            yield WordEvent(event.audio_position, event.text_position - 1, event.length)
        index += 1
