"""What the room trials run on: the product with scripted words, a LiveKit server, and the peer.

One worker with eSpeak speaks for everybody. Our recogniser answers every pass at once and uses no
processor; our language model is a real HTTP server that writes its whole answer at once.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from pydantic import SecretStr

from benchmarks.caller import DidNotHappen
from benchmarks.rooms.puppet import Puppet, puppet
from benchmarks.rooms.speech import LINE, SHORT, clips
from benchmarks.stacks import LOADED, Bench, config_file
from src.common.livekit_server import HOW_TO_GET
from src.common.processes import Child, free_port
from src.demo.stack import Ports, Stack, StackOptions, running_stack
from src.orchestrator.rooms.settings import LiveKitSettings
from src.orchestrator.rooms.tokens import TokenMint
from tests.scripted_llm import Answer, ScriptedLlm

ORCHESTRATOR = "benchmarks.scripted_orchestrator"
VOICE = "espeak-en"
READY_S = 60.0
CONFIG = {**LOADED, "limits.max_sessions_per_key": 64}
OF_THE_SHELL = ("REDIS_URL", "LIVEKIT_URL", "LIVEKIT_API_KEY", "LIVEKIT_API_SECRET")
"""Whatever the shell says, what is measured is what is started here."""


def answer(messages: list[dict[str, str]]) -> Answer:
    """The line; to whoever interrupted it, as little as possible."""
    said = [message["content"] for message in messages if message["role"] == "assistant"]
    interrupted = bool(said) and said[-1].startswith(LINE[:3])
    return Answer([SHORT if interrupted else LINE])


@dataclass
class RoomLab:
    """A running installation with a user and a peer. `stack` has the processes of the product."""

    bench: Bench
    stack: Stack
    user: Puppet
    stock: Puppet
    samples: Path
    """Of the orchestrator, once it has ended."""

    @property
    def base_url(self) -> str:
        return self.stack.page_url.rstrip("/")

    @property
    def livekit(self) -> dict[str, str]:
        assert self.stack.livekit is not None
        return self.stack.livekit

    @property
    def mint(self) -> TokenMint:
        return TokenMint(
            LiveKitSettings(
                url=self.livekit["LIVEKIT_URL"],
                api_key=self.livekit["LIVEKIT_API_KEY"],
                api_secret=SecretStr(self.livekit["LIVEKIT_API_SECRET"]),
            )
        )

    @asynccontextmanager
    async def another(self, name: str, **overrides: Any) -> AsyncIterator[Installed]:
        """One more orchestrator beside the first, at the same worker and LiveKit server."""
        logs, port = self.bench.logs / "livekit", free_port()
        config = {**CONFIG, **{key.replace("__", "."): value for key, value in overrides.items()}}
        argv = [
            *(sys.executable, "-m", ORCHESTRATOR, "--livekit", "--port", str(port)),
            *("--config", str(config_file(logs / f"{name}.yaml", config))),
            *("--samples", str(logs / f"{name}.json"), "--scripted_ms", "0"),
        ]
        around = {"REDIS_URL": self.stack.redis_url, "LLM_BASE_URL": self.stack.llm_base_url}
        child = await Child.start(name, argv, log=logs / f"{name}.log", env=around | self.livekit)
        try:
            here = Installed(child, f"http://127.0.0.1:{port}")
            await child.ready(here.ready, READY_S)
            yield here
        finally:
            await child.stop()


@dataclass(frozen=True)
class Installed:
    child: Child
    base_url: str

    async def ready(self) -> bool:
        try:
            async with aiohttp.ClientSession() as http, http.get(f"{self.base_url}/readyz") as got:
                return got.status == 200
        except aiohttp.ClientError:
            return False


@asynccontextmanager
async def room_lab(bench: Bench) -> AsyncIterator[RoomLab]:
    """Raises ProcessFailed, and DidNotHappen on a machine without a livekit-server."""
    for name in OF_THE_SHELL:
        os.environ.pop(name, None)
    logs = bench.logs / "livekit"
    samples, said = logs / "samples.json", clips(bench.out / "clips" / "rooms.npz")
    async with ScriptedLlm(answer).serving() as llm:
        options = StackOptions(
            Ports.free(),
            logs,
            voice=VOICE,
            llm_base_url=llm.base_url,
            orchestrator_args=(
                *("--config", str(config_file(logs / "orchestrator.yaml", CONFIG))),
                *("--samples", str(samples), "--scripted_ms", "0"),
            ),
            orchestrator_module=ORCHESTRATOR,
            livekit=True,
        )
        async with running_stack(options, bench.report) as stack:
            if stack.livekit is None:
                raise DidNotHappen(HOW_TO_GET)
            async with _people(stack, logs, said) as (user, stock):
                yield RoomLab(bench, stack, user, stock, samples)


@asynccontextmanager
async def _people(stack: Stack, logs: Path, said: Path) -> AsyncIterator[tuple[Puppet, Puppet]]:
    async with (
        puppet("user", "benchmarks.rooms.user", logs / "user.log", "--clips", str(said)) as user,
        puppet(
            *("stock", "benchmarks.rooms.stock", logs / "stock.log"),
            *("--worker", stack.worker_target),
        ) as stock,
    ):
        yield user, stock


def fresh_room() -> str:
    return f"bench-{secrets.token_hex(4)}"


def merged(*parts: Mapping[str, float]) -> dict[str, float]:
    return {name: value for part in parts for name, value in part.items()}
