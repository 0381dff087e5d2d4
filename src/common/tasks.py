"""Structured concurrency on every Python we support."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator

if sys.version_info >= (3, 11):
    from asyncio import TaskGroup, timeout
    from builtins import BaseExceptionGroup
else:
    # Its own `timeout` raises the builtin TimeoutError, which is not asyncio's before 3.11.
    from async_timeout import timeout
    from exceptiongroup import BaseExceptionGroup
    from taskgroup import TaskGroup

__all__ = ["TaskGroup", "cancel_and_wait", "leaves", "timeout"]


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors inside a group, and inside groups within it; of any other error, itself."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


async def cancel_and_wait(task: asyncio.Task[object]) -> None:
    """Cancel a task and wait until it is gone. Its own error is raised; its cancellation is not."""
    task.cancel()
    while not task.done():
        # `wait` never raises the task's error: all it lets through is our own cancellation.
        await asyncio.wait([task])
    if not task.cancelled() and (error := task.exception()) is not None:
        raise error
