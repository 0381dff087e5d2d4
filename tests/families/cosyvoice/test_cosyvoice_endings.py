"""How a stream ends: by a cancel, by being closed, by an error; and what is left then: nothing."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from src.rpc.errors import DuplexError, Internal, Unavailable
from src.tts.families.cosyvoice2.speech import CosyVoice2Model
from src.tts.tts_base import CancelToken, Segment
from tests.families.cosyvoice.packs import chunks, engine_of, load, spec

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.timeout(400)  # the first test waits for the package's import

TEXT = "Hello there."


def left_behind(model: CosyVoice2Model) -> list[Any]:
    package = engine_of(model)._model
    kept = (package.hift_cache_dict, package.tts_speech_token_dict, package.llm_end_dict)
    return [key for store in kept for key in store]


def assert_nothing_is_left(model: CosyVoice2Model) -> None:
    assert not left_behind(model)
    assert not engine_of(model)._lock.locked()


# --- cancelling ---


def _count_steps(model: CosyVoice2Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    encoder = type(engine_of(model)._model.llm.llm)
    real, steps = encoder.forward_one_step, list[int]()

    def step(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(encoder, "forward_one_step", step)
    return steps


@pytest.mark.parametrize("how", ["clauses", "flowing"])
def test_after_a_cancel_nothing_runs_and_nothing_is_left(
    model: CosyVoice2Model, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    before, cancel = threading.active_count(), CancelToken()
    stream = model.stream([Segment(TEXT * 4, 0)], spec(text=how), cancel)
    next(stream)
    steps = _count_steps(model, monkeypatch)
    cancel.cancel()
    assert list(stream) == []
    assert len(steps) <= 1, "the step that was under way, and no more"
    assert threading.active_count() == before
    assert_nothing_is_left(model)


@contextmanager
def watched_parts(model: CosyVoice2Model, began: Callable[[str], object]) -> Iterator[None]:
    """Inside, `began` is told of every part of a chunk's computing, when it begins."""
    package = engine_of(model)._model
    flow, hift = package.flow, package.hift
    parts = {
        "block": [*flow.encoder.encoders, *flow.encoder.up_encoders],
        "step": [flow.decoder.estimator],
        "pitch": [hift.f0_predictor],
        "stage": [*hift.ups],
        "filter": [*hift.source_resblocks, *hift.resblocks],
    }
    with ExitStack() as held:
        for name, modules in parts.items():
            for module in modules:
                hook = module.register_forward_pre_hook(lambda *_, name=name: began(name))
                held.callback(hook.remove)
        yield


@pytest.mark.parametrize("speed", ["1", "1.5"])
@pytest.mark.parametrize(
    "last",
    [("block", 1), ("block", 5), ("step", 1), ("step", 7), ("step", 10), ("pitch", 1),
     ("stage", 1), ("stage", 3), ("filter", 1), ("filter", 2), ("filter", 11)],
)  # fmt: skip
def test_a_cancel_ends_a_chunk_at_its_next_part(
    model: CosyVoice2Model, last: tuple[str, int], speed: str
) -> None:
    cancel, begun = CancelToken(), list[str]()

    def began(name: str) -> None:
        begun.append(name)
        if (name, begun.count(name)) == last:
            cancel.cancel()

    with watched_parts(model, began):
        assert list(model.stream([Segment(TEXT * 4, 0)], spec(speed=speed), cancel)) == []
    assert (begun[-1], begun.count(begun[-1])) == last, "nothing began after it"
    assert_nothing_is_left(model)


def test_the_solver_takes_ten_steps_and_all_of_them_are_watched(model: CosyVoice2Model) -> None:
    """So that the test above looks at a whole chunk."""
    begun: list[str] = []
    with watched_parts(model, begun.append):
        chunks(model, TEXT, most=1)
    counts = {name: begun.count(name) for name in begun}
    assert counts == {"block": 5, "step": 10, "pitch": 1, "stage": 3, "filter": 12}


def cancelled_in_a_step(model: CosyVoice2Model) -> weakref.ref[CancelToken]:
    cancel = CancelToken()

    def began(name: str) -> None:
        if name == "step":
            cancel.cancel()

    with watched_parts(model, began):
        assert list(model.stream([Segment(TEXT, 0)], spec(), cancel)) == []
    return weakref.ref(cancel)


def test_after_a_cancelled_chunk_others_and_later_ones_say_the_same_as_ever(
    model: CosyVoice2Model,
) -> None:
    whole = [c.samples.size for c in chunks(model, TEXT)]
    other = model.stream([Segment(TEXT, 0)], spec(), CancelToken())
    sizes = [next(other).samples.size]
    gone = cancelled_in_a_step(model)
    gc.collect()
    assert gone() is None
    assert sizes + [c.samples.size for c in other] == whole
    assert [c.samples.size for c in chunks(model, TEXT)] == whole


def test_a_stream_that_is_closed_in_the_middle_leaves_nothing(model: CosyVoice2Model) -> None:
    for how in ("clauses", "flowing"):
        assert chunks(model, TEXT * 4, spec(text=how), most=1)
        assert_nothing_is_left(model)


# --- errors ---


def breaks(error: Exception, real: Any, after: int = 5) -> Any:
    """`real`, which raises this once it has been called so many times."""
    calls = itertools.count(1)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if next(calls) > after:
            raise error
        return real(*args, **kwargs)

    return forward


def language_model(model: CosyVoice2Model) -> tuple[Any, str]:
    return type(engine_of(model)._model.llm.llm), "forward_one_step"


def flow(model: CosyVoice2Model) -> tuple[Any, str]:
    return type(engine_of(model)._model.flow.decoder.estimator), "forward"


def vocoder(model: CosyVoice2Model) -> tuple[Any, str]:
    return type(engine_of(model)._model.hift), "decode"


def normaliser(model: CosyVoice2Model) -> tuple[Any, str]:
    return type(engine_of(model)._frontend), "text_normalize"


@pytest.mark.parametrize("how", ["clauses", "flowing"])
@pytest.mark.parametrize(
    ("part", "after"), [(language_model, 5), (flow, 5), (vocoder, 0), (normaliser, 0)]
)
@pytest.mark.parametrize(
    ("error", "becomes", "said"),
    [
        (torch.cuda.OutOfMemoryError("2 GiB"), Unavailable, "lower max_streams"),
        (ValueError("the user's words"), Internal, r"failed while speaking \(ValueError\)$"),
    ],
    ids=["memory", "other"],
)
def test_an_error_is_its_listener_s_in_words_and_the_next_one_is_served(
    model: CosyVoice2Model,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    part: Callable[[CosyVoice2Model], tuple[Any, str]],
    after: int,
    error: Exception,
    becomes: type[DuplexError],
    said: str,
) -> None:
    """The package's consumer polls for ever for tokens that nobody makes."""
    owner, name = part(model)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, breaks(error, getattr(owner, name), after))
        with pytest.raises(becomes, match=said):
            chunks(model, TEXT, spec(text=how))
    assert_nothing_is_left(model)
    assert chunks(model, TEXT, spec(text=how), most=1)[0].samples.size


# --- unloading ---


def test_twenty_utterances_leave_no_tensor_behind(model: CosyVoice2Model) -> None:
    def tensors() -> int:
        gc.collect()
        return sum(torch.is_tensor(found) for found in gc.get_objects())

    chunks(model, "Hi.", most=1)
    before = tensors()
    for number in range(20):
        chunks(model, "Hi.", spec(text="flowing" if number % 2 else "clauses"), most=1)
    assert tensors() <= before + 2


def test_an_unloaded_model_is_gone(pack: Path) -> None:
    from cosyvoice.tokenizer.tokenizer import get_qwen_tokenizer

    model = load(pack)
    assert chunks(model, TEXT, most=1)
    package = engine_of(model)._model
    watched = [weakref.ref(part) for part in (package.llm, package.flow, package.hift)]
    watched.append(weakref.ref(engine_of(model)._frontend.tokenizer))
    del package
    model.unload()
    gc.collect()
    assert [ref() for ref in watched] == [None] * 4
    assert get_qwen_tokenizer.cache_info().currsize == 0
