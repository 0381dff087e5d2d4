"""How long CosyVoice 2 takes to its first sound, with its real weights on a GPU.

Measured and printed (`pytest -s`), and kept as a property of the test in a JUnit file; what is
asserted is only that sound comes, in order. A slow machine fails nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from src.tts.adapters import adapter_for
from src.tts.catalog import ROOT, load_catalog
from src.tts.sources import MissingFile, SourceResolver
from src.tts.tts_base import CancelToken, MissingPackage, Model, Segment, VoiceSpec

MODEL = "cosyvoice2-en-base"
TEXT = "The lighthouse keeper counted the ships every evening, and wrote their names down."
RUNS = 10
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    """The catalog's model from COSYVOICE_PACKS, or from voicepacks/."""
    adapter = adapter_for("cosyvoice2")
    try:
        adapter.check_installed()
    except MissingPackage:
        pytest.skip("optional: CosyVoice 2's sources (COSYVOICE_HOME) and its extra are not here")
    import torch

    if not torch.cuda.is_available():
        pytest.skip("optional: first-audio latency is measured on a GPU, and there is none")
    packs = Path(os.environ.get("COSYVOICE_PACKS", ROOT / "voicepacks"))
    meta = load_catalog(ROOT / "configs" / "model_catalog.yaml", packs).get(MODEL)
    find, files = SourceResolver(), {}
    for name, file in meta.files.items():
        try:
            files[name] = find.resolve(MODEL, name, file.sources, file.sha256)
        except MissingFile as error:
            pytest.skip(f"optional: no weights to measure: {error}")
    loaded = adapter.load(meta, files, "cuda:0", lambda _: None)
    yield loaded
    loaded.unload()


@pytest.mark.parametrize("text", ["clauses", "flowing"])
def test_first_audio(
    model: Model, text: str, record_property: Callable[[str, object], None]
) -> None:
    took_ms: list[float] = []
    for number in range(RUNS + 1):
        spec = model.check_voice(VoiceSpec("", "", {"text": text, "seed": str(number + 1)}))
        started = time.perf_counter()
        stream = model.stream([Segment(TEXT, 0)], spec, CancelToken())
        first = next(stream)
        if number:  # the first run compiles and allocates
            took_ms.append((time.perf_counter() - started) * 1000)
        assert 0 < first.samples.size <= model.native_sample_rate
        assert any(chunk.samples.size for chunk in stream), "it goes on"
    took_ms.sort()
    found = {"median_ms": round(took_ms[RUNS // 2]), "worst_ms": round(took_ms[-1])}
    record_property(f"first_audio_{text}", str(found))
    print(f"CosyVoice 2, first audio, text={text}: {found}")
