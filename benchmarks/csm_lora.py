"""Several LoRA voices on one Sesame base: stacked beside it, or each merged into a copy of it.

    python -m benchmarks.csm_lora [--size tiny|middle|real] [--device cpu|cuda:0] [--voices 4]

Stacked, a tick serves everybody, and computes every voice's low-rank part. Merged copies cost
nothing a row, but each copy is a tick of its own and holds the layers again. Random weights: what
is measured does not depend on them. Needs torch, transformers, peft and this repository.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.csm_sides import real_weights
from src.tts.families.csm.device_model import DeviceModel
from src.tts.families.csm.lora import AdapterWeights, LoraBank, LowRank, StackedLinear
from src.tts.families.csm.ports import Row, Sampling, Voice
from src.tts.families.csm.tiny import make_tiny_pack
from src.tts.families.csm.weights import CsmWeights, load_weights

TEXT = "The museum opens at nine in the morning."
SAMPLING = Sampling()
WARM_UP = 3
MIDDLE = {"hidden": 512, "layers": 8, "depth_hidden": 256, "depth_layers": 4}


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    weights = _weights(args.size, args.device)
    adapters = [_adapter(weights, args.rank, seed) for seed in range(args.voices)]
    slots = max(args.batch)
    plain = _model(weights, slots, args)
    times = {("base alone", rows): _time(plain, [0] * rows, args) for rows in args.batch}
    # Merged copies read other memory each: one model of its own for every voice.
    copies = [_model(_weights(args.size, args.device), slots, args) for _ in range(args.voices)]
    for rows in args.batch:
        share = _shares(rows, args.voices)
        times["merged copies", rows] = sum(
            _time(copy, [0] * part, args) for copy, part in zip(copies, share, strict=True) if part
        )
    layer_bytes = _layer_bytes(weights)
    for model in (plain, *copies):
        model.close()
    del plain, copies
    stacked = _model(weights, slots, args, places=args.voices)
    indices = [stacked.add_adapter(adapter) for adapter in adapters]
    for rows in args.batch:
        times["stacked, base rows alone", rows] = _time(stacked, [0] * rows, args)
        mixed = [indices[row % args.voices] for row in range(rows)]
        times["stacked, all voices", rows] = _time(stacked, mixed, args)
    bank_bytes = _bank_bytes(weights)
    stacked.close()
    _print(args, times, layer_bytes, bank_bytes)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=("tiny", "middle", "real"), default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--voices", type=int, default=4)
    parser.add_argument("--rank", type=int, default=32, help="of each; Unsloth's notebook has 32")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument("--positions", type=int, default=256)
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args(argv)


def _weights(size: str, device: str) -> CsmWeights:
    if size == "real":
        return real_weights(device)
    with tempfile.TemporaryDirectory() as folder:
        shape = MIDDLE if size == "middle" else {}
        return load_weights(make_tiny_pack(Path(folder) / "pack", **shape), device=device)


def _adapter(weights: CsmWeights, rank: int, seed: int) -> AdapterWeights:
    """On every layer that one may have."""
    bank = LoraBank(weights, capacity=1, max_rank=1)
    bank.prepare()
    linears = {n: m for n, m in weights.model.named_modules() if isinstance(m, StackedLinear)}
    bank.detach()
    random = torch.Generator().manual_seed(seed)
    layers = {
        name: LowRank(
            torch.randn(rank, linear.in_features, generator=random) * 0.01,
            torch.randn(linear.out_features, rank, generator=random) * 0.01,
        )
        for name, linear in linears.items()
    }
    return AdapterWeights(layers, rank)


def _model(
    weights: CsmWeights, slots: int, args: argparse.Namespace, places: int = 0
) -> DeviceModel:
    return DeviceModel(
        weights,
        slots=slots,
        positions=args.positions,
        compile=args.compile,
        max_adapters=places,
        max_rank=args.rank,
    )


def _time(model: DeviceModel, adapters: Sequence[int], args: argparse.Namespace) -> float:
    """Median ms of a tick whose rows have these adapters."""
    starts = [_begin(model, slot, adapter) for slot, adapter in enumerate(adapters)]

    def tick(frame: int) -> None:
        model.tick([
            Row(slot, start + frame, slot, frame, SAMPLING, adapter)
            for slot, (start, adapter) in enumerate(zip(starts, adapters, strict=True))
        ])  # fmt: skip

    # On a processor its own time: what else the machine does is no part of the comparison.
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    times = [_ms(partial(tick, frame), clock) for frame in range(WARM_UP + args.frames)]
    return statistics.median(times[WARM_UP:])


def _begin(model: DeviceModel, slot: int, adapter: int) -> int:
    """The position of the slot's first tick."""
    model.assign(slot, Voice(sampling=SAMPLING, adapter=adapter))
    text = model.embed_text(TEXT, 0)
    model.prefill(slot, 0, text[: len(text) - 1])
    model.set_input(slot, text[len(text) - 1 :])
    return len(text) - 1


def _ms(work: Callable[[], None], clock: Callable[[], float]) -> float:
    began = clock()
    work()
    return (clock() - began) * 1000


def _shares(rows: int, voices: int) -> list[int]:
    return [rows // voices + (voice < rows % voices) for voice in range(voices)]


def _layer_bytes(weights: CsmWeights) -> int:
    """What a merged copy holds again; embeddings, heads and codec could be shared."""
    model = weights.model
    parts = (*model.backbone_model.layers, *model.depth_decoder.model.layers)
    return sum(p.nbytes for part in parts for p in part.parameters())


def _bank_bytes(weights: CsmWeights) -> int:
    stacked = [m for m in weights.model.modules() if isinstance(m, StackedLinear)]
    return sum(layer.a.nbytes + layer.b.nbytes for layer in stacked)


def _print(
    args: argparse.Namespace,
    times: dict[tuple[str, int], float],
    layer_bytes: int,
    bank_bytes: int,
) -> None:
    print(f"{args.size} model, {args.device}, {args.voices} voices of rank {args.rank}\n")
    print("| ms a tick | " + " | ".join(f"{rows} rows" for rows in args.batch) + " |")
    print("| --- |" + " --- |" * len(args.batch))
    for name in dict.fromkeys(name for name, _ in times):
        cells = (f"{times[name, rows]:.1f}" for rows in args.batch)
        print(f"| {name} | " + " | ".join(cells) + " |")
    copies = args.voices * layer_bytes
    print(f"\nmemory: stacked {bank_bytes / 1e6:.1f} MB, merged copies {copies / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
