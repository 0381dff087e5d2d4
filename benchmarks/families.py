"""A TTS family's adapter beside its bare package: same architecture, same run, taking turns.

    just bench-families xtts               a tiny random model on one core of the processor
    just bench-families parler --write     and the page's table, from what was kept of every family
    just bench-families melo --rounds 3    shorter

Families: piper, xtts, parler, spark, melo, cosyvoice; the last three from the checkouts that
SPARK_HOME, MELO_HOME and COSYVOICE_HOME name. Sesame has `just bench-csm`.

Both sides say the same text in turn, so that what else the machine does falls on both. They do not
draw the same sounds, so costs are the processor's time for a second of sound; times to a first
chunk and after a cancel are the clock's. Kept in out/benchmarks/families-NAME.json.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.families_sides import SIDES, Say, Side
from benchmarks.figures import Spread, replace_block, table
from src.audio.pcm import Float32
from src.tts.adapters import adapter_for
from src.tts.catalog import ModelMeta
from src.tts.tts_base import CancelToken, Model, Segment, VoiceSpec

ROOT = Path(__file__).resolve().parents[1]
BLOCK = "families"
TEXT = "The museum opens at nine in the morning, and the last tour begins at half past four."
STREAMS = 4
AIM_PERCENT = 5.0


@dataclass
class Outcome:
    """Milliseconds, but for the last three lines."""

    name: str
    call: str
    import_ms: float = 0.0
    load_ms: list[float] = field(default_factory=list)
    unload_ms: list[float] = field(default_factory=list)
    first_ms: dict[str, list[float]] = field(default_factory=dict)
    """Side → from the text to the first chunk of sound."""
    cost_ms: dict[str, list[float]] = field(default_factory=dict)
    """Side → processor time for a second of sound."""
    crowd_first_ms: list[float] = field(default_factory=list)
    crowd_cost_ms: list[float] = field(default_factory=list)
    cancel_ms: list[float] = field(default_factory=list)
    max_streams: int = 0
    facts: dict[str, str] = field(default_factory=dict)
    taken: str = ""

    @property
    def overhead_percent(self) -> float:
        """The adapter's cost above the package's, each at its median."""
        ours, bare = (Spread.of(self.cost_ms[side]).p50 for side in ("adapter", "package"))
        return (ours / bare - 1) * 100


@dataclass(frozen=True, slots=True)
class Spoken:
    first_ms: float
    cpu_ms: float
    audio_s: float


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    outcome = measure(args.name, SIDES[args.name](), args.rounds)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"families-{args.name}.json"
    path.write_text(json.dumps(asdict(outcome), indent=1), encoding="utf-8")
    print("\n".join([*lines([outcome]), "", f"kept in {path}"]))
    if args.write:
        write(args.out, ROOT / "docs" / "benchmarks.md")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="just bench-families",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=SIDES)
    parser.add_argument("--rounds", type=int, default=12, help="turns of each side")
    parser.add_argument("--write", action="store_true", help="rewrite docs/benchmarks.md's table")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "benchmarks")
    return parser.parse_args(argv)


# --- measuring


def measure(name: str, side: Side, rounds: int) -> Outcome:
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    outcome = Outcome(name, side.call)
    outcome.import_ms = timed(side.import_package)
    _one_thread()
    outcome.facts, outcome.taken = facts(), now()
    with tempfile.TemporaryDirectory() as place, side.loading():
        pack = Path(place) / "pack"
        side.make(pack)
        for _ in range(max(2, rounds // 4)):
            model = load(side, pack, outcome)
            outcome.unload_ms.append(timed(model.unload))
            del model
            gc.collect()
        model = load(side, pack, outcome)
        outcome.max_streams = model.max_streams
        sides = {"adapter": by(model), "package": side.bare(pack, model)}
        take_turns(sides, model.native_sample_rate, rounds, outcome)
        crowd(model, rounds, outcome)
        # From before the first chunk to after it, in even steps.
        trials, step_s = 2 * rounds, Spread.of(outcome.first_ms["adapter"]).p50 / rounds / 1000
        outcome.cancel_ms = [cancel(model, trial * step_s) for trial in range(trials)]
        model.unload()
    return outcome


def load(side: Side, pack: Path, outcome: Outcome) -> Model:
    files = {p.relative_to(pack).as_posix(): p for p in pack.rglob("*") if p.is_file()}
    meta = ModelMeta(model_id="tiny", family=side.family, languages=["en"])
    adapter, begun = adapter_for(side.family), time.perf_counter()
    model = adapter.load(meta, files, "cpu", lambda _: None)
    outcome.load_ms.append(since(begun))
    return model


def by(model: Model, cancel: CancelToken | None = None) -> Say:
    spec = model.check_voice(VoiceSpec("", ""))

    def say(text: str) -> Iterator[Float32]:
        for chunk in model.stream([Segment(text, 0)], spec, cancel or CancelToken()):
            if chunk.samples.size:
                yield chunk.samples

    return say


def take_turns(sides: Mapping[str, Say], rate: int, rounds: int, outcome: Outcome) -> None:
    for say in sides.values():
        speak(say, rate)
    for turn in range(rounds):
        for name in sorted(sides, reverse=bool(turn % 2)):
            spoken = speak(sides[name], rate)
            outcome.first_ms.setdefault(name, []).append(spoken.first_ms)
            outcome.cost_ms.setdefault(name, []).append(spoken.cpu_ms / spoken.audio_s)


def speak(say: Say, rate: int) -> Spoken:
    """On this thread, while no other speaks: the process's time is this text's."""
    begun, cpu, first_ms, samples = time.perf_counter(), time.process_time(), 0.0, 0
    for sound in say(TEXT):
        first_ms = first_ms or since(begun)
        samples += sound.size
    if not samples:
        raise RuntimeError("no sound: there is nothing to compare")
    return Spoken(first_ms, (time.process_time() - cpu) * 1000, samples / rate)


def crowd(model: Model, rounds: int, outcome: Outcome) -> None:
    """Several texts at once, each on its thread; or as many as the model serves, one after another
    of those that have to wait."""
    turn = threading.Semaphore(model.max_streams or STREAMS)
    for _ in range(max(2, rounds // STREAMS)):
        spoken: list[tuple[float, int]] = []
        cpu = time.process_time()
        threads = [
            threading.Thread(target=_one_of_many, args=(by(model), turn, spoken))
            for _ in range(STREAMS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if len(spoken) < STREAMS:
            raise RuntimeError(f"{STREAMS - len(spoken)} of {STREAMS} streams failed")
        audio_s = sum(samples for _, samples in spoken) / model.native_sample_rate
        outcome.crowd_first_ms += [first for first, _ in spoken]
        outcome.crowd_cost_ms.append((time.process_time() - cpu) * 1000 / audio_s)


def _one_of_many(say: Say, turn: threading.Semaphore, spoken: list[tuple[float, int]]) -> None:
    begun, first_ms, samples = time.perf_counter(), 0.0, 0
    with turn:
        for sound in say(TEXT):
            first_ms = first_ms or since(begun)
            samples += sound.size
    spoken.append((first_ms, samples))


def cancel(model: Model, after_s: float) -> float:
    """ms from a cancel, so long after the beginning, until the stream has ended."""
    token, ended = CancelToken(), [0.0]

    def listen() -> None:
        try:
            for _ in by(model, token)(" ".join([TEXT] * 3)):
                pass
        finally:
            ended[0] = time.perf_counter()

    thread = threading.Thread(target=listen)
    thread.start()
    time.sleep(after_s)
    cancelled = time.perf_counter()
    token.cancel()
    thread.join()
    return max(0.0, (ended[0] - cancelled) * 1000)


def timed(work: Any) -> float:
    begun = time.perf_counter()
    work()
    return since(begun)


def since(begun: float) -> float:
    return (time.perf_counter() - begun) * 1000


def _one_thread() -> None:
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes")


def facts() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {
        "Python": platform.python_version(),
        "load average before": f"{os.getloadavg()[0]:.1f}",
    }
    for package in ("torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


# --- the table


HEAD = (
    "family", "first chunk ms: adapter", "package", "processor ms a second of sound: adapter",
    "package", f"adapter's more, aim ≤ {AIM_PERCENT:g} %", f"{STREAMS} at once: first chunk ms",
    "processor ms a second of sound", "cancel ms", "import s", "load ms", "unload ms",
)  # fmt: skip


def lines(outcomes: Sequence[Outcome]) -> list[str]:
    """Markdown: a row a family, p50 or p50 / p95; then the packages' calls and what it ran on."""
    said = [*table(HEAD, map(row, outcomes)), ""]
    for one in outcomes:
        about = ", ".join(f"{name} {value}" for name, value in one.facts.items())
        streams = f"{one.max_streams} at once" if one.max_streams else "any number at once"
        said.append(f"- {one.name} ({streams}): {one.call}. {about}; {one.taken}")
    return said


def row(one: Outcome) -> list[str]:
    met = "" if one.overhead_percent <= AIM_PERCENT else " (**missed**)"
    return [
        one.name,
        two(one.first_ms["adapter"]),
        two(one.first_ms["package"]),
        middle(one.cost_ms["adapter"]),
        middle(one.cost_ms["package"]),
        f"{one.overhead_percent:+.0f} %{met}",
        two(one.crowd_first_ms),
        middle(one.crowd_cost_ms),
        two(one.cancel_ms, 1),
        f"{one.import_ms / 1000:.1f}",
        middle(one.load_ms),
        middle(one.unload_ms),
    ]


def middle(values: Sequence[float]) -> str:
    return f"{Spread.of(values).p50:.0f}"


def two(values: Sequence[float], digits: int = 0) -> str:
    spread = Spread.of(values)
    return f"{spread.p50:.{digits}f} / {spread.p95:.{digits}f}"


def write(out: Path, page: Path) -> None:
    """Every family that something was kept of, in the order of SIDES."""
    kept = [out / f"families-{name}.json" for name in SIDES]
    outcomes = [Outcome(**json.loads(path.read_text())) for path in kept if path.exists()]
    text = page.read_text(encoding="utf-8")
    page.write_text(replace_block(text, BLOCK, ["", *lines(outcomes), ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
