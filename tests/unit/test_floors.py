"""Imports go one way: rooms stand on the ground floor and never on each other."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GROUND = {"common": set[str](), "audio": set[str](), "rpc": {"common"}}
ROOMS = {
    room: {"common", "audio", "rpc"} for room in ("tts", "orchestrator", "client", "livekit_plugin")
}
MAY_IMPORT = {**GROUND, **ROOMS}

# Runs on torch; nothing outside imports those of its modules that do before a model loads.
MATHEMATICS = ROOT / "src" / "tts" / "families" / "csm"
# A worker must start where none of these is installed.
HEAVY = {
    "TTS", "cosyvoice", "matcha", "melo", "parler_tts", "sparktts", "hyperpyyaml", "omegaconf",
    "av", "torch", "torchaudio", "transformers", "peft", "livekit", "faster_whisper", "ctranslate2",
    "whisper", "onnxruntime", "piper", "espeakng_loader", "xllamacpp", "aiohttp", "sounddevice",
}  # fmt: skip


def modules(room: str) -> list[Path]:
    files = sorted((ROOT / "src" / room).rglob("*.py"))
    return [path for path in files if "generated" not in path.parts]


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide which room they reach into"
            # `from src import tts` names its room only in the alias.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_import_time(tree: ast.Module) -> Iterator[str]:
    """What importing the module imports: nothing inside functions or `if TYPE_CHECKING`."""
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported(node)
        todo.extend(ast.iter_child_nodes(node))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_stands_only_on_the_floors_below_it(room: str) -> None:
    allowed = MAY_IMPORT[room] | {room}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(room)
        for name in imported(parse(path))
        if name.startswith("src.") and name.split(".")[1] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_every_room_has_modules_to_check() -> None:
    assert all(modules(room) for room in MAY_IMPORT)


@pytest.mark.parametrize("room", ["common", "audio", "rpc", "tts"])
def test_the_worker_slice_imports_no_heavy_package_up_front(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(room)
        for name in at_import_time(parse(path))
        if name.partition(".")[0] in HEAVY and path.parent != MATHEMATICS
    ]
    assert not wrong, "\n".join(wrong)


def test_only_a_model_that_loads_imports_the_mathematics() -> None:
    """Some of its modules are torch through and through: importing one imports torch."""
    tops = {dotted(path): set(at_import_time(parse(path))) for path in modules("tts")}
    heavy = {name for name, top in tops.items() if {t.partition(".")[0] for t in top} & HEAVY}
    assert heavy, "nothing to look for"
    while more := {n for n, top in tops.items() if reaches(top, heavy)} - heavy:
        heavy |= more
    assert {name.rpartition(".")[0] for name in heavy} == {dotted(MATHEMATICS)}


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def reaches(top: set[str], heavy: set[str]) -> bool:
    return any(name in heavy or name.rpartition(".")[0] in heavy for name in top)


def test_livekit_stays_where_rooms_and_its_plugin_are() -> None:
    places = ("orchestrator/rooms/", "livekit_plugin/", "demo/room_user.py")
    wrong = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "src").rglob("*.py"))
        if not str(path.relative_to(ROOT / "src")).startswith(places)
        and any(name.partition(".")[0] == "livekit" for name in imported(parse(path)))
    ]
    assert not wrong


def test_this_test_sees_a_wrong_import(tmp_path: Path) -> None:
    source = "def f():\n    from src.orchestrator import vad\nimport torch\n"
    tree = ast.parse(source)
    assert "src.orchestrator.vad" in set(imported(tree))
    assert list(at_import_time(tree)) == ["torch"]


def test_the_worker_slice_is_python_3_10() -> None:
    for room in ("common", "audio", "rpc", "tts"):
        for path in modules(room):
            ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
    assert sys.version_info >= (3, 10)
