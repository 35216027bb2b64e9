"""Decoding from the cache gives what the whole sequence gives."""

from __future__ import annotations

import pytest
import torch

from elara.errors import ElaraError
from elara.model import KVCache, MaskSection

MASK_ID = 12
VARIANTS = [
    {"num_experts": 0},
    {},
    {"depth": 2, "bias": True},
    {"depth": 2, "order": "stack"},
    {"depth": 3, "num_experts": 0, "n_kv_head": 1},
]


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def random_tokens(rows, length, seed=0):
    return torch.randint(12, (rows, length), generator=torch.Generator().manual_seed(seed))


def empty_cache(model, rows, capacity, **options):
    return KVCache(model.config, rows, capacity, dtype=torch.float64, **options)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 1, 5], [4, 4, 4], [1, 11]])
def test_pieces_equal_the_whole(make_model, options, pieces):
    model = make_model(**options)
    tokens = random_tokens(2, 12)
    cache = empty_cache(model, 2, 12)
    hidden = torch.cat([model(part, cache=cache).hidden for part in tokens.split(pieces, 1)], 1)
    assert_same(hidden, model(tokens).hidden)
    assert cache.lengths == [12, 12]


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("order", ["block", "stack"])
def test_the_cache_fixes_the_depth(make_model, depth, order):
    model = make_model(depth=2, order=order)
    tokens = random_tokens(1, 8)
    cache = empty_cache(model, 1, 8, depth=depth)
    hidden = torch.cat([model(part, cache=cache).hidden for part in tokens.split(3, 1)], 1)
    assert_same(hidden, model(tokens, depth=depth).hidden)
    assert cache.k.shape[0] == 2 * depth


@pytest.mark.parametrize("options", VARIANTS)
def test_rows_of_unequal_length(make_model, options):
    """Right padding, truncated away; then steps of one and of several tokens, then other lengths again."""
    model = make_model(**options)
    lengths, follow = [2, 7, 4], random_tokens(3, 6, seed=1)
    prompts = random_tokens(3, 7)
    cache = empty_cache(model, 3, 20)
    prefill = model(prompts, cache=cache).hidden
    cache.truncate(lengths)
    one = model(follow[:, :1], cache=cache).hidden
    several = model(follow[:, 1:], cache=cache).hidden
    cache.truncate([3, 12, 5])
    again = model(follow[:, 1:3], cache=cache).hidden
    for row, length in enumerate(lengths):
        text = torch.cat([prompts[row, :length], follow[row]])[None]
        whole = model(text).hidden[0]
        assert_same(prefill[row, :length], whole[:length])
        assert_same(one[row], whole[length : length + 1])
        assert_same(several[row], whole[length + 1 :])
        kept = [3, 12, 5][row]
        rest = model(torch.cat([text[:, :kept], follow[row : row + 1, 1:3]], 1)).hidden[0, kept:]
        assert_same(again[row], rest)


@pytest.mark.parametrize("options", VARIANTS)
def test_a_section_sees_cache_and_tokens_alike(make_model, options):
    """The last part of the text with its section on a cache gives what the whole text with that section gives."""
    model = make_model(**options)
    tokens = random_tokens(2, 10)
    starts = torch.tensor([3, 7, 8, 9, 10])  # in the cache, at its end, inside the new tokens, behind them
    section = MaskSection(starts, 3, torch.full((2, 15), MASK_ID))
    cache = empty_cache(model, 2, 25)
    model(tokens[:, :7], cache=cache)
    output = model(tokens[:, 7:], section=section, cache=cache)
    whole = model(tokens, section=section)
    assert_same(output.hidden, whole.hidden[:, 7:])
    assert_same(output.mask_hidden, whole.mask_hidden)
    assert cache.lengths == [10, 10]  # masks never enter


@pytest.mark.parametrize("routing", ["token", "block", "anchor"])
def test_a_section_on_rows_of_unequal_length(make_model, routing):
    model = make_model(depth=2, draft_routing=routing)
    prompts, new, lengths = random_tokens(2, 6), random_tokens(2, 2, seed=1), [3, 6]
    cache = empty_cache(model, 2, 14)
    model(prompts, cache=cache)
    cache.truncate(lengths)
    starts = torch.tensor([[n + 1, n + 2] for n in lengths])
    output = model(new, section=MaskSection(starts, 3, torch.full((2, 6), MASK_ID)), cache=cache)
    for row, length in enumerate(lengths):
        text = torch.cat([prompts[row, :length], new[row]])[None]
        whole = model(text, section=MaskSection(starts[row], 3, torch.full((1, 6), MASK_ID)))
        assert_same(output.hidden[row], whole.hidden[0, length:])
        assert_same(output.mask_hidden[row], whole.mask_hidden[0])


def test_a_fork_is_independent(make_model):
    model = make_model()
    tokens, first, second = random_tokens(1, 5), random_tokens(3, 2, seed=1), random_tokens(1, 2, seed=2)
    cache = empty_cache(model, 1, 8)
    model(tokens, cache=cache)
    branches, prefix = cache.fork(batch=3, capacity=7), cache.fork(4)
    assert (branches.lengths, branches.capacity, prefix.lengths) == ([5, 5, 5], 7, [4])
    many = model(first, cache=branches).hidden
    cut = model(second, cache=prefix).hidden
    one = model(second, cache=cache).hidden
    for row in range(3):
        whole = model(torch.cat([tokens, first[row : row + 1]], 1)).hidden
        assert_same(many[row], whole[0, 5:])
    assert_same(cut, model(torch.cat([tokens[:, :4], second], 1)).hidden[:, 4:])
    assert_same(one, model(torch.cat([tokens, second], 1)).hidden[:, 5:])


def test_replaced_rows_go_on_with_the_other_text(make_model):
    model = make_model()
    texts, others, follow = random_tokens(3, 6), random_tokens(2, 4, seed=1), random_tokens(3, 1, seed=2)
    cache = empty_cache(model, 3, 8)
    model(texts, cache=cache)
    window = cache.like(2, 4)
    model(others, cache=window)
    cache.replace([2, 0], window)
    assert cache.lengths == [4, 6, 4]
    hidden = model(follow, cache=cache).hidden
    for row, text in enumerate([others[1], texts[1], others[0]]):
        whole = model(torch.cat([text, follow[row]])[None]).hidden
        assert_same(hidden[row], whole[0, -1:])


def test_a_full_cache_says_so(make_model):
    model = make_model()
    cache = empty_cache(model, 1, 4)
    with pytest.raises(ElaraError, match="holds 4 tokens and 5 are needed"):
        model(random_tokens(1, 5), cache=cache)


@pytest.mark.parametrize("lengths", [[3], [3, 5, 1], [5, 4], [-1, 2]])
def test_truncate_refuses_what_is_not_there(make_model, lengths):
    model = make_model()
    cache = empty_cache(model, 2, 4)
    model(random_tokens(2, 4), cache=cache)
    with pytest.raises(ElaraError, match="cannot truncate"):
        cache.truncate(lengths)


def test_fork_refuses_what_is_not_there(make_model):
    model = make_model()
    cache = empty_cache(model, 2, 4)
    model(random_tokens(2, 3), cache=cache)
    cache.truncate([2, 3])
    with pytest.raises(ElaraError, match="cannot fork 3 tokens"):
        cache.fork(3)
    with pytest.raises(ElaraError, match="cannot fork 2 rows into 3"):
        cache.fork(batch=3)
