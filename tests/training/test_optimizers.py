"""The fused AdamW against its formula, with a schedule, clipping and accumulated gradients as the trainer drives it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from elara.config import ElaraConfig, ModelConfig, MoEConfig, TiDARConfig
from elara.model import ElaraLM
from elara.training import optimizers, schedules
from elara.training.losses import elara_loss
from elara.training.muon import orthogonalize

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def small_model() -> ElaraLM:
    torch.manual_seed(0)
    sizes = ModelConfig(2, 32, 2, hidden=48, expert_hidden=32, vocab_size=40, context_length=16)
    return ElaraLM(ElaraConfig(sizes, MoEConfig(num_experts=4), tidar=TiDARConfig(block_length=4, chain=True)))


def gradients(model: ElaraLM, tokens: Tensor, micro: int = 1) -> None:
    """Mean over `micro` equal parts of the batch, backward after each, as accumulation does; clipped to norm 1."""
    for part in tokens.chunk(micro):
        (elara_loss(model, part, torch.Generator().manual_seed(1), mask_id=39).total / micro).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(39, (4, 17), generator=generator) for _ in range(count)]


def test_fused_adamw_follows_its_formula_under_a_schedule() -> None:
    """AdamW (arXiv 1711.05101, algorithm 2), step by step in float64 on the same gradients."""
    model = small_model()
    optimizer = optimizers.adamw(model, **SETTINGS)  # type: ignore[arg-type]
    factor = schedules.wsd(12, warmup=3, decay=0.5, final=0.1)
    schedule = LambdaLR(optimizer, factor)
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    first, second = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    for step, tokens in enumerate(batches(12)):
        optimizer.zero_grad()
        gradients(model, tokens)
        rate = 1e-2 * factor(step)
        for name, p in model.named_parameters():
            assert p.grad is not None
            gradient = p.grad.double()
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            decay = 0.0 if p.dim() < 2 or name.startswith("embed.") else 0.1
            weights[name] *= 1 - rate * decay
            mean = first[name] / (1 - 0.9 ** (step + 1))
            spread = (second[name] / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8
            weights[name] -= rate * mean / spread
        optimizer.step()
        schedule.step()
    for name, p in model.named_parameters():
        assert all(group.get("fused") for group in optimizer.param_groups)
        torch.testing.assert_close(p.detach().double(), weights[name], rtol=0, atol=2e-6, msg=name)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_accumulated_gradients_make_the_step_of_the_whole_batch(kind: str) -> None:
    found = []
    for micro in (1, 2, 4):
        model = small_model()
        if kind == "adamw":
            optimizer = optimizers.adamw(model, **SETTINGS)  # type: ignore[arg-type]
        else:
            optimizer = optimizers.muon(
                model, lr=0.02, momentum=0.95, weight_decay=0.01, adam_lr=1e-2, betas=(0.9, 0.95), eps=1e-8,
                dtype="float32",
            )  # fmt: skip
        losses = []
        for tokens in batches(4):
            optimizer.zero_grad()
            gradients(model, tokens, micro)
            optimizer.step()
            losses.append(elara_loss(model, tokens, torch.Generator().manual_seed(1), mask_id=39).total.item())
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=1e-4) and found[2] == pytest.approx(found[0], rel=1e-4)
    assert all(math.isfinite(loss) for loss in found[0]) and len(set(found[0])) == 4


@pytest.mark.parametrize("n_kv_head", [None, 2, 1])
def test_muon_orthogonalizes_every_matrix_of_a_fused_projection_by_itself(n_kv_head: int | None) -> None:
    torch.manual_seed(0)
    sizes = ModelConfig(2, 32, 4, n_kv_head=n_kv_head, hidden=48, expert_hidden=40, vocab_size=40, context_length=16)
    model = ElaraLM(ElaraConfig(sizes, MoEConfig(num_experts=3)))
    optimizer = optimizers.muon(
        model, lr=0.02, momentum=0.95, weight_decay=0.0, adam_lr=1e-2, betas=(0.9, 0.95), eps=1e-8, dtype="float32"
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()

    kv = 8 * (n_kv_head or 4)
    stacked = {  # rows of the matrices of every parameter that is no AdamW's
        "qkv.weight": [32, kv, kv], "out.weight": [32], "blocks.0.mlp.gate_up.weight": [48, 48], "down.weight": [32],
        "experts.gate_up": [40, 40], "experts.down": [32], "shared.gate_up.weight": [40, 40],
    }  # fmt: skip
    checked = []
    for name, p in model.named_parameters():
        for rows in (rows for end, rows in stacked.items() if name.endswith(end)):
            assert p.grad is not None
            moves = ((before[name] - p.detach()) / 0.02).split(rows, -2)
            for move, gradient in zip(moves, p.grad.split(rows, -2), strict=True):
                height, width = gradient.shape[-2:]
                wanted = orthogonalize(gradient.reshape(-1, height, width)) * max(1, height / width) ** 0.5
                torch.testing.assert_close(move.reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-4, msg=name)
            checked.append(name)
    assert len(checked) == 2 + 2 + 2 + 4  # qkv, out, dense MLP, experts with the shared one
