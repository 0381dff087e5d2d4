"""Building and running without a Docker engine: debootstrap, buildah, podman and runc.

Bases come from Debian's and Ubuntu's mirrors instead of a registry, so that nothing but a package
mirror has to be reached. Containers share one network of their own with nothing in it but the
loopback; every service is its own name there, and the machine's ports stay free.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from scripts.compose_file import Service

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("podman", "buildah", "runc", "debootstrap")
HOW_TO_GET = (
    "apt-get install -y --no-install-recommends podman buildah runc debootstrap netavark "
    "fuse-overlayfs catatonit"
)
PREFIX = "localhost/duplex-check"
# Builds in the making, and their caches of wheels: gigabytes, and not for a /tmp in memory.
SCRATCH = Path("/var/tmp/duplex-check")  # noqa: S108 - root only, and removed at the end
NAMES = "duplex-check-"
HOLDER = f"{NAMES}network"
LOCK = Path("/run/duplex-check.lock")
MIRRORS = {
    "bookworm": "http://deb.debian.org/debian",
    "jammy": "http://archive.ubuntu.com/ubuntu",
    "noble": "http://archive.ubuntu.com/ubuntu",
}
_KEYRINGS = Path("/usr/share/keyrings")
_LOCAL_CA = Path("/usr/local/share/ca-certificates")
_CA_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
_ULIMITS = ["--ulimit", "nofile=1024:4096", "--ulimit", "nproc=1000:1000"]
_TAIL_LINES = 15


class EngineError(RuntimeError):
    """A tool is missing or failed; the message has its last lines."""


def missing_tools() -> list[str]:
    return [tool for tool in TOOLS if shutil.which(tool) is None]


def call(argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> str:
    """stdout. Raises EngineError with the end of what was printed."""
    done = subprocess.run(  # noqa: S603 - argument lists, and the programs are ours to name
        argv, env=env, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        # podman looks for systemd to run health checks by, which we do ourselves.
        lines = (done.stdout + done.stderr).strip().splitlines()
        tail = "\n".join([line for line in lines if "get systemd" not in line][-_TAIL_LINES:])
        raise EngineError(f"{' '.join(argv[:4])} … ended with {done.returncode}:\n{tail}")
    return done.stdout


def podman(*args: str) -> str:
    return call(["podman", "--runtime", "runc", *args])


def exists(image: str) -> bool:
    argv = ["podman", "image", "exists", image]
    return subprocess.run(argv, check=False).returncode == 0  # noqa: S603 - as in `call`


def run_once(image: str, flags: Sequence[str], *command: str) -> str:
    """stdout of a container that ends by itself. Raises EngineError when it ends badly."""
    fixed = ["--rm", "--network", "none", "--health-interval", "disable", *_ULIMITS]
    return podman("run", *fixed, *flags, image, *command)


@contextmanager
def alone(lock: Path | None = None) -> Iterator[None]:
    """One run at a time: each clears away whatever carries our names.

    Raises EngineError that names the process of the other. The lock goes with the process.
    """
    with (lock or LOCK).open("a+", encoding="utf-8") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.seek(0)
            other = held.read().strip()
            raise EngineError(
                f"another images-check is running (process {other}), with containers and images "
                "of the same names: wait for its end, or stop it"
            ) from None
        held.truncate(0)
        held.write(str(os.getpid()))
        held.flush()
        yield


@dataclass
class Bases:
    """Stand-ins for the images that ours are built on, made when they are asked for."""

    say: Callable[[str], None]
    livekit_binary: Path | None = None
    reuse: bool = False
    """What an earlier run left is good enough."""
    made: set[str] = field(default_factory=set)

    def standing_in_for(self, image: str) -> str:
        """The local image to use for `image`. Raises EngineError if there is none for it."""
        if image.startswith("python:"):
            return self._on("bookworm", "python", "python3 python3-venv")
        if image.startswith("redis:"):
            return self._on("bookworm", "redis", "redis-server")
        if image.startswith("livekit/livekit-server:"):
            return self._livekit()
        for release, mark in (("jammy", "ubuntu22.04"), ("noble", "ubuntu24.04")):
            if image.endswith(mark):
                return self._system(release)
        if image.startswith("debian:bookworm"):
            return self._system("bookworm")
        raise EngineError(f"no stand-in for the base {image}")

    def _on(self, release: str, name: str, packages: str) -> str:
        install = (
            f"RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends {packages} "
            "&& rm -rf /var/lib/apt/lists/*"
        )
        return self._derive(name, [f"FROM {self._system(release)}", install])

    def _livekit(self) -> str:
        if self.livekit_binary is None:
            raise EngineError("no livekit-server here; `just livekit-server` builds one")
        base = self._on("bookworm", "wget", "wget")
        lines = [f"FROM {base}", "COPY livekit-server /", 'ENTRYPOINT ["/livekit-server"]']
        return self._derive("livekit", lines, self.livekit_binary)

    def _derive(self, name: str, lines: list[str], file: Path | None = None) -> str:
        tag = f"{PREFIX}/base-{name}"
        if not self._there(tag):
            self.say(f"stand-in for {name}'s image")
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, "Dockerfile").write_text("\n".join(lines) + "\n", encoding="utf-8")
                if file is not None:
                    shutil.copy(file, Path(folder, "livekit-server"))
                _bud(tag, Path(folder), [])
            self.made.add(tag)
        return tag

    def _system(self, release: str) -> str:
        tag = f"{PREFIX}/{release}"
        if self._there(tag):
            return tag
        self.say(f"{release} by debootstrap, in place of a registry's image")
        SCRATCH.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
            root = Path(folder, "root")
            call(_debootstrap(release, root))
            _trust_as_here(root)
            changes = [f"ENV {name}={_CA_BUNDLE}" for name in ("SSL_CERT_FILE", "PIP_CERT")]
            options = [part for change in changes for part in ("-c", change)]
            archive = Path(folder, "root.tar")
            call(["tar", "-C", str(root), "-cf", str(archive), "."])
            podman("import", *options, str(archive), tag)
        self.made.add(tag)
        return tag

    def _there(self, tag: str) -> bool:
        return tag in self.made or (self.reuse and exists(tag))


def _debootstrap(release: str, root: Path) -> list[str]:
    argv = ["nice", "-n", "15", "debootstrap", "--variant=minbase", "--include=ca-certificates"]
    if "ubuntu" not in MIRRORS[release]:
        return [*argv, release, str(root), MIRRORS[release]]
    keyring = _KEYRINGS / "ubuntu-archive-keyring.gpg"
    # A base that is thrown away an hour later; without the keyring it is good for that only.
    argv.append(f"--keyring={keyring}" if keyring.is_file() else "--no-check-gpg")
    argv.append("--components=main,universe")
    # Debian's debootstrap has no script by the name of a later Ubuntu; theirs are all this one.
    return [*argv, release, str(root), MIRRORS[release], "gutsy"]


def _trust_as_here(root: Path) -> None:
    """The certificates that this machine was told to trust, for whoever sits behind a proxy."""
    into = root / _LOCAL_CA.relative_to("/")
    into.mkdir(parents=True, exist_ok=True)
    for certificate in sorted(_LOCAL_CA.glob("*.crt")) if _LOCAL_CA.is_dir() else ():
        shutil.copy(certificate, into)
    call(["chroot", str(root), "update-ca-certificates"])
    for package in (root / "var/cache/apt/archives").glob("*.deb"):
        package.unlink()


def _bud(tag: str, context: Path, options: Sequence[str]) -> None:
    # Docker's format: OCI's has no HEALTHCHECK.
    fixed = ["--isolation", "chroot", "--network", "host", "--format", "docker"]
    argv = ["nice", "-n", "15", "buildah", "bud", *fixed, *options, "-t", tag, str(context)]
    SCRATCH.mkdir(parents=True, exist_ok=True)
    if exists(tag):  # or it would stay, without a name
        podman("rmi", "-f", tag)
    call(argv, env={**os.environ, "TMPDIR": str(SCRATCH)})


def build(service: Service, base: str, more_args: dict[str, str], mounts: Sequence[Path]) -> str:
    """The service's image by the compose file's own build settings, on `base`."""
    tag = f"{PREFIX}/{service.name}"
    options = ["-f", str(ROOT / service.dockerfile)]
    if service.target:
        options += ["--target", service.target]
    for name, value in {**service.build_args, "BASE": base, **more_args}.items():
        options += ["--build-arg", f"{name}={value}"]
    for mount in mounts:
        options += ["--volume", f"{mount}:{mount}:ro"]
    _bud(tag, ROOT, options)
    return tag


def size_mb(image: str) -> int:
    return round(int(podman("image", "inspect", image, "--format", "{{.Size}}")) / 1e6)


@dataclass
class Network:
    """One network for all containers of a run, and their names in it."""

    image: str
    names: Sequence[str]
    hosts: Path
    holder: str = HOLDER

    def open(self) -> None:
        lines = [f"127.0.0.1 {name}" for name in ("localhost", *self.names)]
        self.hosts.write_text("\n".join(lines) + "\n", encoding="utf-8")
        flags = ["-d", "--name", self.holder, "--network", "none", *_ULIMITS]
        podman("run", *flags, self.image, "sleep", "infinity")

    @property
    def inside(self) -> list[str]:
        """What a command of this machine is put behind to be in the network."""
        pid = podman("inspect", self.holder, "--format", "{{.State.Pid}}").strip()
        return ["nsenter", f"--net=/proc/{pid}/ns/net", "--"]


@dataclass(frozen=True)
class Container:
    """A service that runs by the compose file's settings."""

    service: Service
    network: Network

    @property
    def name(self) -> str:
        return NAMES + self.service.name

    def start(self, image: str) -> None:
        podman("run", *run_flags(self, image), image, *self.service.command)

    def healthy(self) -> bool:
        test = self.service.health_test
        try:
            if test:
                podman("exec", self.name, *test)
            else:
                podman("healthcheck", "run", self.name)
        except EngineError:
            return False
        return True

    def running(self) -> bool:
        return podman("inspect", self.name, "--format", "{{.State.Running}}").strip() == "true"

    def logs(self) -> str:
        argv = ["podman", "--runtime", "runc", "logs", self.name]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)  # noqa: S603
        return done.stdout + done.stderr

    def stop(self) -> int:
        """SIGTERM, and SIGKILL after the service's grace. Returns the exit status."""
        podman("stop", "-t", str(self.service.grace_s), self.name)
        return int(podman("inspect", self.name, "--format", "{{.State.ExitCode}}"))


def run_flags(container: Container, image: str) -> list[str]:
    """The compose file's settings as podman's, which adds less of its own than it would like to."""
    raw, network = container.service.raw, container.network
    flags = ["-d", "--name", container.name, "--network", f"container:{network.holder}", *_ULIMITS]
    flags += ["-v", f"{network.hosts}:/etc/hosts:ro", "--health-interval", "disable"]
    if raw.get("init"):
        flags.append("--init")
    if raw.get("read_only"):
        flags += ["--read-only", "--read-only-tmpfs=false"]
    for mount in raw.get("tmpfs", []):
        flags += ["--tmpfs", _tmpfs(mount)]
    for capability in raw.get("cap_drop", []):
        flags += ["--cap-drop", capability]
    for option in raw.get("security_opt", []):
        flags += ["--security-opt", option.removesuffix(":true")]
    if user := raw.get("user"):
        flags += ["--user", str(user)]
    for file in raw.get("env_file", []):
        flags += ["--env-file", str(ROOT / file)]
    for name, value in container.service.environment.items():
        flags += ["--env", f"{name}={value}"]
    for volume in raw.get("volumes", []):
        flags += ["--volume", _volume(volume)]
    return flags


def _tmpfs(text: str) -> str:
    """As Docker mounts it: nothing in it is executed or loaded unless `exec` is said."""
    place, _, options = text.partition(":")
    given = options.split(",") if options else []
    closed = [] if {"exec", "noexec"} & set(given) else ["noexec"]
    return ":".join([place, ",".join([*closed, *given])])


def _volume(text: str) -> str:
    source, target, *mode = text.split(":")
    place = os.path.abspath(ROOT / source) if source.startswith((".", "/")) else NAMES + source
    return ":".join([place, target, *mode])


def tidy(bases: Bases, *, keep_images: bool) -> None:
    """Everything that carries our name, and nothing else."""
    everything = ["ps", "-a", "--format", "{{.Names}}"]
    removal = ["rm", "-f", "-t", "1"]
    # The network's holder last: the others live in it.
    _remove(everything, lambda name: name.startswith(NAMES) and name != HOLDER, removal)
    _remove(everything, lambda name: name == HOLDER, removal)
    volumes = ["volume", "ls", "--format", "{{.Name}}"]
    _remove(volumes, lambda name: name.startswith(NAMES), ["volume", "rm", "-f"])
    if not keep_images:
        wanted = ["images", "--format", "{{.Repository}}"]
        _remove(wanted, lambda name: name.startswith(PREFIX), ["rmi", "-f"])
        bases.made.clear()
        shutil.rmtree(SCRATCH, ignore_errors=True)


def _remove(listing: Sequence[str], ours: Callable[[str], bool], removal: Sequence[str]) -> None:
    found = [name for name in podman(*listing).split() if ours(name)]
    if found:
        podman(*removal, *found)
