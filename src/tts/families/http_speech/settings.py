"""What a catalog entry with `backend: http` says about its server, read and checked once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from src.rpc.errors import InvalidArgument, UnknownName
from src.tts.catalog import ModelMeta
from src.tts.families.settings import Range

SPEECH_PATH = "/audio/speech"

SPEED = Range(0.25, 4.0, 1.0, "rate of speech, as the server understands it")
_NUMBERS = {
    "sample_rate": Range(8_000, 96_000, 24_000, "Hz of raw PCM"),
    "connect_ms": Range(1, 60_000, 2_000, "for a connection to be made"),
    "first_byte_ms": Range(1, 600_000, 10_000, "until the first sound, retries included"),
    "chunk_ms": Range(1, 600_000, 5_000, "between two pieces of a sound that goes on"),
    "retries": Range(0, 10, 2, "tries after the first, before the first sound"),
    "max_streams": Range(0, 10_000, 8, "utterances at once; 0: the server knows its limits"),
}
_FORMATS = ("pcm", "wav")
_WORDS = ("url", "model", "voice", "response_format", "api_key_env", "body", "speed")
_VOICE = "voice."
# The adapter fills these in from the text and from settings of their own.
_OURS = frozenset({"model", "input", "voice", "response_format", "speed"})


@dataclass(frozen=True, slots=True)
class HttpSettings:
    url: str
    """The full address that speech is asked of."""
    model: str
    """The server's name for the model; empty: left out of the request."""
    voices: Mapping[str, str]
    """Our names of voices, the default first, and the server's; empty: left out of the request."""
    response_format: str
    sample_rate: int
    """Hz of raw PCM. A WAV header's own rate wins."""
    api_key: str
    connect_ms: int
    first_byte_ms: int
    chunk_ms: int
    retries: int
    max_streams: int
    speed: str
    """Empty: left out of the request."""
    body: Mapping[str, Any]
    """More fields for the request."""

    @property
    def where(self) -> str:
        """The address as it may be shown: without a query, which may hold a secret."""
        return self.url.partition("?")[0]


def read_http_settings(meta: ModelMeta, environ: Mapping[str, str] = os.environ) -> HttpSettings:
    """Raises UnknownName for a key, and InvalidArgument for a value, that cannot be used."""
    said = dict(meta.settings)
    for name in said:
        if name not in _NUMBERS and name not in _WORDS and not name.startswith(_VOICE):
            raise UnknownName.among("setting", name, [*_WORDS, *_NUMBERS])
    if meta.native_sr:
        said.setdefault("sample_rate", str(meta.native_sr))
    numbers = {
        name: int(range_.read(name, said.get(name, str(range_.default))))
        for name, range_ in _NUMBERS.items()
    }
    if "speed" in said:
        SPEED.read("speed", said["speed"])
    return HttpSettings(
        url=_url(meta.model_id, said.get("url", "")),
        model=said.get("model", ""),
        voices=_voices(meta, said),
        response_format=_format(said.get("response_format", "pcm")),
        api_key=_api_key(said.get("api_key_env", ""), environ),
        speed=said.get("speed", ""),
        body=_body(said.get("body", "{}")),
        **numbers,
    )


def _url(model_id: str, text: str) -> str:
    """The address to post to; one that ends in the API's version is its base."""
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise InvalidArgument(f"{model_id}: setting 'url' is no address: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise InvalidArgument(
            f"{model_id}: `backend: http` needs the setting 'url', such as "
            "http://127.0.0.1:8880/v1/audio/speech"
        )
    if url.userinfo:
        raise InvalidArgument(
            f"{model_id}: the setting 'url' holds a password; put the key into an environment "
            "variable and name that in 'api_key_env'"
        )
    path = url.path.rstrip("/")
    return str(url.copy_with(path=path + SPEECH_PATH) if path.endswith("/v1") else url)


def _voices(meta: ModelMeta, said: Mapping[str, str]) -> dict[str, str]:
    """The entry's voices and those that `voice.<name>` renames; else the one that is `voice`."""
    renamed = {
        key.removeprefix(_VOICE): theirs for key, theirs in said.items() if key.startswith(_VOICE)
    }
    names = {name: renamed.get(name, name) for name in meta.voices} | renamed
    default = said.get("voice", "")
    if not names:
        return {default or "default": default}
    if not default:
        return names
    if default not in names:
        raise UnknownName.among(f"voice of {meta.model_id}", default, names)
    return {default: names[default], **names}


def _format(name: str) -> str:
    if name not in _FORMATS:
        raise InvalidArgument(f"setting 'response_format' must be pcm or wav, got {name!r}")
    return name


def _api_key(variable: str, environ: Mapping[str, str]) -> str:
    if not variable:
        return ""
    key = environ.get(variable, "").strip()
    if not key:
        raise InvalidArgument(
            f"the environment variable {variable!r}, named in 'api_key_env', is not set"
        )
    if not key.isascii() or not key.isprintable():
        raise InvalidArgument(f"the key in {variable!r} holds characters that no header can")
    return key


def _body(text: str) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except ValueError as error:
        raise InvalidArgument(f"setting 'body' is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise InvalidArgument("setting 'body' must be a JSON object")
    taken = _OURS & set(body)
    if taken:
        raise InvalidArgument(f"setting 'body' may not hold {sorted(taken)}: they are settings")
    return body
