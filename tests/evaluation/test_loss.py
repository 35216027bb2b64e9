"""Bits per byte are what the formula says, for every tokenizer."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from elara.errors import ElaraError
from elara.evaluation.agreement import compare_scores
from elara.evaluation.loss import cut_windows, difference, measure_loss, ratio
from elara.evaluation.scoring import Scored
from elara.evaluation.text import HeldOutText


def measured(loaded, text, stride=None):
    windows = cut_windows(text, loaded.tokenizer, loaded.config.model.context_length, stride, "model")
    return measure_loss(loaded.model, windows)[0]


@pytest.mark.parametrize("which", ["loaded", "byte_loaded"])
def test_loss_equals_one_forward_per_token(which, text, naive, request):
    model = request.getfixturevalue(which)
    context, nats, tokens = model.config.model.context_length, 0.0, 0
    for passage in text.passages:
        ids = model.tokenizer.encode(passage)
        tokens += len(ids)
        before = [model.tokenizer.end_id, *ids]
        for start in range(0, len(ids), context):
            end = min(start + context, len(ids))
            first = start if end - start == context else max(0, end - context)  # the last window is a full one
            for place in range(start, end):
                nats -= naive(model.model, before[first : place + 1], [ids[place]])[0][0]
    found = measured(model, text)
    size = len("".join(text.passages).encode())
    assert (found.tokens, found.bytes, found.characters) == (tokens, size, len("".join(text.passages)))
    assert found.loss == pytest.approx(nats / tokens, abs=1e-9)
    assert found.perplexity == pytest.approx(math.exp(nats / tokens))
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size)
    assert sum(found.nats) == pytest.approx(nats)


def test_bytes_are_utf8_bytes(byte_loaded):
    found = measured(byte_loaded, HeldOutText("umlauts", ["zwölf Öfen", "grün"], 1))
    assert (found.tokens, found.bytes, found.characters) == (17, 17, 14)
    assert found.bits_per_char == pytest.approx(found.bits_per_byte * 17 / 14)


def test_a_shorter_stride_gives_every_token_more_context(loaded, text):
    disjoint, sliding = (measured(loaded, text, stride) for stride in (None, 3))
    assert disjoint.tokens == sliding.tokens
    assert disjoint.loss != sliding.loss
    with pytest.raises(ElaraError, match=r"eval\.stride=25 must be at most the context of model, 24"):
        measured(loaded, text, 25)


def test_characters_that_a_tokenizer_lacks_are_named(loaded):
    with pytest.raises(ElaraError, match=r"model knows 63 characters, and the letters has 2 others \('1' 'é'\)"):
        measured(loaded, HeldOutText("letters", ["abc", "é1 é"], 1))


def test_the_standard_error_is_that_of_repeated_samples():
    draw = random.Random(0)

    def sample():
        counts = [draw.randint(50, 150) for _ in range(30)]
        return [count * (1.5 + draw.gauss(0, 0.3)) for count in counts], counts

    means, errors = zip(*(ratio(*sample()) for _ in range(400)), strict=True)
    assert statistics.mean(errors) == pytest.approx(statistics.stdev(means), rel=0.1)
    assert math.isnan(ratio([3.0], [2])[1])


def test_differences_are_paired_by_passage(loaded, make_loaded, text):
    one, other = measured(loaded, text), measured(make_loaded(seed=3), text)
    mean, _ = difference(one, other)
    assert mean == pytest.approx(one.bits_per_byte - other.bits_per_byte)
    assert difference(one, one) == (0.0, 0.0)
    with pytest.raises(ElaraError, match="different text"):
        difference(one, measured(loaded, HeldOutText("less", text.passages[:2], 1)))


def test_agreement_compares_the_same_tokens(loaded, text):
    windows = cut_windows(text, loaded.tokenizer, 24, None, "model")
    _, scored = measure_loss(loaded.model, windows)
    same = compare_scores("bfloat16", windows, scored, scored)
    assert (same.difference, same.difference_error, same.same_best) == (0, 0, 1)
    worse = [Scored(one.log_probs - 0.25, one.best + (one.best == scored[0].best[0])) for one in scored]
    found = compare_scores("int4", windows, scored, worse)
    hits = sum(int((one.best == scored[0].best[0]).sum()) for one in scored)
    assert found.difference == pytest.approx(0.25)
    assert found.difference_error == pytest.approx(0, abs=1e-9)
    assert found.same_best == pytest.approx(1 - hits / found.tokens)
