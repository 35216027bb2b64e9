"""Early exit of the recursion: what it computes, and what it leaves in the cache for later tokens."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from elara.model import KVCache, MaskSection

MODELS = [
    {"depth": 3, "order": "block"},
    {"depth": 3, "order": "stack"},
    {"depth": 2, "order": "stack", "num_experts": 0},
    {"depth": 3, "order": "block", "n_kv_head": 4, "bias": True, "draft_routing": "anchor"},
]
TOKENS = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 0]])


def passes_used(model, run):
    """Attention calls of each block during `run`."""
    calls = [0] * len(model.blocks)

    def count(i):
        def hook(*_):
            calls[i] += 1

        return hook

    hooks = [block.attention.register_forward_hook(count(i)) for i, block in enumerate(model.blocks)]
    out = run()
    for hook in hooks:
        hook.remove()
    return calls, out


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("options", MODELS)
def test_threshold_0_is_the_full_depth(make_model, options):
    model = make_model(**options)
    full, caches = [], []
    for threshold in (None, 0.0):
        cache = KVCache(model.config, 2, 12, dtype=torch.float64)
        out = [model(part, cache=cache, exit_threshold=threshold).hidden for part in TOKENS.split([4, 1, 1], 1)]
        full.append(torch.cat(out, 1))
        caches.append(cache)
    assert torch.equal(*full)
    assert torch.equal(caches[0].k, caches[1].k)
    assert torch.equal(caches[0].v, caches[1].v)
    assert torch.equal(model(TOKENS).hidden, model(TOKENS, exit_threshold=0.0).hidden)


@pytest.mark.parametrize("options", MODELS)
def test_a_huge_threshold_is_depth_1(make_model, options):
    """At depth 1 the entries of later passes are never looked at: token after token gives what depth 1 gives."""
    model = make_model(**options)
    cache, shallow = KVCache(model.config, 2, 12, dtype=torch.float64), KVCache(
        model.config, 2, 12, depth=1, dtype=torch.float64
    )
    for part in TOKENS.split([3, 1, 2], 1):
        exited = model(part, cache=cache, exit_threshold=1e9).hidden
        assert torch.equal(exited, model(part, cache=shallow).hidden)
    assert torch.equal(model(TOKENS, exit_threshold=1e9).hidden, model(TOKENS, depth=1).hidden)
    assert cache.lengths == [6, 6]


@pytest.mark.parametrize("options", MODELS)
def test_skipped_passes_hold_keys_and_values_of_the_final_state(make_model, options):
    """Recomputed from the definition: qkv of the normed state behind the last pass that ran, one RoPE."""
    model = make_model(**options)
    cache = KVCache(model.config, 2, 12, dtype=torch.float64)
    seen: dict = {}  # block: state behind its last pass; final: of the whole stack
    hooks = [
        block.register_forward_hook(lambda _, __, out, i=i: seen.__setitem__(i, out[0]))
        for i, block in enumerate(model.blocks)
    ]
    model(TOKENS, cache=cache, exit_threshold=1e9)
    for hook in hooks:
        hook.remove()
    depth, count = model.config.trm.depth, len(model.blocks)
    heads, kv, dim = model.config.model.n_head, model.config.n_kv_head, model.config.head_dim
    position = torch.arange(6, dtype=torch.float32)[:, None]
    angle = position * model.config.model.rope_base ** (-torch.arange(0, dim, 2) / dim)
    for i, block in enumerate(model.blocks):
        x = seen[i] if model.config.trm.order == "block" else seen[count - 1]
        qkv = block.attention.qkv(block.attention_norm(x)).view(2, 6, heads + 2 * kv, dim)
        key = block.attention.k_norm(qkv[:, :, heads : heads + kv])
        first, second = key.chunk(2, -1)
        cos, sin = angle.cos()[:, None].double(), angle.sin()[:, None].double()
        key = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        for p in range(1, depth):
            layer = i * depth + p if model.config.trm.order == "block" else p * count + i
            torch.testing.assert_close(cache.k[layer, :, :, :6], key.transpose(1, 2), atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(cache.v[layer, :, :, :6], qkv[:, :, heads + kv :].transpose(1, 2))


@pytest.mark.parametrize("options", MODELS)
def test_later_tokens_may_think_longer(make_model, options):
    """Early exit for some tokens, full depth for the next: all entries are there."""
    model = make_model(**options)
    cache = KVCache(model.config, 2, 16, dtype=torch.float64)
    cache.k.fill_(torch.nan)  # whatever is read without having been written shows
    cache.v.fill_(torch.nan)
    model(TOKENS[:, :4], cache=cache, exit_threshold=1e9)
    used, _ = passes_used(model, lambda: model(TOKENS[:, 4:5], cache=cache, exit_threshold=1e9))
    assert used == [1] * len(model.blocks)
    used, out = passes_used(model, lambda: model(TOKENS[:, 5:], cache=cache))
    assert used == [model.config.trm.depth] * len(model.blocks)
    assert bool(out.hidden.isfinite().all())


def test_it_stops_where_the_definition_says(make_model):
    """Between the relative changes of two passes, measured by depth alone, the threshold decides."""
    model = make_model(depth=4, order="stack")
    states = []
    hook = model.norm.register_forward_hook(lambda _, given, __: states.append(given[0]))
    for depth in range(1, 5):
        model(TOKENS, depth=depth)
    hook.remove()
    states.insert(0, model.embed(TOKENS))
    changes = [
        float(((after - before).norm(dim=-1) / before.norm(dim=-1)).max()) for before, after in pairwise(states)
    ]
    for threshold in [*changes, 1e-9, 1e9]:
        expected = next((p + 1 for p, change in enumerate(changes) if change < threshold * 1.0001), 4)
        used, out = passes_used(model, lambda t=threshold: model(TOKENS, exit_threshold=t * 1.0001))
        assert used == [expected] * 2
        torch.testing.assert_close(out.hidden, model.norm(states[expected]))


def test_masks_count_as_tokens_and_leave_nothing_in_the_cache(make_model):
    for order in ("block", "stack"):
        model = make_model(depth=3, order=order)
        cache = KVCache(model.config, 2, 16, dtype=torch.float64)
        shallow = KVCache(model.config, 2, 16, depth=1, dtype=torch.float64)
        section = MaskSection(torch.tensor([4]), 3, torch.full((2, 3), 12))
        out = model(TOKENS[:, :4], cache=cache, section=section, exit_threshold=1e9)
        expected = model(TOKENS[:, :4], cache=shallow, section=section)
        assert torch.equal(out.mask_hidden, expected.mask_hidden)
        assert cache.lengths == [4, 4]
        assert torch.equal(
            model(TOKENS[:, 4:5], cache=cache, exit_threshold=1e9).hidden, model(TOKENS[:, 4:5], cache=shallow).hidden
        )


def test_no_routing_is_reported(make_model):
    assert make_model(depth=2)(TOKENS, exit_threshold=0.1).routing.load.numel() == 0
