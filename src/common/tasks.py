"""Structured concurrency on every Python we support."""

from __future__ import annotations

import asyncio
import sys

if sys.version_info >= (3, 11):
    from asyncio import TaskGroup, timeout
else:
    from taskgroup import TaskGroup, timeout

__all__ = ["TaskGroup", "cancel_and_wait", "timeout"]


async def cancel_and_wait(task: asyncio.Task[object]) -> None:
    """Cancel a task and wait until it is gone. Its own error is raised; its cancellation is not."""
    task.cancel()
    while not task.done():
        # `wait` never raises the task's error: all it lets through is our own cancellation.
        await asyncio.wait([task])
    if not task.cancelled() and (error := task.exception()) is not None:
        raise error
