"""`trust`: TiDAR that accepts more than what is exact, by a rule that the text shows."""

from __future__ import annotations

import pytest
import torch

from elara.decoding import SamplingConfig
from elara.errors import ElaraError

MASK_ID = 10
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 1, 2, 3]]


def lossy(trust, count=60, **options):
    return SamplingConfig(mode="tidar", max_new_tokens=count, trust=trust, **{"temperature": 0.0, **options})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_trust_0_is_exact(make_model, write, temperature):
    model = make_model(2)
    exact = SamplingConfig(mode="tidar", max_new_tokens=40, temperature=temperature)
    texts, _ = write(model, PROMPTS, exact, mask_id=MASK_ID)
    assert write(model, PROMPTS, lossy(0.0, 40, temperature=temperature), mask_id=MASK_ID)[0] == texts
    if temperature == 0:
        assert write(model, PROMPTS, exact, mode="ar")[0] == texts


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("chain", [False, True])
def test_trust_1_accepts_every_draft(make_model, write, temperature, chain):
    model = make_model(chain=chain)
    config = lossy(1.0, 21, temperature=temperature)
    texts, steps = write(model, [[1, 2]], config, mask_id=MASK_ID)
    assert [step.accepted for step in steps] == [[0], *[[3]] * 5]
    assert [len(step.tokens[0]) for step in steps] == [1, 4, 4, 4, 4, 4]
    assert len(texts[0]) == 21


@pytest.mark.parametrize("trust", [0.3, 0.6, 0.9])
def test_every_token_is_as_likely_as_promised(make_model, write, trust):
    """Greedy: each token has at least (1 - trust) of the best token's AR probability, and not all are the best."""
    model = make_model(2, context_length=80)
    texts, _ = write(model, PROMPTS, lossy(trust), mask_id=MASK_ID)
    shares = []
    for prompt, text in zip(PROMPTS, texts, strict=True):
        with torch.no_grad():
            probs = model.ar_head(model(torch.tensor([prompt + text])).hidden[0]).softmax(-1)[len(prompt) - 1 : -1]
        shares += (probs.gather(1, torch.tensor(text)[:, None])[:, 0] / probs.amax(1)).tolist()
    assert min(shares) >= 1 - trust - 1e-9
    assert min(shares) < 1


def test_more_trust_more_tokens_per_forward(make_model, write):
    model = make_model(2)
    counts = []
    for trust in (0.0, 0.3, 0.6, 0.9, 1.0):
        _, steps = write(model, [[i] for i in range(10)], lossy(trust, 80), mask_id=MASK_ID)
        counts.append(sum(bool(tokens) for step in steps for tokens in step.tokens))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[2] > counts[4] == 10 * (1 + 20)


def test_only_allowed_tokens_are_trusted(make_model, write):
    allowed = torch.zeros(11, dtype=torch.bool)
    allowed[[1, 4, 6]] = True
    texts, _ = write(make_model(), PROMPTS, lossy(1.0, temperature=1.0), mask_id=MASK_ID, allowed=allowed)
    assert {token for text in texts for token in text} == {1, 4, 6}


@pytest.mark.parametrize("trust", [-0.1, 1.1, float("nan")])
def test_trust_outside_0_and_1_is_refused(trust):
    with pytest.raises(ElaraError, match=r"trust=.* must be between 0"):
        lossy(trust)
