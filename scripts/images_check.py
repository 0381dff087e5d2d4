"""Are the images and the compose file any good? Builds them, starts them, and talks to them.

`just images-check`: the default services of docker-compose.yml by its own settings, on stand-in
bases made by debootstrap, and a spoken question through the command-line client. Needs root and
{tools}; takes ten minutes and 6 GB.
Leaves nothing behind, writes nothing into the repository, and runs once at a time on a machine.
It proves the Dockerfiles' steps, the lock on that Python, and every setting the services run with.
It proves nothing about CUDA, about the bases of a registry, or about published ports.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scripts import images_engine as engine
from scripts import images_family as family
from scripts.compose_file import ComposeError, Service, read_env_file, services
from scripts.images_engine import ROOT, Bases, Container, EngineError, Network
from scripts.images_turn import AUDIBLE_DBFS, Failed, judge, speak_question
from src.common.livekit_server import LiveKitUnavailable, find_binary
from src.demo.play import QUESTION

READY_S = 180.0
COSYVOICE = "tts-cosyvoice"
COSYVOICES_TESTS = "tests/integration/test_cosyvoice.py"
COSYVOICE_URLS = {"COSYVOICE_URL": "https://github.com/FunAudioLLM/CosyVoice",
                  "MATCHA_URL": "https://github.com/shivammehta25/Matcha-TTS"}  # fmt: skip


@dataclass
class Findings:
    """What is worth writing down."""

    sizes_mb: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Service → its image, and the base inside it."""
    build_s: dict[str, float] = field(default_factory=dict)
    ready_s: dict[str, float] = field(default_factory=dict)
    stop_s: dict[str, float] = field(default_factory=dict)
    turn: dict[str, Any] = field(default_factory=dict)


class Progress:
    """One line a step, with the seconds since the start."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        self._console.print(f"[dim]{time.monotonic() - self._began:5.0f} s[/]  {text}")


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    began = time.monotonic()
    work()
    return time.monotonic() - began


def environment() -> dict[str, str]:
    """.env as a new user would have it: the example with the two secrets filled in."""
    made = {name: secrets.token_hex(24) for name in ("DUPLEX_API_KEY", "LIVEKIT_API_SECRET")}
    return {**read_env_file(ROOT / ".env.example"), **made}


def in_order(wanted: Mapping[str, Service]) -> list[Service]:
    """Each after what it depends on."""
    done: dict[str, Service] = {}

    def visit(service: Service) -> None:
        for name in service.depends_on:
            if name in wanted and name not in done:
                visit(wanted[name])
        done[service.name] = service

    for service in wanted.values():
        visit(service)
    return list(done.values())


class Check:
    def __init__(
        self, progress: Progress, folder: Path, *, livekit: Path | None, reuse: bool, llm: bool
    ) -> None:
        self._say = progress.say
        self._folder = folder
        self._env = environment()
        if llm:
            self._env["LLM_BASE_URL"] = "http://llm:8091/v1"
        self.bases = Bases(progress.say, livekit, reuse)
        self.findings = Findings()
        self.all = services(ROOT / "docker-compose.yml", self._env)
        chosen = {"llm"} if llm else set[str]()
        default = {n: one for n, one in self.all.items() if set(one.profiles) <= chosen}
        if livekit is None:
            del default["livekit-server"]
        self.services = in_order(default)

    # --- building ---

    def build(self, service: Service, more: dict[str, str], mounts: list[Path]) -> str:
        """The image to run; for what we do not build ourselves, a stand-in."""
        if not service.dockerfile:
            return self.bases.standing_in_for(service.image)
        base = self.bases.standing_in_for(service.build_args["BASE"])
        image = f"{engine.PREFIX}/{service.name}"
        if not (self.bases.reuse and engine.exists(image)):
            self._say(f"{service.name}: {service.dockerfile} on {base}")
            self.findings.build_s[service.name] = timed(
                lambda: engine.build(service, base, more, mounts)
            )
        self.findings.sizes_mb[service.name] = engine.size_mb(image), engine.size_mb(base)
        return image

    # --- running ---

    def run(self) -> None:
        """Raises Failed, EngineError."""
        images = {service.name: self.build(service, {}, []) for service in self.services}
        self._refuses_without_key(images["orchestrator"])
        network = Network(images["redis"], list(images), self._folder / "hosts")
        network.open()
        running = {service.name: Container(service, network) for service in self.services}
        for service in self.services:
            self._start(running[service.name], images[service.name])
        for name in ("orchestrator", "tts0"):
            self._is_confined(running[name])
        if "livekit-server" in images:
            self._opens_a_room(network)
        self._talk(network)
        for service in reversed(self.services):
            self._stop(running[service.name])

    def _refuses_without_key(self, image: str) -> None:
        try:
            engine.run_once(image, ["--env", "DUPLEX_API_KEY="])
        except EngineError as error:
            if "without an API key" in str(error):
                self._say("orchestrator without a key: refused")
                return
            raise
        raise Failed("the orchestrator started on every interface without an API key")

    def _start(self, container: Container, image: str) -> None:
        name = container.service.name

        def until_ready() -> None:
            container.start(image)
            deadline = time.monotonic() + max(READY_S, container.service.start_s)
            while not container.healthy():
                if not container.running() or time.monotonic() > deadline:
                    raise Failed(f"{name} did not get healthy:\n{container.logs()[-3000:]}")
                time.sleep(0.3)

        self.findings.ready_s[name] = timed(until_ready)
        self._say(f"{name}: healthy after {self.findings.ready_s[name]:.1f} s")

    def _is_confined(self, container: Container) -> None:
        user = engine.podman("exec", container.name, "id", "-u").strip()
        if user == "0":
            raise Failed(f"{container.name} runs as root")
        probe = "for d in /app /etc /home; do touch $d/probe 2>/dev/null && echo $d; done; true"
        writable = engine.podman("exec", container.name, "sh", "-c", probe).split()
        if writable:
            raise Failed(f"{container.name} can write into {', '.join(writable)}")
        self._say(f"{container.service.name}: user {user}, read-only root")

    def _stop(self, container: Container) -> None:
        name, status = container.service.name, 0

        def stop() -> None:
            nonlocal status
            status = container.stop()

        self.findings.stop_s[name] = timed(stop)
        if status:
            raise Failed(f"{name} ended with {status} on SIGTERM:\n{container.logs()[-2000:]}")
        self._say(f"{name}: stopped in {self.findings.stop_s[name]:.1f} s, status 0")

    # --- talking ---

    def _opens_a_room(self, network: Network) -> None:
        """The orchestrator joins before it hands out the token."""
        ask = (
            "import json, os, urllib.request as u; "
            "r = u.Request('http://127.0.0.1:8080/v1/livekit/token', method='POST', "
            "headers={'X-API-Key': os.environ['DUPLEX_API_KEY']}); "
            "print(json.load(u.urlopen(r, timeout=20))['server_url'])"
        )
        env = {**os.environ, **self._key()}
        told = engine.call([*network.inside, sys.executable, "-c", ask], env=env).strip()
        if told != self._env["LIVEKIT_PUBLIC_URL"]:
            raise Failed(f"clients are told to dial {told}")
        self._say(f"a LiveKit room is open at {told}")

    def _key(self) -> dict[str, str]:
        """Not an argument: everybody on the machine can read those."""
        return {"DUPLEX_API_KEY": self._env["DUPLEX_API_KEY"]}

    def _talk(self, network: Network) -> None:
        question, reply = self._folder / "question.wav", self._folder / "reply.wav"
        me = [*network.inside, sys.executable, "-m", "scripts.images_check"]
        engine.call([*me, "--speak_into", str(question)])
        self._say(f"asking: {QUESTION}")
        client = [*network.inside, sys.executable, "-m", "src.client.cli_client", "--json"]
        client += ["--no_devices", "--host", "ws://127.0.0.1:8080", "--in", str(question)]
        answer = subprocess.run(  # noqa: S603 - our own client
            [*client, "--out", str(reply)],
            env={**os.environ, **self._key()},
            capture_output=True, text=True, check=False, cwd=ROOT,
        )  # fmt: skip
        if answer.returncode:
            raise Failed(f"the client ended with {answer.returncode}: {answer.stderr[-1000:]}")
        events = [json.loads(line) for line in answer.stdout.splitlines()]
        self.findings.turn = judge(events, reply)
        self._say(f"understood: {self.findings.turn['understood']}")
        self._say(f"answered:   {self.findings.turn['answered']}")

    # --- other families' images ---

    def family(self, extra: str) -> None:
        """Dockerfile.tts with an extra: built, started without a GPU, and spoken to."""
        packs = self._folder / f"packs-{extra}"
        worker = family.service_for(extra, self._env, packs)
        both = (self.all["redis"], worker)
        images = {one.name: self.build(one, {}, []) for one in both}
        family.make_pack(extra, images[worker.name], packs)
        network = Network(images["redis"], list(images), self._folder / f"hosts-{extra}")
        network.open()
        running = {one.name: Container(one, network) for one in both}
        for name, container in running.items():
            self._start(container, images[name])
        self._is_confined(running[worker.name])
        told = family.speak(network.inside, extra)
        self._say(f"{worker.name}: first sound after {told['first_ms']:.0f} ms, {told}")
        if told["dbfs"] < AUDIBLE_DBFS:
            raise Failed(f"{worker.name} is silent: {told}")
        for container in reversed(running.values()):
            self._stop(container)

    def cosyvoice(self, *, tests: bool) -> None:
        """Builds it and imports what it is for; without a pack it must say what is missing.

        `tests`: its tests' image too, and the tests in it.
        """
        urls, mounts = dict(COSYVOICE_URLS), []
        for name in urls:
            if given := os.environ.get(name):
                urls[name] = given
                mounts += [Path(given.removeprefix("file://"))] if given.startswith("file:") else []
        service = self.all[COSYVOICE]
        image = self.build(service, urls, mounts)
        what = (
            "import sys, torch; from cosyvoice.flow import flow; "
            "from src.tts.adapters.adapter_cosyvoice2 import CosyVoice2Adapter as Adapter; "
            "Adapter().check_installed(); "
            "print(sys.version.split()[0], torch.__version__)"
        )
        home = "PYTHONPATH=/opt/cosyvoice:/opt/cosyvoice/third_party/Matcha-TTS"
        flags = ["--read-only", "--tmpfs", "/cache", "--env", home]
        found = engine.run_once(image, flags, "python", "-c", what).strip()
        self._say(f"{COSYVOICE}: {found}, CosyVoice's own modules import")
        try:
            engine.run_once(image, flags)
        except EngineError as error:
            if "no voice pack in" not in str(error):
                raise
            self._say(f"{COSYVOICE}: says that the voice pack is missing")
        else:
            raise Failed(f"{COSYVOICE} started without a voice pack")
        if tests:
            self._cosyvoices_tests(urls, mounts)

    def _cosyvoices_tests(self, urls: dict[str, str], mounts: list[Path]) -> None:
        service = services(ROOT / "docker-compose.yml", {**self._env, "COSYVOICE_TARGET": "tests"})
        named = replace(service[COSYVOICE], name=f"{COSYVOICE}-tests")
        image = self.build(named, urls, mounts)
        flags = ["--read-only", "--tmpfs", "/cache", "--tmpfs", "/tmp"]  # noqa: S108 - in there
        told = engine.run_once(image, flags, "pytest", "-p", "no:cacheprovider", COSYVOICES_TESTS)
        self._say(f"{named.name}: {told.strip().splitlines()[-1]}")


def show(console: Console, findings: Findings) -> None:
    table = Table("image", "size MB", "of it base MB", "built s", "healthy s", "stopped s")
    for name in {**findings.sizes_mb, **findings.ready_s}:
        size, base = findings.sizes_mb.get(name, ("", ""))
        times = (findings.build_s, findings.ready_s, findings.stop_s)
        cells = [f"{of[name]:.1f}" if name in of else "" for of in times]
        table.add_row(name, str(size), str(base), *cells)
    console.print(table)
    if findings.turn:
        console.print(
            f"first audio of the reply {findings.turn['first_audio_ms']} ms after the question"
        )


def livekit_binary() -> Path | None:
    try:
        return find_binary()
    except LiveKitUnavailable:
        return None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    described = (__doc__ or "").format(tools=", ".join(engine.TOOLS))
    parser = argparse.ArgumentParser(
        description=described, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cosyvoice",
        action="store_true",
        help="build CosyVoice's image too (8 GB more); COSYVOICE_URL and MATCHA_URL may name "
        "repositories on this machine (file:///…)",
    )
    parser.add_argument(
        "--llm", action="store_true", help="the profile llm too: it answers instead of the echo"
    )
    parser.add_argument(
        "--cosyvoice_tests", action="store_true", help="and its tests in their own image"
    )
    parser.add_argument(
        "--extra",
        action="append",
        choices=sorted(family.TINY),
        default=[],
        help="Dockerfile.tts with this family too, speaking out of a small random pack (9 GB each)",
    )
    parser.add_argument(
        "--only", action="store_true", help="nothing but what --cosyvoice and --extra ask for"
    )
    parser.add_argument("--keep", action="store_true", help="leave images for a look at them")
    parser.add_argument("--reuse", action="store_true", help="build nothing that --keep has left")
    parser.add_argument("--speak_into", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def check(console: Console, args: argparse.Namespace) -> None:
    progress = Progress(console)
    livekit = livekit_binary()
    if livekit is None:
        progress.say("no livekit-server on this machine: left out (`just livekit-server`)")
    with tempfile.TemporaryDirectory(prefix="duplex-check-") as folder:
        run = Check(progress, Path(folder), livekit=livekit, reuse=args.reuse, llm=args.llm)
        try:
            for part in parts(run, args):
                engine.tidy(run.bases, keep_images=True)
                part()
        finally:
            engine.tidy(run.bases, keep_images=args.keep)
            show(console, run.findings)


def parts(run: Check, args: argparse.Namespace) -> list[Callable[[], None]]:
    wanted: list[Callable[[], None]] = [] if args.only else [run.run]
    wanted += [partial(run.family, extra) for extra in args.extra]
    if args.cosyvoice or args.cosyvoice_tests:
        wanted.append(partial(run.cosyvoice, tests=args.cosyvoice_tests))
    return wanted


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.speak_into is not None:
        speak_question(args.speak_into)
        return 0
    missing = engine.missing_tools()
    if missing or os.geteuid() != 0:
        lacking = f"not here: {', '.join(missing)}" if missing else "needs root"
        print(f"images-check: {lacking}. {engine.HOW_TO_GET}", file=sys.stderr)
        return 2
    console = Console(soft_wrap=True)
    try:
        with engine.alone():
            check(console, args)
    except (Failed, EngineError, ComposeError) as error:
        console.print(f"[bold red]✗[/] {error}", markup=True)
        return 1
    console.print("[bold green]✓[/] the images build, start by the compose file, and hold a turn")
    return 0


if __name__ == "__main__":
    sys.exit(main())
