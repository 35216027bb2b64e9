"""Recursion: one set of weights applied several times, and what activation checkpointing keeps."""

from __future__ import annotations

import pytest
import torch

from elara.model import draw_section


def kept_bytes(model, tokens, section=None):
    """Bytes of distinct storages that autograd keeps from forward to backward, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)  # an address must not be given out again while we count
        return tensor

    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(tokens, section=section)
        loss = output.hidden.sum() + (output.mask_hidden.sum() if section is not None else 0)
    loss.backward()
    return sum(found.values())


@pytest.mark.parametrize("sectioned", [False, True])
def test_checkpointing_keeps_no_more_at_depth_2_than_at_depth_1(make_model, sectioned):
    def measure(depth, checkpoint):
        model = make_model(
            n_layer=4, n_embd=64, hidden=128, expert_hidden=64, block_length=4, depth=depth, checkpoint=checkpoint
        )
        tokens = torch.randint(12, (4, 33), generator=torch.Generator().manual_seed(0))
        section = None
        if sectioned:
            section = draw_section(tokens, model.config.tidar, 12, torch.Generator().manual_seed(0))[0]
        return kept_bytes(model, tokens, section)

    one, two, plain = measure(1, True), measure(2, True), measure(2, False)
    assert two <= 1.05 * one
    assert two <= 0.35 * plain
    assert plain >= 1.8 * measure(1, False)  # the counter sees what checkpointing saves


@pytest.mark.parametrize("order", ["block", "stack"])
def test_checkpointing_changes_no_gradient(make_model, order):
    tokens = torch.randint(12, (2, 9), generator=torch.Generator().manual_seed(0))
    results = []
    for checkpoint in (False, True):
        model = make_model(depth=2, order=order, checkpoint=checkpoint)
        section = draw_section(tokens, model.config.tidar, 12, torch.Generator().manual_seed(0))[0]
        output = model(tokens, section=section)
        (output.hidden.sin().sum() + output.mask_hidden.cos().sum()).backward()
        results.append([p.grad for p in model.parameters()])
    for plain, again in zip(*results, strict=True):
        assert (plain is None) == (again is None)
        assert plain is None or torch.equal(plain, again)


def test_depth_adds_no_parameters(make_model):
    counts = {sum(p.numel() for p in make_model(depth=depth).parameters()) for depth in (1, 2, 3)}
    assert len(counts) == 1


def test_orders_agree_for_one_block_and_differ_for_two(make_model):
    tokens = torch.randint(12, (1, 6))
    for layers, same in ((1, True), (2, False)):
        block, stack = (make_model(n_layer=layers, depth=2, order=order)(tokens).hidden for order in ("block", "stack"))
        assert torch.equal(block, stack) == same


def test_loads_are_counted_by_layer_and_pass(make_model):
    model = make_model(depth=3, every=1)
    load = model(torch.randint(12, (2, 5))).routing.load
    assert load.shape == (2, 3, 2, 4)
    assert torch.equal(load.sum((2, 3)), torch.full((2, 3), 2.0 * 5 * 2))
