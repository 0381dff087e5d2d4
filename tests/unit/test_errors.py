"""Every error crosses a real gRPC edge and comes out as what went in."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from src.rpc import errors
from src.rpc.errors import DuplexError, abort, from_rpc_error

KINDS = [
    errors.Internal,
    errors.InvalidArgument,
    errors.UnknownName,
    errors.NotFound,
    errors.Unauthenticated,
    errors.FailedPrecondition,
    errors.InUse,
    errors.Exhausted,
    errors.Unavailable,
    errors.CorruptModel,
]


class Edge:
    """A server with one method, which fails as told."""

    def __init__(self) -> None:
        self.error: DuplexError = errors.Internal("not told")
        self.bare_status: grpc.StatusCode | None = None

    async def fail(self, request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        if self.bare_status is not None:
            await context.abort(self.bare_status, "from elsewhere")
        await abort(context, self.error)
        raise AssertionError("abort returned")


@pytest.fixture
async def edge() -> AsyncIterator[tuple[Edge, grpc.aio.Channel]]:
    failing, server = Edge(), grpc.aio.server()
    method: Any = grpc.unary_unary_rpc_method_handler(failing.fail)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("edge", {"Fail": method}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield failing, channel
    await server.stop(None)


async def raised_by(channel: grpc.aio.Channel) -> grpc.aio.AioRpcError:
    call: Any = channel.unary_unary("/edge/Fail")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(b"")
    return caught.value


async def test_every_kind_survives_the_crossing(
    edge: tuple[Edge, grpc.aio.Channel],
) -> None:
    failing, channel = edge
    for kind in KINDS:
        failing.error = kind(f"why: {kind.__name__}", retry_after_ms=250, queue_position=3)
        rpc = await raised_by(channel)
        assert rpc.code() is kind.status
        back = from_rpc_error(rpc)
        assert type(back) is kind
        assert back.message == f"why: {kind.__name__}"
        assert (back.retry_after_ms, back.queue_position) == (250, 3)


async def test_what_was_not_said_stays_unsaid(edge: tuple[Edge, grpc.aio.Channel]) -> None:
    failing, channel = edge
    failing.error = errors.Exhausted("full")
    back = from_rpc_error(await raised_by(channel))
    assert back.retry_after_ms is None
    assert back.queue_position is None


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.Unavailable),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.Exhausted),
        (grpc.StatusCode.NOT_FOUND, errors.NotFound),
        (grpc.StatusCode.UNKNOWN, errors.Internal),
    ],
)
async def test_a_status_from_elsewhere_is_understood_too(
    edge: tuple[Edge, grpc.aio.Channel], status: grpc.StatusCode, kind: type[DuplexError]
) -> None:
    failing, channel = edge
    failing.bare_status = status
    assert type(from_rpc_error(await raised_by(channel))) is kind


def test_an_unknown_name_says_the_nearest_one() -> None:
    error = errors.UnknownName.among("model", "piper-en-jo", ["piper-en-joe", "espeak-en"])
    assert error.message == "unknown model 'piper-en-jo'; did you mean 'piper-en-joe'?"


def test_codes_are_unique_and_every_kind_has_its_own() -> None:
    assert len({kind.code for kind in KINDS}) == len(KINDS)
