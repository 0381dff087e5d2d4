"""Tokens for rooms, and a guard that keeps them out of every log.

LiveKit's SDKs put whole tokens into their errors and log lines ("invalid token: eyJ…"), and a token
is all that it takes to enter a room.
"""

from __future__ import annotations

import datetime
import logging
import re
import secrets
import traceback
import warnings
from collections.abc import Mapping

from livekit import api

from src.orchestrator.rooms.settings import LiveKitSettings

log = logging.getLogger(__name__)

AGENT_PREFIX = "agent-"
SAFE_SECRET_CHARACTERS = 32
_USER_SOURCES = ["microphone"]
_HIDDEN = "[token]"
# A JWT begins with base64url of '{"', however it is cut off; a token in a URL may be of any kind.
_TOKEN = re.compile(
    r"\bey[JA][A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*){0,2}|(?<=access_token=)[^&\s\"'<>]+"
)
_LOGGERS = ("livekit", "livekit.agents", "livekit.api", "livekit.rtc")
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__)


def redact(text: str) -> str:
    """`text` with every token in it, whole or cut off, replaced."""
    return _TOKEN.sub(_HIDDEN, text)


class TokenMint:
    """Tokens signed with our API secret, for one room and one identity each."""

    def __init__(self, settings: LiveKitSettings) -> None:
        self._key = settings.api_key
        self._secret = settings.api_secret.get_secret_value()
        self._agent_name = settings.agent_name
        self._ttl = datetime.timedelta(milliseconds=settings.token_ttl_ms)
        self._dispatch: list[api.RoomAgentDispatch] = []
        if settings.entry == "agentserver" and settings.dispatch == "explicit":
            self._dispatch.append(api.RoomAgentDispatch(agent_name=settings.agent_name))
        # Said once by `warn_of_short_secret`, not at every token by the library.
        warnings.filterwarnings("ignore", message="The HMAC key is")

    def user(
        self,
        room: str,
        identity: str,
        name: str = "",
        attributes: Mapping[str, str] | None = None,
        metadata: str = "",
    ) -> str:
        """Talk, listen, send data, set one's own attributes: in this room and nowhere else."""
        grants = api.VideoGrants(
            room_join=True,
            room=room,
            can_publish=True,
            can_publish_data=True,
            can_publish_sources=list(_USER_SOURCES),
            can_subscribe=True,
            can_update_own_metadata=True,
        )
        token = self._token(identity, name or identity, grants)
        token.with_attributes(dict(attributes or {})).with_metadata(metadata)
        if self._dispatch:
            token.with_room_config(api.RoomConfiguration(agents=self._dispatch))
        return token.to_jwt()

    def agent(self, room: str) -> str:
        """An agent's token for `room`, under an identity of its own."""
        grants = api.VideoGrants(
            room_join=True,
            room=room,
            agent=True,
            can_publish=True,
            can_publish_data=True,
            can_subscribe=True,
            can_update_own_metadata=True,
            hidden=False,
        )
        identity = AGENT_PREFIX + secrets.token_hex(6)
        token = self._token(identity, self._agent_name, grants).with_kind("agent")
        return token.to_jwt()

    def _token(self, identity: str, name: str, grants: api.VideoGrants) -> api.AccessToken:
        token = api.AccessToken(self._key, self._secret)
        return token.with_identity(identity).with_name(name).with_ttl(self._ttl).with_grants(grants)


def warn_of_short_secret(settings: LiveKitSettings) -> None:
    """Once, at the start."""
    length = len(settings.api_secret.get_secret_value())
    if length < SAFE_SECRET_CHARACTERS:
        log.warning(
            "livekit.api_secret has %d characters; one of fewer than %d can be guessed by trying",
            length,
            SAFE_SECRET_CHARACTERS,
        )


class _WithoutTokens(logging.Filter):
    """Takes tokens out of a record: message, arguments, extras, exception and stack."""

    def filter(self, record: logging.LogRecord) -> bool:
        self._message(record)
        self._exception(record)
        if record.stack_info:
            record.stack_info = redact(record.stack_info)
        for key, value in record.__dict__.items():
            if key not in _STANDARD and not isinstance(value, int | float | bool | None):
                text = str(value)
                if (clean := redact(text)) != text:
                    record.__dict__[key] = clean
        return True

    def _message(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except (TypeError, ValueError):
            return  # the handler reports a wrong format string itself
        if (clean := redact(message)) != message:
            record.msg, record.args = clean, ()

    def _exception(self, record: logging.LogRecord) -> None:
        if record.exc_text:
            record.exc_text = redact(record.exc_text)
        if not record.exc_info or record.exc_info[1] is None:
            return
        text = "".join(traceback.format_exception(*record.exc_info))
        if (clean := redact(text)) != text:
            # Formatters read `exc_info`, so the words have to be changed there.
            record.exc_info = (_Redacted, _Redacted(clean.rstrip()), None)
            record.exc_text = None


class _Redacted(Exception):
    """An exception whose own words carried a token; this one carries the rest of them."""


def install_redaction() -> None:
    """Put the guard before every handler of the root logger and LiveKit's own loggers. Idempotent.

    A record reaches other people's handlers of other loggers unguarded: there are none here.
    """
    guarded: list[logging.Filterer] = [*logging.getLogger().handlers]
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        guarded += [logger, *logger.handlers]
    for filterer in guarded:
        if not any(isinstance(found, _WithoutTokens) for found in filterer.filters):
            filterer.addFilter(_WithoutTokens())
