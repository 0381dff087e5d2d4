"""What makes a voice prompt, and what is refused, in words that say what to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from src.audio.pcm import Float32
from src.rpc.errors import CorruptModel, InvalidArgument
from src.tts.recordings import LONGEST_MS, LOWEST_RATE, SHORTEST_MS, read_recording


def tone(seconds: float, rate: int, hertz: float = 440.0, peak: float = 0.5) -> Float32:
    out: Float32 = (
        peak * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)
    ).astype(np.float32)
    return out


def written(
    folder: Path, samples: Float32, rate: int, name: str = "ref.wav", subtype: str = "PCM_16"
) -> Path:
    path = folder / name
    soundfile.write(path, samples, rate, subtype=subtype)
    return path


@pytest.mark.parametrize(
    ("name", "subtype"),
    [("ref.wav", "PCM_16"), ("ref.wav", "FLOAT"), ("ref.flac", "PCM_24"), ("ref.ogg", "VORBIS")],
)
def test_a_recording_at_the_models_rate_comes_as_it_is(
    tmp_path: Path, name: str, subtype: str
) -> None:
    sound = tone(1.0, 24_000)
    got = read_recording(written(tmp_path, sound, 24_000, name, subtype))
    assert got.dtype == np.float32
    assert got.shape == sound.shape
    assert float(np.abs(got - sound).max()) < (0.05 if subtype == "VORBIS" else 1e-4)


@pytest.mark.parametrize("rate", [16_000, 22_050, 44_100, 48_000, 96_000])
def test_another_rate_is_resampled_without_another_pitch_or_level(
    tmp_path: Path, rate: int
) -> None:
    got = read_recording(written(tmp_path, tone(1.0, rate), rate))
    assert got.size == pytest.approx(24_000, abs=2)
    middle = slice(2_000, 22_000)
    assert float(np.abs(got[middle] - tone(1.0, 24_000)[middle]).max()) < 1e-3


def test_what_the_models_rate_cannot_hold_is_filtered_and_does_not_fold(tmp_path: Path) -> None:
    got = read_recording(written(tmp_path, tone(1.0, 48_000, hertz=15_000), 48_000))
    assert float(np.abs(got[2_000:22_000]).max()) < 1e-3


@pytest.mark.parametrize("milliseconds", [SHORTEST_MS, LONGEST_MS])
def test_the_bounds_themselves_are_taken(tmp_path: Path, milliseconds: int) -> None:
    path = written(tmp_path, tone(milliseconds / 1000, 24_000), 24_000)
    assert read_recording(path).size == milliseconds * 24


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.0, "lasts 0.0 s"), (0.4, "lasts 0.4 s"), (31.0, "lasts 31.0 s")]
)
def test_too_little_and_too_much_are_refused(tmp_path: Path, seconds: float, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said) as refusal:
        read_recording(written(tmp_path, tone(seconds, 24_000), 24_000))
    assert "0.5 to 30 s" in refusal.value.message


def test_stereo_is_refused_and_told_how_to_become_mono(tmp_path: Path) -> None:
    both = np.stack([tone(1.0, 24_000)] * 2, axis=1)
    with pytest.raises(InvalidArgument, match=r"2 channels.*ffmpeg -i ref\.wav -ac 1"):
        read_recording(written(tmp_path, both, 24_000))


@pytest.mark.parametrize("rate", [8_000, 11_025, LOWEST_RATE - 1])
def test_telephone_sound_is_refused_with_the_reason(tmp_path: Path, rate: int) -> None:
    with pytest.raises(InvalidArgument, match=f"{rate} Hz.*like a telephone"):
        read_recording(written(tmp_path, tone(1.0, rate), rate))


@pytest.mark.parametrize("peak", [0.0, 0.002])
def test_silence_is_refused(tmp_path: Path, peak: float) -> None:
    with pytest.raises(InvalidArgument, match="is silent"):
        read_recording(written(tmp_path, tone(1.0, 24_000, peak=peak), 24_000))


def test_a_quiet_voice_is_taken(tmp_path: Path) -> None:
    assert read_recording(written(tmp_path, tone(1.0, 24_000, peak=0.01), 24_000)).size == 24_000


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_numbers_are_refused(tmp_path: Path, value: float) -> None:
    sound = tone(1.0, 24_000)
    sound[500] = value
    with pytest.raises(CorruptModel, match="not numbers"):
        read_recording(written(tmp_path, sound, 24_000, subtype="FLOAT"))


def test_integers_stored_as_floats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="full scale is 1"):
        read_recording(written(tmp_path, tone(1.0, 24_000, peak=20_000.0), 24_000, subtype="FLOAT"))


def test_a_file_that_is_no_sound_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "ref.wav"
    path.write_bytes(b"not a sound at all" * 100)
    with pytest.raises(CorruptModel, match=r"ref\.wav cannot be read"):
        read_recording(path)


@pytest.mark.parametrize("name", ["ref.flac", "ref.ogg", "ref.mp3"])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    soundfile.write(path, tone(2.0, 24_000), 24_000)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptModel, match=r"cut off|cannot be read"):
        read_recording(path)


def test_no_file_and_no_plain_file_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.wav", tmp_path):
        with pytest.raises(CorruptModel, match="is not there"):
            read_recording(path)
