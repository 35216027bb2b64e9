"""What is exported: a checkpoint folder's parts without its weights, and what is known about where they come from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from elara import checkpoint
from elara.checkpoint import Weights
from elara.config import ElaraConfig
from elara.errors import ElaraError
from elara.evaluation.models import data_of, run_of
from elara.export.metadata import About
from elara.model import ElaraLM
from elara.size.parameters import Part, count_parameters
from elara.tokenizer import Tokenizer

MAX_LAYERS = 512  # of llama.cpp (LLAMA_MAX_LAYERS)
MAX_EXPERTS = 512  # the same (LLAMA_MAX_EXPERTS)


@dataclass(frozen=True)
class Source:
    """A checkpoint, opened. depth: the recursion depth it is exported with. chat: whether it holds conversations."""

    folder: Path
    meta: dict[str, Any]
    config: ElaraConfig
    tokenizer: Tokenizer
    weights: Weights
    about: About
    depth: int
    chat: bool


def open_source(
    folder: Path,
    *,
    name: str | None = None,
    license: str | None = None,
    depth: int | None = None,
    chat: bool | None = None,
) -> Source:
    """Open a checkpoint folder, its checksums compared. Raises ElaraError for what is damaged or out of range."""
    meta, config = checkpoint.read_meta(folder), checkpoint.read_config(folder)
    if depth is not None and depth < 1:
        raise ElaraError(f"depth={depth} must be at least 1 (null = the trained depth, {config.trm.depth})")
    return Source(
        folder=folder,
        meta=meta,
        config=config,
        tokenizer=checkpoint.read_tokenizer(folder, meta),
        weights=Weights(folder, meta, config),
        about=_about(folder, meta, config, name, license),
        depth=depth or config.trm.depth,
        chat=bool(meta.get("chat")) if chat is None else chat,
    )


def check_llama_limits(source: Source) -> None:
    """Raise ElaraError for a model that llama.cpp would not load."""
    layers, experts = source.config.model.n_layer * source.depth, source.config.moe.num_experts
    if layers > MAX_LAYERS:
        raise ElaraError(
            f"unrolled this model has {layers} layers and llama.cpp takes {MAX_LAYERS}: give a lower depth, or use "
            "format=compact"
        )
    if experts > MAX_EXPERTS:
        raise ElaraError(f"llama.cpp takes {MAX_EXPERTS} experts and this model has {experts}: use format=compact")


def file_name(name: str) -> str:
    """A model's name as a part of a file name."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def _about(folder: Path, meta: dict[str, Any], config: ElaraConfig, name: str | None, license: str | None) -> About:
    run, data = run_of(folder), data_of(folder)
    summary = {} if run is None else run.read_summary()
    described = None if data is None else " ".join(filter(None, [data.name, data.dataset, _file(data.path)]))
    with torch.device("meta"):
        parts = count_parameters(ElaraLM(config)).values()
    return About(
        name=name or (meta.get("name", folder.resolve().name) if run is None else run.path.parent.name),
        license=license or meta.get("license"),
        commit=summary.get("commit") or meta.get("commit"),
        data=described or meta.get("data"),
        step=int(meta.get("step", 0)),
        parameters=Part(sum(part.total for part in parts), sum(part.active for part in parts)),
    )


def _file(path: str | None) -> str | None:
    """The last part of a path: where it lay is nobody's business."""
    return None if path is None else Path(path).name
