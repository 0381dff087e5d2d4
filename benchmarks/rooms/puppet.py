"""A process of the benchmark that does as it is told, so that its cost is not the product's.

The parent asks (`POST /NAME` with JSON arguments), the child answers with JSON. Child of the parent
like any other: its own log, and dead when the parent is.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from benchmarks.caller import DidNotHappen
from src.common.processes import Child, free_port
from src.demo import actor

READY_S = 60.0
ASK_S = 90.0
FAILED = 409
Command = Callable[..., Awaitable[Any]]


class Puppet:
    """Made by `puppet`."""

    def __init__(self, child: Child, http: aiohttp.ClientSession, url: str) -> None:
        self.child = child
        self._http = http
        self._url = url

    async def ask(self, command: str, **arguments: Any) -> Any:
        """Raises DidNotHappen, also when the child has lost its way."""
        try:
            async with self._http.post(f"{self._url}/{command}", json=arguments) as answer:
                if answer.status == 200:
                    return await answer.json()
                raise DidNotHappen(await answer.text())
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            name = type(error).__name__
            raise DidNotHappen(f"{self.child.name}, {command}: {name}: {error}") from None


@asynccontextmanager
async def puppet(name: str, module: str, log: Path, *args: str) -> AsyncIterator[Puppet]:
    port = free_port()
    argv = [sys.executable, "-m", module, "--port", str(port), *args]
    child = await Child.start(name, argv, log=log)
    url = f"http://127.0.0.1:{port}"
    limit = aiohttp.ClientTimeout(total=ASK_S)
    try:
        async with aiohttp.ClientSession(timeout=limit) as http:
            await child.ready(lambda: _answers(http, url), READY_S)
            yield Puppet(child, http, url)
    finally:
        await child.stop()


async def _answers(http: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with http.get(url) as answer:
            return answer.status == 200
    except (aiohttp.ClientError, asyncio.TimeoutError):
        return False


# --- in the child ---


async def obey(port: int, commands: Mapping[str, Command]) -> None:
    """Until SIGTERM. What a command raises as DidNotHappen is the parent's; the rest is a bug."""
    app = web.Application()
    app.router.add_get("/", lambda _: _ok())
    for name, command in commands.items():
        app.router.add_post(f"/{name}", _handler(command))
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    try:
        await over.wait()
    finally:
        await runner.cleanup()


async def _ok() -> web.Response:
    return web.Response()


def _handler(command: Command) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            return web.json_response(await command(**await request.json()))
        except (DidNotHappen, actor.DidNotHappen) as error:
            return web.Response(status=FAILED, text=str(error))

    return handle
