"""What `benchmarks.csm` sets side by side: our engine and transformers' `generate`, on one model.

Needs torch, transformers and numpy; nothing else, so that it runs on a bare GPU machine.
"""

from __future__ import annotations

import ctypes
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from src.tts.families.csm.cores import settle
from src.tts.families.csm.device_model import DeviceModel
from src.tts.families.csm.engine import Engine
from src.tts.families.csm.ports import Row, Sampling, Voice
from src.tts.families.csm.tiny import make_tiny_pack
from src.tts.families.csm.weights import CsmWeights, load_weights
from src.tts.tts_base import CancelToken

if TYPE_CHECKING:
    from torch import Tensor

TEXT = "The museum opens at nine in the morning, and the last tour begins at half past four."
SAMPLING = Sampling(temperature=0.9, top_k=50)
SPEAKER = 0
SETTLE_S = 0.2
CROWD_S = 120.0
"""Everybody has begun to speak by then, or something is broken."""

OURS, EAGER, STATIC = "this engine", "generate", "generate, static cache"


@dataclass(frozen=True, slots=True)
class Timed:
    """One run at one batch size."""

    frame_ms: tuple[float, ...]
    """Wall time from one frame of all rows to the next, the codec's share in it."""
    joules: float | None = None
    """Of the device, for all frames; None where it does not say."""
    peak_bytes: int | None = None
    """Device memory above what the weights take; None on a processor."""


class Side(Protocol):
    name: str
    fixed_length: bool
    """A run of another number of frames would measure a compiler."""

    def run(self, batch: int, frames: int) -> Timed:
        """Speak on `batch` rows for `frames` frames. Raises what the device raises."""
        ...


# --- the model


def text_of(weights: CsmWeights, context: int) -> str:
    """The text, said again until it takes `context` positions."""
    text = TEXT
    while len(weights.text_ids(text, SPEAKER)) < context:
        text += " " + TEXT
    return text


def tiny_weights(device: str) -> CsmWeights:
    with tempfile.TemporaryDirectory() as folder:
        return load_weights(make_tiny_pack(Path(folder) / "tiny"), device=device)


def real_weights(device: str) -> CsmWeights:
    """A random model of csm-1b's size, made where it will compute: the default configuration is
    the released one's. Its tokenizer is the tiny pack's; only the ids' count matters."""
    from transformers import CsmConfig, CsmForConditionalGeneration

    tiny = tiny_weights("cpu")
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    config = CsmConfig()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = CsmForConditionalGeneration(config).eval().requires_grad_(False)
            model.codec_model.float()
    finally:
        torch.set_default_dtype(before)
    return CsmWeights(
        model=model,
        tokenizer=tiny.tokenizer,
        device=torch.device(device),
        dtype=dtype,
        codebooks=config.num_codebooks,
        vocab=config.vocab_size,
        codec_vocab=config.codec_config.codebook_size,
        hidden=config.hidden_size,
        frame_samples=tiny.frame_samples,
        sample_rate=tiny.sample_rate,
    )


# --- our engine


class Ours:
    """The model under our engine, ticked as the engine ticks it, all rows in every tick."""

    def __init__(
        self, weights: CsmWeights, *, slots: int, positions: int, context: int, compile: bool
    ) -> None:
        self.name = OURS
        self.fixed_length = False
        self._text = text_of(weights, context)
        began = time.perf_counter()
        self.model = DeviceModel(weights, slots=slots, positions=positions, compile=compile)
        self.ready_s = time.perf_counter() - began
        self.slot_bytes = self.model.slot_bytes
        self._weights = weights
        self._device = weights.device

    def run(self, batch: int, frames: int) -> Timed:
        """On a thread of its own, as an engine has one: the main one is settled for `generate`."""
        with ThreadPoolExecutor(1, initializer=settle, initargs=(self._weights,)) as thread:
            return thread.submit(self._run, batch, frames).result()

    def _run(self, batch: int, frames: int) -> Timed:
        rows = [self._begin(slot) for slot in range(batch)]
        times, meter = [], EnergyMeter(self._device)
        for frame in range(frames):
            began = time.perf_counter()
            self.model.tick([Row(slot, start + frame, slot, frame, SAMPLING)
                             for slot, start in rows])  # fmt: skip
            times.append(_ms_since(began))
        return Timed(tuple(times), meter.joules())

    def _begin(self, slot: int) -> tuple[int, int]:
        """(slot, position of its first tick)"""
        self.model.assign(slot, Voice(SPEAKER, sampling=SAMPLING))
        text = self.model.embed_text(self._text, SPEAKER)
        last = len(text) - 1
        for start in range(0, last, self.model.max_prefill):
            piece = text[start : min(start + self.model.max_prefill, last)]
            self.model.prefill(slot, start, piece)
        self.model.set_input(slot, text[last:])
        return slot, last

    def first_audio_ms(self, crowds: Sequence[int], trials: int) -> list[list[float]]:
        """From a text to its first 80 ms, while so many others speak as fast as they are given
        frames. The last thing that is asked of this side: an engine closes its model."""
        engine = Engine(self.model, name="benchmark")
        engine.start()
        engine.run(lambda _: settle(self._weights))
        try:
            found = []
            for others in crowds:
                with self._crowd(engine, others):
                    found.append([self._first_ms(engine, seed) for seed in range(trials)])
            return found
        finally:
            engine.close()

    def _first_ms(self, engine: Engine, seed: int) -> float:
        time.sleep(SETTLE_S)  # the last trial's slot may be in a tick still
        began, cancel = time.perf_counter(), CancelToken()
        with engine.slot(Voice(SPEAKER, sampling=SAMPLING), seed=seed, cancel=cancel) as slot:
            next(iter(slot.say(TEXT)))
            took = _ms_since(began)
            cancel.cancel()
        return took

    @contextmanager
    def _crowd(self, engine: Engine, size: int) -> Iterator[None]:
        cancel, speaking = CancelToken(), threading.Barrier(size + 1)

        def speak(seed: int) -> None:
            first = True
            with engine.slot(Voice(SPEAKER, sampling=SAMPLING), seed=seed, cancel=cancel) as slot:
                while not cancel.cancelled:
                    for _ in slot.say(TEXT):
                        if first:
                            speaking.wait(CROWD_S)
                            first = False

        threads = [threading.Thread(target=speak, args=(1000 + i,)) for i in range(size)]
        for thread in threads:
            thread.start()
        try:
            speaking.wait(CROWD_S)
            yield
        finally:
            cancel.cancel()
            for thread in threads:
                thread.join()


# --- transformers


class Generate:
    """`CsmForConditionalGeneration.generate`, sampling, with a streamer to see its frames come.

    Its codes become sound after it has ended, all rows at once, a frame's share of which counts as
    the frame's: `generate` itself would decode row after row, and streams no sound.
    """

    def __init__(self, weights: CsmWeights, *, context: int, static: bool) -> None:
        self.name = STATIC if static else EAGER
        # The cache's length is the run's: what was compiled for another is compiled again.
        self.fixed_length = static and weights.device.type == "cuda"
        self._weights = weights
        self._ids = weights.text_ids(text_of(weights, context), SPEAKER)
        self._cache = {"cache_implementation": "static"} if static else {}

    def run(self, batch: int, frames: int) -> Timed:
        meter = EnergyMeter(self._weights.device)
        before = _reset_peak(self._weights.device)
        times, codes = self._codes(batch, frames)
        began = time.perf_counter()
        self._sound(codes)
        decode_ms = _ms_since(began) / frames
        peak = _peak(self._weights.device)
        return Timed(
            tuple(ms + decode_ms for ms in times),
            meter.joules(),
            None if peak is None else peak - before,
        )

    def first_audio_ms(self, trials: int) -> list[float]:
        """To the first frame's codes and their sound, as a server around its streamer would."""
        found = []
        for _ in range(trials):
            began = time.perf_counter()
            _, codes = self._codes(1, 1)
            self._sound(codes)
            found.append(_ms_since(began))
        return found

    def _codes(self, batch: int, frames: int) -> tuple[list[float], Tensor]:
        weights = self._weights
        ids = torch.tensor(self._ids, device=weights.device).expand(batch, -1)
        seen = _Frames()
        options = {"do_sample": True, "temperature": SAMPLING.temperature, "top_k": SAMPLING.top_k}
        codes = weights.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=frames,
            streamer=seen,
            **options,
            **self._cache,
            **{f"depth_decoder_{name}": value for name, value in (options | self._cache).items()},
        )
        return seen.frame_ms, codes

    def _sound(self, codes: Tensor) -> None:
        codec = self._weights.model.codec_model
        valid = codes.clamp(0, self._weights.codec_vocab - 1)
        with torch.inference_mode():
            codec.decode(valid.transpose(1, 2)).audio_values.float().cpu()


class _Frames:
    """transformers' streamer: `put` gets the prompt first, then every frame, on the host."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.frame_ms: list[float] = []
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        if self._prompt_seen:
            self.frame_ms.append(_ms_since(self._last))
        self._prompt_seen = True
        self._last = time.perf_counter()

    def end(self) -> None:
        pass


# --- meters


class EnergyMeter:
    """Joules of one GPU since it was made, from NVML's counter (Volta and later)."""

    def __init__(self, device: torch.device) -> None:
        self._read = _energy_reader(device)
        self._before = self._read() if self._read else 0.0

    def joules(self) -> float | None:
        return self._read() - self._before if self._read else None


def _energy_reader(device: torch.device) -> Callable[[], float] | None:
    if device.type != "cuda":
        return None
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)):
        return None
    if nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
        return None

    def read() -> float:
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
        return millijoules.value / 1000.0

    return read


def _reset_peak(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return int(torch.cuda.memory_allocated(device))


def _peak(device: torch.device) -> int | None:
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None


def _ms_since(began: float) -> float:
    return (time.perf_counter() - began) * 1000
