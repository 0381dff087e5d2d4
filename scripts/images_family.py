"""A family's image: Dockerfile.tts with one extra, and a sentence out of a small random voice pack.

The pack is made in the container by the family's tests, so it has the true architecture and the
real loader reads it. What is spoken is noise; that it is spoken is what counts.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from scripts import images_engine as engine
from scripts.compose_file import Service, services
from scripts.images_engine import ROOT
from src.audio.pcm import SAMPLE_RATE, from_bytes, level_dbfs
from src.rpc.generated import tts_pb2 as pb
from src.rpc.generated import tts_pb2_grpc

SERVICE = "tts-gpu"
TEXT = "Once upon a time."


@dataclass(frozen=True)
class Tiny:
    """A family's small random model."""

    adapter: str
    model: str
    make: str = ""
    """What fills the folder `into` with a pack; empty: the model is in the catalog."""


# Pieces of text end in time, so that nobody has to wait for a random model to come to an end.
TINY = {
    "xtts": Tiny(
        "xtts",
        "tiny-xtts",
        "from tests.families.xtts.tiny import make_tiny_pack as make; make(into, max_codes=60)",
    ),
    "parler": Tiny(
        "parler_tts",
        "tiny-parler",
        "from tests.families.parler.tiny import make_tiny_pack as make; make(into)",
    ),
    "sesame": Tiny("sesame", "tiny-csm-random"),
}


def service_for(extra: str, env: Mapping[str, str], packs: Path) -> Service:
    """The compose file's worker for a GPU, with this extra, these packs, and on the processor."""
    tiny = TINY[extra]
    chosen = {
        "TTS_EXTRAS": extra,
        "TTS_ADAPTER": tiny.adapter,
        "TTS_DEFAULT_MODEL": tiny.model,
        "VOICEPACKS_DIR": str(packs),
    }
    service = services(ROOT / "docker-compose.yml", {**env, **chosen})[SERVICE]
    command = ["cpu" if part == "cuda:0" else part for part in service.command]
    raw = {**service.raw, "command": command}
    return dataclasses.replace(service, name=f"tts-{extra}", raw=raw)


def make_pack(extra: str, image: str, packs: Path) -> None:
    """Raises EngineError."""
    tiny = TINY[extra]
    packs.mkdir()
    if not tiny.make:
        return
    shelf = packs / tiny.adapter
    shelf.mkdir()
    shelf.chmod(0o777)  # the image's user is none of this machine's
    code = f"from pathlib import Path; into = Path('/packs/tiny'); {tiny.make}"
    flags = ["--volume", f"{shelf}:/packs", "--volume", f"{ROOT}/tests:/app/tests:ro"]
    engine.run_once(image, flags, "python", "-c", code)
    said = f"model_id: {tiny.model}\ntags: [random-weights]\nlanguages: [en]\n"
    (shelf / "tiny" / "metadata.yaml").write_text(said, encoding="utf-8")


def speak(inside: list[str], extra: str) -> dict[str, float]:
    """{first_ms, seconds, dbfs} of a sentence that the worker in that network speaks.

    Raises EngineError.
    """
    argv = [*inside, sys.executable, "-m", "scripts.images_family", TINY[extra].model]
    told: dict[str, float] = json.loads(engine.call(argv).splitlines()[-1])
    return told


async def _spoken(model: str) -> dict[str, float]:
    async with grpc.aio.insecure_channel("127.0.0.1:7001") as channel:
        stub: Any = tts_pb2_grpc.TTSStub(channel)  # type: ignore[no-untyped-call]
        await stub.StartSession(pb.StartSessionReq(session_id="check", model_id=model))
        began, first_ms, pcm = time.monotonic(), 0.0, []
        async for frame in stub.Synthesize(_text()):
            first_ms = first_ms or (time.monotonic() - began) * 1000
            pcm.append(frame.pcm)
        await stub.EndSession(pb.EndSessionReq(session_id="check"))
    samples = from_bytes(b"".join(pcm))
    return {
        "first_ms": round(first_ms),
        "seconds": round(samples.size / SAMPLE_RATE, 1),
        "dbfs": round(level_dbfs(samples), 1),
    }


async def _text() -> AsyncIterator[pb.TextChunk]:
    yield pb.TextChunk(session_id="check", utterance_id="one", text=TEXT, is_final=True)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_spoken(sys.argv[1]))))
