"""What training costs: the MoE layer, the step, the step with a mask section."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from elara.bench.limits import against_matmul, moe_flops
from elara.bench.measure import Figure, Run, compare
from elara.bench.naive import NaiveElara
from elara.config import ElaraConfig, TiDARConfig
from elara.model import ElaraLM
from elara.model.mlp import MLP
from elara.model.moe import MoE
from elara.training.callbacks.throughput import flops_per_token
from elara.training.losses import elara_loss
from elara.training.precision import resolve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def moe_layer(config: ElaraConfig, device: torch.device, rounds: int) -> Iterator[Figure]:
    """Routed experts (no shared one) against a dense MLP that does the same work per token, forward + backward.

    Every call gets fresh tokens, so the row counts per expert are new each time, as in training.
    """
    tokens, width = 4096, config.model.n_embd
    config = replace(config, moe=replace(config.moe, num_shared=0))
    sparse = MoE(config).to(device)
    for p in sparse.parameters():
        torch.nn.init.normal_(p, std=0.02)
    dense = MLP(width, config.expert_hidden * config.moe.top_k).to(device)

    def run_sparse() -> Tensor:
        x = torch.randn(1, tokens, width, device=device, requires_grad=True)
        weights = sparse.experts.weights(device.type)
        y: Tensor = sparse(x, weights)[0]
        return y.float().square().mean()

    def run_dense() -> Tensor:
        x = torch.randn(1, tokens, width, device=device, requires_grad=True)
        y: Tensor = dense(x)
        return y.float().square().mean()

    for name, dtype in DTYPES.items():
        found = compare(
            f"MoE layer / dense MLP of the same work, {name}",
            _train(run_sparse, device, dtype, sparse),
            _train(run_dense, device, dtype, dense),
            target=1.35 if name == "bf16" else 1.15,
            rounds=rounds,
            note=f"{tokens} tokens, n_embd {width}, expert {config.expert_hidden}",
        )
        yield against_matmul(found, moe_flops(sparse, tokens), tokens, device, dtype)


def training_step(
    what: str, config: ElaraConfig, device: torch.device, rounds: int, batch: int, seq: int
) -> Iterator[Figure]:
    """Forward + backward of the AR model against the naive Elara in fp32."""
    plain = replace(config, tidar=TiDARConfig())
    model, naive = ElaraLM(plain).to(device), NaiveElara(plain).to(device)
    step = _step(model, batch, seq, device)

    def run_naive() -> Tensor:
        return naive.loss(_tokens(config, batch, seq, device))

    for name, dtype in DTYPES.items():
        found = compare(
            f"AR step of {what}, {name}: speed-up over naive fp32",
            _train(step, device, dtype, model),
            _train(run_naive, device, torch.float32, naive),
            target=3.0 if name == "bf16" else 1.8,
            faster=True,
            rounds=rounds,
            note=f"batch {batch} x {seq}",
        )
        yield _of_matmul(found, model, batch, seq, device, dtype)


def tidar_step(config: ElaraConfig, device: torch.device, rounds: int, batch: int, seq: int) -> Iterator[Figure]:
    """A step with the mask section against the AR step of the same model."""
    reference = ElaraLM(replace(config, tidar=TiDARConfig())).to(device)
    for fraction, target in ((0.25, 1.3), (1.0, 2.1)):
        tidar = replace(config.tidar, block_length=config.tidar.block_length or 4, block_fraction=fraction)
        model = ElaraLM(replace(config, tidar=tidar)).to(device)
        for name, dtype in DTYPES.items():
            found = compare(
                f"TiDAR step at block_fraction {fraction} / AR step, {name}",
                _train(_step(model, batch, seq, device), device, dtype, model),
                _train(_step(reference, batch, seq, device), device, dtype, reference),
                target=target,
                rounds=rounds,
                note=f"batch {batch} x {seq}, blocks of {tidar.block_length}",
            )
            yield _of_matmul(found, model, batch, seq, device, dtype)


def fastest_step(config: ElaraConfig, batch: int, device: torch.device) -> tuple[Run, int]:
    """Forward and backward in the precision that training takes here, without an optimizer; its number of tokens."""
    seq = config.model.context_length
    model = ElaraLM(config).to(device)
    narrow = resolve("auto", device.type) == "bf16-mixed"
    dtype = torch.bfloat16 if narrow else torch.float32
    return _train(_step(model, batch, seq, device), device, dtype, model), batch * seq


def _of_matmul(
    found: Figure, model: ElaraLM, batch: int, seq: int, device: torch.device, dtype: torch.dtype
) -> Figure:
    tokens = batch * seq
    return against_matmul(found, tokens * flops_per_token(model, seq), tokens, device, dtype)


def _step(model: ElaraLM, batch: int, seq: int, device: torch.device) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(0)

    def run() -> Tensor:
        return elara_loss(model, _tokens(model.config, batch, seq, device), generator, mask_id=0).total

    return run


def _tokens(config: ElaraConfig, batch: int, seq: int, device: torch.device) -> Tensor:
    return torch.randint(config.vocab_size, (batch, seq + 1), device=device)


def _train(loss: Callable[[], Tensor], device: torch.device, dtype: torch.dtype, module: torch.nn.Module) -> Run:
    """Forward under autocast (off for float32) and backward outside of it, as a trainer does."""

    def run() -> None:
        module.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            value = loss()
        value.backward()

    return run
