"""Recordings to what is kept of a voice. The encoder (wav2vec2, 1.3 GB) is here only meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from src.rpc.errors import CorruptModel
from src.tts.families.spark.pack import SOURCE, WAV2VEC2, read_yaml, require_files
from src.tts.families.spark.prompts import ClonedVoice
from src.tts.families.torch_host import give_back_memory, load_plain, loading
from src.tts.recordings import Reference, read_recording

_CONFIGS = (f"{WAV2VEC2}/config.json", f"{WAV2VEC2}/preprocessor_config.json")
_WEIGHTS = (f"{WAV2VEC2}/model.safetensors", f"{WAV2VEC2}/pytorch_model.bin")
_LAYERS = 16
"""The features are hidden states 11, 14 and 16."""
_UNUSED = {"masked_spec_embed"}  # for training


def encode_voices(
    model_id: str,
    files: Mapping[str, Path],
    folder: Path,
    references: Mapping[str, Reference],
    bicodec: Any,
    device: Any,
) -> dict[str, ClonedVoice]:
    """Raises CorruptModel for an encoder that cannot be read, and as `read_recording` does."""
    if not references:
        return {}
    rate = int(read_yaml(model_id, folder, "config.yaml")["sample_rate"])
    sounds = {name: read_recording(each.audio, rate) for name, each in references.items()}
    try:
        with _encoder(model_id, files, folder, bicodec, device) as encode:
            return {
                name: _voice(encode(sound), references[name].transcript)
                for name, sound in sounds.items()
            }
    finally:
        give_back_memory(str(device))


def _voice(codes: tuple[Any, Any], transcript: str) -> ClonedVoice:
    global_codes, semantic_codes = codes
    return ClonedVoice(
        tuple(global_codes.flatten().tolist()),
        tuple(semantic_codes.flatten().tolist()) if transcript else (),
        transcript,
    )


@contextmanager
def _encoder(
    model_id: str, files: Mapping[str, Path], folder: Path, bicodec: Any, device: Any
) -> Iterator[Any]:
    """The package's `BiCodecTokenizer.tokenize`, for samples instead of a file."""
    import torch

    SOURCE.offer()
    from sparktts.models.audio_tokenizer import BiCodecTokenizer
    from sparktts.utils.audio import audio_volume_normalize

    made = BiCodecTokenizer.__new__(BiCodecTokenizer)  # its __init__ loads everything
    made.config = read_yaml(model_id, folder, "config.yaml")
    made.processor, made.feature_extractor = _wav2vec2(model_id, files, folder, device)

    def encode(sound: Any) -> tuple[Any, Any]:
        if made.config.get("volume_normalize"):
            sound = audio_volume_normalize(sound)
        clip = torch.from_numpy(made.get_ref_clip(sound)).float()[None].to(device)
        with torch.inference_mode():
            features = made.extract_wav2vec2_features(sound)
            semantic, speaker = bicodec.tokenize({"ref_wav": clip, "feat": features})
        return speaker, semantic

    try:
        yield encode
    finally:
        made.feature_extractor = None


def _wav2vec2(
    model_id: str, files: Mapping[str, Path], folder: Path, device: Any
) -> tuple[Any, Any]:
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    weights = next((name for name in _WEIGHTS if name in files), _WEIGHTS[1])
    require_files(model_id, files, (*_CONFIGS, weights))
    state = _state(model_id, files[weights])
    with loading(f"{model_id}: {WAV2VEC2}", str(device)):
        processor = Wav2Vec2FeatureExtractor.from_pretrained(folder / WAV2VEC2)
        config = Wav2Vec2Config.from_pretrained(folder / WAV2VEC2, output_hidden_states=True)
        model, info = Wav2Vec2Model.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True
        )
    lost = sorted(set(info["missing_keys"]) - _UNUSED)
    if lost:
        raise CorruptModel(f"{model_id}: {weights} lacks {len(lost)} tensors: {lost[0]}…")
    if config.num_hidden_layers < _LAYERS:
        raise CorruptModel(
            f"{model_id}: {WAV2VEC2} has {config.num_hidden_layers} layers, not {_LAYERS} or more"
        )
    return processor, model.float().to(device).eval()


def _state(model_id: str, path: Path) -> Any:
    if path.suffix == ".bin":
        return load_plain(model_id, path)
    from safetensors.torch import load_file

    with loading(f"{model_id}: {WAV2VEC2}/{path.name}", "cpu"):
        return load_file(path)
