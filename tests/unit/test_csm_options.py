"""What a catalog entry of the Sesame families may set."""

from __future__ import annotations

import pytest

from src.rpc.errors import InvalidArgument, UnknownName
from src.tts.families.csm.options import read_options
from src.tts.families.csm.ports import Sampling


def test_without_settings_the_defaults_are_the_devices() -> None:
    on_cpu, on_gpu = read_options({}, "cpu"), read_options({}, "cuda:0")
    assert (on_cpu.engine.max_slots, on_gpu.engine.max_slots) == (8, 32)
    assert (on_cpu.engine.compile, on_gpu.engine.compile) == (False, True)
    assert on_cpu.sampling == Sampling(0.9, 50)
    assert not on_cpu.tiny
    assert on_cpu.engine.max_adapters == 0


def test_everything_can_be_set() -> None:
    options = read_options(
        {
            "dtype": "bfloat16",
            "max_slots": "3",
            "positions": "512",
            "compile": "on",
            "temperature": "0",
            "top_k": "10",
            "seed": "7",
            "speaker": "2",
            "tiny": "1",
            "max_adapters": "4",
            "max_rank": "64",
        },
        "cpu",
    )
    assert (options.engine.dtype, options.engine.max_slots) == ("bfloat16", 3)
    assert (options.engine.positions, options.engine.compile) == (512, True)
    assert (options.engine.max_adapters, options.engine.max_rank) == (4, 64)
    assert options.sampling == Sampling(0.0, 10)
    assert (options.seed, options.speaker, options.tiny) == (7, 2, True)


def test_an_unknown_key_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'max_slots'"):
        read_options({"max_slot": "3"}, "cpu")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("dtype", "float8", "one of auto, float32, bfloat16"),
        ("max_slots", "0", "from 1 to 256"),
        ("max_slots", "2.5", "whole number"),
        ("max_slots", "many", "from 1 to 256"),
        ("positions", "100", "from 256 to 2048"),
        ("compile", "yes", "'on' or 'off'"),
        ("tiny", "on", "'1' or '0'"),
        ("temperature", "nan", "from 0 to 2"),
        ("top_k", "129", "from 1 to 128"),
        ("seed", "-1", "from 0 to"),
        ("speaker", "10", "from 0 to 9"),
    ],
)
def test_a_bad_value_is_refused_in_words(key: str, value: str, said: str) -> None:
    with pytest.raises(InvalidArgument, match=f"setting {key!r} must be .*{said}"):
        read_options({key: value}, "cpu")
