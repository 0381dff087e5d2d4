"""Every error that crosses an edge, with its one mapping to gRPC status, close code and HTTP.

DuplexError
├── InvalidArgument         the request is wrong; the same call will fail again
│   └── UnknownName         no such model, voice, language or key; names the nearest
├── NotFound                a session or utterance that is not (or no longer) there
├── Unauthenticated         no API key, or a wrong one
├── FailedPrecondition      right request, wrong moment
│   └── InUse               somebody holds a lease; says who
├── Exhausted               full; `retry_after_ms` says when to come back
├── Unavailable             draining, starting, or a part that is down
├── CorruptModel            a model file is missing, truncated or not the one whose hash is pinned
└── Internal                our fault
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import grpc

from src.common.names import nearest_hint

CODE_KEY = "error-code"
RETRY_KEY = "retry-after-ms"
QUEUE_KEY = "queue-position"


class DuplexError(Exception):
    """Base of all errors that a caller may see. The message is a sentence for a person."""

    code: ClassVar[str] = "internal"
    status: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    http: ClassVar[int] = 500
    close: ClassVar[int] = 4500

    def __init__(
        self, message: str, *, retry_after_ms: int | None = None, queue_position: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_ms = retry_after_ms
        self.queue_position = queue_position


class Internal(DuplexError):
    pass


class InvalidArgument(DuplexError):
    code = "invalid_argument"
    status = grpc.StatusCode.INVALID_ARGUMENT
    http = 400
    close = 4400


class UnknownName(InvalidArgument):
    """A name that nobody knows. `among` writes the message with the nearest known name."""

    code = "unknown_name"
    status = grpc.StatusCode.NOT_FOUND
    http = 404
    close = 4404

    @classmethod
    def among(cls, what: str, name: str, known: Iterable[str]) -> UnknownName:
        return cls(f"unknown {what} {name!r}{nearest_hint(name, known)}")


class NotFound(DuplexError):
    code = "not_found"
    status = grpc.StatusCode.NOT_FOUND
    http = 404
    close = 4404


class Unauthenticated(DuplexError):
    code = "unauthenticated"
    status = grpc.StatusCode.UNAUTHENTICATED
    http = 401
    close = 4401


class FailedPrecondition(DuplexError):
    code = "failed_precondition"
    status = grpc.StatusCode.FAILED_PRECONDITION
    http = 409
    close = 4409


class InUse(FailedPrecondition):
    code = "in_use"


class Exhausted(DuplexError):
    code = "exhausted"
    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    http = 429
    close = 4429


class Unavailable(DuplexError):
    code = "unavailable"
    status = grpc.StatusCode.UNAVAILABLE
    http = 503
    close = 4503


class CorruptModel(DuplexError):
    code = "corrupt_model"
    status = grpc.StatusCode.DATA_LOSS
    http = 500
    close = 4500


_CODES: dict[str, type[DuplexError]] = {
    error.code: error
    for error in (
        Internal,
        InvalidArgument,
        UnknownName,
        NotFound,
        Unauthenticated,
        FailedPrecondition,
        InUse,
        Exhausted,
        Unavailable,
        CorruptModel,
    )
}
CODES = tuple(_CODES)
"""Every code that an error of ours may have."""
_STATUSES: dict[grpc.StatusCode, type[DuplexError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Exhausted,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: Unavailable,
    grpc.StatusCode.DATA_LOSS: CorruptModel,
}


def to_metadata(error: DuplexError) -> tuple[tuple[str, str], ...]:
    """Trailing metadata for a gRPC status, read back by `from_rpc_error`."""
    pairs = [(CODE_KEY, error.code)]
    if error.retry_after_ms is not None:
        pairs.append((RETRY_KEY, str(error.retry_after_ms)))
    if error.queue_position is not None:
        pairs.append((QUEUE_KEY, str(error.queue_position)))
    return tuple(pairs)


async def abort(context: grpc.aio.ServicerContext, error: DuplexError) -> None:  # type: ignore[type-arg]
    """End a gRPC call with this error. Never returns: grpc raises."""
    await context.abort(error.status, error.message, to_metadata(error))


def from_rpc_error(error: grpc.aio.AioRpcError) -> DuplexError:
    """The error that the other side raised, rebuilt from status and trailing metadata."""
    trailing = {str(key): str(value) for key, value in error.trailing_metadata() or ()}
    fallback = _STATUSES.get(error.code(), Internal)
    kind = _CODES.get(trailing.get(CODE_KEY, ""), fallback)
    retry, queue = trailing.get(RETRY_KEY), trailing.get(QUEUE_KEY)
    return kind(
        error.details() or error.code().name,
        retry_after_ms=int(retry) if retry else None,
        queue_position=int(queue) if queue else None,
    )
