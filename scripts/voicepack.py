"""Fetches voice packs and looks them over.

`just voicepack xtts v2-en` brings the files that are missing, from the hub that the catalog names;
`just voicepack-check` looks at all packs, `just voicepack-check xtts v2-en` at one. Nothing that
was fetched is run or unpickled here. Another hub: HF_ENDPOINT; a page with terms: HF_TOKEN.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from src.common.config import ConfigError
from src.rpc.errors import CorruptModel, DuplexError
from src.tts.catalog import METADATA, ROOT, Catalog, ModelFile, load_catalog
from src.tts.download import (
    Fetched,
    Hub,
    HubFile,
    NotFetched,
    NotOnHub,
    Refused,
    Report,
    Unreachable,
    download,
)
from src.tts.packs import Pack, State, Verdict, check_pack, find_packs, pick
from src.tts.sources import MissingFile, Source, SourceResolver

_COLOURS = {State.OK: "green", State.ABSENT: "yellow", State.BAD: "red"}


@dataclass(slots=True)
class Outcome:
    """What became of a pack's files."""

    there: dict[str, Path] = field(default_factory=dict)
    came: dict[str, Fetched] = field(default_factory=dict)
    failed: dict[str, NotFetched] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    """Optional, and the hub does not have them."""


def fetch(pack: Pack, hub: Hub, progress: Progress | None = None) -> Outcome:
    """Brings every file that is missing and has a `hub:` source; replaces none that is there."""
    outcome = Outcome()
    resolver = SourceResolver()
    stopped: NotFetched | None = None
    for name, file in pack.meta.files.items():
        try:
            outcome.there[name] = resolver.resolve(pack.meta.model_id, name, file.sources)
            continue
        except MissingFile:
            place, target = _hub_file(file), pack.place(name)
        if place is None or target is None:
            if not file.optional:
                outcome.failed[name] = NotFetched("no place on a hub is known for it")
            continue
        if stopped is not None:
            outcome.failed[name] = stopped
            continue
        try:
            with _shown(progress, name) as report:
                came = download(place, target, hub, sha256=file.sha256, report=report)
            outcome.came[name], outcome.there[name] = came, target
        except NotOnHub as error:
            if file.optional:
                outcome.skipped.append(name)
            else:
                outcome.failed[name] = error
        except NotFetched as error:
            outcome.failed[name] = error
            stopped = error if error.for_all else None
        except OSError as error:
            outcome.failed[name] = NotFetched(f"{target} cannot be written: {error.strerror}")
    return outcome


def _hub_file(file: ModelFile) -> HubFile | None:
    for source in map(Source.parse, file.sources):
        if source.scheme == "hub":
            return HubFile.parse(source.rest)
    return None


@contextmanager
def _shown(progress: Progress | None, name: str) -> Iterator[Report]:
    if progress is None:
        yield lambda done, total: None
        return
    task = progress.add_task(name, total=None)
    try:
        yield lambda done, total: progress.update(task, completed=done, total=total or None)
    except NotFetched:
        progress.remove_task(task)
        raise
    progress.update(task, total=_done(progress, task))


def _done(progress: Progress, wanted: TaskID) -> float:
    return next(task.completed for task in progress.tasks if task.id == wanted)


def advice(pack: Pack, outcome: Outcome, hub: Hub) -> list[str]:
    """Lines that say which file to put where, and how else they would come."""
    lines = [
        f"{pack}: {len(outcome.failed)} of {len(pack.meta.files)} files did not come. "
        "Put each where it says, or do what helps, and run this again:"
    ]
    for name, error in outcome.failed.items():
        place, target = _hub_file(pack.meta.files[name]), pack.place(name)
        optional = " (optional)" if pack.meta.files[name].optional else ""
        lines.append(f"  {name}{optional}: {error}")
        if place is not None:
            lines.append(f"    from {hub.shown(place)}")
        lines.append(f"    to   {target or pack.folder / name}")
    return lines + _remedies(pack, outcome, hub)


def _remedies(pack: Pack, outcome: Outcome, hub: Hub) -> list[str]:
    lines = []
    errors = outcome.failed.values()
    refused = [name for name, error in outcome.failed.items() if isinstance(error, Refused)]
    pages = {hub.page(place) for name in refused if (place := _hub_file(pack.meta.files[name]))}
    for page in sorted(pages):
        lines.append(
            f"Accept the terms on {page}, make a token that may read it, and set HF_TOKEN to it."
        )
    if any(isinstance(error, Unreachable) for error in errors):
        lines.append(
            "Behind a proxy set https_proxy and SSL_CERT_FILE; HF_ENDPOINT names another hub. "
            "Files copied from another machine are as good."
        )
    return lines


def pins(pack: Pack, outcome: Outcome, root: Path) -> str:
    """The `files:` of the catalog entry, with the hashes of what is there."""
    lines = ["    files:"]
    for name, file in pack.meta.files.items():
        lines.append(f"      {name}:")
        if file.optional:
            lines.append("        optional: true")
        if name in outcome.there:
            lines.append(
                f"        sha256: {sha256_of(outcome.there[name], outcome.came.get(name))}"
            )
        elif file.sha256:
            lines.append(f"        sha256: {file.sha256}")
        lines.append("        sources:")
        commit = outcome.came[name].commit if name in outcome.came else ""
        lines += [f"          - {_relative(text, root, commit)}" for text in file.sources]
    return "\n".join(lines)


def sha256_of(path: Path, came: Fetched | None) -> str:
    if came is not None:
        return came.sha256
    import hashlib

    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _relative(text: str, root: Path, commit: str) -> str:
    source = Source.parse(text)
    if source.scheme == "hub" and commit:
        return HubFile.parse(source.rest).at(commit)
    path = Path(source.rest)
    if source.scheme == "path" and path.is_relative_to(root):
        return f"path:{path.relative_to(root)}"
    return text


# --- the two commands ---


@dataclass(frozen=True, slots=True)
class Place:
    root: Path
    catalog: Catalog
    packs: Mapping[tuple[str, str], Pack]

    @classmethod
    def of(cls, root: Path) -> Place:
        """Raises ConfigError."""
        root = root.resolve()
        voicepacks = root / "voicepacks"
        catalog = load_catalog(root / "configs" / "model_catalog.yaml", voicepacks, root)
        return cls(root, catalog, find_packs(catalog, voicepacks))


def run_fetch(args: argparse.Namespace, console: Console) -> int:
    place = Place.of(args.root)
    pack = pick(place.packs, args.family, args.name)
    hub = Hub.of(os.environ)
    with _progress(console) as progress:
        outcome = fetch(pack, hub, progress)
    _say_what_came(pack, outcome, console)
    if outcome.failed:
        _lines(console, advice(pack, outcome, hub))
    if any(not pack.meta.files[name].optional for name in outcome.failed):
        return 1
    _complete_folder(pack)
    place = Place.of(args.root)
    pack = place.packs[pack.family, pack.name]
    if args.pin:
        print(pins(pack, outcome, place.root))
    return _report([(pack, check_pack(pack))], _problems(place.catalog, pack), console, named=True)


def _say_what_came(pack: Pack, outcome: Outcome, console: Console) -> None:
    for name, came in outcome.came.items():
        pinned = "as pinned" if pack.meta.files[name].sha256 else "not pinned"
        _lines(console, [f"{name}: {came.size} bytes, sha256 {came.sha256} ({pinned})"])
    for name in outcome.skipped:
        _lines(console, [f"{name}: the hub does not have it, and a load does without"])


def _problems(catalog: Catalog, pack: Pack) -> list[str]:
    return [said for said in catalog.problems if str(pack.folder / METADATA) in said]


def _complete_folder(pack: Pack) -> None:
    """A folder without metadata would be reported as no pack."""
    metadata = pack.folder / METADATA
    if pack.folder.is_dir() and not metadata.exists():
        metadata.write_text(f"model_id: {pack.meta.model_id}\nfamily: {pack.meta.family}\n")


def run_check(args: argparse.Namespace, console: Console) -> int:
    place = Place.of(args.root)
    named = bool(args.family)
    if named:
        folder = f"{args.family}/{args.name}/{METADATA}"
        problems = [said for said in place.catalog.problems if folder in said]
        packs = [] if problems else [pick(place.packs, args.family, args.name)]
    else:
        problems, packs = list(place.catalog.problems), list(place.packs.values())
    return _report([(pack, check_pack(pack)) for pack in packs], problems, console, named)


def _report(
    verdicts: Sequence[tuple[Pack, Verdict]],
    problems: Sequence[str],
    console: Console,
    named: bool,
) -> int:
    """Prints the table, and what is wrong below it. The exit status."""
    table = Table("pack", "model", "state", "files", "size")
    for pack, verdict in verdicts:
        state = verdict.state
        size = f"{verdict.size / 1e6:.1f} MB"
        coloured = f"[{_COLOURS[state]}]{state.value}[/]"
        table.add_row(str(pack), pack.meta.model_id, coloured, str(verdict.files), size)
    if verdicts:
        console.print(table)
    _lines(console, problems)
    for pack, verdict in verdicts:
        told = list(verdict.problems)
        if verdict.state is not State.ABSENT or named:
            told += [*verdict.missing, *verdict.notes]
        if verdict.state is State.ABSENT and named:
            told.append(f"fetch it: uv run just voicepack {pack}")
        _lines(console, [f"{pack}: {line}" for line in told])
    states = [verdict.state for _, verdict in verdicts]
    bad = State.BAD in states or (named and State.ABSENT in states)
    return 1 if bad or problems else 0


def _lines(console: Console, lines: Sequence[str]) -> None:
    """As they are: an address or a path that is broken in two cannot be copied."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="voicepack", description="Fetch and check voice packs.")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--root", type=Path, default=ROOT, help="where configs/ and voicepacks/ are"
    )
    commands = parser.add_subparsers(required=True)
    fetching = commands.add_parser(
        "fetch", parents=[shared], help="bring the files that are missing"
    )
    fetching.add_argument("family", help="a folder of voicepacks/, or a model id alone")
    fetching.add_argument("name", nargs="?", default="", help="a folder in it")
    fetching.add_argument(
        "--pin", action="store_true", help="print the catalog's files: with hashes"
    )
    fetching.set_defaults(run=run_fetch)
    checking = commands.add_parser(
        "check", parents=[shared], help="look a pack over, or all of them"
    )
    checking.add_argument("family", nargs="?", default="")
    checking.add_argument("name", nargs="?", default="")
    checking.set_defaults(run=run_check)
    args = parser.parse_args(argv)
    logging.getLogger("src.tts.catalog").setLevel(logging.ERROR)  # its problems are told below
    try:
        status: int = args.run(args, Console(stderr=True))
    except (ConfigError, CorruptModel, DuplexError) as error:
        print(f"voicepack: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("voicepack: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
