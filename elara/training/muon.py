"""Muon: orthogonalized momentum for matrices, fused AdamW for everything else, as one torch optimizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

# Quintic Newton-Schulz steps with coefficients fitted to the spectrum that is left (Polar Express, arXiv 2505.16932)
_STEPS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
# All but the last map a little below 1 (the authors' code): what bf16 rounds beyond 1, the next would throw far off
_SAFE_STEPS = (*((a / 1.02, b / 1.02**3, c / 1.02**5) for a, b, c in _STEPS[:-1]), _STEPS[-1])


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix to each of (count, rows, columns), roughly: all singular values near 1."""
    x = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    for a, b, c in _SAFE_STEPS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, float32 elsewhere."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def _whole(update: Tensor) -> Tensor:
    """The whole of a tensor that ranks hold in shards: a matrix cannot be orthogonalized in parts."""
    return update.full_tensor() if isinstance(update, DTensor) else update


def _shard(whole: Tensor, p: Tensor) -> Tensor:
    """This rank's rows of an update, as FSDP2 shards parameters."""
    if not isinstance(p, DTensor):
        return whole
    chunks, rank = whole.chunk(p.device_mesh.size()), p.device_mesh.get_local_rank()
    return chunks[rank] if rank < len(chunks) else whole[:0]


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized, for the matrices (Keller Jordan, 2024; arXiv 2502.16982); fused AdamW for the rest.

    Groups carry `kind` ("muon" or "adamw"), `lr`, `weight_decay`; muon groups also `momentum`. `rows`: of every
    parameter of a muon group, the rows of each matrix that is stacked in it (fused projections are orthogonalized one
    by one). `dtype` is the arithmetic of the Newton-Schulz steps: "float32", "bfloat16", or None for the device's fast
    one. Weights may be sharded (FSDP2): every rank then gathers and orthogonalizes all updates, and applies its rows.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], rows: Mapping[Tensor, Sequence[int]], *, dtype: str | None = None
    ) -> None:
        self.dtype: torch.dtype | None = getattr(torch, dtype) if dtype else None
        self._rows = {p: list(sizes) for p, sizes in rows.items()}  # not in the groups: what is saved needs no shapes
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["kind"] == "muon":
                self._muon(group)
            else:
                self._adamw(group)
        return loss

    def _muon(self, group: dict[str, Any]) -> None:
        updates: list[tuple[Tensor, Tensor]] = []
        by_shape: dict[tuple[int, int], list[Tensor]] = defaultdict(list)  # views of the updates
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            momentum = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
            update = _whole(p.grad.lerp(momentum, group["momentum"]))  # Nesterov
            updates.append((p, update))
            for part in update.split(self._rows[p], -2):
                by_shape[part.shape[-2], part.shape[-1]].append(part)

        for (rows, columns), parts in by_shape.items():
            matrices = torch.cat([part.reshape(-1, rows, columns) for part in parts])
            matrices = orthogonalize(matrices.to(self.dtype or fast_dtype(matrices.device)))
            counts = [part.numel() // (rows * columns) for part in parts]
            for part, found in zip(parts, matrices.split(counts), strict=True):
                part.copy_(found.view(part.shape)).mul_(max(1, rows / columns) ** 0.5)

        for p, update in updates:
            mine = p.to_local() if isinstance(p, DTensor) else p
            mine.mul_(1 - group["lr"] * group["weight_decay"]).add_(_shard(update, p), alpha=-group["lr"])

    def _adamw(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        states = [self.state[p] for p in params]
        adamw(
            params,
            [p.grad for p in params],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
