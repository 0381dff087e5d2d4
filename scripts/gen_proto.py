"""Generate `src/rpc/generated` from the .proto files; `--check` fails when it is stale."""

from __future__ import annotations

import argparse
import filecmp
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
RPC = ROOT / "src" / "rpc"
PACKAGE = "src/rpc/generated"


def generate(out: Path) -> None:
    """Write the modules under `out`/src/rpc/generated, importable as `src.rpc.generated.*`."""
    (out / PACKAGE).mkdir(parents=True, exist_ok=True)
    # The left of `=` is the path that the generated imports see, so that they are absolute.
    args = ["protoc", f"-I{PACKAGE}={RPC}", f"--python_out={out}", f"--pyi_out={out}"]
    args += [f"--grpc_python_out={out}"]
    args += [f"{PACKAGE}/{proto.name}" for proto in sorted(RPC.glob("*.proto"))]
    if protoc.main(args) != 0:
        raise SystemExit("protoc failed")


def stale(out: Path) -> list[str]:
    fresh = sorted(path.name for path in (out / PACKAGE).iterdir())
    _, differ, missing = filecmp.cmpfiles(out / PACKAGE, ROOT / PACKAGE, fresh, shallow=False)
    return differ + missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        generate(ROOT)
        return
    with tempfile.TemporaryDirectory() as tmp:
        generate(Path(tmp))
        if names := stale(Path(tmp)):
            sys.exit(f"stale, run `just gen-proto`: {', '.join(sorted(names))}")


if __name__ == "__main__":
    main()
