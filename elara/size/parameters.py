"""Parameters by part, and what they cost in the KV cache and in training."""

from __future__ import annotations

from dataclasses import dataclass

from elara.config import ElaraConfig
from elara.errors import ElaraError
from elara.model import ElaraLM


@dataclass(frozen=True)
class Part:
    """Parameters of one kind: in total, and those that one token meets in an autoregressive step.

    A block that recursion applies several times counts once.
    """

    total: int
    active: int


def count_parameters(model: ElaraLM) -> dict[str, Part]:
    """Parameters by part, in the order of PARTS; the model may live on the meta device.

    The AR head is the embedding. The diffusion head is no part of an autoregressive step.
    """
    moe = model.config.moe
    found: dict[str, int] = {}
    for name, weight in model.named_parameters():
        part = _part(name)
        found[part] = found.get(part, 0) + weight.numel()
    active = dict(found)
    if "routed experts" in found:
        active["routed experts"] = found["routed experts"] * moe.top_k // moe.num_experts
    if "diffusion head" in found:
        active["diffusion head"] = 0
    return {part: Part(found[part], active[part]) for part in PARTS if part in found}


PARTS = (
    "embedding",
    "attention",
    "dense MLP",
    "routed experts",
    "shared experts",
    "router",
    "norms",
    "diffusion head",
)
_PIECES = {  # a part by what its parameters' names contain; the first that fits
    "chain.": "diffusion head",
    "norm": "norms",
    "embed.": "embedding",
    ".attention.": "attention",
    ".mlp.router.": "router",
    ".mlp.experts.": "routed experts",
    ".mlp.shared.": "shared experts",
    ".mlp.": "dense MLP",
    "diffusion.": "diffusion head",
}


def _part(name: str) -> str:
    for piece, part in _PIECES.items():
        if piece in name:
            return part
    raise ElaraError(f"parameter {name} belongs to no part that elara.size knows: add it to _PIECES")


def kv_cache_bytes(config: ElaraConfig, element_bytes: int) -> int:
    """Bytes of keys and values that one token leaves in the cache, over all effective layers."""
    layers = config.model.n_layer * config.trm.depth
    return 2 * layers * config.n_kv_head * config.head_dim * element_bytes


def adamw_bytes(parameters: int) -> int:
    """Weights, gradients and AdamW's two moments, all in float32."""
    return parameters * 4 * 4
