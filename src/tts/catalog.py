"""Which models there are: `configs/model_catalog.yaml` and what lies under `voicepacks/`."""

from __future__ import annotations

from pydantic import Field

from src.common.config import StrictModel


class ModelFile(StrictModel):
    """One file of a model and the places to look for it, tried in order.

    A place is `path:<file>`, `package:<module>/<file inside it>` or `hub:<repo>@<revision>/<file>`.
    """

    sha256: str = Field("", description="refuse any other content; empty: not pinned")
    sources: list[str] = Field(min_length=1)


class ModelMeta(StrictModel):
    """One catalog entry."""

    model_id: str
    family: str
    device: str = Field("", description="empty: the worker's own")
    needs_gpu: bool = False
    supports_lora: bool = False
    cpu_ok: bool = False
    native_sr: int = 0
    estimated_vram_gb: float = 0.0
    languages: list[str] = Field(default_factory=list)
    voices: list[str] = Field(default_factory=list)
    tags: list[str] = Field(default_factory=list)
    licence: str = ""
    files: dict[str, ModelFile] = Field(default_factory=dict)
    settings: dict[str, str] = Field(default_factory=dict, description="family-specific defaults")
