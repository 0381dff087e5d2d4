"""What the room trials run on: the product with scripted words, a LiveKit server, and the peer.

One worker with eSpeak speaks for everybody. Our recogniser answers every pass at once and uses no
processor; our language model is a real HTTP server that writes its whole answer at once.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
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

PRODUCT = "src.orchestrator.server"
SCRIPTED = "benchmarks.scripted_orchestrator"
EAGER = {"vad__endpoint_ms": 100, "vad__barge_in_endpoint_ms": 100}
"""As little silence as the tuned peer waits for."""
VOICE = "espeak-en"
READY_S = 60.0
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
    eager_url: str
    """Of an orchestrator like the first but for EAGER."""
    samples: tuple[Path, ...]
    """Of both, once they have ended."""

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

    def another(self, name: str, **overrides: Any) -> AbstractAsyncContextManager[Installed]:
        """One more orchestrator at the same worker and LiveKit server: the product as it is."""
        return _orchestrator(self.bench, self.stack, name, PRODUCT, (), overrides)


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
async def _orchestrator(
    bench: Bench,
    stack: Stack,
    name: str,
    module: str,
    args: Sequence[str],
    overrides: Mapping[str, Any],
) -> AsyncIterator[Installed]:
    """`overrides`: dotted keys of the configuration with `__` for the dot."""
    logs, port = bench.logs / "livekit", free_port()
    config = {**LOADED, **{key.replace("__", "."): value for key, value in overrides.items()}}
    argv = [
        *(sys.executable, "-m", module, "--livekit", "--port", str(port)),
        *("--config", str(config_file(logs / f"{name}.yaml", config)), *args),
    ]
    around = {"REDIS_URL": stack.redis_url, "LLM_BASE_URL": stack.llm_base_url}
    around |= stack.livekit or {}
    child = await Child.start(name, argv, log=logs / f"{name}.log", env=around)
    try:
        here = Installed(child, f"http://127.0.0.1:{port}")
        await child.ready(here.ready, READY_S)
        yield here
    finally:
        await child.stop()


@asynccontextmanager
async def room_lab(bench: Bench) -> AsyncIterator[RoomLab]:
    """Raises ProcessFailed, and DidNotHappen on a machine without a livekit-server."""
    for name in OF_THE_SHELL:
        os.environ.pop(name, None)
    logs = bench.logs / "livekit"
    samples = (logs / "samples.json", logs / "eager.json")
    said = clips(bench.out / "clips" / "rooms.npz")
    async with ScriptedLlm(answer).serving() as llm:
        options = StackOptions(
            Ports.free(),
            logs,
            voice=VOICE,
            llm_base_url=llm.base_url,
            orchestrator_args=(
                *("--config", str(config_file(logs / "orchestrator.yaml", LOADED))),
                *_hearing(samples[0]),
            ),
            orchestrator_module=SCRIPTED,
            livekit=True,
        )
        async with running_stack(options, bench.report) as stack:
            if stack.livekit is None:
                raise DidNotHappen(HOW_TO_GET)
            hearing = _hearing(samples[1])
            async with (
                _people(stack, logs, said) as (user, stock),
                _orchestrator(bench, stack, "eager", SCRIPTED, hearing, EAGER) as eager,
            ):
                yield RoomLab(bench, stack, user, stock, eager.base_url, samples)


def _hearing(samples: Path) -> tuple[str, ...]:
    """Words at once, and a sample of everything that is observed."""
    return ("--samples", str(samples), "--scripted_ms", "0")


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
