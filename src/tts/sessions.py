"""All sessions of a worker: who may start one, who has one, and how they end."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Mapping

from src.common.tasks import TaskGroup
from src.rpc.errors import (
    Exhausted,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
    UnknownName,
)
from src.rpc.generated import tts_pb2 as pb
from src.tts.leases import Lease
from src.tts.model_manager import ModelManager
from src.tts.session import Session
from src.tts.tts_base import VoiceSpec
from src.tts.utterance import Stage

log = logging.getLogger(__name__)

RETRY_AFTER_MS = 2_000
MAX_ID_CHARS = 128
MAX_LEAD_MS = 10_000


class Sessions:
    """`max_sessions` may be changed at any time; it only says who else may come in."""

    def __init__(self, manager: ModelManager, stage: Stage, max_sessions: int) -> None:
        self.stage = stage
        self.max_sessions = max_sessions
        self.draining = False
        self._manager = manager
        self._sessions: dict[str, Session] = {}
        # Their model is loading; they count, so that a slow load does not let too many in.
        self._starting: set[str] = set()
        manager.on_lease_expired = self._expired

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, session_id: str) -> Session:
        """Raises NotFound, or InvalidArgument for an empty id."""
        if not session_id:
            raise InvalidArgument("session_id is missing; StartSession gives one")
        try:
            return self._sessions[session_id]
        except KeyError:
            raise NotFound(
                f"no session {session_id!r}: it never started, has ended, or was silent for longer "
                "than its lease; call StartSession"
            ) from None

    async def start(self, request: pb.StartSessionReq) -> Session:
        """A new session, or the same one with its lease renewed."""
        if request.lead_ms > MAX_LEAD_MS:
            raise InvalidArgument(f"lead_ms may be at most {MAX_LEAD_MS}")
        known = self._sessions.get(request.session_id)
        if known is not None:
            return _renewed(known, request)
        session_id = request.session_id or f"s-{uuid.uuid4().hex[:12]}"
        self._admit(session_id)
        self._starting.add(session_id)
        try:
            session = self._sessions[session_id] = await self._open(session_id, request)
        finally:
            self._starting.discard(session_id)
        log.info(
            "session started",
            extra={"session_id": session_id, "model_id": session.lease.meta.model_id},
        )
        return session

    async def end(self, session_id: str) -> int:
        """Stops what is being spoken. How many frames the session emitted. Raises NotFound."""
        session = self.get(session_id)
        del self._sessions[session_id]
        await session.close()
        log.info("session ended", extra={"session_id": session_id, "frames": session.frames})
        return session.frames

    async def drain(self, timeout_ms: float) -> None:
        """Let nobody in, wait for what is being spoken, then end every session."""
        self.draining = True
        speaking = [
            asyncio.ensure_future(session.until_idle()) for session in self._sessions.values()
        ]
        if speaking:
            _, late = await asyncio.wait(speaking, timeout=timeout_ms / 1000.0)
            for wait in late:
                wait.cancel()
        left = list(self._sessions.values())
        self._sessions.clear()
        async with TaskGroup() as group:
            for session in left:
                group.create_task(session.close(), name=f"close {session.session_id}")

    def _admit(self, session_id: str) -> None:
        if self.draining:
            raise Unavailable("this worker is draining; start the session on another one")
        if len(session_id) > MAX_ID_CHARS:
            raise InvalidArgument(f"session_id may be at most {MAX_ID_CHARS} characters long")
        if session_id in self._starting:
            raise FailedPrecondition(f"session {session_id!r} is being started by another call")
        if len(self._sessions) + len(self._starting) >= self.max_sessions:
            raise Exhausted(
                f"this worker takes {self.max_sessions} sessions and has as many; "
                "try again later or on another one",
                retry_after_ms=RETRY_AFTER_MS,
            )

    async def _open(self, session_id: str, request: pb.StartSessionReq) -> Session:
        lease = await self._manager.acquire(
            request.model_id,
            session_id=session_id,
            owner=request.owner,
            lease_ttl_ms=request.lease_ttl_ms,
        )
        try:
            if self.draining:
                raise Unavailable("this worker is draining; start the session on another one")
            asked = VoiceSpec(request.voice, request.language, dict(request.settings))
            spec = _checked(lease, asked)
        except BaseException:
            await lease.release()
            raise
        return Session(session_id, lease, spec, _codec(request), self.stage, request.lead_ms)

    def _expired(self, session_id: str) -> None:
        session = self._sessions.pop(session_id, None)
        self.stage.metrics.lease_expired()
        if session is not None:
            session.abandon()


def _renewed(session: Session, request: pb.StartSessionReq) -> Session:
    """What the request leaves empty stays as it was."""
    model_id = session.lease.meta.model_id
    if request.model_id not in ("", model_id):
        raise FailedPrecondition(
            f"session {session.session_id!r} speaks with {model_id!r}; a session keeps its model: "
            "end it and start another"
        )
    session.lease.touch()
    old = session.spec
    if request.voice or request.language or request.settings:
        asked = VoiceSpec(
            voice=request.voice or old.voice,
            language=request.language or ("" if request.voice else old.language),
            settings={**old.settings, **request.settings},
        )
        session.spec = _checked(session.lease, asked)
    if request.codec:
        session.codec = request.codec
    if request.lead_ms:
        session.lead_ms = request.lead_ms
    return session


def _checked(lease: Lease, asked: VoiceSpec) -> VoiceSpec:
    """Raises UnknownName or InvalidArgument."""
    _check_keys(asked.settings, lease.capabilities.settings)
    return lease.model.check_voice(asked)


def _check_keys(settings: Mapping[str, str], known: Mapping[str, str]) -> None:
    for key in settings:
        if key not in known:
            raise UnknownName.among("setting", key, known)


def _codec(request: pb.StartSessionReq) -> pb.Codec:
    return request.codec or pb.CODEC_PCM_S16LE
