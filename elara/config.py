"""Schemas that need no torch: of a model (`config.json`, four groups of Hydra's), and of how tokens are chosen."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from elara.errors import ElaraError
from elara.ranges import check_ranges

PRECISIONS = ("float32", "bfloat16", "int8", "int4")  # of weights, for inference
MODES = ("auto", "ar", "tidar", "diffusion")
ORDERS = ("confidence", "left_to_right")
OVERFLOWS = ("slide", "error")


@dataclass
class ModelConfig:
    """Sizes of the dense skeleton (group `model`)."""

    n_layer: int = 2  # physical blocks; effective layers = n_layer * trm.depth
    n_embd: int = 256  # width of the residual stream
    n_head: int = 4  # query heads; the head dimension is n_embd / n_head
    n_kv_head: int | None = None  # key/value heads (grouped-query attention); null = n_head
    hidden: int = 768  # inner width of the dense SwiGLU MLPs
    expert_hidden: int | None = None  # inner width of each expert, routed or shared; null = hidden
    vocab_size: int | None = None  # rows of the embedding; null = the tokenizer's size, padded to 64
    context_length: int = 256  # longest sequence seen in training, in tokens
    rope_base: float = 10000.0  # base of the rotary frequencies
    norm_eps: float = 1e-5  # epsilon of every RMSNorm
    bias: bool = False  # biases on the q, k and v projections (nowhere else)
    dropout: float = 0.0  # on attention and MLP outputs, training only
    init_std: float = 0.02  # standard deviation of the initial weights


@dataclass
class MoEConfig:
    """Mixture of experts (group `moe`); DeepSeekMoE with DeepSeek-V3's bias balance."""

    num_experts: int = 0  # routed experts; 0 switches MoE off
    top_k: int = 2  # routed experts per token
    num_shared: int = 1  # always-active experts' worth of width
    every: int = 2  # block i is MoE when i % every == every - 1 (2: every odd block)
    gate_scale: float = 1.0  # factor on the renormalised gate weights
    bias_update_rate: float = 0.0  # step of the selection bias after each optimizer step; 0 = no balancing
    balance_loss: float = 0.0  # weight of the sequence-wise auxiliary balance loss (DeepSeek-V3, eq. 17-20)
    z_loss: float = 0.0  # weight of the router z-loss on the routing logits (ST-MoE, eq. 5)


@dataclass
class TRMConfig:
    """Recursion (group `trm`): every physical block is applied `depth` times."""

    depth: int = 1  # applications of each block; 1 switches recursion off
    order: str = "block"  # block: 0,0,1,1,...   stack: 0..n-1,0..n-1
    checkpoint: bool = False  # recompute each block's inside in the backward pass (less memory, more time)
    sample_depth: list[int] | None = None  # [low, high]: draw the depth of each training step from this range

    @property
    def max_depth(self) -> int:
        """The deepest recursion that training meets."""
        return max(self.depth, self.sample_depth[1] if self.sample_depth else 1)


@dataclass
class TiDARConfig:
    """Diffusion head and its training section (group `tidar`); arXiv 2511.08923."""

    block_length: int = 0  # tokens drafted at once; 0 switches TiDAR off
    block_fraction: float = 1.0  # share of the blocks supervised per step: the mask section's length / sequence
    schedule: str = "full"  # full: every section token is [MASK]; linear | cosine: a random share, for denoising
    loss_weight: float = 0.5  # loss = AR + loss_weight * diffusion
    tie_head: bool = False  # share the diffusion head's weight with the embedding
    chain: bool = False  # every drafted token also depends on the one before it in the draft, through a small MLP
    draft_routing: str = "token"  # experts of a draft block's masks: token = each its own, block = one choice for the
    # block, anchor = those of the last clean token before the block


@dataclass
class ElaraConfig:
    """Everything that fixes the architecture of one model."""

    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    trm: TRMConfig = field(default_factory=TRMConfig)
    tidar: TiDARConfig = field(default_factory=TiDARConfig)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def head_dim(self) -> int:
        return self.model.n_embd // self.model.n_head

    @property
    def n_kv_head(self) -> int:
        return self.model.n_kv_head or self.model.n_head

    @property
    def expert_hidden(self) -> int:
        return self.model.expert_hidden or self.model.hidden

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding; raises ElaraError when no tokenizer has filled it in yet."""
        if self.model.vocab_size is None:
            raise ElaraError("model.vocab_size is not set: give a number or build the model with a tokenizer")
        return self.model.vocab_size

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the physical blocks whose MLP is a mixture of experts."""
        if not self.moe.num_experts:
            return []
        return [i for i in range(self.model.n_layer) if i % self.moe.every == self.moe.every - 1]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ElaraConfig:
        """Inverse of `to_dict`; raises ElaraError for the first group, key or kind of value that it does not know."""
        parts = {}
        for part in fields(cls):
            kind: Any = part.default_factory
            known = {f.name for f in fields(kind)}
            given = data.get(part.name)
            if not isinstance(given, dict):
                raise ElaraError(f"model config: group '{part.name}' is missing")
            if unknown := sorted(set(given) - known):
                choices = ", ".join(sorted(known))
                raise ElaraError(f"model config: unknown key '{part.name}.{unknown[0]}'; known: {choices}")
            for name, hint in get_type_hints(kind).items():
                if name in given and not _fits(given[name], hint):
                    wanted = getattr(hint, "__name__", str(hint))
                    raise ElaraError(f"model config: {part.name}.{name}={given[name]!r} must be of kind {wanted}")
            parts[part.name] = kind(**given)
        return cls(**parts)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON is of the kind that a field is declared with."""
    if get_origin(hint) is UnionType:
        return any(_fits(value, one) for one in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(one, get_args(hint)[0]) for one in value)
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint


def _check(config: ElaraConfig) -> None:
    """Raise ElaraError for the first value that no model can be built from."""
    m, moe, trm, tidar = config.model, config.moe, config.trm, config.tidar
    heads = m.n_kv_head or m.n_head
    rules = [
        (min(m.n_layer, m.n_embd, m.n_head, m.hidden, m.context_length, heads) > 0, "model: sizes must be positive"),
        (m.n_head > 0 and m.n_embd % (2 * m.n_head) == 0,
         f"model.n_embd={m.n_embd} must be a multiple of 2 * model.n_head={2 * m.n_head}"),
        (heads > 0 and m.n_head % heads == 0, f"model.n_kv_head={heads} must divide model.n_head={m.n_head}"),
        (m.vocab_size is None or m.vocab_size > 0, f"model.vocab_size={m.vocab_size} must be positive"),
        (moe.num_experts >= 0, f"moe.num_experts={moe.num_experts} must not be negative"),
        (not moe.num_experts or 1 <= moe.top_k <= moe.num_experts,
         f"moe.top_k={moe.top_k} must be between 1 and moe.num_experts={moe.num_experts}"),
        (moe.num_shared >= 0, f"moe.num_shared={moe.num_shared} must not be negative"),
        (moe.every >= 1, f"moe.every={moe.every} must be at least 1"),
        (trm.depth >= 1, f"trm.depth={trm.depth} must be at least 1"),
        (trm.order in ("block", "stack"), f"trm.order={trm.order} must be block or stack"),
        (trm.sample_depth is None or (len(trm.sample_depth) == 2 and 1 <= trm.sample_depth[0] <= trm.sample_depth[1]),
         f"trm.sample_depth={trm.sample_depth} must be [low, high] with 1 <= low <= high"),
        (0 <= tidar.block_length < m.context_length,
         f"tidar.block_length={tidar.block_length} must be below model.context_length={m.context_length}"),
        (tidar.schedule in ("full", "linear", "cosine"),
         f"tidar.schedule={tidar.schedule} must be full, linear or cosine"),
        (tidar.draft_routing in ("token", "block", "anchor"),
         f"tidar.draft_routing={tidar.draft_routing} must be token, block or anchor"),
    ]
    for ok, message in rules:
        if not ok:
            raise ElaraError(message)
    check_ranges(config.to_dict())


@dataclass
class SamplingConfig:
    """How to choose tokens; checked when made, ElaraError names the bad key."""

    mode: str = "auto"  # ar: a token per forward; tidar: draft and verify several; diffusion: denoise blocks;
    # auto: tidar at the pace that a controller finds fastest, ar for a model without diffusion head
    max_new_tokens: int = 256  # tokens to write after each prompt
    temperature: float = 0.8  # logits are divided by it; 0 = greedy
    top_k: int | None = None  # keep only the k most likely tokens; null (or a k above the vocabulary) = all
    top_p: float | None = None  # keep the smallest set of tokens that holds this probability; null = all
    seed: int = 0  # row r of a batch draws from seed + r, whatever the other rows are
    stop: list[int] = field(default_factory=list)  # token ids that end a row; the stop token is still emitted
    draft_length: int | None = None  # tokens per TiDAR step; null = the controller's choice, else the trained length
    groups: int | None = None  # mask groups per step, behind the likeliest numbers of accepted tokens; null = all
    trust: float = 0.0  # tidar: also accept what is (1 - trust) as likely as the best token; above 0 the text changes
    steps: int | None = None  # diffusion: forwards per block; null = one per token
    confidence: float | None = None  # diffusion: reveal every token at least this probable; null = by steps alone
    order: str = "confidence"  # diffusion: reveal the surest tokens first, or left_to_right
    overflow: str = "slide"  # text beyond the context: slide = a window goes on; error = refuse it beforehand
    exit_threshold: float | None = None  # ar, diffusion: end recursion after a pass that moves every token by less than
    # this share of its norm; the text then depends on the rows beside it; null = all passes

    def __post_init__(self) -> None:
        rules = [
            (self.mode in MODES, f"mode={self.mode} must be one of: {', '.join(MODES)}"),
            (self.max_new_tokens >= 1, f"max_new_tokens={self.max_new_tokens} must be at least 1"),
            (
                self.temperature >= 0 and math.isfinite(self.temperature),
                f"temperature={self.temperature} must be 0 (greedy) or a positive number",
            ),
            (self.top_k is None or self.top_k >= 1, f"top_k={self.top_k} must be at least 1 (null = all tokens)"),
            (self.top_p is None or 0 < self.top_p <= 1, f"top_p={self.top_p} must be in (0, 1] (null = all tokens)"),
            (
                self.draft_length is None or self.draft_length >= 1,
                f"draft_length={self.draft_length} must be at least 1 (null = the controller or the trained length)",
            ),
            (-(2**63) <= self.seed < 2**63, f"seed={self.seed} must fit into 64 bits"),
            (self.groups is None or self.groups >= 1, f"groups={self.groups} must be at least 1 (null = all)"),
            (0 <= self.trust <= 1, f"trust={self.trust} must be between 0 (exact) and 1 (accept every draft)"),
            (self.steps is None or self.steps >= 1, f"steps={self.steps} must be at least 1 (null = one per token)"),
            (
                self.confidence is None or 0 < self.confidence <= 1,
                f"confidence={self.confidence} must be in (0, 1] (null = reveal by steps alone)",
            ),
            (self.order in ORDERS, f"order={self.order} must be one of: {', '.join(ORDERS)}"),
            (self.overflow in OVERFLOWS, f"overflow={self.overflow} must be one of: {', '.join(OVERFLOWS)}"),
            (
                self.exit_threshold is None or 0 <= self.exit_threshold < math.inf,
                f"exit_threshold={self.exit_threshold} must be 0 (all passes) or a positive number (null = off)",
            ),
        ]
        for ok, message in rules:
            if not ok:
                raise ElaraError(message)
