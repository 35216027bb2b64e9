"""Everything about a model's size in one plain dictionary: what `elara.verify` prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from elara.config import ElaraConfig
from elara.model import ElaraLM
from elara.size.activations import activation_bytes
from elara.size.files import FORMATS, file_bytes
from elara.size.parameters import adamw_bytes, count_parameters, kv_cache_bytes


def size_report(config: ElaraConfig) -> dict[str, Any]:
    """Counts (parameters, bytes) as plain integers, from a model on the meta device: no weight is allocated."""
    with torch.device("meta"), _NoInit():
        parts = count_parameters(ElaraLM(config))
    total = sum(part.total for part in parts.values())
    head = parts["diffusion head"].total if "diffusion head" in parts else 0
    return {
        "parameters": {name: asdict(part) for name, part in parts.items()},
        "total": total,
        "without_diffusion_head": total - head,
        "active": sum(part.active for part in parts.values()),
        "effective_layers": config.model.n_layer * config.trm.depth,
        "vocabulary": config.vocab_size,
        "file_bytes": {
            name: {
                "one_copy": file_bytes(config, name, unrolled=False),
                "unrolled": file_bytes(config, name, unrolled=True),
            }
            for name in FORMATS
        },
        "kv_cache_bytes_per_token": {"fp32": kv_cache_bytes(config, 4), "bf16": kv_cache_bytes(config, 2)},
        "adamw_bytes": adamw_bytes(total),
        "activation_bytes_per_sequence": asdict(activation_bytes(config)),
    }


class _NoInit(TorchFunctionMode):
    """Skips torch.nn.init: there is nothing to fill, and the first fill on the meta device imports for a second."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
