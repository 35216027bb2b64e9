"""Which parameter is trained how: the optimizers of group `optimizer`, each built from the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from elara.model import ElaraLM
from elara.model.attention import Attention
from elara.model.mlp import MLP
from elara.model.moe import Experts
from elara.training.muon import Muon


def adamw(
    model: ElaraLM, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Fused AdamW; norms, biases and the embedding are not decayed."""
    decay, plain = _by_decay(list(model.named_parameters()))
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=True)


def muon(
    model: ElaraLM,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    adam_lr: float,
    betas: tuple[float, float],
    eps: float,
    dtype: str | None = None,
) -> torch.optim.Optimizer:
    """Muon for the matrices of attention, MLPs and experts; AdamW with `adam_lr` for embedding, head, router, norms."""
    matrices = _matrices(model)
    rest = [(name, p) for name, p in model.named_parameters() if p not in matrices]
    decay, plain = _by_decay(rest)
    adam: dict[str, Any] = {"kind": "adamw", "lr": adam_lr, "betas": tuple(betas), "eps": eps}
    groups = [
        {"kind": "muon", "params": list(matrices), "lr": lr, "momentum": momentum, "weight_decay": weight_decay},
        {**adam, "params": decay, "weight_decay": weight_decay},
        {**adam, "params": plain, "weight_decay": 0.0},
    ]
    return Muon([g for g in groups if g["params"]], matrices, dtype=dtype)


def hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What each parameter group holds beside its parameters: rate, decay, momentum and the like."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def configure(optimizer: torch.optim.Optimizer, schedule: LambdaLR, wanted: list[dict[str, Any]]) -> None:
    """Give the parameter groups the hyperparameters `wanted`, their rates at the step that `schedule` has come to.

    An optimizer and a schedule that are restored bring along those of the run that saved them.
    """
    schedule.base_lrs = [group["initial_lr"] for group in wanted]
    for group, mine, factor in zip(optimizer.param_groups, wanted, schedule.lr_lambdas, strict=True):
        group.update(mine)
        group["lr"] = mine["initial_lr"] * factor(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]


def _matrices(model: ElaraLM) -> dict[Tensor, list[int]]:
    """Hidden matrices and the rows of each that is stacked in them: q, k, v in one projection, gate, up in another."""
    rows: dict[Tensor, list[int]] = {}
    for module in model.modules():
        if isinstance(module, Attention):
            rows[module.qkv.weight] = [heads * module.head_dim for heads in (module.n_head, *2 * (module.n_kv_head,))]
            rows[module.out.weight] = [module.out.weight.shape[0]]
        elif isinstance(module, MLP):
            rows[module.gate_up.weight] = 2 * [module.gate_up.weight.shape[0] // 2]
            rows[module.down.weight] = [module.down.weight.shape[0]]
        elif isinstance(module, Experts):
            rows[module.gate_up] = 2 * [module.gate_up.shape[1] // 2]
            rows[module.down] = [module.down.shape[1]]
    return rows


def _by_decay(named: list[tuple[str, nn.Parameter]]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    plain = [p for name, p in named if p.dim() < 2 or name.startswith("embed.")]
    return [p for _, p in named if not any(p is q for q in plain)], plain
