"""Does a model of this configuration train at all? One forward and backward pass of the real objective."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elara.config import ElaraConfig
from elara.model import ElaraLM
from elara.training.losses import elara_loss

TOKENS_PER_EXPERT = 64  # expected: enough that no expert is passed over by chance
TOLERANCE = 0.05  # how far an untrained model may be from guessing evenly
MEMORY_SHARE = 4  # weights and gradients may take one part in four of the machine's memory


@dataclass(frozen=True)
class Smoke:
    """expected: ln(vocabulary), the loss in nats of even guesses. diffusion is None without TiDAR.

    without_gradient: parameters (and single experts) that the backward pass did not reach.
    """

    expected: float
    ar: float
    diffusion: float | None
    without_gradient: list[str]

    @property
    def problems(self) -> list[str]:
        """One sentence per thing that is wrong; empty when the model can be trained."""
        found = []
        for head, loss in (("AR", self.ar), ("diffusion", self.diffusion)):
            if loss is None:
                continue
            if not math.isfinite(loss):
                found.append(f"the {head} loss is {loss}")
            elif abs(loss - self.expected) > TOLERANCE * self.expected:
                far = f"the initial {head} loss {loss:.3f} is over 5 % away from ln(vocabulary) {self.expected:.3f}"
                found.append(far)
        if self.without_gradient:
            found.append(f"no gradient reaches {', '.join(self.without_gradient[:5])}")
        return found


def fits(parameters: int) -> bool:
    """Whether weights and gradients in float32 take at most a quarter of this machine's memory."""
    if not hasattr(os, "sysconf"):  # Windows tells nothing without another package
        return parameters * 8 <= 1e9
    return parameters * 8 * MEMORY_SHARE <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def smoke_check(config: ElaraConfig, seed: int = 0) -> Smoke:
    """Build the model on the CPU and run one random batch through forward and backward.

    Every mask is drawn in full: a random-mask schedule weights few tokens heavily, which no small batch averages out.
    """
    config = replace(config, tidar=replace(config.tidar, schedule="full"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ElaraLM(config)
    generator = torch.Generator().manual_seed(seed)
    seq = min(config.model.context_length, max(64, 4 * config.tidar.block_length))
    wanted = TOKENS_PER_EXPERT * max(1, config.moe.num_experts) // (config.moe.top_k if config.moe.num_experts else 1)
    tokens = torch.randint(config.vocab_size, (max(2, -(-wanted // seq)), seq + 1), generator=generator)
    losses = elara_loss(model, tokens, generator, mask_id=config.vocab_size - 1)
    losses.total.backward()
    reached = [(name, w.grad) for name, w in model.named_parameters()]
    missing = [where for name, grad in reached for where in _unreached(name, grad)]
    diffusion = None if losses.diffusion is None else losses.diffusion.item()
    return Smoke(math.log(config.vocab_size), losses.ar.item(), diffusion, missing)


def _unreached(name: str, grad: Tensor | None) -> list[str]:
    if grad is None or not grad.isfinite().all():
        return [name]
    if ".experts." in name:
        return [f"{name}[{e}]" for e, part in enumerate(grad) if not part.any()]
    return [] if grad.any() else [name]
