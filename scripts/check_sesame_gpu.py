"""Sesame's engine on a GPU machine: is it right there, and how fast? One command.

    python scripts/check_sesame_gpu.py            the checks (a minute or two), then the benchmark
    python scripts/check_sesame_gpu.py --only checks
    python scripts/check_sesame_gpu.py --device cpu --only checks     the same without graphs

Needs torch, transformers 5.23 and this repository; downloads nothing. All models are random: the
checks' is tiny, the benchmark's is of csm-1b's size. Exits with 1 if a check fails. Send back what
it prints, and out/benchmarks/csm-real-cuda.json; `just bench-csm report` makes the page of it.
"""

from __future__ import annotations

import argparse
import enum
import importlib.util
import sys
import tempfile
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).resolve().parents[1]
POSITIONS = 384
"""More than the shortest graph has, so that two lengths are recorded."""
SLOTS = 6
TEXTS = ("Left.", "Good morning to all of you.", "How far is it to the sea?", "Then right.")


class StatusCode(enum.Enum):
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


def without_grpc() -> None:
    """The project's errors name gRPC's status codes; their names are all that is needed here."""
    if importlib.util.find_spec("grpc"):
        return
    sys.modules["grpc"] = cast(types.ModuleType, types.SimpleNamespace(StatusCode=StatusCode))


@dataclass
class Bench:
    """A tiny model on the device, and models made of it."""

    device: str
    pack: Path

    def weights(self, dtype: str = "float32") -> Any:
        from src.tts.families.csm.weights import load_weights

        return load_weights(self.pack, device=self.device, dtype=dtype)

    def model(self, weights: Any, **options: Any) -> Any:
        """As the worker makes it on a GPU: few sizes, as CUDA graphs where there is CUDA."""
        from src.tts.families.csm.device_model import DeviceModel, sizes_for

        options.setdefault("sizes", sizes_for(SLOTS, POSITIONS, few=True))
        return DeviceModel(weights, slots=SLOTS, positions=POSITIONS, **options)

    def by_hand(self, weights: Any, *, few: bool = False, **options: Any) -> Any:
        """The same without graphs: at exactly the sizes that come, or at the `few` that graphs are
        recorded at, where rounding is theirs too."""
        from src.tts.families.csm.device_model import sizes_for
        from src.tts.families.csm.graphs import CallRecorder

        sizes = sizes_for(SLOTS, POSITIONS, few=few)
        return self.model(weights, recorder=CallRecorder(), sizes=sizes, **options)


class Talk:
    """Slots that speak in ticks of their own choosing, and what they said."""

    def __init__(self, model: Any, temperature: float = 0.9) -> None:
        from src.tts.families.csm.ports import Sampling

        self.model = model
        self.sampling = Sampling(temperature, 50)
        self.at: dict[int, tuple[int, int]] = {}
        self.codes: dict[int, list[Any]] = {}
        self.pcm: dict[int, list[Any]] = {}
        self.healthy = True

    def join(self, slot: int, adapter: int = 0) -> None:
        from src.tts.families.csm.ports import Voice

        self.model.assign(slot, Voice(adapter=adapter))
        text = self.model.embed_text(TEXTS[slot % len(TEXTS)], 0)
        self.model.prefill(slot, 0, text[:-1])
        self.model.set_input(slot, text[-1:])
        self.at[slot] = (len(text) - 1, adapter)
        self.codes[slot], self.pcm[slot] = [], []

    def tick(self, slots: Sequence[int]) -> None:
        result = self.model.tick([self.row(slot) for slot in slots])
        self.healthy &= bool(result.healthy.all())
        for i, slot in enumerate(slots):
            self.codes[slot].append(result.codes[i])
            self.pcm[slot].append(result.pcm[i])

    def row(self, slot: int) -> Any:
        from src.tts.families.csm.ports import Row

        start, adapter = self.at[slot]
        frame = len(self.codes[slot])
        return Row(slot, start + frame, 7 + slot, frame, self.sampling, adapter)

    def joins_and_leaves(self, frames: int = 6) -> None:
        self.join(0)
        self.tick([0])
        self.join(2)
        self.join(3)
        for slots in ([0, 2, 3], [3, 0], [2]):
            self.tick(slots)
        self.join(5)
        self.join(1)
        for _ in range(frames):
            self.tick([5, 0, 1, 2, 3])


def same(a: Talk, b: Talk) -> str:
    """Every code of every slot; the sound to one part in ten thousand."""
    import numpy as np

    frames = 0
    loudest = 0.0
    for slot in a.codes:
        expect(np.array_equal(a.codes[slot], b.codes[slot]), f"other codes in slot {slot}")
        apart = np.abs(np.concatenate(a.pcm[slot]) - np.concatenate(b.pcm[slot])).max()
        loudest = max(loudest, float(apart))
        frames += len(a.codes[slot])
    expect(loudest < 1e-4, f"the sound is {loudest:.1e} apart")
    return f"{frames} frames, codes identical, sound within {loudest:.0e}"


def expect(true: bool, otherwise: str) -> None:
    if not true:
        raise AssertionError(otherwise)


# --- the checks; each returns a few words for its line


def frames_are_those_of_generate(bench: Bench) -> str:
    import torch

    weights = bench.weights()
    talk = Talk(bench.model(weights), temperature=0.0)
    talk.join(1)
    for _ in range(12):
        talk.tick([1])
    ids = torch.tensor([weights.text_ids(TEXTS[1], 0)], device=weights.device)
    with no_reserved_ids(weights):
        theirs = weights.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            depth_decoder_do_sample=False,
        )[0]
    ours = torch.stack([torch.from_numpy(codes) for codes in talk.codes[1]])
    agree = int((ours == theirs.cpu()).all(1).long().cumprod(0).sum())
    expect(agree == 12, f"the first {agree} of 12 greedy frames agree")
    return "12 greedy frames of 32 codes, identical"


@contextmanager
def no_reserved_ids(weights: Any) -> Iterator[None]:
    """`generate` may draw ids that the codec does not have; here they lose every draw."""

    def mask(module: Any, args: Any, logits: Any) -> Any:
        logits[..., weights.codec_vocab :] = float("-inf")
        return logits

    model = weights.model
    heads = (model.lm_head, model.depth_decoder.codebooks_head)
    hooks = [head.register_forward_hook(mask) for head in heads]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def graphs_draw_what_calls_draw(bench: Bench) -> str:
    weights = bench.weights()
    graphs, calls = Talk(bench.model(weights)), Talk(bench.by_hand(weights))
    for talk in (graphs, calls):
        talk.joins_and_leaves()
    return same(graphs, calls)


def both_lengths_are_recorded_alike(bench: Bench) -> str:
    weights = bench.weights()
    graphs, calls = Talk(bench.model(weights)), Talk(bench.by_hand(weights, few=True))
    for talk in (graphs, calls):
        talk.joins_and_leaves(frames=300)
    return same(graphs, calls)


def in_half_precision_graphs_still_draw_what_calls_draw(bench: Bench) -> str:
    weights = bench.weights("bfloat16")
    graphs, calls = Talk(bench.model(weights)), Talk(bench.by_hand(weights, few=True))
    for talk in (graphs, calls):
        talk.joins_and_leaves()
    expect(graphs.healthy, "logits that are not numbers")
    return same(graphs, calls)


def the_compiled_model_draws_the_same(bench: Bench) -> str:
    weights = bench.weights()
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = Talk(bench.model(weights, compile=True))
    took = time.perf_counter() - began
    plain = Talk(bench.model(weights))
    for talk in (compiled, plain):
        talk.joins_and_leaves()
    return f"{same(compiled, plain)}; ready after {took:.0f} s"


def lora_voices_share_a_tick(bench: Bench) -> str:
    """Voices come after the graphs were recorded; the base says what it says without them."""
    import torch

    from src.tts.families.csm.lora import AdapterWeights, LowRank

    def voice(model: Any, seed: int) -> AdapterWeights:
        made = torch.Generator().manual_seed(seed)
        layers = {
            name: LowRank(
                torch.randn(4, module.in_features, generator=made) * 0.3,
                torch.randn(module.out_features, 4, generator=made) * 0.3,
            )
            for name, module in model.named_modules()
            if "layers." in name and name.endswith("_proj") and "codec_model" not in name
        }
        return AdapterWeights(layers, 4)

    talks = []
    for make in (bench.model, bench.by_hand):
        weights = bench.weights()
        first, second = (voice(weights.model, seed) for seed in (1, 2))
        model = make(weights, max_adapters=2, max_rank=4)
        a, b = model.add_adapter(first), model.add_adapter(second)
        talk = Talk(model)
        for slot, adapter in ((0, 0), (1, a), (2, b)):
            talk.join(slot, adapter)
        for _ in range(6):
            talk.tick([0, 1, 2])
        talks.append(talk)
    base = Talk(bench.model(bench.weights()))
    base.join(0)
    for _ in range(6):
        base.tick([0])
    expect(
        all((x == y).all() for x, y in zip(base.codes[0], talks[0].codes[0], strict=True)),
        "the base says something else beside its voices",
    )
    return same(*talks)


def a_tick_waits_for_the_device_once(bench: Bench) -> str:
    import torch

    talk = Talk(bench.model(bench.weights()))
    for slot in range(3):
        talk.join(slot)
    talk.tick([0, 1, 2])
    if not bench.device.startswith("cuda"):
        return "nothing to see on a processor"
    torch.cuda.set_sync_debug_mode("error")  # of all waits but the one for the tick's event
    try:
        for slots in ([0, 1, 2], [1], [2, 0]):
            talk.tick(slots)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no other wait"


def out_of_memory_while_recording_leaves_smaller_ticks(bench: Bench) -> str:
    """A real refusal by the allocator, in the warm-up of the large sizes and within a capture."""
    import torch

    from src.tts.families.csm import device_model, graphs

    cuda = bench.device.startswith("cuda")
    kind: Any = graphs.CudaGraphRecorder if cuda else graphs.CallRecorder

    class Greedy(kind):  # type: ignore[misc]
        def record(self, size: Any, work: Callable[[], None]) -> Callable[[], None]:
            runs = 0

            def hungry() -> None:
                nonlocal runs
                runs += 1
                capturing = cuda and torch.cuda.is_current_stream_capturing()
                if size.rows == SLOTS or (size.rows == 4 and capturing):
                    torch.empty(1 << 50, dtype=torch.uint8, device=bench.device)
                work()

            if not cuda and size.rows >= 4:
                raise torch.OutOfMemoryError("as if")
            return super().record(size, hungry)  # type: ignore[no-any-return]

    weights = bench.weights()
    recorder = Greedy(torch.device(bench.device)) if cuda else Greedy()
    sizes = device_model.sizes_for(SLOTS, POSITIONS, few=True)
    pieces = Talk(bench.model(weights, recorder=recorder, sizes=sizes))
    whole = Talk(bench.model(weights))
    for talk in (pieces, whole):
        talk.joins_and_leaves()
    return same(pieces, whole)


def a_row_that_is_not_numbers_is_alone_with_it(bench: Bench) -> str:
    model = bench.model(bench.weights())
    ill, well = Talk(model), Talk(bench.model(bench.weights()))
    for talk in (ill, well):
        talk.join(0)
        talk.join(1)
    poison = model.embed_text("x", 0)[:1] * float("nan")
    model.set_input(1, poison)
    result = model.tick([ill.row(0), ill.row(1)])
    expect(list(result.healthy) == [True, False], f"healthy is {list(result.healthy)}")
    well.tick([0, 1])
    expect((result.codes[0] == well.codes[0][0]).all(), "its neighbour says something else")
    ill.codes[0].append(result.codes[0])
    ill.pcm[0].append(result.pcm[0])
    for talk in (ill, well):
        talk.join(1)
        for _ in range(3):
            talk.tick([1, 0])
    return same(ill, well)


def streamed_sound_is_decoded_sound(bench: Bench) -> str:
    import numpy as np
    import torch

    weights = bench.weights()
    talk = Talk(bench.model(weights))
    talk.join(0)
    for _ in range(160):
        talk.tick([0])
    codes = torch.from_numpy(np.stack(talk.codes[0])).T[None].to(weights.device)
    with torch.no_grad():
        whole = weights.model.codec_model.decode(codes).audio_values[0, 0].clamp(-1, 1)
    sound = np.concatenate(talk.pcm[0])
    error = sound - whole.cpu().numpy()
    db = 10 * np.log10((error**2).mean() / (sound**2).mean() + 1e-30)
    expect(db < -100, f"{db:.0f} dB")
    return f"160 frames, past the codec's window: {db:.0f} dB"


def closing_gives_the_memory_back(bench: Bench) -> str:
    import gc

    import torch

    if not bench.device.startswith("cuda"):
        return "nothing to see on a processor"
    left = []
    for _ in range(4):
        model = bench.model(bench.weights())
        Talk(model).joins_and_leaves(1)
        model.close()
        del model
        gc.collect()
        torch.cuda.empty_cache()
        left.append(torch.cuda.memory_allocated(bench.device))
    expect(left[-1] <= left[0], f"bytes after each of four models: {left}")
    return f"{left[-1] / 2**20:.1f} MiB stay after four models"


CHECKS: tuple[Callable[[Bench], str], ...] = (
    frames_are_those_of_generate,
    graphs_draw_what_calls_draw,
    both_lengths_are_recorded_alike,
    in_half_precision_graphs_still_draw_what_calls_draw,
    lora_voices_share_a_tick,
    a_row_that_is_not_numbers_is_alone_with_it,
    streamed_sound_is_decoded_sound,
    a_tick_waits_for_the_device_once,
    out_of_memory_while_recording_leaves_smaller_ticks,
    closing_gives_the_memory_back,
    the_compiled_model_draws_the_same,
)


def check(device: str, names: Sequence[str]) -> int:
    """How many failed."""
    from src.tts.families.csm.tiny import make_tiny_pack

    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(device, make_tiny_pack(Path(folder) / "tiny"))
        for one in CHECKS:
            if names and one.__name__ not in names:
                continue
            began = time.perf_counter()
            title = one.__name__.replace("_", " ")
            if sys.stdout.isatty():
                print(f"…    {title}", end="\r", flush=True)
            try:
                line = f"ok   {title}: {one(bench)}"
            except Exception as error:  # the others are worth having
                failed += 1
                line = f"FAIL {title}: {type(error).__name__}: {error}"
                traceback.print_exc()
            print(f"{line} [{time.perf_counter() - began:.0f} s]", flush=True)
    return failed


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Shortened float32 products would make other codes of the same logits."""
    import torch

    places = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = False
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.allow_tf32 = value


def describe(device: str) -> None:
    import torch
    import transformers

    print(f"torch {torch.__version__}, transformers {transformers.__version__}", end="")
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            sys.exit("\nthere is no GPU that torch can use; --device cpu checks what a CPU can")
        print(f", CUDA {torch.version.cuda}, {torch.cuda.get_device_name(device)}", end="")
    print(flush=True)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", choices=["checks", "benchmark"], default=None)
    parser.add_argument("--checks", nargs="+", default=(), metavar="NAME", help="some of them")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a benchmark's cell")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    sys.path.insert(0, str(ROOT))
    without_grpc()
    describe(args.device)
    failed = 0
    if args.only != "benchmark":
        with exact_arithmetic():
            failed = check(args.device, args.checks)
        print(f"{failed} checks failed" if failed else "all checks passed", flush=True)
    if args.only != "checks":
        from benchmarks import csm

        size = "real" if args.device.startswith("cuda") else "tiny"
        csm.main(["--size", size, "--device", args.device, "--seconds", str(args.seconds)])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
