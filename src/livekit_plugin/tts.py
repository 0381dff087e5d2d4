"""`TTS`: what an AgentSession is given."""

from __future__ import annotations

import asyncio
import os
import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
from livekit.agents import (
    DEFAULT_API_CONNECT_OPTIONS,
    NOT_GIVEN,
    APIConnectOptions,
    NotGivenOr,
    tts,
)
from livekit.agents.utils import is_given

from src.audio.pcm import SAMPLE_RATE
from src.livekit_plugin.fleet import Fleet
from src.livekit_plugin.stream import SynthesizeStream
from src.rpc.generated import tts_pb2 as pb
from src.rpc.tls import ClientTls

TARGET_ENV = "DUPLEX_TTS_TARGET"
TLS_ENV = "DUPLEX_TTS_TLS_"
DEFAULT_TARGET = "127.0.0.1:7001"
MAX_AHEAD_MS = 10_000
OWNER = "livekit-agents"
_ADDRESS = re.compile(r"(\[[\da-fA-F:]+\]|[\w.-]+):\d{1,5}|unix:\S+")


@dataclass(frozen=True)
class _Options:
    model: str
    voice: str
    language: str
    ahead_ms: int
    settings: Mapping[str, str] = field(default_factory=dict)

    def request(self) -> pb.StartSessionReq:
        return pb.StartSessionReq(
            model_id=self.model,
            voice=self.voice,
            language=self.language,
            settings=self.settings,
            lead_ms=self.ahead_ms,
            owner=OWNER,
        )


class TTS(tts.TTS[str]):
    """Streaming speech with word times, 48 kHz mono.

    `target`: `host:port` of one worker, or of several with commas between; else the environment's
    DUPLEX_TTS_TARGET, else 127.0.0.1:7001. They take turns, and one that is down or full is passed
    over. `model`, `voice`, `language`: empty means the worker's, model's and voice's own.
    `settings`: the family's (speed, pitch, …). `ahead_ms`: how much audio may wait in the agent;
    0 leaves it to the worker. `ca`: the file (PEM) of who signed the workers' certificates; with it
    all of them are called over TLS. `cert`, `key`: our own, for workers that ask for one. Else the
    environment's DUPLEX_TTS_TLS_CA, _CERT and _KEY. `credentials` instead of these: gRPC's.
    Raises ValueError for a target that is none, and for files that cannot be used.

    It connects on the event loop that it is first used on, once for each loop.
    """

    def __init__(
        self,
        *,
        target: str = "",
        model: str = "",
        voice: str = "",
        language: str = "",
        settings: Mapping[str, str] | None = None,
        ahead_ms: int = 1_000,
        ca: str | Path = "",
        cert: str | Path = "",
        key: str | Path = "",
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        super().__init__(
            capabilities=tts.TTSCapabilities(streaming=True, aligned_transcript=True),
            sample_rate=SAMPLE_RATE,
            num_channels=1,
        )
        if not 0 <= ahead_ms <= MAX_AHEAD_MS:
            raise ValueError(f"ahead_ms must be from 0 to {MAX_AHEAD_MS}, not {ahead_ms}")
        self._targets = _targets(target or os.environ.get(TARGET_ENV, "") or DEFAULT_TARGET)
        self._options = _Options(model, voice, language, ahead_ms, dict(settings or {}))
        if credentials is not None and (ca or cert or key):
            raise ValueError("give credentials, or ca with cert and key, not both")
        self._credentials = credentials
        self._tls = None if credentials is not None else _tls(ca, cert, key)
        self._fleets: dict[asyncio.AbstractEventLoop, Fleet] = {}
        self._streams = weakref.WeakSet[SynthesizeStream]()

    @property
    def model(self) -> str:
        return self._options.model or "default"

    @property
    def provider(self) -> str:
        return "duplex"

    def update_options(
        self,
        *,
        model: NotGivenOr[str] = NOT_GIVEN,
        voice: NotGivenOr[str] = NOT_GIVEN,
        language: NotGivenOr[str] = NOT_GIVEN,
        settings: NotGivenOr[Mapping[str, str]] = NOT_GIVEN,
    ) -> None:
        """For what is said from now on. Another model keeps the voice only if it is given again."""
        asked = self._options
        if is_given(model) and model != asked.model:
            asked = replace(asked, model=model, voice="", language="", settings={})
        if is_given(voice):
            asked = replace(asked, voice=voice)
        if is_given(language):
            asked = replace(asked, language=language)
        if is_given(settings):
            asked = replace(asked, settings=dict(settings))
        self._options = asked

    def synthesize(
        self, text: str, *, conn_options: APIConnectOptions = DEFAULT_API_CONNECT_OPTIONS
    ) -> tts.ChunkedStream:
        return self._synthesize_with_stream(text, conn_options=conn_options)

    def stream(
        self, *, conn_options: APIConnectOptions = DEFAULT_API_CONNECT_OPTIONS
    ) -> SynthesizeStream:
        stream = SynthesizeStream(
            tts=self,
            fleet=self._fleet(),
            asked=self._options.request(),
            conn_options=conn_options,
        )
        self._streams.add(stream)
        return stream

    async def aclose(self) -> None:
        """Stops what is being said on this loop; its sessions have ended when this returns."""
        for stream in list(self._streams):
            await stream.aclose()
        fleet = self._fleets.pop(asyncio.get_running_loop(), None)
        if fleet is not None:
            await fleet.aclose()

    def _fleet(self) -> Fleet:
        loop = asyncio.get_running_loop()
        if loop not in self._fleets:
            # Channels hold on to their loop, so those of loops that are gone must be let go.
            self._fleets = {of: fleet for of, fleet in self._fleets.items() if not of.is_closed()}
            self._fleets[loop] = Fleet(self._targets, self._credentials, tls=self._tls)
        return self._fleets[loop]


def _tls(ca: str | Path, cert: str | Path, key: str | Path) -> ClientTls | None:
    """Each as given, else the environment's. Raises TlsError, a ValueError."""
    given = {"ca": ca, "cert": cert, "key": key}
    names = {part: f"{part} ({TLS_ENV}{part.upper()})" for part in given}
    files = {part: path or os.environ.get(TLS_ENV + part.upper()) for part, path in given.items()}
    paths = {part: Path(path) for part, path in files.items() if path}
    if "ca" in paths:
        return ClientTls(paths["ca"], paths.get("cert"), paths.get("key"), names)
    if paths:
        raise ValueError(f"{names['cert']} and {names['key']} need {names['ca']} as well")
    return None


def _targets(text: str) -> tuple[str, ...]:
    targets = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for target in targets:
        if not _ADDRESS.fullmatch(target):
            raise ValueError(f"{target!r} is no worker: give host:port, as in {DEFAULT_TARGET}")
    if not targets:
        raise ValueError(f"no worker in {text!r}: give host:port, as in {DEFAULT_TARGET}")
    return targets
