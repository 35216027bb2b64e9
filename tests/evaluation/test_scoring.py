"""Log-probabilities in batches equal those of one forward per token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elara.evaluation.scoring import Request, rolling_windows, score


@given(st.integers(0, 60), st.integers(1, 12), st.data())
def test_windows_score_every_token_once_and_never_read_more_than_the_context(length, context, data):
    stride = data.draw(st.integers(1, context))
    ids = list(range(100, 100 + length))
    windows = list(rolling_windows(ids, 7, context, stride))
    assert [target for window in windows for target in window.targets] == ids
    whole, end = [7, *ids], 0
    for window in windows:
        end += len(window.targets)
        assert len(window.inputs) <= context
        assert list(window.inputs) == whole[end - len(window.inputs) : end], "the tokens right before the last target"
    assert all(len(window.inputs) == context for window in windows[1:])


@given(st.integers(0, 60), st.integers(1, 12), st.data())
def test_windows_are_those_of_lm_eval(length, context, data):
    utils = pytest.importorskip("lm_eval.utils")
    stride = data.draw(st.integers(1, context))
    theirs = utils.get_rolling_token_windows(list(range(length)), 99, context, context - stride + 1)
    ours = rolling_windows(range(length), 99, context, stride)
    assert [(list(w.inputs), list(w.targets)) for w in ours] == [tuple(map(list, pair)) for pair in theirs]


def requests(loaded):
    """Of all lengths, some with equal inputs, one without targets."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(60, (n,), generator=generator).tolist() for n in (1, 2, 5, 9, 24, 24, 13, 9)]
    found = [Request(tuple(row), (*row[1:][-5:], 3)) for row in rows]
    return [*found, *(Request(tuple(rows[3]), (target,)) for target in (1, 2, 4)), Request((1, 2), ())]


@pytest.mark.parametrize("batch_tokens", [1, 30, 4096])
def test_scores_equal_one_forward_per_token(loaded, naive, batch_tokens):
    wanted = requests(loaded)
    for request, scored in zip(wanted, score(loaded.model, wanted, batch_tokens=batch_tokens), strict=True):
        count = len(request.targets)
        assert scored.log_probs.shape == scored.best.shape == (count,)
        for i, target in enumerate(request.targets):
            read = list(request.inputs[: len(request.inputs) - count + 1 + i])
            (expected,), greedy = naive(loaded.model, read, [target])
            assert float(scored.log_probs[i]) == pytest.approx(expected, abs=1e-9)
            assert (int(scored.best[i]) == target) == greedy


def test_equal_inputs_share_one_forward(loaded):
    rows = []
    handle = loaded.model.embed.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].numel()))
    try:
        score(loaded.model, [Request((1, 2, 3), (target,)) for target in range(20)])
    finally:
        handle.remove()
    assert rows == [3]


def test_a_large_vocabulary_is_scored_in_parts(make_loaded, naive):
    large = make_loaded(n_embd=8, n_head=1, hidden=8, block=0)
    large.model.embed = torch.nn.Embedding(5000, 8, dtype=torch.float64)
    large.model.config.model.vocab_size = 5000
    row = tuple(range(20))
    many = [Request((*row[:12], i), (*row[1:12], i, 4999)) for i in range(40)]  # 520 rows of logits: three parts
    scored = score(large.model, many)
    for i in (0, 19, 39):
        expected, _ = naive(large.model, list(many[i].inputs), [4999])
        assert float(scored[i].log_probs[-1]) == pytest.approx(expected[0], abs=1e-9)


def test_progress_counts_requests(loaded):
    done: list[int] = []
    score(loaded.model, requests(loaded), batch_tokens=30, advance=done.append)
    assert sum(done) == len(requests(loaded))
    assert len(done) > 1
