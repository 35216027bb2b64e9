"""What a GPU runs, as far as a CPU can show it: the grouped products, and that nothing in a layer asks for a value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from elara.model.moe import Choice, Experts
from elara.training.losses import IGNORE, elara_loss, head_loss


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """One kernel for all experts, and the attention that is not written for CPUs."""
    monkeypatch.setattr("elara.model.moe._takes_groups", lambda x: True)
    monkeypatch.setattr("elara.model.attention.KEPT_LIMIT", 0)


def run(experts: Experts, x: Tensor, choice: Choice, grad: Tensor) -> list[Tensor]:
    """Output and all gradients."""
    leaves = [x, choice.gates, experts.gate_up, experts.down]
    y = experts(x, choice, (experts.gate_up, experts.down))
    return [y, *torch.autograd.grad(y, leaves, grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("busy", [5, 2], ids=["all experts busy", "three idle"])
def test_grouped_products_equal_those_expert_by_expert(monkeypatch, dtype, busy):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    experts = Experts(32, 16, 5).to(dtype)
    for p in experts.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=generator)
    x, grad = normal(101, 32), normal(101, 32).detach()
    scores, chosen = torch.rand(101, busy, generator=generator).topk(2)
    choice = Choice(chosen, scores.requires_grad_(), torch.zeros(()))
    wanted = run(experts, x, choice, grad)
    monkeypatch.setattr("elara.model.moe._takes_groups", lambda x: True)
    limit = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for got, want in zip(run(experts, x, choice, grad), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=limit, atol=limit * want.detach().abs().max().item())
    assert not wanted[3][busy:].any() and wanted[3][:busy].any()


class Waits(TorchDispatchMode):
    """Fails at what would make the host wait for a GPU: a value read, or a shape that depends on values."""

    ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique", "unique_dim", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name.partition("::")[2]
        by_mask = name in ("index", "index_put") and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert not by_mask and not name.startswith(self.ASKING), name
        assert func is not torch.ops.aten.repeat_interleave.Tensor, "the length of the result is a value"
        return func(*args, **(kwargs or {}))


def no_list(tensor: Tensor) -> None:
    raise AssertionError("tolist")


OPTIONS: list[dict[str, Any]] = [
    {"depth": 2, "balance_loss": 0.1, "z_loss": 0.1},
    {"draft_routing": "anchor", "chain": True},
    {"draft_routing": "block", "schedule": "linear", "checkpoint": True, "every": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_layer_asks_for_a_value(make_model, monkeypatch, options, as_on_a_gpu):
    """From the first block's input to the last one's output, and in the whole backward pass."""
    model = make_model(dtype=torch.float32, **options)
    mode = Waits()
    watched: list[bool] = []

    def begin(*_: Any) -> None:
        mode.__enter__()
        patch.setattr(Tensor, "tolist", no_list)

    def end(*_: Any) -> None:
        mode.__exit__(None, None, None)
        patch.undo()
        watched.append(True)

    handles = [
        model.blocks[0].register_forward_pre_hook(begin),
        model.blocks[-1].register_forward_hook(end, always_call=True),
    ]
    with pytest.MonkeyPatch.context() as patch:
        tokens = torch.randint(12, (2, 25), generator=torch.Generator().manual_seed(1))
        loss = elara_loss(model, tokens, torch.Generator().manual_seed(0), mask_id=12)
    assert watched == [True]
    for handle in handles:
        handle.remove()
    with mode, monkeypatch.context() as patch:
        patch.setattr(Tensor, "tolist", no_list)
        loss.total.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("vocabulary", [100, 5000])
def test_the_loss_asks_for_no_value(vocabulary):
    """Also where the logits are made in chunks."""
    hidden, weight = torch.randn(6, 100, 16, requires_grad=True), torch.randn(vocabulary, 16, requires_grad=True)
    targets = torch.arange(600).remainder(100).masked_fill(torch.arange(600) % 7 == 0, IGNORE).view(6, 100)
    with Waits():
        head_loss(hidden, weight, targets)[0].backward()
    assert hidden.grad is not None


def test_the_watch_sees_what_waits():
    for asks in (lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: bool((x > 0).any())):
        with pytest.raises(AssertionError), Waits():
            asks(torch.arange(3.0))
