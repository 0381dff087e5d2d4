"""A voice pack of CosyVoice 2 → its engine. The pack's yaml is read for sizes, and never run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from src.rpc.errors import CorruptModel, UnknownName
from src.tts.catalog import ModelMeta
from src.tts.families.cosyvoice2.engine import Speaker, TorchEngine
from src.tts.families.cosyvoice2.frontend import make_frontend, read_presets
from src.tts.families.cosyvoice2.layers import make_encoder
from src.tts.families.cosyvoice2.pack import (
    CONFIG,
    LANGUAGE_MODEL,
    PRESETS,
    Sizes,
    check_files,
    hidden_size,
    read_sizes,
)
from src.tts.families.cosyvoice2.package import import_package
from src.tts.families.torch_host import check_device, load_plain, loading, well_behaved
from src.tts.recordings import Transcripts, read_references


def open_engine(
    meta: ModelMeta, files: Mapping[str, Path], device: str, progress: Callable[[float], None]
) -> TorchEngine:
    """Raises InvalidArgument for a device that is not there or a recording that makes no voice,
    CorruptModel for files that are missing, damaged or of another shape, UnknownName for a voice
    that is listed and not there, Unavailable where memory is short."""
    wanted = check_device(meta.model_id, device)
    folder = check_files(meta.model_id, files)
    sizes = read_sizes(meta.model_id, files[CONFIG])
    hidden = hidden_size(meta.model_id, files[f"{LANGUAGE_MODEL}/config.json"])
    with loading(meta.model_id, device), well_behaved():
        package = import_package()
        progress(0.2)
        model = _make_model(package, folder, sizes, hidden)
        _put_on(model, wanted)
        for share, name in ((0.6, "llm"), (0.7, "flow"), (0.8, "hift")):
            _fill(meta.model_id, getattr(model, name), files[f"{name}.pt"], wanted)
            progress(share)
        frontend = make_frontend(package, meta.model_id, files, folder, wanted)
        speakers = _speakers(meta, files, frontend, wanted)
        _settle(wanted)
    progress(1.0)
    return TorchEngine(meta.model_id, model, frontend, speakers)


def _make_model(package: Any, folder: Path, sizes: Sizes, hidden: int) -> Any:
    """What the release's yaml would build, without what only training needs."""
    return package.model.CosyVoice2Model(
        package.llm.Qwen2LM(
            llm_input_size=hidden,
            llm_output_size=hidden,
            speech_token_size=sizes.speech_tokens,
            llm=make_encoder(package.llm, folder),
            sampling=None,  # every run brings its own
            mix_ratio=[5, 15],
        ),
        _make_flow(package, sizes),
        _make_vocoder(package, sizes),
    )


def _make_flow(package: Any, sizes: Sizes) -> Any:
    import torch
    from omegaconf import DictConfig

    flow = package.flow.CausalMaskedDiffWithXvec(
        input_size=512, output_size=80, spk_embed_dim=192, vocab_size=sizes.speech_tokens,
        input_frame_rate=25, token_mel_ratio=2, pre_lookahead_len=3,
        encoder=package.encoder.UpsampleConformerEncoder(
            input_size=512, output_size=512, attention_heads=sizes.encoder_heads,
            linear_units=sizes.encoder_units, num_blocks=sizes.encoder_blocks,
            input_layer="linear", pos_enc_layer_type="rel_pos_espnet",
            selfattention_layer_type="rel_selfattn", use_cnn_module=False, macaron_style=False,
            static_chunk_size=25,
        ),
        decoder=package.matching.CausalConditionalCFM(
            in_channels=240, n_spks=1, spk_emb_dim=80,
            cfm_params=DictConfig({
                "sigma_min": 1e-6, "solver": "euler", "t_scheduler": "cosine",
                "training_cfg_rate": 0.2, "inference_cfg_rate": 0.7, "reg_loss_type": "l1",
            }),
            estimator=package.decoder.CausalConditionalDecoder(
                in_channels=320, out_channels=80, channels=[sizes.flow_channels], dropout=0.0,
                attention_head_dim=sizes.flow_head, n_blocks=sizes.flow_blocks,
                num_mid_blocks=sizes.flow_middle, num_heads=sizes.flow_heads, act_fn="gelu",
                static_chunk_size=50, num_decoding_left_chunks=-1,
            ),
        ),
    )  # fmt: skip
    # The network was trained with any noise; the release always begins with this one.
    noise = torch.Generator().manual_seed(0)
    flow.decoder.rand_noise = torch.randn(flow.decoder.rand_noise.shape, generator=noise)
    return flow


def _make_vocoder(package: Any, sizes: Sizes) -> Any:
    dilations = [[1, 3, 5]] * 3
    return package.vocoder.HiFTGenerator(
        in_channels=80, base_channels=sizes.vocoder_channels, nb_harmonics=8,
        sampling_rate=24_000, nsf_alpha=0.1, nsf_sigma=0.003, nsf_voiced_threshold=10,
        upsample_rates=[8, 5, 3], upsample_kernel_sizes=[16, 11, 7],
        istft_params={"n_fft": 16, "hop_len": 4},
        resblock_kernel_sizes=[3, 7, 11], resblock_dilation_sizes=dilations,
        source_resblock_kernel_sizes=[7, 7, 11], source_resblock_dilation_sizes=dilations,
        lrelu_slope=0.1, audio_limit=0.99,
        f0_predictor=package.pitch.ConvRNNF0Predictor(
            num_class=1, in_channels=80, cond_channels=sizes.pitch_channels
        ),
    )  # fmt: skip


def _put_on(model: Any, device: Any) -> None:
    """The package's model takes the first GPU that it sees, asked or not."""
    import torch

    model.device = device
    if device.type == "cuda":
        model.llm_context = torch.cuda.stream(torch.cuda.Stream(device))


def _fill(model_id: str, part: Any, path: Path, device: Any) -> None:
    weights = load_plain(model_id, path)
    try:
        # The vocoder is saved as a part of what trained it.
        weights = {name.replace("generator.", ""): value for name, value in weights.items()}
        part.load_state_dict(weights, strict=True)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise CorruptModel(
            f"{model_id}: {path.name} is not what {CONFIG} describes: {str(error)[:600]}"
        ) from error
    part.to(device).eval()


def _speakers(
    meta: ModelMeta, files: Mapping[str, Path], frontend: Any, device: Any
) -> dict[str, Speaker]:
    """The recordings' voices, then the presets; `meta.voices` picks and orders them."""
    presets = read_presets(meta.model_id, files[PRESETS], device) if PRESETS in files else {}
    listed = [name for name in meta.voices if name not in presets]
    found: dict[str, Speaker] = {}
    if listed or not meta.voices:
        references = read_references(meta.model_id, files, listed, Transcripts.NEEDED)
        found = {name: frontend.speaker(ref) for name, ref in references.items() if ref}
    found = {**presets, **found} if meta.voices else {**found, **presets}
    for name in meta.voices:
        if name not in found:
            raise UnknownName.among(f"voice for {meta.model_id}", name, found)
    if not found:
        raise CorruptModel(
            f"{meta.model_id}: it has no voice. Put a recording of 5 to 15 s into ref/seed.wav and"
            f" what is said in it into ref/seed.txt, or the release's {PRESETS} beside llm.pt"
        )
    return {name: found[name] for name in meta.voices or found}


def _settle(device: Any) -> None:
    """What was put on a GPU is there before another of its streams reads it."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
