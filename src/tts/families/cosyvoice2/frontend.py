"""What CosyVoice 2 reads: texts as ids, recordings as tokens, mel and embedding."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from src.rpc.errors import CorruptModel
from src.tts.families.cosyvoice2.engine import Speaker
from src.tts.families.cosyvoice2.package import text_normalisers
from src.tts.families.cosyvoice2.plan import SAMPLE_RATE, unmarked
from src.tts.families.torch_host import load_plain
from src.tts.recordings import Reference, read_recording

_SPEECH_RATE = 16_000
"""Of what the two ONNX networks hear."""
_EMBEDDING = 192
_MELS = 80


def make_frontend(
    package: Any, model_id: str, files: Mapping[str, Path], folder: Path, device: Any
) -> Any:
    """The package's `CosyVoiceFrontEnd`, without what its constructor does besides: it takes the
    first GPU, looks for a licensed text front end, and keeps every tokenizer for ever."""
    import torch

    class FrontEnd(package.frontend.CosyVoiceFrontEnd):  # type: ignore[misc]
        def __init__(self) -> None:
            import inflect  # type: ignore[import-not-found,unused-ignore]

            self.device = device
            self.tokenizer = package.tokenizer.CosyVoice2Tokenizer(str(folder))
            self.allowed_special = "all"
            self.feat_extractor = partial(
                package.mel_spectrogram, n_fft=1920, num_mels=_MELS, sampling_rate=SAMPLE_RATE,
                hop_size=480, win_size=1920, fmin=0, fmax=8000, center=False,
            )  # fmt: skip
            self.campplus_session = _session(model_id, files["campplus.onnx"])
            self.speech_tokenizer_session = _session(model_id, files["speech_tokenizer_v2.onnx"])
            self.spk2info: dict[str, Any] = {}
            self.inflect_parser = inflect.engine()
            normalisers = text_normalisers()
            self.text_frontend = "wetext" if normalisers else ""
            if normalisers:
                self.zh_tn_model, self.en_tn_model = normalisers

        def text_ids(self, text: str) -> Any:
            """(1, n), int32; (1, 0) for no text."""
            return torch.tensor([self.tokenizer.encode(text)], dtype=torch.int32, device=device)

        def speaker(self, reference: Reference) -> Speaker:
            """Raises as `read_recording` does."""
            rates = (_SPEECH_RATE, SAMPLE_RATE)
            sounds = {r: torch.from_numpy(read_recording(reference.audio, r))[None] for r in rates}
            said = self.text_normalize(unmarked(reference.transcript), split=False)
            with torch.inference_mode():
                heard = self.frontend_zero_shot("", said, sounds, SAMPLE_RATE, "")
            return _speaker_of(heard, device)

    return FrontEnd()


def _session(model_id: str, path: Path) -> Any:
    """Read once a voice, at the load: one thread on the CPU is enough."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(
            str(path), sess_options=options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its errors have no common base but this
        raise CorruptModel(f"{model_id}: {path.name} cannot be loaded: {error}") from error


def _speaker_of(heard: Mapping[str, Any], device: Any) -> Speaker:
    """From the package's own names; a preset may have an embedding alone."""
    import torch

    def ids(name: str) -> Any:
        return heard.get(name, torch.zeros(1, 0)).to(device, torch.int32)

    mel = heard.get("prompt_speech_feat", torch.zeros(1, 0, _MELS))
    embedding = heard["flow_embedding"] if "flow_embedding" in heard else heard["embedding"]
    return Speaker(
        ids("prompt_text"),
        ids("flow_prompt_speech_token"),
        mel.to(device, torch.float32),
        embedding.to(device, torch.float32),
    )


def read_presets(model_id: str, path: Path, device: Any) -> dict[str, Speaker]:
    """The voices in a `spk2info.pt`. Raises CorruptModel."""
    content = load_plain(model_id, path)
    if not isinstance(content, dict):
        raise CorruptModel(f"{model_id}: {path.name} holds no voices by name")
    speakers = {}
    for name, heard in content.items():
        try:
            speakers[str(name)] = _checked(_speaker_of(heard, device))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CorruptModel(
                f"{model_id}: voice {name!r} in {path.name} is none of CosyVoice 2: {error}"
            ) from error
    return speakers


def _checked(speaker: Speaker) -> Speaker:
    shape, mel, tokens = speaker.embedding.shape, speaker.mel.shape, speaker.speech.shape
    if tuple(shape) != (1, _EMBEDDING) or not bool(speaker.embedding.isfinite().all()):
        raise ValueError(f"its embedding has the shape {tuple(shape)}, not (1, {_EMBEDDING})")
    if tuple(mel) != (1, 2 * tokens[1], _MELS):
        raise ValueError(f"its mel has the shape {tuple(mel)} with {tokens[1]} tokens")
    return speaker
