"""Write docs/protocol.schema.json from the WebSocket events; with --check, say whether it fits.

Exit status 1: the file is stale.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from src.rpc.ws_events import json_schema  # noqa: E402

SCHEMA = ROOT / "docs" / "protocol.schema.json"


def render() -> str:
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def is_stale(path: Path = SCHEMA) -> bool:
    return not path.is_file() or path.read_text(encoding="utf-8") != render()


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--check", action="store_true", help="write nothing")
    if flags.parse_args().check:
        if is_stale():
            print(f"{SCHEMA.name} is stale; run `just gen-schema`")
        return int(is_stale())
    SCHEMA.parent.mkdir(exist_ok=True)
    SCHEMA.write_text(render(), encoding="utf-8")
    print(f"wrote {SCHEMA.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
