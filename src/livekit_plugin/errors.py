"""A worker's errors as LiveKit Agents knows them, so that its retries and fallbacks work.

UNAVAILABLE, or no answer at all   APIConnectionError     retried
DEADLINE_EXCEEDED                  APITimeoutError        retried
RESOURCE_EXHAUSTED                 APIStatusError(429)    retried; `body` says when to come back
INVALID_ARGUMENT, NOT_FOUND, …     APIStatusError(4xx)    not retried: it would fail again
the worker's own fault             APIStatusError(500)    retried
"""

from __future__ import annotations

import grpc
from grpc.aio import AioRpcError
from livekit.agents import APIConnectionError, APIError, APIStatusError, APITimeoutError

from src.rpc.errors import CODE_KEY, NotFound, Unavailable, from_rpc_error

# Without our code in the trailer these come from gRPC itself: nobody at the other end answered.
_LOST = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,
    }
)
FULL = 429


def api_error(error: AioRpcError, target: str) -> APIError:
    answered = any(key == CODE_KEY for key, _ in error.trailing_metadata() or ())
    if not answered and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return APITimeoutError(f"worker {target} did not answer in time")
    if not answered and error.code() in _LOST:
        return APIConnectionError(f"worker {target} is lost: {error.details()}")
    typed = from_rpc_error(error)
    # A session that is gone is a worker that was restarted; the next attempt starts another.
    if isinstance(typed, Unavailable | NotFound):
        return APIConnectionError(f"worker {target}: {typed.message}")
    body: dict[str, object] = {"code": typed.code, "worker": target}
    if typed.retry_after_ms is not None:
        body["retry_after_ms"] = typed.retry_after_ms
    return APIStatusError(typed.message, status_code=typed.http, body=body)


def another_may_help(error: APIError) -> bool:
    """Whether another worker might do what this one would not.

    One that timed out has used up the time of this attempt; the next one starts elsewhere.
    """
    if isinstance(error, APIStatusError):
        return error.status_code in (404, FULL)
    return isinstance(error, APIConnectionError) and not isinstance(error, APITimeoutError)


def rest_ms(error: APIError, default_ms: int) -> int:
    """For how long to ask other workers first; 0: nothing is wrong with this one."""
    if isinstance(error, APIStatusError):
        body = error.body if isinstance(error.body, dict) else {}
        return int(body.get("retry_after_ms", default_ms)) if error.status_code == FULL else 0
    return default_ms
