"""What a speech server's answer means when it is no sound, as one of our errors. Pure.

The caller did nothing wrong when the server refuses the worker's key or has another model: those
are `Unavailable`, so that another worker may be tried. What the server says about the request may
quote its text, so only its error code is told on, and its whole message where the text is ours.
"""

from __future__ import annotations

import email.utils
import json
import re
import time
from collections.abc import Mapping

from src.rpc.errors import DuplexError, Exhausted, InvalidArgument, Unavailable
from src.tts.families.http_speech.audio import MAX_RATE, MIN_RATE

# What goes away by itself.
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
MAX_ERROR_BYTES = 8_192
_SHOWN_CHARS = 200
_CODE = re.compile(r"[A-Za-z0-9_.\-]{1,40}\Z")
_SOUND = re.compile(r"audio/(pcm|pcm_s16le|x-pcm|l16|raw|x-raw|wav|wave|x-wav|vnd\.wave)\Z")
_HZ = re.compile(r"[0-9]{1,6}\Z")
_RATE = re.compile(r";\s*rate\s*=\s*\"?(\d{4,6})\b", re.IGNORECASE)


def refusal(
    where: str, status: int, headers: Mapping[str, str], body: bytes, *, quote: bool
) -> DuplexError:
    """The error for a status other than 200. With `quote` the server's message is in it."""
    said = _said(body, quote=quote)
    answers = f"the speech server {where} answers with HTTP {status}{said}"
    retry_ms = retry_after_ms(headers.get("retry-after", ""))
    if status == 429:
        return Exhausted(f"{answers}: it has too much to do", retry_after_ms=retry_ms)
    if status >= 500 or status in PASSING:
        return Unavailable(answers, retry_after_ms=retry_ms)
    if status in (401, 403):
        return Unavailable(f"{answers}: it refuses this worker's key; see the setting api_key_env")
    if status in (404, 405):
        return Unavailable(f"{answers}: it has nothing there, or no such model or voice")
    if status < 400:
        return Unavailable(f"{answers}, which is neither sound nor an error; see the setting url")
    return InvalidArgument(f"{answers}: it cannot say this, or not in this way")


def is_sound(content_type: str) -> bool:
    """Is it raw PCM or WAV, or does nobody say?"""
    kind = _kind(content_type)
    return not kind or kind == "application/octet-stream" or bool(_SOUND.match(kind))


def not_sound(where: str, content_type: str, body: bytes, *, quote: bool) -> DuplexError:
    """The error for a content type that is none we can play."""
    kind = _kind(content_type)
    if kind.startswith(("audio/", "video/")):
        return Unavailable(
            f"the speech server {where} answers with {kind[:60]}; it was asked for raw PCM or WAV: "
            "try the other response_format"
        )
    what = "JSON" if "json" in kind else "a web page" if "html" in kind else repr(kind[:60])
    said = _said(body, quote=quote)
    return Unavailable(f"the speech server {where} answers with {what} instead of sound{said}")


def wav_promised(content_type: str) -> bool:
    return "wav" in _kind(content_type)


def rate_of(headers: Mapping[str, str]) -> int | None:
    """The sample rate that an answer tells of its raw PCM, in Hz; None: none of use.

    In a content type such as `audio/pcm; rate=24000`, else as `X-Sample-Rate`.
    """
    said = _RATE.search(headers.get("content-type", ""))
    text = said.group(1) if said else headers.get("x-sample-rate", "").strip()
    # Of a few digits only: int() reads other scripts' digits, and thousands of them.
    rate = int(text) if _HZ.match(text) else 0
    return rate if MIN_RATE <= rate <= MAX_RATE else None


def retry_after_ms(value: str) -> int | None:
    """A `Retry-After` header: seconds, or a date (RFC 9110 §10.2.3)."""
    try:
        return max(0, round(float(value) * 1000))
    except (ValueError, OverflowError):
        pass
    try:
        at = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0, round((at.timestamp() - time.time()) * 1000))


def _kind(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _said(body: bytes, *, quote: bool) -> str:
    """` (code: message)` from an error body in the API's shape; both may be missing."""
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        told = None
    error = told.get("error", told) if isinstance(told, dict) else {}
    error = error if isinstance(error, dict) else {"message": error}
    names = (error.get(key) for key in ("code", "type", "error"))
    code = next((name for name in names if isinstance(name, str) and _CODE.match(name)), "")
    parts = [code, _message(error, body) if quote else ""]
    shown = ": ".join(part for part in parts if part)
    return f" ({shown})" if shown else ""


def _message(error: Mapping[str, object], body: bytes) -> str:
    message = next((error[key] for key in ("message", "detail") if error.get(key)), None)
    text = body.decode("utf-8", "replace") if message is None else str(message)
    return " ".join(text.split())[:_SHOWN_CHARS]
