"""Hydra's schema of `python -m elara.export`."""

from __future__ import annotations

from dataclasses import dataclass, field

FORMATS = ("gguf", "compact", "safetensors", "ollama")


@dataclass
class FormatConfig:
    """Group `format`: what is written."""

    kind: str = "gguf"  # one of FORMATS
    temperature: float = 0.8  # ollama: written into the Modelfile
    num_ctx: int | None = None  # ollama: the same; null = the trained context


@dataclass
class QuantizeConfig:
    """Group `quantize`: the type of the weights in a GGUF file."""

    type: str = "F16"  # a key of elara.export.quantize.FILE_TYPES
    library: str | None = None  # llama.cpp's library, or a folder that holds it; null = look for it


@dataclass
class ExportConfig:
    """Schema of conf/export.yaml."""

    checkpoint: str | None = None  # checkpoint folder, run folder or run name
    output: str | None = None
    name: str | None = None
    license: str | None = None
    depth: int | None = None
    chat: bool | None = None
    verify: bool = True
    verify_tokens: int = 1024
    format: FormatConfig = field(default_factory=FormatConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
