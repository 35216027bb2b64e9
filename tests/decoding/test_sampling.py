"""The distribution that a config describes, and draws from it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elara.decoding import SamplingConfig
from elara.decoding.sampling import Uniforms, draw, probabilities
from elara.errors import ElaraError

LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=12)


def slow_probabilities(logits, temperature, top_k, top_p, allowed):
    """The definition, token by token."""
    ids = [i for i in range(len(logits)) if allowed[i]]
    ranked = sorted(ids, key=lambda i: (-logits[i], i))
    if temperature == 0:
        return {ranked[0]: 1.0}
    if top_k is not None and top_k < len(logits):
        limit = logits[ranked[min(top_k, len(ranked)) - 1]]
        ranked = [i for i in ranked if logits[i] >= limit]  # equals of the last one stay too
    top = logits[ranked[0]]
    weights = [torch.tensor((logits[i] - top) / temperature, dtype=torch.float64).exp().item() for i in ranked]
    total, kept, mass = sum(weights), [], 0.0
    for i, weight in zip(ranked, weights, strict=True):
        if top_p is not None and top_p < 1 and mass >= top_p:
            break
        kept.append((i, weight))
        mass += weight / total
    total = sum(weight for _, weight in kept)
    return {i: weight / total for i, weight in kept}


@given(
    LOGITS,
    st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    st.one_of(st.none(), st.integers(1, 15)),
    st.one_of(st.none(), st.sampled_from([0.05, 0.5, 0.9, 1.0])),
    st.data(),
)
@settings(max_examples=200, deadline=None)
def test_matches_the_definition(values, temperature, top_k, top_p, data):
    allowed = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)).filter(any))
    logits = torch.tensor(values, dtype=torch.float64)
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    got = probabilities(logits, config, torch.tensor(allowed))
    want = slow_probabilities(logits.tolist(), temperature, top_k, top_p, allowed)
    assert float(got.sum()) == pytest.approx(1.0)
    ties = len(set(values)) < len(values)  # which of two equals is cut off is not defined
    for i, p in enumerate(got.tolist()):
        if not allowed[i]:
            assert p == 0
        elif not ties and abs(p - want.get(i, 0.0)) > 1e-9:
            # a sum that rounds to the other side of top_p may move the border by one token
            assert top_p is not None
            assert sum(sorted(want.values())) == pytest.approx(1.0)
            borders = torch.tensor(sorted(slow_probabilities(values, temperature, top_k, None, allowed).values()))
            assert (borders.flip(0).cumsum(0) - top_p).abs().min() < 1e-6


@given(
    st.lists(st.sampled_from([0.0, 1e-30, 1e-7, 0.1, 1.0, 3.0]), min_size=1, max_size=9).filter(any),
    st.one_of(st.just(0.0), st.just(1 - 2**-24), st.floats(0, 1 - 2**-24)),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=300, deadline=None)
def test_draw_inverts_the_distribution_and_never_takes_the_impossible(weights, uniform, dtype):
    probs = torch.tensor(weights, dtype=dtype)
    token = int(draw(probs, torch.tensor(uniform)))
    assert probs[token] > 0
    before, after = float(probs[:token].sum()), float(probs[: token + 1].sum())
    target = uniform * float(probs.sum())
    assert before <= target * (1 + 1e-6) + 1e-12
    assert target <= after * (1 + 1e-6)


def test_draws_have_the_right_frequencies():
    probs = torch.tensor([0.5, 0.0, 0.3, 0.2])
    uniform = Uniforms(0, 1, torch.device("cpu")).draw(100_000)
    counts = torch.bincount(draw(probs.expand(1, 100_000, 4), uniform)[0], minlength=4) / 100_000
    torch.testing.assert_close(counts, probs, rtol=0, atol=0.006)


def test_every_row_has_its_own_stream():
    device = torch.device("cpu")
    three, one = Uniforms(5, 3, device), Uniforms(6, 1, device)
    assert torch.equal(torch.cat([three.draw(2), three.draw(3)], 1)[1], torch.cat([one.draw(2), one.draw(3)], 1)[0])


@pytest.mark.parametrize("temperature", [5e-324, 1e-39, 1e-30, 1e-6, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_temperatures_are_finite(temperature, dtype):
    probs = probabilities(torch.tensor([3.0, -80.0, 2.0], dtype=dtype), SamplingConfig(temperature=temperature))
    assert probs.isfinite().all()
    assert probs.dtype == torch.float32
    assert float(probs.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("mode", {"mode": "guess"}),
        ("max_new_tokens", {"max_new_tokens": 0}),
        ("temperature", {"temperature": -0.5}),
        ("temperature", {"temperature": float("nan")}),
        ("temperature", {"temperature": float("inf")}),
        ("top_k", {"top_k": 0}),
        ("top_p", {"top_p": 0.0}),
        ("top_p", {"top_p": 1.2}),
        ("draft_length", {"draft_length": 0}),
        ("draft_length", {"draft_length": -4}),
        ("groups", {"groups": 0}),
        ("trust", {"trust": -0.1}),
        ("trust", {"trust": 1.5}),
        ("trust", {"trust": float("nan")}),
        ("steps", {"steps": 0}),
        ("confidence", {"confidence": 0.0}),
        ("order", {"order": "random"}),
        ("overflow", {"overflow": "ignore"}),
        ("seed", {"seed": 2**64}),
    ],
)
def test_a_bad_value_is_refused_by_name(key, options):
    with pytest.raises(ElaraError, match=f"^{key}=") as error:
        SamplingConfig(**options)
    assert "\n" not in str(error.value)


def test_top_k_above_the_vocabulary_keeps_everything():
    logits = torch.randn(7)
    wide = probabilities(logits, SamplingConfig(top_k=100))
    assert torch.equal(wide, probabilities(logits, SamplingConfig()))
